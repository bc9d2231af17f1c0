"""VllmEngine and server reflection against a running cluster: grpcio with stubs made from our protos, grpcio-reflection."""
import hashlib
import importlib
import importlib.metadata
import io
import os
import sys
import threading
import zipfile

import grpc
import pytest

from conftest import NANO, ROOT, wait_for

TIMEOUT_S = 300  # for a call that hangs, not for a slow machine
CLIENT = "grpcio " + grpc.__version__
REFLECTION = "grpcio-reflection " + importlib.metadata.version("grpcio-reflection")
PARIS = "The capital of France is Paris."
SERVICES = {"baleen.v1.Inference", "grpc.health.v1.Health", "vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService",
            "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.fixture(scope="module")
def pb(tmp_path_factory):
    from grpc_tools import protoc
    out = tmp_path_factory.mktemp("stubs")

    def make(root, *names):
        """Named as seen from root: a file has one name in a process, whoever loads it."""
        assert protoc.main(["protoc", f"-I{root}", f"--python_out={out}", f"--grpc_python_out={out}",
                            *(os.path.join(ROOT, "proto", name + ".proto") for name in names)]) == 0

    make(os.path.join(ROOT, "proto"), "baleen_v1", "health", "reflection_v1")
    make(ROOT, "vllm_common", "vllm_engine")
    sys.path.insert(0, str(out))

    class Modules:
        v1, v1_grpc = (importlib.import_module(name) for name in ("baleen_v1_pb2", "baleen_v1_pb2_grpc"))
        health, health_grpc = (importlib.import_module(name) for name in ("health_pb2", "health_pb2_grpc"))
        reflection, reflection_grpc = (importlib.import_module(name) for name in ("reflection_v1_pb2", "reflection_v1_pb2_grpc"))
        common = importlib.import_module("proto.vllm_common_pb2")
        vllm, vllm_grpc = (importlib.import_module(name) for name in ("proto.vllm_engine_pb2", "proto.vllm_engine_pb2_grpc"))

    return Modules


@pytest.fixture(scope="module")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def own(channel, pb):
    return pb.v1_grpc.InferenceStub(channel)


@pytest.fixture(scope="module")
def engine(channel, pb):
    return pb.vllm_grpc.VllmEngineStub(channel)


@pytest.fixture(scope="module")
def paris(own, pb):
    """The ids of the question; its answer is PARIS."""
    chat = pb.v1.ChatRequest(messages=[pb.v1.Message(role=pb.v1.ROLE_USER, content="What is the capital of France?")],
                             thinking=pb.v1.THINKING_DISABLED)
    return list(own.Tokenize(pb.v1.TokenizeRequest(chat=chat), timeout=TIMEOUT_S).ids)


def request(pb, ids, request_id="", stream=True, kv_transfer_params_json=None, **sampling):
    sampling.setdefault("temperature", 0)
    return pb.vllm.GenerateRequest(request_id=request_id, tokenized=pb.vllm.TokenizedInput(input_ids=ids), stream=stream,
                                   kv_transfer_params_json=kv_transfer_params_json,
                                   sampling_params=pb.vllm.SamplingParams(**sampling))


def text_of(own, pb, ids):
    return own.Detokenize(pb.v1.DetokenizeRequest(ids=ids), timeout=TIMEOUT_S).text


def refused(call):
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value


def details(error):
    return dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")


@pytest.mark.conformance(44, client=CLIENT)
def test_stream(engine, own, pb, paris):
    responses = list(engine.Generate(request(pb, paris, request_id="vllm-1"), timeout=TIMEOUT_S))
    assert [r.WhichOneof("response") for r in responses] == ["chunk"] * (len(responses) - 1) + ["complete"]
    ids = [i for r in responses[:-1] for i in r.chunk.token_ids]
    complete = responses[-1].complete
    assert list(complete.output_ids) == ids and text_of(own, pb, ids) == PARIS
    assert complete.finish_reason == "stop" and complete.prompt_tokens == len(paris) and complete.completion_tokens == len(ids)
    counts = [r.chunk.completion_tokens for r in responses[:-1]]
    assert counts == sorted(counts) and counts[-1] == len(ids)
    whole = list(engine.Generate(request(pb, paris, stream=False), timeout=TIMEOUT_S))
    assert len(whole) == 1 and list(whole[0].complete.output_ids) == ids


def test_text_is_raw(engine, own, pb):
    """As Generate of our own: the same ids from the same text."""
    sampling = pb.v1.Sampling(temperature=0, max_tokens=8)
    events = own.Generate(pb.v1.GenerateRequest(text="One two", sampling=sampling), timeout=TIMEOUT_S)
    want = [i for event in events for i in event.tokens.ids]
    ask = pb.vllm.GenerateRequest(text="One two", sampling_params=pb.vllm.SamplingParams(temperature=0, max_tokens=8))
    complete, = (r.complete for r in engine.Generate(ask, timeout=TIMEOUT_S))
    assert list(complete.output_ids) == want


def test_answers_ends_and_logprobs(engine, own, pb, paris):
    whole = list(engine.Generate(request(pb, paris, stream=False, n=3, logprobs=2), timeout=TIMEOUT_S))
    assert sorted(r.complete.index for r in whole) == [0, 1, 2]
    for r in whole:
        told = r.complete.output_logprobs
        assert list(told.token_ids) == list(r.complete.output_ids) == list(whole[0].complete.output_ids)
        for id, value, top in zip(told.token_ids, told.token_logprobs, told.top_logprobs):
            assert top.token_ids[0] == id and top.values[0] == value and len(top.values) == 2
    cut, = engine.Generate(request(pb, paris, stream=False, max_tokens=2), timeout=TIMEOUT_S)
    assert cut.complete.finish_reason == "length" and len(cut.complete.output_ids) == 2
    stopped, = engine.Generate(request(pb, paris, stream=False, stop=["France"]), timeout=TIMEOUT_S)
    assert stopped.complete.finish_reason == "stop" and stopped.complete.matched_stop_str == "France"
    last = whole[0].complete.output_ids[-1]
    stopped, = engine.Generate(request(pb, paris, stream=False, stop_token_ids=[last]), timeout=TIMEOUT_S)
    assert stopped.complete.matched_token_id == last


@pytest.mark.conformance(45, client=CLIENT)
def test_abort(engine, own, pb, cluster):
    prompt = list(own.Tokenize(pb.v1.TokenizeRequest(text="One two three"), timeout=TIMEOUT_S).ids)
    call = engine.Generate(request(pb, prompt, request_id="to-abort", max_tokens=4000, ignore_eos=True), timeout=TIMEOUT_S)
    first = next(call)
    for _ in range(2):
        assert engine.Abort(pb.vllm.AbortRequest(request_ids=["to-abort", "unknown"]), timeout=TIMEOUT_S) == pb.vllm.AbortResponse()
    rest = list(call)
    assert rest[-1].complete.finish_reason == "abort"
    ids = list(first.chunk.token_ids) + [i for r in rest[:-1] for i in r.chunk.token_ids]
    assert list(rest[-1].complete.output_ids) == ids and 0 < len(ids) < 4000
    wait_for("the ledger to be zero", cluster.ledger_is_zero)


@pytest.mark.conformance(45, 46, client=CLIENT)
def test_cancel_and_deadline(engine, own, pb, cluster):
    prompt = list(own.Tokenize(pb.v1.TokenizeRequest(text="One two three"), timeout=TIMEOUT_S).ids)
    endless = request(pb, prompt, max_tokens=4000, ignore_eos=True)
    cancelled = cluster.cancelled()
    call = engine.Generate(endless, timeout=TIMEOUT_S)
    next(call)
    call.cancel()
    cluster.wait_until_freed(cancelled)
    cancelled = cluster.cancelled()
    assert refused(engine.Generate(endless, timeout=0.1)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_until_freed(cancelled)


@pytest.mark.conformance(48, client=CLIENT)
def test_bad_input(engine, channel, pb, paris):
    invalid, unimplemented = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED
    error = refused(engine.Generate(request(pb, paris, temperature=9), timeout=TIMEOUT_S))
    assert error.code() == invalid and b"sampling_params.temperature" in details(error)
    error = refused(engine.Generate(request(pb, []), timeout=TIMEOUT_S))
    assert error.code() == invalid and b"input" in details(error)
    error = refused(engine.Generate(request(pb, [10**6]), timeout=TIMEOUT_S))
    assert error.code() == invalid
    error = refused(engine.Generate(request(pb, paris * 2000), timeout=TIMEOUT_S))
    assert error.code() == invalid and "context" in error.details()
    error = refused(engine.Generate(pb.vllm.GenerateRequest(), timeout=TIMEOUT_S))
    assert error.code() == invalid and b"input" in details(error)
    error = refused(engine.Generate(request(pb, paris, n=100), timeout=TIMEOUT_S))
    assert error.code() == invalid and b"sampling_params.n" in details(error)
    error = refused(engine.Generate(request(pb, paris, request_id="no spaces"), timeout=TIMEOUT_S))
    assert error.code() == invalid and b"request_id" in details(error)
    for wrong in ({"prompt_logprobs": 1}, {"truncate_prompt_tokens": 5}, {"kv_transfer_params_json": "{}"}):
        assert refused(engine.Generate(request(pb, paris, **wrong), timeout=TIMEOUT_S)).code() == unimplemented
    with pytest.raises(grpc.RpcError) as unknown:
        channel.unary_unary("/vllm.grpc.engine.VllmEngine/NoSuch")(b"", timeout=TIMEOUT_S)
    assert unknown.value.code() == unimplemented
    with pytest.raises(grpc.RpcError) as embed:
        engine.Embed(pb.vllm.EmbedRequest(), timeout=TIMEOUT_S)
    assert embed.value.code() == unimplemented and "Embed" in embed.value.details()
    assert refused(engine.SubscribeKvEvents(pb.common.SubscribeKvEventsRequest(), timeout=TIMEOUT_S)).code() == unimplemented


def test_infos(engine, pb):
    model = engine.GetModelInfo(pb.vllm.GetModelInfoRequest(), timeout=TIMEOUT_S)
    assert model.served_model_name == "nano" and model.is_generation and model.max_context_length == 16384
    server = engine.GetServerInfo(pb.vllm.GetServerInfoRequest(), timeout=TIMEOUT_S)
    assert server.uptime_seconds > 0 and not server.is_paused
    loads = engine.GetLoads(pb.vllm.GetLoadsRequest(), timeout=TIMEOUT_S)
    assert len(loads.loads) == 1 and loads.dp_rank_count == 1
    assert engine.HealthCheck(pb.vllm.HealthCheckRequest(), timeout=TIMEOUT_S).healthy


def test_tokenizer(engine, pb):
    chunks = list(engine.GetTokenizer(pb.common.GetTokenizerRequest(), timeout=TIMEOUT_S))
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest() and not any(chunk.sha256 for chunk in chunks[:-1])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(archive.namelist())
        for name in archive.namelist():
            with open(os.path.join(NANO, name), "rb") as file:
                assert archive.read(name) == file.read()


@pytest.mark.conformance(43, client=CLIENT, part="Check, unknown service")
def test_health_of_services(channel, pb):
    health = pb.health_grpc.HealthStub(channel)
    for service in SERVICES:
        assert health.Check(pb.health.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status == 1
    with pytest.raises(grpc.RpcError) as error:
        health.Check(pb.health.HealthCheckRequest(service="vllm.grpc.engine"), timeout=TIMEOUT_S)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


# ---- reflection


@pytest.mark.conformance(42, client=REFLECTION, part="plaintext")
def test_reflection_client(channel):
    """A client that knows no proto: finds the services, makes messages from what it is told, calls them."""
    from google.protobuf import message_factory
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == SERVICES
    pool = DescriptorPool(database)

    def caller(service, method, make):
        found = pool.FindServiceByName(service).methods_by_name[method]
        ask, answer = (message_factory.GetMessageClass(type) for type in (found.input_type, found.output_type))
        return ask, make(f"/{service}/{method}", request_serializer=ask.SerializeToString, response_deserializer=answer.FromString)

    ask, call = caller("vllm.grpc.engine.VllmEngine", "GetModelInfo", channel.unary_unary)
    assert call(ask(), timeout=TIMEOUT_S).served_model_name == "nano"
    ask, call = caller("vllm.grpc.engine.VllmEngine", "Generate", channel.unary_stream)
    responses = list(call(ask(text="One", stream=True, sampling_params={"temperature": 0, "max_tokens": 3}), timeout=TIMEOUT_S))
    assert len(responses[-1].complete.output_ids) == 3
    ask, call = caller("inference.GRPCInferenceService", "ModelMetadata", channel.unary_unary)
    assert call(ask(name="nano"), timeout=TIMEOUT_S).outputs[0].name == "text_output"
    ask, call = caller("baleen.v1.Inference", "Info", channel.unary_unary)
    assert call(ask(), timeout=TIMEOUT_S).ready
    assert pool.FindMessageTypeByName("smg.grpc.common.GetTokenizerChunk").fields_by_name["sha256"].number == 2
    with pytest.raises(KeyError):
        pool.FindMessageTypeByName("vllm.grpc.engine.NoSuch")


@pytest.mark.conformance(42, client=CLIENT, part="v1")
def test_reflection_v1(channel, pb):
    stub = pb.reflection_grpc.ServerReflectionStub(channel)
    asks = [pb.reflection.ServerReflectionRequest(list_services="*"),
            pb.reflection.ServerReflectionRequest(file_containing_symbol="inference.ModelInferRequest"),
            pb.reflection.ServerReflectionRequest(file_by_filename="no_such.proto"),
            pb.reflection.ServerReflectionRequest(all_extension_numbers_of_type="baleen.v1.Sampling")]
    services, file, unknown, extensions = stub.ServerReflectionInfo(iter(asks), timeout=TIMEOUT_S)
    assert {service.name for service in services.list_services_response.service} == SERVICES
    assert len(file.file_descriptor_response.file_descriptor_proto) == 1
    assert unknown.error_response.error_code == extensions.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# ---- transport


@pytest.mark.conformance(50, client=CLIENT)
def test_large_and_compressed(engine, pb, paris, cluster):
    """A request of more than 8 MiB, and one that is compressed."""
    big = request(pb, paris, stream=False)
    big.tokenized.original_text = "x" * (8 << 20)
    complete, = (r.complete for r in engine.Generate(big, timeout=TIMEOUT_S))
    assert complete.finish_reason == "stop"
    again, = (r.complete for r in engine.Generate(big, timeout=TIMEOUT_S, compression=grpc.Compression.Gzip))
    assert again.output_ids == complete.output_ids
    with grpc.insecure_channel(cluster.grpc, compression=grpc.Compression.Gzip) as channel:
        stub = pb.vllm_grpc.VllmEngineStub(channel)
        again, = (r.complete for r in stub.Generate(request(pb, paris, stream=False), timeout=TIMEOUT_S))
    assert again.output_ids == complete.output_ids


@pytest.mark.conformance(50, client=CLIENT)
def test_slow_reader_among_many(engine, own, pb, paris):
    """64 streams on one connection; one that is not read, and has more to tell than a stream's window, does not hold up the others
    and is complete when it is read."""
    prompt = list(own.Tokenize(pb.v1.TokenizeRequest(text="One two three"), timeout=TIMEOUT_S).ids)
    slow = engine.Generate(request(pb, prompt, request_id="slow", max_tokens=1500, ignore_eos=True, logprobs=20), timeout=TIMEOUT_S)
    answers = {}

    def ask(i):
        responses = list(engine.Generate(request(pb, paris, request_id=f"fast-{i}"), timeout=TIMEOUT_S))
        answers[i] = list(responses[-1].complete.output_ids)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(63)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 63 and all(text_of(own, pb, answer) == PARIS for answer in answers.values())
    late = list(slow)
    assert sum(response.ByteSize() for response in late) > 2 * 65536
    ids = [i for response in late[:-1] for i in response.chunk.token_ids]
    assert len(ids) == 1500 and list(late[-1].complete.output_ids) == ids
