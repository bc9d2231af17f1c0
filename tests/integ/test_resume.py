"""Streams that outlive the processes they run in: routers and gateways killed in the middle of answers."""
import http.client
import json
import os
import re
import signal
import subprocess
import threading

import grpc
import openai
import pytest

from conftest import NANO, WAIT_S, Cluster, wait_for
from test_grpc import pb  # noqa: F401: a fixture

CHAT = {"thinking": {"type": "disabled"}}
SLOW = {"BALEEN_FAILPOINTS": "router_step_slow:10000"}  # 20 ms a step: time to act in the middle of an answer
PROMPTS = ["Count from 1 to 100.", "Tell me a story.", "What is the capital of France?", "Count from 1 to 50."]


def client_of(address):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


def fields_of(i):
    """Eight different requests: greedy and sampled, all long."""
    fields = {"messages": [{"role": "user", "content": PROMPTS[i % 4]}], "model": "nano", "max_tokens": 120,
              "extra_body": {**CHAT, "ignore_eos": True}}
    return {**fields, "temperature": 0} if i < 4 else {**fields, "temperature": 1, "top_p": 0.9, "seed": i}


class Streams:
    """Many streams at once, each read on a thread of its own."""

    def __init__(self, address, n):
        self.texts = [""] * n
        self.errors = []
        self.n_chunks = [0] * n
        self.threads = [threading.Thread(target=self.read, args=(address, i)) for i in range(n)]
        for thread in self.threads:
            thread.start()

    def read(self, address, i):
        try:
            for chunk in client_of(address).chat.completions.create(stream=True, **fields_of(i)):
                if chunk.choices:
                    self.texts[i] += chunk.choices[0].delta.content or ""
                    self.n_chunks[i] += 1
        except openai.OpenAIError as error:
            self.errors.append((i, error))

    def wait_running(self, chunks=10):
        wait_for("all streams to be in the middle", lambda: self.errors or min(self.n_chunks) >= chunks)
        assert not self.errors

    def join(self):
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert self.errors == []
        return self.texts


def undisturbed(address, n):
    return Streams(address, n).join()


def reopened(cluster):
    return sum(cluster.metrics().get("baleen_streams_reopened_total", {}).values())


class Process:
    """One of our programs by hand: its ready line read, its log beside the others'."""

    def __init__(self, cluster, role, name, *args, env=None):
        reader, writer = os.pipe()
        with open(os.path.join(cluster.run, name + ".log"), "a") as log:
            self.child = subprocess.Popen([os.path.join(cluster.bin_dir, "baleen-" + role), "--ready-fd", str(writer), *args],
                                          stderr=log, pass_fds=[writer], env={**os.environ, **(env or {})})
        os.close(writer)
        with os.fdopen(reader) as file:
            self.info = json.loads(file.readline() or "{}")
        assert self.info, cluster.said()

    def kill(self):
        self.child.kill()
        self.child.wait()


