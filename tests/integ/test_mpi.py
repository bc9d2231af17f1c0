"""A cluster from one mpirun line: addresses and links over MPI, the same tokens as over UCX, and the end of all when one dies."""
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request

import pytest

from conftest import NANO, WAIT_S, wait_for

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here: install openmpi-bin")
PROMPTS = ("What is the capital of France?", "Count from 1 to 60.")


class World:
    def __init__(self, bin_dir, folder):
        def program(name, *options):
            return [os.path.join(bin_dir, f"baleen-{name}"), *options]

        member = ("--coordinator", "mpi", "--net", "mpi", "--model", NANO)
        line = ["mpirun", "--oversubscribe", "--mca", "odls_base_sigkill_timeout", "5",
                "-n", "1", *program("coordinator", "--mpi", "--workers-min", "2"), ":", "-n", "2", *program("worker", *member), ":",
                "-n", "2", *program("router", *member), ":", "-n", "1", *program("gateway", *member)]
        self.log = os.path.join(folder, "mpirun.log")
        environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        with open(self.log, "w") as out:  # a file: what mpirun leaves behind may keep a pipe open
            self.mpirun = subprocess.Popen(line, stdout=out, stderr=out, env=environment, start_new_session=True)
        wait_for("the cluster", lambda: "ready: a token came out" in self.said())
        self.http = "http://" + re.search(r"http (127\.0\.0\.1:\d+)", self.said())[1]

    def said(self):
        with open(self.log) as file:
            text = file.read()
        assert self.mpirun.poll() is None or "ready: a token" in text, text
        return text

    def pids(self, role):
        return [int(pid) for pid in re.findall(rf"joins: {role} on \S+ pid (\d+)", self.said())]

    def end(self):
        if self.mpirun.poll() is None:
            os.killpg(self.mpirun.pid, signal.SIGTERM)
            try:
                self.mpirun.wait(timeout=WAIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.mpirun.pid, signal.SIGKILL)
        for role in ("worker", "router", "gateway"):
            for pid in self.pids(role):
                if os.path.exists(f"/proc/{pid}"):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def world(bin_dir, tmp_path):
    if not os.path.exists(os.path.join(bin_dir, "baleen-mpi.so")):
        pytest.skip("built without Open MPI: install libopenmpi-dev")
    running = World(bin_dir, tmp_path)
    yield running
    running.end()


def answer(http, prompt):
    body = {"model": "nano", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "thinking": {"type": "disabled"}}
    request = urllib.request.Request(http + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def test_same_tokens_as_over_ucx(world, cluster):
    for prompt in PROMPTS:
        assert answer(world.http, prompt) == answer(cluster.http, prompt)
    assert "it is fixed; nobody can join" in world.said()  # its limits are said at the start


def test_one_death_ends_all(world):
    os.kill(world.pids("worker")[0], signal.SIGKILL)
    assert world.mpirun.wait(timeout=WAIT_S) != 0
    wait_for("all to be gone", lambda: not any(os.path.exists(f"/proc/{pid}") for role in ("worker", "router", "gateway")
                                               for pid in world.pids(role)))


def test_alone_is_refused(bin_dir):
    if not os.path.exists(os.path.join(bin_dir, "baleen-mpi.so")):
        pytest.skip("built without Open MPI: install libopenmpi-dev")
    out = subprocess.run([os.path.join(bin_dir, "baleen-worker"), "--coordinator", "mpi", "--net", "mpi", "--model", NANO],
                         capture_output=True, text=True, timeout=WAIT_S)
    assert out.returncode != 0 and "start all of the cluster in one mpirun line" in out.stderr, out.stderr
