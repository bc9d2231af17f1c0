"""KServe's protocol over gRPC and REST against a running cluster, with Triton's own clients."""
import importlib.metadata
import json
import queue
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from conftest import wait_for

TIMEOUT_S = 300  # for a call that hangs, not for a slow machine
CLIENT = "tritonclient " + importlib.metadata.version("tritonclient")
PARIS = "The capital of France is Paris."
MESSAGES = json.dumps([{"role": "user", "content": "What is the capital of France?"}])
GREEDY = json.dumps({"temperature": 0, "max_tokens": 12})


@pytest.fixture(scope="module")
def client(cluster):
    with triton_grpc.InferenceServerClient(cluster.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def http(cluster):
    client = triton_http.InferenceServerClient(cluster.http.removeprefix("http://"), network_timeout=TIMEOUT_S)
    yield client
    client.close()


def text_tensor(api, name, text):
    tensor = api.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def bool_tensor(api, name, value):
    tensor = api.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def ids_tensor(api, ids):
    tensor = api.InferInput("input_ids", [len(ids)], "INT32")
    tensor.set_data_from_numpy(np.array(ids, dtype=np.int32))
    return tensor


def output(result):
    """Over REST it comes in the JSON, as text."""
    value = result.as_numpy("text_output")[0]
    return value if isinstance(value, str) else value.decode()


def chat(api, sampling=None):
    return [text_tensor(api, "messages", MESSAGES),
            text_tensor(api, "sampling_parameters", sampling or json.dumps({"temperature": 0, "thinking": {"type": "disabled"}}))]


@pytest.mark.conformance(49, client=CLIENT)
@pytest.mark.parametrize("protocol", ["client", "http"])
def test_what_there_is(protocol, request):
    client = request.getfixturevalue(protocol)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("nano")
    assert client.is_model_ready("nano", "1") and not client.is_model_ready("other") and not client.is_model_ready("nano", "2")
    server, model = (client.get_server_metadata(), client.get_model_metadata("nano"))
    if protocol == "client":
        server, model = server.name, {t.name: (t.datatype, list(t.shape)) for t in model.inputs}
    else:
        server, model = server["name"], {t["name"]: (t["datatype"], t["shape"]) for t in model["inputs"]}
    assert server == "baleen"
    assert model == {"text_input": ("BYTES", [1]), "input_ids": ("INT32", [-1]), "messages": ("BYTES", [1]), "stream": ("BOOL", [1]),
                     "sampling_parameters": ("BYTES", [1]), "exclude_input_in_output": ("BOOL", [1])}
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("other")


def test_config(client):
    config = client.get_model_config("nano").config
    assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
    assert {t.name for t in config.input} >= {"text_input", "stream"} and config.output[0].name == "text_output"
    index = client.get_model_repository_index().models
    assert [(model.name, model.state) for model in index] == [("nano", "READY")]


@pytest.mark.conformance(49, client=CLIENT)
@pytest.mark.parametrize("protocol", ["client", "http"])
def test_infer(protocol, request):
    client = request.getfixturevalue(protocol)
    api = triton_grpc if protocol == "client" else triton_http
    result = client.infer("nano", chat(api), request_id="one", outputs=[api.InferRequestedOutput("text_output")])
    assert output(result) == PARIS
    text = [text_tensor(api, "text_input", "One two"), text_tensor(api, "sampling_parameters", GREEDY)]
    with_prompt = output(client.infer("nano", text))
    alone = output(client.infer("nano", [*text, bool_tensor(api, "exclude_input_in_output", True)]))
    assert with_prompt == "One two" + alone and alone


def test_infer_ids(client, cluster):
    body = {"prompt": "One two"}
    with urllib.request.urlopen(urllib.request.Request(cluster.http + "/tokenize", json.dumps(body).encode()), timeout=TIMEOUT_S) as reply:
        ids = json.load(reply)["tokens"]
    sampling = text_tensor(triton_grpc, "sampling_parameters", GREEDY)
    from_ids = output(client.infer("nano", [ids_tensor(triton_grpc, ids), sampling]))
    from_text = output(client.infer("nano", [text_tensor(triton_grpc, "text_input", "One two"), sampling]))
    assert "One two" + from_ids == from_text


def test_infer_json(http):
    """Tensors in the JSON itself."""
    tensors = chat(triton_http)
    for tensor, text in zip(tensors, (MESSAGES, '{"temperature": 0, "thinking": {"type": "disabled"}}')):
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_), binary_data=False)
    assert output(http.infer("nano", tensors, outputs=[triton_http.InferRequestedOutput("text_output", binary_data=False)])) == PARIS


def status_of(call):
    with pytest.raises(InferenceServerException) as error:
        call()
    return error.value