def member(cluster, role, name, *args, env=None):
    return Process(cluster, role, name, "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO, *args, env=env)


class Gateway(Process):
    def __init__(self, cluster, name, http="127.0.0.1:0", env=None):
        super().__init__(cluster, "gateway", name, "--coordinator", cluster.coordinator, "--net", cluster.net, "--model", NANO, "--http", http,
                         env=env)
        self.http, self.grpc = self.info["http"], self.info["grpc"]
        wait_for("the gateway to be ready", self.ready)

    def ready(self):
        connection = http.client.HTTPConnection(self.http, timeout=WAIT_S)
        connection.request("GET", "/ready")
        status = connection.getresponse().status
        connection.close()
        return status == 200


class ByHand(Cluster):
    """A cluster whose processes nobody starts again, or stops because one is gone."""

    def __init__(self, bin_dir, run, env):
        self.bin_dir, self.run, self.env = bin_dir, str(run), env
        self.children = [Process(self, "coordinator", "coordinator", "--workers-min", "1", "--address", "127.0.0.1:0", "--store",
                                 os.path.join(self.run, "store"), env=env)]
        self.net = "ucx"  # what a process takes that is not told
        self.coordinator = self.children[0].info["address"]
        for role in ("worker", "router"):
            self.children.append(member(self, role, role, env=env))
        self.router = self.children[-1]
        self.gateway = Gateway(self, "gateway", env=env)
        self.children.append(self.gateway)
        self.http = "http://" + self.gateway.http

    def start_router(self):
        self.router = member(self, "router", "router-again", env=self.env)
        self.children.append(self.router)

    def stop(self):
        for child in reversed(self.children):
            child.kill()


@pytest.fixture
def by_hand(bin_dir, tmp_path):
    started = []

    def begin(env):
        started.append(ByHand(bin_dir, tmp_path, env))
        return started[-1]

    yield begin
    for cluster in started:
        cluster.stop()


def count(cluster, role, ready=True):
    return sum(m["role"] == role and (not ready or m["state"] == "ready") for m in cluster.status()["members"])


# ---- routers


def test_router_dies_under_eight_streams(start_cluster):
    """kill -9 of one of two routers: its streams go on at the other, and no token is another than without."""
    cluster = start_cluster("--workers", "2", "--routers", "2", env=SLOW)
    whole = undisturbed(cluster.info["http"], 8)
    streams = Streams(cluster.info["http"], 8)
    streams.wait_running()
    os.kill(cluster.processes("router")[0]["pid"], signal.SIGKILL)
    assert streams.join() == whole, cluster.said()
    assert reopened(cluster) >= 1
    wait_for("the ledger to be zero", cluster.ledger_is_zero)


def test_the_only_router_is_started_again(by_hand):
    """Streams wait for a router until one is there."""
    cluster = by_hand(SLOW)
    whole = undisturbed(cluster.gateway.http, 8)
    streams = Streams(cluster.gateway.http, 8)
    streams.wait_running()
    cluster.router.kill()
    wait_for("its streams to be without a router", lambda: not cluster.gateway.ready())
    cluster.start_router()
    assert streams.join() == whole, cluster.said()
    assert reopened(cluster) >= 8


def test_no_router_comes_back(by_hand):
    """A clear end after reopen_ms: an error in the stream, nothing pretends that the answer is whole."""
    cluster = by_hand({**SLOW, "BALEEN_REOPEN_MS": "1000"})
    stream = client_of(cluster.gateway.http).chat.completions.create(stream=True, **fields_of(0))
    next(stream)
    cluster.router.kill()
    with pytest.raises(openai.APIError, match="no router could go on"):
        list(stream)
    wait_for("the ledger to be zero", lambda: not any(cluster.metrics()["baleen_streams"].values()))


def test_a_router_leaves_under_eight_streams(start_cluster):
    cluster = start_cluster("--workers", "2", "--routers", "2", env=SLOW)
    whole = undisturbed(cluster.info["http"], 8)
    streams = Streams(cluster.info["http"], 8)
    streams.wait_running()
    os.kill(cluster.processes("router")[0]["pid"], signal.SIGTERM)
    wait_for("an epoch without it", lambda: count(cluster, "router") == 1)
    assert streams.join() == whole, cluster.said()


# ---- gateways


class Sse:
    """One streamed chat, its events as they came: bytes, ids, data."""

    def __init__(self, address, body=None, path="/v1/chat/completions", last_id=None):
        self.events = []
        self.connection = http.client.HTTPConnection(address, timeout=WAIT_S)
        headers = {"Content-Type": "application/json", **({"Last-Event-ID": last_id} if last_id else {})}
        self.connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body is not None else None, headers)
        self.reply = self.connection.getresponse()

    def read(self, n=None):
        """Up to n more events, or all; what a broken connection cuts off is not an event."""
        event = b""
        try:
            while n is None or len(self.events) < n:
                line = self.reply.readline()
                if not line:
                    break
                if line.startswith(b":"):
                    continue
                event += line
                if line == b"\n":
                    if event.strip():
                        self.events.append(event)
                    event = b""
        except (http.client.HTTPException, OSError):
            pass
        return self

    @property
    def last_id(self):
        return re.findall(rb"^id: (.*)$", self.events[-1], re.M)[-1].decode()

    def close(self):
        self.connection.close()


def body_of(i, **more):
    fields = fields_of(i)
    return {**{k: v for k, v in fields.items() if k != "extra_body"}, **fields["extra_body"], "stream": True, **more}


@pytest.mark.parametrize("request_no, how", [(0, "other"), (5, "other"), (6, "restarted")])
def test_gateway_dies(start_cluster, request_no, how):
    """kill -9 of a gateway: at another, or the one started again, the same bytes follow."""
    cluster = start_cluster("--workers", "2", "--routers", "2", env=SLOW)
    gateway = Gateway(cluster, "gateway-by-hand")
    first = Sse(gateway.http, body_of(request_no, stream_options={"include_usage": True})).read(12)
    assert len(first.events) == 12
    gateway.kill()
    first.read()
    address = cluster.info["http"]
    if how == "restarted":
        gateway = Gateway(cluster, "gateway-again", gateway.http)
        address = gateway.http
    rest = Sse(address, {}, last_id=first.last_id).read()
    assert rest.reply.status == 200
    stream_id = first.last_id.rsplit(":", 1)[0]
    again = Sse(address, path=f"/v1/streams/{stream_id}").read()  # from the start, while it is kept
    assert b"".join(first.events + rest.events) == b"".join(again.events), cluster.said()
    assert again.events[-1].endswith(b"data: [DONE]\n\n")
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in map(chunk_of, again.events[:-1]) if c["choices"])
    assert text == client_of(cluster.info["http"]).chat.completions.create(**fields_of(request_no)).choices[0].message.content
    if how == "restarted":
        gateway.kill()


