"""Membership with real processes: who is there, who is refused, what a death and a drain look like from outside."""
import json
import os
import shutil
import signal
import subprocess
import threading

import openai
import pytest

from conftest import NANO, ROOT, WAIT_S, wait_for

COUNT = [{"role": "user", "content": "Count from 1 to 100."}]
CHAT = {"thinking": {"type": "disabled"}}


def client_of(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


def answer(cluster, messages=COUNT):
    reply = client_of(cluster).chat.completions.create(model="nano", messages=messages, temperature=0, extra_body=CHAT)
    return reply.choices[0].message.content


def test_status(cluster):
    status = cluster.status()
    members = status["members"]
    roles = sorted(member["role"] for member in members)
    assert roles == ["coordinator", "gateway", "router", "worker", "worker", "worker"]
    assert status["epoch"] > 0
    assert {member["pid"] for member in members} == {process["pid"] for process in cluster.info["processes"]}
    assert all(member["epoch"] == status["epoch"] and member["state"] == "ready" for member in members)


def test_drain_exits_zero(start_cluster):
    cluster = start_cluster("--workers", "2")
    pids = [process["pid"] for process in cluster.info["processes"]]
    assert cluster.stop() == 0, cluster.said()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not os.path.exists(os.path.join(cluster.run, "cluster.json"))


@pytest.mark.conformance(59)
def test_a_running_answer_survives_the_drain(start_cluster):
    cluster = start_cluster("--workers", "2")
    whole = answer(cluster)
    stream = client_of(cluster).chat.completions.create(model="nano", messages=COUNT, temperature=0, stream=True, extra_body=CHAT)
    text = next(stream).choices[0].delta.content or ""
    cluster.terminate()
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole
    assert cluster.stop() == 0, cluster.said()


@pytest.mark.conformance(60)
@pytest.mark.parametrize("net", ["ucx", "shm"])
def test_worker_dies_in_the_middle(start_cluster, net):
    """kill -9 of a worker while an answer streams: the others take its experts over and no token changes."""
    cluster = start_cluster("--workers", "3", "--no-restart", "--net", net)
    whole = answer(cluster)
    stream = client_of(cluster).chat.completions.create(model="nano", messages=COUNT, temperature=0, stream=True, extra_body=CHAT)
    text = ""
    for i, chunk in enumerate(stream):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if i == 20:
            os.kill(cluster.processes("worker")[1]["pid"], signal.SIGKILL)
    assert text == whole, cluster.said()
    members = cluster.status()["members"]
    assert sum(member["role"] == "worker" for member in members) == 2
    assert answer(cluster) == whole


def test_a_worker_joins(start_cluster, bin_dir):
    cluster = start_cluster("--workers", "1")
    whole = answer(cluster)
    epoch = cluster.status()["epoch"]
    with open(os.path.join(cluster.run, "late-worker.log"), "w") as log:
        late = subprocess.Popen([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO], stderr=log)
        wait_for("an epoch with both workers", lambda: sum(
            m["role"] == "worker" and m["state"] == "ready" and m["epoch"] > epoch for m in cluster.status()["members"]) == 2)
        assert answer(cluster) == whole
        late.send_signal(signal.SIGTERM)
        assert late.wait(timeout=WAIT_S) == 0
    assert answer(cluster) == whole


def test_a_worker_that_cannot_load_changes_nothing(start_cluster, bin_dir):
    """Its prepare fails: the epoch is aborted, the old one serves on."""
    cluster = start_cluster("--workers", "2")
    whole = answer(cluster)
    epoch = cluster.status()["epoch"]
    log_path = os.path.join(cluster.run, "late-worker.log")
    with open(log_path, "w") as log:
        late = subprocess.Popen([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO,
                                 "--failpoints", "worker_load_fails:10000"], stderr=log)
        wait_for("the load to fail", lambda: "load failed by a failpoint" in open(log_path).read())
        assert answer(cluster) == whole
        late.kill()
        late.wait()
    wait_for("the worker to be forgotten", lambda: sum(m["role"] == "worker" for m in cluster.status()["members"]) == 2)
    assert cluster.status()["epoch"] >= epoch
    assert answer(cluster) == whole


def test_late_answers_change_nothing(start_cluster):
    """Workers hold back every fifth answer: slower, the same tokens."""
    cluster = start_cluster("--workers", "2")
    whole = answer(cluster)
    late = start_cluster("--workers", "2", env={"BALEEN_FAILPOINTS": "worker_combine_late:2000"})
    assert answer(late) == whole


@pytest.mark.parametrize("net, other", [("ucx", "shm"), ("shm", "ucx")])
def test_other_transport_is_refused(start_cluster, bin_dir, net, other):
    """What rows could not reach never becomes a member."""
    cluster = start_cluster("--workers", "1", "--net", net)
    epoch = cluster.status()["epoch"]
    out = subprocess.run([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--net", other, "--model", NANO],
                         capture_output=True, text=True, timeout=WAIT_S)
    assert out.returncode == 1 and f"--net {other} there, the cluster's is {net}" in out.stderr
    assert cluster.status()["epoch"] == epoch


def test_wrong_checkpoint_is_refused(start_cluster, bin_dir, tmp_path):
    cluster = start_cluster("--workers", "1")
    other = os.path.join(ROOT, "tests", "golden", "data", "model", "tiny-pro", "ckpt")
    out = subprocess.run([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--model", other],
                         capture_output=True, text=True, timeout=WAIT_S)
    assert out.returncode == 1 and "refused" in out.stderr
    # the same shapes, other weights
    copy = tmp_path / "nano"
    shutil.copytree(NANO, copy)
    with open(copy / "model-00007-of-00008.safetensors", "r+b") as shard:
        shard.seek(-4096, os.SEEK_END)
        data = bytearray(shard.read(4096))
        shard.seek(-4096, os.SEEK_END)
        shard.write(bytes(byte ^ 1 for byte in data))
    out = subprocess.run([os.path.join(bin_dir, "baleen-worker"), "--coordinator", cluster.coordinator, "--model", str(copy)],
                         capture_output=True, text=True, timeout=WAIT_S)
    assert out.returncode == 1 and "fingerprint" in out.stderr
    assert "Paris" in answer(cluster, [{"role": "user", "content": "What is the capital of France?"}])


def test_second_coordinator_on_the_port(cluster, bin_dir):
    out = subprocess.run([os.path.join(bin_dir, "baleen-coordinator"), "--address", cluster.coordinator], capture_output=True,
                         text=True, timeout=WAIT_S)
    assert out.returncode == 1
    assert cluster.coordinator in out.stderr and "taken" in out.stderr


def test_second_up_in_the_same_folder(cluster, bin_dir):
    out = subprocess.run([os.path.join(bin_dir, "baleen"), "up", "--run", cluster.run, "--model", NANO], capture_output=True,
                         text=True, timeout=WAIT_S)
    assert out.returncode != 0 and cluster.run in out.stderr


def test_queue_full_is_429(start_cluster):
    """Two slots, and room for two more that wait: the fifth is told to come back."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_SEQUENCES_MAX": "2", "BALEEN_STREAMS_MAX": "4",
                                                   "BALEEN_FAILPOINTS": "router_step_slow:10000"})  # none ends meanwhile
    client = client_of(cluster)
    over = threading.Event()

    def hold():
        with client.chat.completions.create(model="nano", messages=COUNT, stream=True, temperature=0,
                                            extra_body={"ignore_eos": True, **CHAT}) as stream:
            for _ in stream:
                if over.is_set():
                    return

    holders = [threading.Thread(target=hold) for _ in range(4)]
    for holder in holders:
        holder.start()
    try:
        wait_for("four streams", lambda: sum(cluster.metrics()["baleen_streams"].values()) == 4)
        with pytest.raises(openai.RateLimitError) as refused:
            answer(cluster)
        assert refused.value.response.headers.get("retry-after")
    finally:
        over.set()
        for holder in holders:
            holder.join()
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    assert answer(cluster)
