"""Real processes on loopback: a cluster started by `baleen up`, on ports chosen by the system, in a folder of its own."""
import json
import os
import signal
import subprocess
import time
import urllib.request

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NANO = os.path.join(ROOT, "models", "nano")
NET = {"BALEEN_NET": os.environ["TEST_NET"]} if "TEST_NET" in os.environ else {}  # transport of the clusters, if not up's own
WAIT_S = 120  # bound of every wait for a state; generous because sanitizer builds run the same tests


def pytest_addoption(parser):
    parser.addoption("--bin", default=os.path.join(ROOT, "build", "release", "bin"), help="folder of the binaries under test")


def pytest_configure(config):
    config.addinivalue_line("markers", "conformance(*items): covers these items of the conformance list (docs/conformance.md)")


@pytest.fixture(scope="session")
def bin_dir(request):
    return request.config.getoption("--bin")


def wait_for(what, probe, seconds=WAIT_S):
    """Polls probe until it gives something true; returns that."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


class Cluster:
    """A running `baleen up`."""

    def __init__(self, bin_dir, run, *args, env=None):
        self.bin_dir = bin_dir
        self.run = str(run)
        self.terminated = False
        self.errors = open(os.path.join(self.run, "up.err"), "w")
        self.up = subprocess.Popen([os.path.join(bin_dir, "baleen"), "up", "--run", self.run, *args], stdout=subprocess.PIPE,
                                   stderr=self.errors, text=True, env={**os.environ, **NET, **(env or {})})
        self.line = self.up.stdout.readline()
        if not self.line:
            raise AssertionError("baleen up did not get ready:\n" + self.said())
        with open(os.path.join(self.run, "cluster.json")) as file:
            self.info = json.load(file)
        self.http = "http://" + self.info["http"]
        self.grpc = self.info["grpc"]
        self.coordinator = self.info["coordinator"]
        self.net = self.info["net"]

    def said(self):
        """Everything that up and its children wrote, for failure messages."""
        text = []
        for name in sorted(os.listdir(self.run)):
            if name.endswith((".log", ".err")):
                with open(os.path.join(self.run, name)) as file:
                    text.append(f"--- {name}\n{file.read()[-4000:]}")
        return "\n".join(text)

    def processes(self, role):
        return [process for process in self.info["processes"] if process["role"] == role]

    def status(self):
        out = subprocess.run([os.path.join(self.bin_dir, "baleen"), "status", "--coordinator", self.coordinator, "--json"],
                             capture_output=True, text=True, timeout=WAIT_S)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    def metrics(self):
        """name -> {member -> value}, histograms left out."""
        values = {}
        with urllib.request.urlopen(self.http + "/metrics", timeout=WAIT_S) as reply:
            for line in reply.read().decode().splitlines():
                if line and not line.startswith("#") and "le=" not in line:
                    name, rest = line.split("{", 1)
                    labels, value = rest.rsplit("} ", 1)
                    values.setdefault(name, {})[labels.split('"')[1]] = float(value)
        return values

    LEDGER = ("baleen_streams", "baleen_sequences", "baleen_kv_pages_used", "baleen_sequence_slots_used", "baleen_frames_in_flight")

    def ledger_is_zero(self):
        metrics = self.metrics()  # members' values come with their first heartbeat
        return all(name in metrics and not any(metrics[name].values()) for name in self.LEDGER)

    def cancelled(self):
        """Sequences that routers ended because they were told to. A sequence that merely finished is none."""
        return sum(self.metrics().get("baleen_sequences_cancelled_total", {}).values())

    def wait_until_freed(self, cancelled_before):
        """A sequence more was cancelled, and nothing is held any more. (Members tell their counters with the heartbeat.)"""
        wait_for("the cancel to reach the router", lambda: self.cancelled() > cancelled_before)
        wait_for("the ledger to be zero", self.ledger_is_zero)

    def terminate(self):
        """Begins the drain, once: a second signal would end it at once."""
        if not self.terminated and self.up.poll() is None:
            self.terminated = True
            self.up.send_signal(signal.SIGTERM)

    def stop(self):
        """The exit code after the drain."""
        self.terminate()
        code = self.up.wait(timeout=WAIT_S)
        self.up.stdout.close()
        self.errors.close()
        return code


@pytest.fixture(scope="session")
def cluster(bin_dir, tmp_path_factory):
    """One cluster for all tests that leave it as they found it."""
    running = Cluster(bin_dir, tmp_path_factory.mktemp("cluster"), "--workers", "3", "--model", NANO)
    yield running
    assert running.stop() == 0, running.said()


@pytest.fixture(scope="session")
def scripted(bin_dir, tmp_path_factory):
    """One cluster without a model: every answer is the text of the last user or tool message, control spellings recognised."""
    running = Cluster(bin_dir, tmp_path_factory.mktemp("scripted"), "--model", NANO, "--scripted-model", "scripted")
    yield running
    assert running.stop() == 0, running.said()


@pytest.fixture
def start_cluster(bin_dir, tmp_path):
    """For tests that harm theirs: start_cluster("--workers", "2", ...)."""
    started = []

    def start(*args, env=None):
        run = tmp_path / f"run{len(started)}"
        run.mkdir()
        started.append(Cluster(bin_dir, run, "--model", NANO, *args, env=env))
        return started[-1]

    yield start
    for running in started:
        running.stop()
