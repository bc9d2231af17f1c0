"""What an operator installs: the Debian packages hold what a cluster needs, and their units and samples start one."""
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import urllib.request

import pytest

from conftest import NANO, WAIT_S, wait_for

ROLES = ("coordinator", "worker", "router", "gateway")


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def root(bin_dir, tmp_path_factory):
    """The packages' files, unpacked to a folder of their own."""
    made, root = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("root")
    run("cpack", "--config", os.path.join(os.path.dirname(bin_dir), "CPackConfig.cmake"), "-B", made)
    for package in made.glob("*.deb"):
        run("dpkg-deb", "-x", package, root)
    return root


def unit_of(root, role):
    return root / "usr/lib/systemd/system" / f"baleen-{role}{'@' if role == 'worker' else ''}.service"


def command_of(root, role):
    """What the unit starts, node 0 of a worker's."""
    line = re.search(r"^ExecStart=(.*)$", unit_of(root, role).read_text(), re.MULTILINE)
    program, *words = shlex.split(line[1].replace("%i", "0"))
    return [str(root / "usr/bin" / program), *words]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_units(root):
    """systemd takes each line of them; that the programs are not installed on this machine is all it may say."""
    names = [str(unit_of(root, role)).replace("@", "@0") for role in ROLES]
    said = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=WAIT_S)
    lines = [line for line in said.stderr.splitlines() if "is not executable: No such file" not in line]
    assert lines == [], lines


def test_models_come_along(root, tmp_path):
    """Found beside the programs, wherever one stands."""
    done = subprocess.run([root / "usr/bin/baleen", "bench", "step.overlap", "--rounds", "1"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=WAIT_S)
    assert done.returncode == 0 and '"two_faster"' in done.stdout, done.stdout + done.stderr
    assert (root / "usr/share/baleen/models/bench-s/config.json").is_file()


@pytest.fixture
def etc(root, tmp_path):
    """The samples with this machine's addresses, certificates and a tenant's key."""
    etc = tmp_path / "etc"
    run(root / "usr/bin/baleen", "certs", etc, "--hosts", "127.0.0.1")
    for end in ("crt", "key"):  # of the pairs there are, the one for a server
        shutil.copy(etc / f"coordinator.{end}", etc / f"host.{end}")
    changes = ((r"/etc/baleen", etc), (r"/var/lib/baleen", tmp_path / "store"), (r"/srv/models/v4", NANO), (r"10\.0\.0\.\d+:\d+", "127.0.0.1:0"),
               (r"threads = 32", "threads = 1"), (r"kv_bytes = 64g", "kv_bytes = 64m"))
    for role in ROLES:
        text = (root / "usr/share/doc/baleen/etc" / f"{role}.conf").read_text()
        for old, new in changes:
            text = re.sub(old, str(new), text)
        (etc / f"{role}.conf").write_text(text)
    return etc


@pytest.fixture
def processes():
    running = []
    yield running
    for process in running:
        process.kill()
        process.wait()


def start(running, command, etc, log):
    """Its ready line."""
    reader, writer = os.pipe()
    command = [word.replace("/etc/baleen", str(etc)) for word in command]
    with open(log, "ab") as to:
        running.append(subprocess.Popen([*command, "--ready-fd", str(writer)], pass_fds=[writer], stderr=to))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        line = pipe.readline()
    assert line, log.read_text()
    return json.loads(line)


def test_a_cluster_of_units(root, etc, tmp_path, processes):
    """Two workers as the samples want, TLS within and without, an answer for the key; SIGTERM ends each with 0."""
    ready = start(processes, command_of(root, "coordinator"), etc, tmp_path / "coordinator.log")
    for role in ("worker", "router", "gateway"):
        conf = etc / f"{role}.conf"
        conf.write_text(re.sub(r"^coordinator = .*$", f"coordinator = {ready['address']}", conf.read_text(), flags=re.MULTILINE))
    key = run(root / "usr/bin/baleen", "keys", etc / "keys.json", "acme").split()[0]
    for i, role in enumerate(("worker", "worker", "router", "gateway")):
        gateway = start(processes, command_of(root, role), etc, tmp_path / f"{role}-{i}.log")

    body = {"model": "nano", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "thinking": {"type": "disabled"}}
    request = urllib.request.Request(f"https://{gateway['http']}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", "Authorization": "Bearer " + key})
    trust = ssl.create_default_context(cafile=etc / "ca.crt")

    def answer():
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S, context=trust) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            assert error.code == 503, error.read()
            return None

    assert "Paris" in wait_for("an answer", answer)
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