@pytest.mark.conformance(48, client=CLIENT)
def test_refused(client, http):
    wrong = [text_tensor(triton_grpc, "text_input", "x"), text_tensor(triton_grpc, "sampling_parameters", '{"temperature": 9}')]
    error = status_of(lambda: client.infer("nano", wrong))
    assert "INVALID_ARGUMENT" in error.status() and "temperature" in error.message()
    assert "NOT_FOUND" in status_of(lambda: client.infer("other", wrong)).status()
    assert "stream" in status_of(lambda: client.infer("nano", [wrong[0], bool_tensor(triton_grpc, "stream", True)])).message()
    assert "no input" in status_of(lambda: client.infer("nano", [text_tensor(triton_grpc, "text", "x")])).message()
    wrong = [text_tensor(triton_http, "text_input", "x"), text_tensor(triton_http, "sampling_parameters", '{"temperature": 9}')]
    error = status_of(lambda: http.infer("nano", wrong))
    assert error.status() == "400" and "temperature" in error.message()


class Stream:
    """What start_stream's callback was told."""

    def __init__(self, client):
        self.client, self.told = client, queue.Queue()
        client.start_stream(callback=lambda result, error: self.told.put((result, error)), stream_timeout=TIMEOUT_S)

    def ask(self, inputs, id, final=True):
        self.client.async_stream_infer("nano", inputs, request_id=id, enable_empty_final_response=final)

    def response(self):
        return self.told.get(timeout=TIMEOUT_S)


def is_final(response):
    return response.parameters["triton_final_response"].bool_param


@pytest.mark.conformance(49, client=CLIENT)
def test_stream(client):
    stream = Stream(client)
    stream.ask([*chat(triton_grpc), bool_tensor(triton_grpc, "stream", True)], "a")
    stream.ask(chat(triton_grpc), "b")
    texts, n, ended = {"a": "", "b": ""}, {"a": 0, "b": 0}, set()
    while len(ended) < 2:
        result, error = stream.response()
        assert error is None
        response = result.get_response()
        assert response.id not in ended
        n[response.id] += 1
        if response.outputs:
            texts[response.id] += output(result)
        if is_final(response):
            ended.add(response.id)
    assert texts == {"a": PARIS, "b": PARIS} and n["b"] == 1 and n["a"] > 2
    client.stop_stream()


@pytest.mark.conformance(49, client=CLIENT)
def test_stream_errors(client):
    """What is wrong with one request leaves the stream open."""
    stream = Stream(client)
    stream.ask([text_tensor(triton_grpc, "text", "x")], "bad")
    result, error = stream.response()
    assert "no input" in error.message()
    stream.ask(chat(triton_grpc), "good")
    result, error = stream.response()
    assert error is None and output(result) == PARIS
    client.stop_stream()


def test_stream_cancel(client, cluster):
    endless = json.dumps({"max_tokens": 4000, "ignore_eos": True})
    cancelled = cluster.cancelled()
    stream = Stream(client)
    stream.ask([text_tensor(triton_grpc, "text_input", "One"), text_tensor(triton_grpc, "sampling_parameters", endless),
                bool_tensor(triton_grpc, "stream", True)], "endless")
    result, error = stream.response()
    assert error is None and result.as_numpy("text_output") is not None
    client.stop_stream(cancel_requests=True)
    cluster.wait_until_freed(cancelled)


# ---- generate


def post(cluster, path, body):
    request = urllib.request.Request(cluster.http + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def test_generate(cluster):
    body = {"messages": json.loads(MESSAGES), "parameters": {"temperature": 0, "thinking": {"type": "disabled"}}}
    with post(cluster, "/v2/models/nano/generate", body) as reply:
        whole = json.load(reply)
    assert whole["text_output"] == PARIS and whole["model_name"] == "nano"
    with post(cluster, "/v2/models/nano/versions/1/generate_stream", body) as reply:
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    assert "".join(event["text_output"] for event in events) == PARIS and len(events) > 2
    assert [event["triton_final_response"] for event in events] == [False] * (len(events) - 1) + [True]
    with pytest.raises(urllib.error.HTTPError) as error:
        post(cluster, "/v2/models/nano/generate", {"text_input": "x", "stream": True})
    assert error.value.code == 400 and "generate_stream" in json.load(error.value)["error"]


def test_generate_stream_disconnect(cluster):
    cancelled = cluster.cancelled()
    reply = post(cluster, "/v2/models/nano/generate_stream", {"text_input": "One", "parameters": {"max_tokens": 4000, "ignore_eos": True}})
    assert reply.readline()
    reply.close()
    cluster.wait_until_freed(cancelled)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
