"""grpcio with stubs made from our .proto files against a running cluster."""
import importlib
import json
import os
import sys
import threading

import grpc
import pytest

from conftest import ROOT, wait_for

TIMEOUT_S = 300  # for a call that hangs, not for a slow machine


@pytest.fixture(scope="module")
def pb(tmp_path_factory):
    """Modules made from proto/*.proto."""
    from grpc_tools import protoc
    out = tmp_path_factory.mktemp("stubs")
    for name in ("baleen_v1", "health"):
        assert protoc.main(["protoc", f"-I{ROOT}/proto", f"--python_out={out}", f"--grpc_python_out={out}",
                            os.path.join(ROOT, "proto", name + ".proto")]) == 0
    sys.path.insert(0, str(out))

    class Modules:
        v1 = importlib.import_module("baleen_v1_pb2")
        v1_grpc = importlib.import_module("baleen_v1_pb2_grpc")
        health = importlib.import_module("health_pb2")
        health_grpc = importlib.import_module("health_pb2_grpc")

    return Modules


@pytest.fixture(scope="module")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel, pb):
    return pb.v1_grpc.InferenceStub(channel)


def question(pb, text="What is the capital of France?", **fields):
    fields.setdefault("thinking", pb.v1.THINKING_DISABLED)
    fields.setdefault("sampling", pb.v1.Sampling(temperature=0))
    return pb.v1.ChatRequest(messages=[pb.v1.Message(role=pb.v1.ROLE_USER, content=text)], **fields)


def code_of(call):
    with pytest.raises(grpc.RpcError) as error:
        list(call) if hasattr(call, "__iter__") else call
    return error.value.code()


def test_chat(stub, pb):
    events = list(stub.Chat(question(pb), timeout=TIMEOUT_S))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "start" and kinds[-1] == "finish" and set(kinds[1:-1]) == {"delta"}
    assert "".join(event.delta.content for event in events[1:-1]) == "The capital of France is Paris."
    assert events[-1].finish.reason == pb.v1.FINISH_STOP
    assert events[-1].finish.usage.prompt_tokens == events[0].start.prompt_tokens
    assert events[-1].finish.usage.completion_tokens == 7


def test_chat_thinks(stub, pb):
    events = list(stub.Chat(question(pb, "What is 72 - 38?", thinking=pb.v1.THINKING_ENABLED, effort=pb.v1.EFFORT_LOW), timeout=TIMEOUT_S))
    assert "".join(event.delta.reasoning for event in events)
    assert "34" in "".join(event.delta.content for event in events)
    assert events[-1].finish.usage.reasoning_tokens > 0


