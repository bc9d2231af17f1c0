"""HTTP and gRPC side by side, on scripted answers: the same JSON, large and compressed messages, a slow reader beside others, many
streams of all kinds at once, and the end of a cluster that is busy."""
import json
import socket
import threading

import grpc
import openai
import pytest

from conftest import wait_for
from script import calls, function, invoke
from test_chat import CHAT, Joined, ask, post, user
from test_grpc import pb  # noqa: F401

TIMEOUT_S = 300  # for a call that hangs, not for a slow machine


@pytest.fixture(scope="module")
def client(scripted):
    return openai.OpenAI(base_url=scripted.http + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def stub(scripted, pb):  # noqa: F811
    with grpc.insecure_channel(scripted.grpc) as channel:
        yield pb.v1_grpc.InferenceStub(channel)


def chat(pb, text, **fields):  # noqa: F811
    return pb.v1.ChatRequest(messages=[pb.v1.Message(role=pb.v1.ROLE_USER, content=text)], thinking=pb.v1.THINKING_DISABLED, **fields)


def content(events):
    return "".join(event.delta.content for event in events if event.WhichOneof("event") == "delta")


@pytest.mark.conformance(52)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}, {"n": 2, "logprobs": True},
                                    {"tools": [function("f")]}], ids=str)
def test_chat_json_is_the_rest_body(scripted, stub, pb, fields):  # noqa: F811
    """But for what names the request, ids and times, and that the second finds the first one's prompt computed."""
    body = {"model": "scripted", "messages": user("See: " + calls(invoke("f", a="1"))), **CHAT, **fields}

    def plain(objects):
        for thing in objects:
            thing.pop("id")
            thing.pop("created")
            for name in ("prompt_tokens_details", "prompt_cache_hit_tokens", "prompt_cache_miss_tokens"):
                (thing.get("usage") or {}).pop(name, None)
            for choice in thing["choices"]:
                for call in choice.get("message", choice.get("delta", {})).get("tool_calls", []):
                    call.pop("id", None)
        return objects

    replies = [json.loads(reply.json) for reply in stub.ChatJson(pb.v1.ChatJsonRequest(body=json.dumps(body).encode()), timeout=TIMEOUT_S)]
    if fields.get("stream"):
        connection = socket.create_connection(scripted.info["http"].split(":"), timeout=TIMEOUT_S)
        data = json.dumps(body).encode()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        with connection, connection.makefile("rb") as file:
            lines = [line[6:] for line in file.read().decode().splitlines() if line.startswith("data: {")]
        rest = [json.loads(line) for line in lines]
    else:
        status, reply = post(scripted, "/v1/chat/completions", body)
        assert status == 200
        rest = [reply]
    assert plain(replies) == plain(rest)


@pytest.mark.conformance(50)
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_large_messages(scripted, pb, compression):  # noqa: F811
    """8 MiB are read, and then refused for what they are: too long for the model."""
    with grpc.insecure_channel(scripted.grpc, compression=compression) as channel:
        stub = pb.v1_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Chat(chat(pb, "word " * ((8 << 20) // 5 + 1)), timeout=TIMEOUT_S))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "context" in error.value.details()
        assert content(stub.Chat(chat(pb, "small"), timeout=TIMEOUT_S)) == "small"


@pytest.mark.conformance(50)
def test_a_slow_reader_stalls_nobody(stub, pb):  # noqa: F811
    """64 streams on one connection; one is not read until the others are done."""
    text = " ".join(str(i) for i in range(400))
    slow = stub.Chat(chat(pb, text), timeout=TIMEOUT_S)
    got = {}

    def read(i):
        got[i] = content(stub.Chat(chat(pb, f"{i}: {text}"), timeout=TIMEOUT_S))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(63)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: f"{i}: {text}" for i in range(63)}
    assert content(slow) == text


@pytest.mark.conformance(58)
def test_two_hundred_over_http_and_grpc(client, scripted, stub, pb):  # noqa: F811
    got = {}

    def one(i):
        nonce = f"nonce-{i}-" + "x" * (i % 7)
        if i % 4 == 0:
            got[nonce] = ask(client, nonce).choices[0].message.content
        elif i % 4 == 1:
            got[nonce] = Joined(ask(client, nonce, stream=True)).content
        elif i % 4 == 2:
            got[nonce] = content(stub.Chat(chat(pb, nonce), timeout=TIMEOUT_S))
        else:
            body = {"model": "scripted", "messages": user(nonce), **CHAT}
            reply, = stub.ChatJson(pb.v1.ChatJsonRequest(body=json.dumps(body).encode()), timeout=TIMEOUT_S)
            got[nonce] = json.loads(reply.json)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 200 and all(told == nonce for nonce, told in got.items())
    wait_for("the ledger to be zero", scripted.ledger_is_zero)


@pytest.mark.conformance(59)
def test_the_end_of_a_busy_cluster(start_cluster, pb):  # noqa: F811
    """SIGTERM: health says so and new work is refused while what runs ends in order; exit 0."""
    running = start_cluster("--scripted-model", "scripted", "--failpoints", "router_step_slow:10000")
    client = openai.OpenAI(base_url=running.http + "/v1", api_key="none", max_retries=0)
    words = " ".join(str(i) for i in range(60))
    stream = ask(client, words, stream=True)
    text = "".join(next(stream).choices[0].delta.content or "" for _ in range(3))
    with grpc.insecure_channel(running.grpc) as channel:
        health = pb.health_grpc.HealthStub(channel).Watch(pb.health.HealthCheckRequest(service=""), timeout=TIMEOUT_S)
        assert next(health).status == 1
        running.terminate()
        assert next(health).status == 2
        with pytest.raises(grpc.RpcError) as error:
            list(pb.v1_grpc.InferenceStub(channel).Chat(chat(pb, "more"), timeout=TIMEOUT_S))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            ask(client, "more")
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == words
    assert running.stop() == 0, running.said()
