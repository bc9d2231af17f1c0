"""Coordinators that die under running streams: one restarted on its file, one of two on etcd. Nobody misses a token."""
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import openai
import pytest

from conftest import NANO, WAIT_S, wait_for

COUNT = [{"role": "user", "content": "Count from 1 to 100."}]
CHAT = {"thinking": {"type": "disabled"}}
STREAMS = 6
TOKENS = 250


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Servers started one by one, as on several machines."""

    def __init__(self, bin_dir, run):
        self.bin_dir, self.run, self.all = bin_dir, str(run), {}
        self.client = None

    def log(self, name):
        return os.path.join(self.run, name + ".log")

    def start(self, name, program, *args):
        """Its ready line, as soon as it has said it."""
        reader, writer = os.pipe()
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen([os.path.join(self.bin_dir, "baleen-" + program), "--ready-fd", str(writer), *args],
                                       pass_fds=[writer], stderr=log)
        os.close(writer)
        self.all[name] = process
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        assert line, f"{name} did not get ready:\n{self.said()}"
        return json.loads(line)

    def start_cluster(self, coordinators, workers=3):
        """Router steps are slow and give one token each, so that answers last longer than what is done to the coordinators."""
        self.coordinators = coordinators
        member = ["--coordinator", coordinators, "--model", NANO]
        for i in range(workers):
            self.start(f"worker-{i}", "worker", *member)
        self.start("router", "router", *member, "--failpoints", "router_step_slow:10000", "--drafts-max", "0")
        ready = self.start("gateway", "gateway", *member)
        self.client = openai.OpenAI(base_url=f"http://{ready['http']}/v1", api_key="none", max_retries=0)
        wait_for("all to be ready", lambda: self.workers_ready() == workers and self.state_of("gateway") and self.state_of("router"))
        wait_for("an answer", self.answers)

    def answers(self):
        try:
            return self.client.chat.completions.create(model="nano", messages=COUNT, max_tokens=1, extra_body=CHAT)
        except openai.APIStatusError:
            return None

    def status(self):
        """None while no coordinator is active."""
        out = subprocess.run([os.path.join(self.bin_dir, "baleen"), "status", "--coordinator", self.coordinators, "--json"],
                             capture_output=True, text=True, timeout=WAIT_S)
        return json.loads(out.stdout) if out.returncode == 0 else None

    def members(self, role):
        status = self.status()
        return [m for m in status["members"] if m["role"] == role] if status else []

    def state_of(self, role):
        return [m["state"] for m in self.members(role)] == ["ready"]

    def workers_ready(self):
        return sum(m["state"] == "ready" for m in self.members("worker"))

    def ids(self):
        status = self.status()
        return {m["pid"]: m["id"] for m in status["members"] if m["role"] != "coordinator"} if status else {}

    def said(self):
        text = []
        for name in sorted(os.listdir(self.run)):
            if name.endswith(".log"):
                with open(os.path.join(self.run, name), errors="replace") as file:
                    text.append(f"--- {name}\n{file.read()[-3000:]}")
        return "\n".join(text)

    def end(self):
        for process in self.all.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


class Stream(threading.Thread):
    """One answer as it comes: its pieces and when they came."""

    def __init__(self, client):
        super().__init__()
        self.client, self.pieces, self.times, self.error = client, [], [], None
        self.start()

    def run(self):
        try:
            for chunk in self.client.chat.completions.create(model="nano", messages=COUNT, temperature=0, stream=True,
                                                             max_tokens=TOKENS, extra_body={"ignore_eos": True, **CHAT}):
                if chunk.choices and chunk.choices[0].delta.content:
                    self.pieces.append(chunk.choices[0].delta.content)
                    self.times.append(time.monotonic())
        except Exception as error:  # the test's thread tells
            self.error = error

    def text(self):
        self.join(WAIT_S)
        assert not self.is_alive() and self.error is None, self.error
        return "".join(self.pieces)

    def longest_pause(self):
        return max(b - a for a, b in zip(self.times, self.times[1:]))


def all_go_on(streams):
    """Each gets pieces that were not there when this was asked."""
    before = [len(stream.pieces) for stream in streams]
    wait_for("all streams to go on", lambda: all(len(s.pieces) > n or not s.is_alive() for s, n in zip(streams, before)))


@pytest.fixture
def processes(bin_dir, tmp_path):
    started = Processes(bin_dir, tmp_path)
    yield started
    started.end()


@pytest.fixture
def etcd(tmp_path):
    """host:port of one that runs."""
    if shutil.which("etcd") is None:
        pytest.fail("no etcd here: install the package etcd-server")
    for attempt in range(5):  # somebody may take the ports before it does
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        log_path = tmp_path / f"etcd-{attempt}.log"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(["etcd", "--name", "t", "--data-dir", str(tmp_path / f"etcd-{attempt}"), "--listen-client-urls", client,
                                        "--advertise-client-urls", client, "--listen-peer-urls", peer,
                                        "--initial-advertise-peer-urls", peer, "--initial-cluster", f"t={peer}"], stdout=log, stderr=log)
        wait_for("etcd", lambda: process.poll() is not None or b"ready to serve client requests" in log_path.read_bytes())
        if process.poll() is None:
            break
    yield client.removeprefix("http://")
    process.kill()
    process.wait()


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "T"


def test_killed_and_restarted_on_its_file(processes, tmp_path):
    args = ["--store", str(tmp_path / "store"), "--workers-min", "3"]
    address = processes.start("coordinator", "coordinator", *args)["address"]
    processes.start_cluster(address)
    whole = Stream(processes.client).text()
    before, epoch = processes.ids(), processes.status()["epoch"]

    streams = [Stream(processes.client) for _ in range(STREAMS)]
    all_go_on(streams)
    processes.all["coordinator"].kill()
    processes.all["coordinator"].wait()
    all_go_on(streams)  # without any
    ready = processes.start("coordinator", "coordinator", *args, "--address", address)
    assert ready["role"] == "active"
    wait_for("all members to be back", lambda: processes.ids() == before and processes.workers_ready() == 3)
    assert processes.status()["epoch"] == epoch
    assert any(stream.is_alive() for stream in streams), "the answers were too short to see anything"
    for stream in streams:
        assert stream.text() == whole, processes.said()
    print(f"longest pause of {STREAMS} streams: {max(s.longest_pause() for s in streams) * 1e3:.0f} ms")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_active_one_of_two_goes_while_a_worker_joins(processes, etcd, how):
    """Killed, or silent for so long that another one took over, and then awake again with what it wanted to do."""
    store = ["--store", f"etcd://{etcd}/baleen/test", "--claim-ms", "2000", "--workers-min", "3"]
    first = processes.start("coordinator-a", "coordinator", *store)
    second = processes.start("coordinator-b", "coordinator", *store)
    assert (first["role"], second["role"]) == ("active", "standby")
    processes.start_cluster(f"{first['address']},{second['address']}")
    whole = Stream(processes.client).text()
    before, epoch = processes.ids(), processes.status()["epoch"]

    streams = [Stream(processes.client) for _ in range(STREAMS)]
    all_go_on(streams)
    processes.start("worker-late", "worker", "--coordinator", processes.coordinators, "--model", NANO,
                    "--failpoints", "worker_load_stops:10000")
    late = processes.all["worker-late"].pid
    wait_for("it to be asked to prepare", lambda: is_stopped(late))
    processes.all["coordinator-a"].send_signal(how)
    all_go_on(streams)  # without any
    processes.coordinators = second["address"]  # a silent one would hold up every question

    def joined():
        os.kill(late, signal.SIGCONT)  # it stops before each expert
        return processes.workers_ready() == 4
    wait_for("the worker to join by the other coordinator", joined)
    assert any(stream.is_alive() for stream in streams), "the answers were too short to see anything"
    status, after = processes.status(), processes.ids()
    assert [m["pid"] for m in status["members"] if m["role"] == "coordinator"] == [processes.all["coordinator-b"].pid]
    assert {pid: after.get(pid) for pid in before} == before
    assert status["epoch"] > epoch
    wait_for("all to have the epoch", lambda: len({m["epoch"] for m in processes.status()["members"]}) == 1)
    for stream in streams:
        assert stream.text() == whole, processes.said()
    print(f"{how.name}: longest pause of {STREAMS} streams: {max(s.longest_pause() for s in streams) * 1e3:.0f} ms")
    assert Stream(processes.client).text() == whole  # on the new epoch

    # It comes back as the standby, and an orderly end hands over to it at once.
    if how == signal.SIGKILL:
        back = processes.start("coordinator-c", "coordinator", *store, "--address", first["address"])
        assert back["role"] == "standby"
    else:
        processes.all["coordinator-a"].send_signal(signal.SIGCONT)
        wait_for("it to notice", lambda: "is the standby coordinator" in open(processes.log("coordinator-a")).read())
    assert {m["epoch"] for m in processes.status()["members"]} == {status["epoch"]}
    processes.coordinators = first["address"]
    wait_for("the standby to send us on", lambda: processes.ids() == after)
    processes.all["coordinator-b"].terminate()
    assert processes.all["coordinator-b"].wait(timeout=WAIT_S) == 0
    wait_for("the other to have all members", lambda: processes.ids() == after and processes.workers_ready() == 4)