def test_chat_json_is_the_http_body(stub, pb):
    body = {"model": "nano", "temperature": 0, "thinking": {"type": "disabled"},
            "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    replies = list(stub.ChatJson(pb.v1.ChatJsonRequest(body=json.dumps(body).encode()), timeout=TIMEOUT_S))
    assert len(replies) == 1 and replies[0].last
    assert json.loads(replies[0].json)["choices"][0]["message"]["content"] == "The capital of France is Paris."
    body["stream"] = True
    chunks = [json.loads(reply.json) for reply in stub.ChatJson(pb.v1.ChatJsonRequest(body=json.dumps(body).encode()), timeout=TIMEOUT_S)]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == "The capital of France is Paris."


def test_chat_json_n_answers(stub, pb):
    """n answers are drawn from n seeds of which the first is the request's; greedy ones are all the same."""
    body = {"model": "nano", "seed": 7, "temperature": 1.5, "n": 3, "max_tokens": 12, "thinking": {"type": "disabled"},
            "messages": [{"role": "user", "content": "Tell me a story."}]}

    def ask(**more):
        text = json.dumps({**body, **more}).encode()
        return [json.loads(reply.json) for reply in stub.ChatJson(pb.v1.ChatJsonRequest(body=text), timeout=TIMEOUT_S)]

    whole, = ask()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    alone, = ask(n=1)
    assert alone["choices"][0]["message"]["content"] == texts[0]
    streamed = ["", "", ""]
    for chunk in ask(stream=True):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts
    with pytest.raises(grpc.RpcError) as refused:
        ask(n=17)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "16" in refused.value.details()


def test_generate_ids(stub, pb):
    tokens = stub.Tokenize(pb.v1.TokenizeRequest(chat=question(pb)), timeout=TIMEOUT_S).ids
    events = list(stub.Generate(pb.v1.GenerateRequest(tokens=pb.v1.TokenIds(ids=tokens), sampling=pb.v1.Sampling(temperature=0)),
                                timeout=TIMEOUT_S))
    ids, offsets = [], []
    for event in events:
        if event.WhichOneof("event") == "tokens":
            offsets.append(event.tokens.offset)
            assert event.tokens.offset == len(ids)
            ids += event.tokens.ids
    text = stub.Detokenize(pb.v1.DetokenizeRequest(ids=ids), timeout=TIMEOUT_S).text
    assert text == "The capital of France is Paris."
    whole = list(stub.Generate(pb.v1.GenerateRequest(tokens=pb.v1.TokenIds(ids=tokens), sampling=pb.v1.Sampling(temperature=0),
                                                     stream=False), timeout=TIMEOUT_S))
    assert [event.WhichOneof("event") for event in whole] == ["start", "tokens", "finish"]
    assert list(whole[1].tokens.ids) == ids


def test_logprobs(stub, pb):
    sampling = pb.v1.Sampling(temperature=0, top_logprobs=3)
    events = list(stub.Chat(question(pb, sampling=sampling), timeout=TIMEOUT_S))
    told = [token for event in events[1:-1] for token in event.delta.logprobs]
    assert b"".join(token.token for token in told).decode() == "The capital of France is Paris."
    for token in told:
        assert len(token.top) == 3 and token.top[0].token_id == token.token_id
        assert [top.logprob for top in token.top] == sorted((top.logprob for top in token.top), reverse=True)
    events = list(stub.Generate(pb.v1.GenerateRequest(text="One", sampling=pb.v1.Sampling(temperature=0, max_tokens=6, top_logprobs=0)),
                                timeout=TIMEOUT_S))
    pairs = [(id, token.token_id) for event in events[1:-1] for id, token in zip(event.tokens.ids, event.tokens.logprobs)]
    assert pairs and all(id == told_id for id, told_id in pairs)


def test_logit_bias(stub, pb):
    wanted, = stub.Tokenize(pb.v1.TokenizeRequest(text="x"), timeout=TIMEOUT_S).ids
    sampling = pb.v1.Sampling(max_tokens=4, logit_bias=[pb.v1.LogitBias(token_id=wanted, bias=100)])
    events = list(stub.Chat(question(pb, sampling=sampling), timeout=TIMEOUT_S))
    assert "".join(event.delta.content for event in events[1:-1]) == "xxxx"


def test_info_and_health(stub, channel, pb):
    info = stub.Info(pb.v1.InfoRequest(), timeout=TIMEOUT_S)
    assert info.ready and info.models[0].name == "nano" and info.models[0].max_model_len == 16384 and info.epoch > 0
    health = pb.health_grpc.HealthStub(channel)
    for service in ("", "baleen.v1.Inference"):
        assert health.Check(pb.health.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status == 1
    with pytest.raises(grpc.RpcError) as error:
        health.Check(pb.health.HealthCheckRequest(service="no.such"), timeout=TIMEOUT_S)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(pb.health.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == 1
    watch.cancel()


def test_request_id(stub, pb):
    call = stub.Chat(question(pb, routing=pb.v1.Routing(request_id="my-id.1")), timeout=TIMEOUT_S)
    assert dict(call.initial_metadata())["x-request-id"] == "my-id.1"
    assert next(call).start.request_id == "my-id.1"
    list(call)


def test_bad_input(stub, pb):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(stub.Chat(pb.v1.ChatRequest(), timeout=TIMEOUT_S)) == invalid
    assert code_of(stub.Chat(question(pb, model="gpt-5"), timeout=TIMEOUT_S)) == grpc.StatusCode.NOT_FOUND
    assert code_of(stub.Chat(question(pb, sampling=pb.v1.Sampling(temperature=9)), timeout=TIMEOUT_S)) == invalid
    assert code_of(stub.Chat(question(pb, "word " * 20000), timeout=TIMEOUT_S)) == invalid
    assert code_of(stub.ChatJson(pb.v1.ChatJsonRequest(body=b"{"), timeout=TIMEOUT_S)) == invalid
    assert code_of(stub.Generate(pb.v1.GenerateRequest(), timeout=TIMEOUT_S)) == invalid
    with pytest.raises(grpc.RpcError) as error:
        stub.Detokenize(pb.v1.DetokenizeRequest(ids=[10**6]), timeout=TIMEOUT_S)
    assert error.value.code() == invalid and "1000000" in error.value.details()
    assert "".join(event.delta.content for event in stub.Chat(question(pb), timeout=TIMEOUT_S)) == "The capital of France is Paris."


def test_cancel_frees_everything(stub, pb, cluster):
    cancelled = cluster.cancelled()
    call = stub.Chat(question(pb, "Count from 1 to 100."), timeout=TIMEOUT_S)
    for event in call:
        if event.WhichOneof("event") == "delta":
            break
    call.cancel()
    cluster.wait_until_freed(cancelled)


def test_abort(stub, pb, cluster):
    call = stub.Chat(question(pb, "Count from 1 to 100.", routing=pb.v1.Routing(request_id="to-abort")), timeout=TIMEOUT_S)
    next(call)
    assert stub.Abort(pb.v1.AbortRequest(request_ids=["to-abort", "no-such-id"]), timeout=TIMEOUT_S).aborted in (0, 1)
    try:
        list(call)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.ABORTED
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    assert stub.Abort(pb.v1.AbortRequest(request_ids=["to-abort"]), timeout=TIMEOUT_S).aborted == 0


def test_deadline(stub, pb, cluster):
    cancelled = cluster.cancelled()
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Chat(question(pb, "Count from 1 to 100."), timeout=0.1))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_until_freed(cancelled)


def test_many_at_once(stub, pb):
    """32 streams, each its own answer."""
    answers = {}

    def ask(i):
        events = stub.Chat(question(pb, f"What is {i} + {i}?", thinking=pb.v1.THINKING_ENABLED), timeout=TIMEOUT_S)
        answers[i] = "".join(event.delta.content for event in events)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = "".join(event.delta.content for event in stub.Chat(question(pb, "What is 12 + 12?", thinking=pb.v1.THINKING_ENABLED),
                                                               timeout=TIMEOUT_S))
    assert len(answers) == 32 and all(answers.values()) and answers[12] == alone
