"""A cluster that changes while it serves: processes that come again, drains, scaling, rebalancing. Streams notice nothing."""
import json
import os
import signal
import subprocess
import threading
import urllib.request

import openai
import pytest

from conftest import NANO, WAIT_S, wait_for

CHAT = {"thinking": {"type": "disabled"}}
COUNT = [{"role": "user", "content": "Count from 1 to 100."}]


def client_of(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


def answer(cluster, messages=COUNT):
    reply = client_of(cluster).chat.completions.create(model="nano", messages=messages, temperature=0, extra_body=CHAT)
    return reply.choices[0].message.content


def pids(cluster):
    """name -> pid of what `baleen up` runs now."""
    with open(os.path.join(cluster.run, "cluster.json")) as file:
        return {process["name"]: process["pid"] for process in json.load(file)["processes"]}


def is_ready(cluster):
    try:
        with urllib.request.urlopen(cluster.http + "/ready", timeout=WAIT_S) as reply:
            return reply.status == 200
    except OSError:
        return False


def status_of(cluster):
    """None while the coordinator is away."""
    out = subprocess.run([os.path.join(cluster.bin_dir, "baleen"), "status", "--coordinator", cluster.coordinator, "--json"],
                         capture_output=True, text=True, timeout=WAIT_S)
    return json.loads(out.stdout) if out.returncode == 0 else None


def serving(cluster, role):
    """Ids of the members of a role that are ready in the epoch in force; empty while something changes."""
    status = status_of(cluster)
    if status is None or "change" in status:
        return []
    return [m["id"] for m in status["members"]
            if m["role"] == role and m["state"] == "ready" and m["epoch"] == status["epoch"]]


PROMPTS = ("Count from 1 to 100.", "Count from 1 to 60.", "What is the capital of France?", "Count from 20 to 90.")


class Load:
    """Streams that never stop coming: each thread asks its prompt again and again, and every answer must be the one of rest."""

    def __init__(self, cluster, n_threads=8):
        self.cluster = cluster
        self.expected = {prompt: answer(cluster, [{"role": "user", "content": prompt}]) for prompt in PROMPTS}
        self.over = threading.Event()
        self.failures, self.n_answers, self.n_tokens = [], 0, 0
        self.threads = [threading.Thread(target=self.ask, args=(PROMPTS[i % len(PROMPTS)],)) for i in range(n_threads)]

    def ask(self, prompt):
        client = client_of(self.cluster)
        while not self.over.is_set():
            text = ""
            try:
                for chunk in client.chat.completions.create(model="nano", messages=[{"role": "user", "content": prompt}],
                                                            temperature=0, stream=True, extra_body=CHAT):
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    self.n_tokens += 1
            except Exception as error:  # any: the point is that there is none
                self.failures.append(f"{prompt!r} after {len(text)} characters: {error!r}")
                return
            if text != self.expected[prompt]:
                self.failures.append(f"{prompt!r}: {text!r} in place of {self.expected[prompt]!r}")
                return
            self.n_answers += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.goes_on()
        return self

    def goes_on(self):
        """Tokens come, and a whole answer after this moment too."""
        tokens, answers = self.n_tokens, self.n_answers
        wait_for("answers", lambda: self.failures or (self.n_tokens > tokens + 50 and self.n_answers > answers))
        assert not self.failures, self.failures[0] + "\n" + self.cluster.said()

    def __exit__(self, kind, value, trace):
        self.over.set()
        for thread in self.threads:
            thread.join()
        if kind is None:
            assert not self.failures, self.failures[0] + "\n" + self.cluster.said()


def operate(cluster, *words):
    return subprocess.run([os.path.join(cluster.bin_dir, "baleen"), *words, "--run", cluster.run], capture_output=True, text=True,
                          timeout=WAIT_S)


# ---- processes that come again


def test_what_is_killed_comes_again(start_cluster):
    """kill -9 of each kind of process: up starts it again at its old address, and the cluster is the same one."""
    cluster = start_cluster("--workers", "2")
    whole = answer(cluster)
    first = cluster.status()["cluster"]
    for name in ("worker-1", "router-0", "gateway", "coordinator"):
        before = pids(cluster)
        os.kill(before[name], signal.SIGKILL)
        wait_for(f"another {name}", lambda: pids(cluster).get(name, before[name]) != before[name])
        wait_for("everybody to be ready", lambda: [len(serving(cluster, role)) for role in ("worker", "router", "gateway")] == [2, 1, 1])
        wait_for("the gateway to be ready", lambda: is_ready(cluster))
        assert answer(cluster) == whole, cluster.said()
        assert cluster.status()["cluster"] == first
        assert {n: p for n, p in pids(cluster).items() if n != name} == {n: p for n, p in before.items() if n != name}
    said = open(os.path.join(cluster.run, "up.err")).read()
    assert said.count("was killed by signal 9") == 4 and said.count("is started again as process") == 4


def test_a_failing_process_is_started_more_and_more_rarely(start_cluster):
    cluster = start_cluster("--workers", "1")

    def pauses():
        return [line.split("again in ")[1] for line in open(os.path.join(cluster.run, "up.err")).read().splitlines() if "again in " in line]

    for n in range(4):
        pid = wait_for("the worker", lambda: pids(cluster).get("worker-0"))
        os.kill(pid, signal.SIGKILL)
        wait_for("up to notice", lambda: len(pauses()) == n + 1 and pids(cluster).get("worker-0") != pid)
    assert pauses() == ["0.2 s", "0.4 s", "0.8 s", "1.6 s"]
    assert cluster.stop() == 0, cluster.said()


def test_no_restart_leaves_it_dead(start_cluster):
    cluster = start_cluster("--workers", "2", "--no-restart")
    whole = answer(cluster)
    os.kill(pids(cluster)["worker-1"], signal.SIGKILL)
    wait_for("the epoch without it", lambda: len(serving(cluster, "worker")) == 1)
    assert answer(cluster) == whole
    assert "worker-1" not in pids(cluster)
    os.kill(pids(cluster)["router-0"], signal.SIGKILL)  # the last of its kind: nothing can be served
    assert cluster.up.wait(timeout=WAIT_S) == 1
    assert "no router is left" in cluster.said()


# ---- drains


def test_drain_under_load(start_cluster):
    """A worker and a router go while streams run on both routers: nobody notices, and up does not start them again."""
    cluster = start_cluster("--workers", "3", "--routers", "2", "--drain-ms", "10m")  # a busy machine is no reason to cut a stream
    with Load(cluster) as load:
        for role, left in (("worker", 2), ("router", 1)):
            out = operate(cluster, "drain", str(serving(cluster, role)[0]))
            assert out.returncode == 0 and "has left" in out.stdout, out.stderr + cluster.said()
            wait_for("its epoch", lambda: len(serving(cluster, role)) == left)
            load.goes_on()
    wait_for("their processes to end", lambda: len(pids(cluster)) == 5)
    assert "again" not in open(os.path.join(cluster.run, "up.err")).read()
    wait_for("the ledger to be zero", cluster.ledger_is_zero)


def test_drain_of_a_gateway(start_cluster, bin_dir):
    """Its stream ends as it would have, new requests are refused there, then its process ends in order."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_FAILPOINTS": "router_step_slow:10000"})
    ask = {"model": "nano", "messages": COUNT, "temperature": 0, "max_tokens": 80, "extra_body": CHAT}
    whole = client_of(cluster).chat.completions.create(**ask).choices[0].message.content
    ready, child = os.pipe()
    second = subprocess.Popen([os.path.join(bin_dir, "baleen-gateway"), "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO,
                               "--ready-fd", str(child)], pass_fds=[child], stderr=open(os.path.join(cluster.run, "second.log"), "w"))
    http = json.loads(os.read(ready, 4096))["http"]
    os.close(ready)
    os.close(child)

    def both():
        ids = serving(cluster, "gateway")
        return ids if len(ids) == 2 else None

    gateway = max(wait_for("the second gateway", both))  # ids are given in order
    client = openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0)
    wait_for("it to be ready", lambda: subprocess.run(["curl", "-sf", f"http://{http}/ready"], capture_output=True).returncode == 0)
    stream = client.chat.completions.create(**ask, stream=True)
    text = next(stream).choices[0].delta.content or ""
    drain = subprocess.Popen([os.path.join(bin_dir, "baleen"), "drain", str(gateway), "--run", cluster.run], stdout=subprocess.PIPE,
                             text=True)
    wait_for("it to be leaving", lambda: [m for m in cluster.status()["members"] if m["id"] == gateway and m["state"] == "leaving"])
    with pytest.raises(openai.APIError):
        client.chat.completions.create(**ask)
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole
    assert "has left" in drain.communicate(timeout=WAIT_S)[0]
    assert second.wait(timeout=WAIT_S) == 0
    assert client_of(cluster).chat.completions.create(**ask).choices[0].message.content == whole


def test_drains_that_cannot_be(start_cluster):
    cluster = start_cluster("--workers", "1")
    epoch = cluster.status()["epoch"]
    for words, code, said in ((["99"], 1, "no member 99"), (["x"], 2, "no member id"), ([], 2, "which member"),
                              ([str(serving(cluster, "worker")[0])], 1, "only one of its role")):
        out = operate(cluster, "drain", *words)
        assert out.returncode == code and said in out.stderr
    assert cluster.status()["epoch"] == epoch


# ---- scaling


def test_scale_under_load(start_cluster):
    """2, 3, 5, 4, 1 workers while streams run: all of them finish, and no token changes."""
    cluster = start_cluster("--workers", "2")
    with Load(cluster) as load:
        for n in (3, 5, 4, 1):
            out = operate(cluster, "scale", str(n))
            assert out.returncode == 0 and f"{n} of {n} workers serve" in out.stderr, out.stderr + cluster.said()
            assert len(serving(cluster, "worker")) == n
            load.goes_on()
    wait_for("the others to end", lambda: [name for name in pids(cluster) if name.startswith("worker")] == ["worker-0"])
    assert "again" not in open(os.path.join(cluster.run, "up.err")).read()
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    assert cluster.stop() == 0, cluster.said()


def test_scale_outlives_the_coordinator(start_cluster):
    """The coordinator dies when the order is out: the one started again finds the workers, and they serve."""
    cluster = start_cluster("--workers", "2")
    with Load(cluster, 4) as load:
        scale = subprocess.Popen([os.path.join(cluster.bin_dir, "baleen"), "scale", "4", "--run", cluster.run], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
        wait_for("the order", lambda: "worker-3 is started" in open(os.path.join(cluster.run, "up.err")).read())
        first = scale.stderr.readline()  # it says how far they are: its own call has been answered
        assert "workers serve" in first, first
        os.kill(pids(cluster)["coordinator"], signal.SIGKILL)
        said = scale.communicate(timeout=WAIT_S)[1]
        assert scale.returncode == 0, said + cluster.said()
        assert len(serving(cluster, "worker")) == 4
        load.goes_on()
        out = operate(cluster, "scale", "2")  # up has found the new coordinator
        assert out.returncode == 0, out.stderr


def test_scales_that_cannot_be(start_cluster, bin_dir, tmp_path):
    cluster = start_cluster("--workers", "2", env={"BALEEN_EXPERT_BYTES_MAX": "3m"})  # each holds some 60 of the 96 experts
    epoch = cluster.status()["epoch"]
    for words, code, said in ((["0"], 1, "give 1 to"), (["many"], 2, "no number of workers"), ([], 2, "how many"),
                              (["1"], 1, "keep more workers")):
        out = operate(cluster, "scale", *words)
        assert out.returncode == code and said in out.stderr, out.stderr
    assert cluster.status()["epoch"] == epoch
    # processes started by unit files: nobody here can start another
    ready, child = os.pipe()
    with subprocess.Popen([os.path.join(bin_dir, "baleen-coordinator"), "--ready-fd", str(child)], pass_fds=[child]) as coordinator:
        address = json.loads(os.read(ready, 4096))["address"]
        out = subprocess.run([os.path.join(bin_dir, "baleen"), "scale", "3", "--coordinator", address], capture_output=True, text=True)
        coordinator.terminate()
    os.close(ready)
    os.close(child)
    assert out.returncode == 1 and "not started by baleen up" in out.stderr and "baleen-worker" in out.stderr


# ---- rebalancing


def test_rebalance_under_load(start_cluster):
    """Experts move and get copies while streams run: no token changes, the imbalance is less."""
    cluster = start_cluster("--workers", "3")
    assert "no load" in operate(cluster, "rebalance").stdout
    with Load(cluster) as load:
        before = wait_for("the load to be told", lambda: cluster.status().get("imbalance"))
        epoch = cluster.status()["epoch"]
        for _ in range(10):
            out = operate(cluster, "rebalance", "--moves", "4")
            assert out.returncode == 0, out.stderr + cluster.said()
            load.goes_on()
            if "nothing moves" in out.stdout:
                break
        assert cluster.status()["epoch"] > epoch
        assert cluster.status()["imbalance"] < before
        table = operate(cluster, "status", "--experts", "--json")
        owners = json.loads(table.stdout)["placement"]["owners"]
        assert len(owners) == 96 and all(owners)
        for victim in ("worker-0", "worker-2"):  # what has copies lives on in them, what has none is taken over
            os.kill(pids(cluster)[victim], signal.SIGKILL)
            wait_for("up to notice", lambda: open(os.path.join(cluster.run, "up.err")).read().count(f"{victim} is started again as"))
            wait_for("three to serve", lambda: len(serving(cluster, "worker")) == 3)
            load.goes_on()


def test_rebalance_that_fails_changes_nothing(start_cluster):
    """No worker can load a moved expert: the round is given up, everybody serves on with what he has."""
    cluster = start_cluster("--workers", "2", env={"BALEEN_FAILPOINTS": "worker_load_again_fails:10000"})
    with Load(cluster, 4) as load:
        wait_for("the load to be told", lambda: cluster.status().get("imbalance"))
        epoch, members = cluster.status()["epoch"], serving(cluster, "worker")
        out = operate(cluster, "rebalance")
        assert out.returncode == 1 and "by a failpoint" in out.stderr, out.stdout + out.stderr
        load.goes_on()
        assert cluster.status()["epoch"] == epoch and serving(cluster, "worker") == members


def test_rounds_by_themselves(start_cluster):
    cluster = start_cluster("--workers", "3", env={"BALEEN_REBALANCE_MS": "300"})
    with Load(cluster) as load:
        log = os.path.join(cluster.run, "coordinator.log")
        wait_for("a round", lambda: " experts and gives up " in open(log).read())
        load.goes_on()


# ---- warm spares


def warm(cluster):
    return sum(cluster.metrics().get("baleen_experts_warm", {}).values())


def test_heirs_are_warm(start_cluster):
    """Every expert has one heir, who has read it before its worker dies; then heirs are found anew."""
    cluster = start_cluster("--workers", "3", "--no-restart")
    whole = answer(cluster)
    wait_for("all 96 to be warm", lambda: warm(cluster) == 96)
    os.kill(pids(cluster)["worker-1"], signal.SIGKILL)
    wait_for("the epoch without it", lambda: len(serving(cluster, "worker")) == 2)
    assert answer(cluster) == whole
    wait_for("all to be warm again", lambda: warm(cluster) == 96)
    os.kill(pids(cluster)["worker-0"], signal.SIGKILL)
    wait_for("the epoch without it", lambda: len(serving(cluster, "worker")) == 1)
    assert answer(cluster) == whole
    wait_for("nobody to be an heir", lambda: warm(cluster) == 0)


def test_no_more_is_warm_than_memory_allows(start_cluster):
    cluster = start_cluster("--workers", "3", env={"BALEEN_EXPERT_BYTES_MAX": "2872320"})  # 55 experts: 32, and 23 more
    wait_for("what fits to be warm", lambda: warm(cluster) == 3 * 55 - 96)
