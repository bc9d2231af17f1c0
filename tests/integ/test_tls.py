"""A cluster whose control channel is secured: it serves, and lets nobody else in."""
import json
import os
import signal
import subprocess

import openai
import pytest

from conftest import NANO, WAIT_S, wait_for

ASK = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"thinking": {"type": "disabled"}}


def run(bin_dir, program, *args):
    return subprocess.run([os.path.join(bin_dir, program), *args], capture_output=True, text=True, timeout=WAIT_S)


def files_of(folder, role):
    return ["--tls-ca", f"{folder}/ca.crt", "--tls-cert", f"{folder}/{role}.crt", "--tls-key", f"{folder}/{role}.key"]


def workers_of(bin_dir, *which):
    """Ids of the workers in the operator's table."""
    status = run(bin_dir, "baleen", "status", *which)
    assert status.returncode == 0, status.stderr
    return [int(line.split()[1]) for line in status.stdout.splitlines() if line.startswith("worker ")]


@pytest.fixture(scope="module")
def certs(bin_dir, tmp_path_factory):
    """Two authorities: ours and somebody else's."""
    folder = tmp_path_factory.mktemp("certs")
    for name in ("ours", "theirs"):
        made = run(bin_dir, "baleen", "certs", str(folder / name))
        assert made.returncode == 0, made.stderr
    return folder


def test_certs_are_not_written_over(bin_dir, certs):
    files = {path.name: path.read_bytes() for path in (certs / "ours").iterdir()}
    assert len(files) == 12 and all(path.stat().st_mode & 0o777 == 0o600 for path in (certs / "ours").iterdir())
    again = run(bin_dir, "baleen", "certs", str(certs / "ours"))
    assert again.returncode == 1 and "not written over" in again.stderr
    assert {path.name: path.read_bytes() for path in (certs / "ours").iterdir()} == files


def test_renewed_certs_fit_the_old(bin_dir, tmp_path):
    folder = tmp_path / "certs"
    run(bin_dir, "baleen", "certs", str(folder))
    before = (folder / "worker.crt").read_bytes(), (folder / "ca.crt").read_bytes()
    renewed = run(bin_dir, "baleen", "certs", "--renew", str(folder))
    assert renewed.returncode == 0, renewed.stderr
    assert (folder / "worker.crt").read_bytes() != before[0] and (folder / "ca.crt").read_bytes() == before[1]
    verified = subprocess.run(["openssl", "verify", "-CAfile", folder / "ca.crt", folder / "worker.crt"], capture_output=True)
    assert verified.returncode == 0


@pytest.mark.parametrize("program, option", [("baleen-coordinator", "--address"), ("baleen-worker", "--coordinator"),
                                             ("baleen-router", "--coordinator"), ("baleen-gateway", "--coordinator"),
                                             ("baleen", "--coordinator")])
def test_plain_is_for_loopback(bin_dir, program, option):
    """Beyond it a process does not even begin, unless it is told to."""
    verb = ["status"] if program == "baleen" else []
    model = ["--model", NANO] if program in ("baleen-worker", "baleen-router", "baleen-gateway") else []
    refused = run(bin_dir, program, *verb, option, "192.0.2.1:7000", *model)
    assert refused.returncode != 0
    assert "baleen certs" in refused.stderr and "--control-security plain" in refused.stderr


def test_secured_cluster(bin_dir, certs, start_cluster):
    ours = str(certs / "ours")
    cluster = start_cluster("--workers", "2", "--tls", ours)
    client = openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(model="nano", messages=ASK, temperature=0, extra_body=CHAT)
    assert "Paris" in reply.choices[0].message.content
    for role in ("coordinator", "router-0", "worker-1", "gateway"):
        with open(os.path.join(cluster.run, role + ".log")) as log:
            assert "control channel: mutual TLS as " + role.split("-")[0] in log.read()

    # the operator's certificate opens the admin service, found by itself with the run folder
    assert len(workers_of(bin_dir, "--run", cluster.run)) == 2
    assert len(workers_of(bin_dir, "--coordinator", cluster.coordinator, *files_of(ours, "admin"))) == 2

    # others do not: no TLS, another authority
    plain = run(bin_dir, "baleen", "status", "--coordinator", cluster.coordinator)
    assert plain.returncode == 1 and "--tls-ca" in plain.stderr
    foreign = run(bin_dir, "baleen", "status", "--coordinator", cluster.coordinator, *files_of(certs / "theirs", "admin"))
    assert foreign.returncode == 1 and "authority that is not ours" in foreign.stderr

    # nor members
    for words, options in (("give --tls-ca", []), ("authority that is not ours", files_of(certs / "theirs", "worker"))):
        log_path = os.path.join(cluster.run, "stranger.log")
        with open(log_path, "w") as log:
            stranger = subprocess.Popen([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO,
                                         *options], stderr=log)
            try:
                wait_for("the stranger to say why", lambda: words in open(log_path).read())
            finally:
                stranger.kill()
                stranger.wait()
    assert len(workers_of(bin_dir, "--run", cluster.run)) == 2

    # one of ours may come
    with open(os.path.join(cluster.run, "late.log"), "w") as log:
        late = subprocess.Popen([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO,
                                 *files_of(ours, "worker")], stderr=log)
        try:
            wait_for("the third worker", lambda: len(workers_of(bin_dir, "--run", cluster.run)) == 3)
            again = client.chat.completions.create(model="nano", messages=ASK, temperature=0, extra_body=CHAT)
            assert again.choices[0].message.content == reply.choices[0].message.content
        finally:
            late.terminate()
            assert late.wait(timeout=WAIT_S) == 0
    assert not any(cluster.metrics()["baleen_net_refused_total"].values())
    assert cluster.stop() == 0, cluster.said()


def test_a_secured_cluster_changes(bin_dir, certs, start_cluster):
    """Processes that are started again, ordered or asked for have their certificates; orders are for the admin."""
    ours = str(certs / "ours")
    cluster = start_cluster("--workers", "2", "--tls", ours)
    client = openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)

    def ask():
        reply = client.chat.completions.create(model="nano", messages=ASK, temperature=0, extra_body=CHAT)
        return reply.choices[0].message.content

    first = ask()
    with open(os.path.join(cluster.run, "cluster.json")) as file:
        processes = {process["name"]: process["pid"] for process in json.load(file)["processes"]}
    os.kill(processes["coordinator"], signal.SIGKILL)
    wait_for("the coordinator to be back", lambda: run(bin_dir, "baleen", "status", "--run", cluster.run).returncode == 0)
    assert ask() == first
    wait_for("up to have found it, and three workers", lambda: run(bin_dir, "baleen", "scale", "--run", cluster.run, "3").returncode == 0)
    workers = workers_of(bin_dir, "--run", cluster.run)
    assert len(workers) == 3 and ask() == first
    denied = run(bin_dir, "baleen", "drain", "--coordinator", cluster.coordinator, *files_of(ours, "worker"), str(workers[0]))
    assert denied.returncode != 0 and "of role" in denied.stderr
    drained = run(bin_dir, "baleen", "drain", "--coordinator", cluster.coordinator, *files_of(ours, "admin"), str(workers[0]))
    assert drained.returncode == 0, drained.stderr
    wait_for("it to be gone", lambda: len(workers_of(bin_dir, "--run", cluster.run)) == 2)
    assert ask() == first
    assert not any(cluster.metrics()["baleen_net_refused_total"].values())
    assert cluster.stop() == 0, cluster.said()