def chunk_of(event):
    return json.loads(re.search(rb"^data: (.*)$", event, re.M)[1])


def test_several_answers_resume_together(start_cluster):
    cluster = start_cluster("--workers", "1", "--routers", "2", env=SLOW)
    gateway = Gateway(cluster, "gateway-by-hand")
    first = Sse(gateway.http, body_of(7, n=3)).read(20)
    gateway.kill()
    first.read()
    rest = Sse(cluster.info["http"], {}, last_id=first.last_id).read()
    chunks = [chunk_of(event) for event in first.events + rest.events[:-1]]
    assert rest.events[-1].endswith(b"data: [DONE]\n\n")
    texts, finishes = ["", "", ""], []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        finishes += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(finishes) == [0, 1, 2]
    assert [chunk["usage"] is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    fields = fields_of(7)
    whole = client_of(cluster.info["http"]).chat.completions.create(n=3, **fields)
    assert texts == [choice.message.content for choice in whole.choices]


def test_what_a_dead_gateway_left_is_freed(start_cluster):
    """Nobody comes back: after the grace time nothing is held, and the id is unknown."""
    cluster = start_cluster("--workers", "1", env={**SLOW, "BALEEN_GATEWAY_GRACE_MS": "1000"})
    gateway = Gateway(cluster, "gateway-by-hand")
    streams = [Sse(gateway.http, body_of(i, max_tokens=2000)).read(3) for i in range(4)]
    cancelled = cluster.cancelled()
    gateway.kill()
    wait_for("the sequences to be ended", lambda: cluster.cancelled() >= cancelled + 4)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    wait_for("nothing to be kept", lambda: not any(cluster.metrics()["baleen_sequences_kept"].values()))
    reply = Sse(cluster.info["http"], {}, last_id=streams[0].last_id).reply
    assert reply.status == 404
    assert "ask again" in json.loads(reply.read())["error"]["message"]


def test_a_client_goes_away_and_comes_back(start_cluster):
    """Only with resumable; else its request ends with its connection."""
    cluster = start_cluster("--workers", "1", env=SLOW)
    address = cluster.info["http"]
    first = Sse(address, body_of(0, stream_options={"resumable": True})).read(8)
    first.close()
    rest = Sse(address, {}, last_id=first.last_id).read()
    whole = Sse(address, path="/v1/streams/" + first.last_id.rsplit(":", 1)[0]).read()
    assert b"".join(first.events + rest.events) == b"".join(whole.events)
    cancelled = cluster.cancelled()
    gone = Sse(address, body_of(0)).read(8)
    gone.close()
    wait_for("the cancel", lambda: cluster.cancelled() > cancelled)
    assert Sse(address, {}, last_id=gone.last_id).reply.status == 404


def test_grpc_resumes(start_cluster, pb):  # noqa: F811
    cluster = start_cluster("--workers", "1", "--routers", "2", env=SLOW)
    gateway = Gateway(cluster, "gateway-by-hand")
    sampling = pb.v1.Sampling(temperature=1, top_p=0.9, seed=3, max_tokens=80, ignore_eos=True)

    def request(**fields):
        return pb.v1.GenerateRequest(text="Once upon a time", sampling=sampling, **fields)

    def events(address, **fields):
        with grpc.insecure_channel(address) as channel:
            yield from pb.v1_grpc.InferenceStub(channel).Generate(request(**fields), timeout=WAIT_S)

    whole = [event.tokens for event in events(cluster.grpc) if event.HasField("tokens")]
    ids, text = [], ""
    routing = pb.v1.Routing(request_id="my-own-id")
    try:
        for event in events(gateway.grpc, routing=routing):
            ids += event.tokens.ids
            text += event.tokens.text
            if len(ids) >= 10 and gateway.child.poll() is None:
                gateway.kill()
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE
    rest = list(events(cluster.grpc, routing=routing, resume_offset=len(ids)))
    assert rest[0].HasField("start") and rest[0].start.request_id == "my-own-id"
    assert next(event.tokens.offset for event in rest if event.HasField("tokens")) == len(ids)
    ids += [i for event in rest for i in event.tokens.ids]
    text += "".join(event.tokens.text for event in rest)
    assert ids == [i for tokens in whole for i in tokens.ids], cluster.said()
    assert text == "".join(tokens.text for tokens in whole)
    assert rest[-1].HasField("finish")
    with pytest.raises(grpc.RpcError) as error:
        list(events(cluster.grpc, routing=pb.v1.Routing(request_id="nobody"), resume_offset=0))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
