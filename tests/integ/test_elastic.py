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
