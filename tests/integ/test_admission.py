"""Who may ask, how much, and in whose turn: real clients against a cluster with a key file, with and without TLS."""
import http.client
import importlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import grpc
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import NANO, ROOT, WAIT_S, wait_for

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"thinking": {"type": "disabled"}}
LONG = {"thinking": {"type": "disabled"}, "ignore_eos": True}


@pytest.fixture(scope="module")
def pb(tmp_path_factory):
    """Modules made from proto/*.proto."""
    from grpc_tools import protoc
    out = tmp_path_factory.mktemp("stubs")
    for name in ("baleen_v1", "health", "rpc_status"):
        assert protoc.main(["protoc", f"-I{ROOT}/proto", f"--python_out={out}", f"--grpc_python_out={out}",
                            os.path.join(ROOT, "proto", name + ".proto")]) == 0
    sys.path.insert(0, str(out))

    class Modules:
        v1 = importlib.import_module("baleen_v1_pb2")
        v1_grpc = importlib.import_module("baleen_v1_pb2_grpc")
        health = importlib.import_module("health_pb2")
        health_grpc = importlib.import_module("health_pb2_grpc")
        rpc = importlib.import_module("rpc_status_pb2")

    return Modules


class Keys:
    """A key file, made by the command; limits are written beside the names as an operator would."""

    def __init__(self, bin_dir, path):
        self.bin_dir, self.path = bin_dir, str(path)

    def add(self, tenant, *options, **limits):
        made = subprocess.run([os.path.join(self.bin_dir, "baleen"), "keys", self.path, tenant, *options], capture_output=True,
                              text=True, timeout=WAIT_S)
        assert made.returncode == 0, made.stderr
        if limits:
            self.change(tenant, **limits)
        return made.stdout.strip()

    def change(self, tenant, **limits):
        with open(self.path) as file:
            root = json.load(file)
        next(row for row in root["tenants"] if row["name"] == tenant).update(limits)
        self.write(json.dumps(root))

    def write(self, text):
        with open(self.path + ".tmp", "w") as file:
            file.write(text)
        os.replace(self.path + ".tmp", self.path)


@pytest.fixture
def keys(bin_dir, tmp_path):
    return Keys(bin_dir, tmp_path / "keys.json")


def openai_of(cluster, key, retries=0, **more):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key=key, max_retries=retries, **more)


def ask(client, **more):
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, extra_body=CHAT, **more)
    return reply.choices[0].message.content


def long_stream(client, tokens=12000):
    """A stream that has begun and will not end soon."""
    stream = client.chat.completions.create(model="nano", messages=QUESTION, stream=True, max_tokens=tokens, extra_body=LONG)
    next(stream)
    return stream


def scrape(cluster, key=None):
    request = urllib.request.Request(cluster.http + "/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
        return reply.read().decode()


def values(text, name):
    """labels -> value of one metric."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of_tenant(cluster, key, name, tenant):
    return values(scrape(cluster, key), name).get((("tenant", tenant),), 0)


def gateway_log(cluster):
    with open(os.path.join(cluster.run, "gateway.log")) as file:
        return file.read()


def question(pb, **fields):
    return pb.v1.ChatRequest(messages=[pb.v1.Message(role=pb.v1.ROLE_USER, content="What is the capital of France?")],
                             thinking=pb.v1.THINKING_DISABLED, sampling=pb.v1.Sampling(temperature=0), **fields)


def grpc_answer(stub, pb, key, **more):
    events = stub.Chat(question(pb), timeout=WAIT_S, metadata=(("authorization", f"Bearer {key}"),), **more)
    return "".join(event.delta.content for event in events if event.WhichOneof("event") == "delta")


def in_background(fn):
    """(thread, its result in a list)"""
    result = []

    def run():
        try:
            result.append(fn())
        except Exception as error:  # the test looks at it
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


# ---- keys


@pytest.mark.conformance(21)
def test_keys(start_cluster, keys, pb):
    alice, root = keys.add("alice", "--name", "laptop"), keys.add("root", "--operator")
    cluster = start_cluster("--workers", "2", env={"BALEEN_KEY_FILE": keys.path})
    assert ask(openai_of(cluster, alice)) == "The capital of France is Paris."
    for client in (openai_of(cluster, "wrong"), openai_of(cluster, "")):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)) as error:
            ask(client)
        if isinstance(error.value, openai.AuthenticationError):
            assert error.value.type == "authentication_error" and alice not in str(error.value.body)
    with pytest.raises(openai.AuthenticationError):
        openai_of(cluster, "wrong").models.list()
    with urllib.request.urlopen(cluster.http + "/health", timeout=WAIT_S) as reply:
        assert reply.status == 200
    with pytest.raises(urllib.error.HTTPError) as error:
        scrape(cluster, alice)
    assert error.value.code == 403
    assert "baleen_tenant_requests_total" in scrape(cluster, root)

    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb.v1_grpc.InferenceStub(channel)
        assert "Paris" in grpc_answer(stub, pb, alice)
        events = list(stub.Chat(question(pb), timeout=WAIT_S, metadata=(("x-api-key", alice),)))
        assert events[-1].WhichOneof("event") == "finish"
        for metadata in ((), (("authorization", "Bearer wrong"),), (("x-api-key", "wrong"),)):
            for call in (lambda: list(stub.Chat(question(pb), timeout=WAIT_S, metadata=metadata)),
                         lambda: stub.Info(pb.v1.InfoRequest(), timeout=WAIT_S, metadata=metadata)):
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        health = pb.health_grpc.HealthStub(channel).Check(pb.health.HealthCheckRequest(), timeout=WAIT_S)
        assert health.status == pb.health.HealthCheckResponse.SERVING  # probes have no key

    # taken up while it serves: a new tenant, a broken file, a key that was taken out
    bob = keys.add("bob")
    wait_for("the new key", lambda: "3 tenants" in gateway_log(cluster))
    assert "Paris" in ask(openai_of(cluster, bob))
    with open(keys.path) as file:
        good = file.read()
    keys.write(good[:-20])
    wait_for("the complaint", lambda: "the keys read before stay in force" in gateway_log(cluster))
    assert "Paris" in ask(openai_of(cluster, bob))
    without = json.loads(good)
    without["tenants"] = [row for row in without["tenants"] if row["name"] != "alice"]
    keys.write(json.dumps(without))
    wait_for("the new file", lambda: gateway_log(cluster).count("2 tenants, 2 keys") == 2)
    with pytest.raises(openai.AuthenticationError):
        ask(openai_of(cluster, alice))

    chat = subprocess.run([os.path.join(cluster.bin_dir, "baleen"), "chat", "--run", cluster.run, "--key", bob, "--thinking", "off",
                           "What is the capital of France?"], capture_output=True, text=True, timeout=WAIT_S)
    assert chat.returncode == 0 and "Paris" in chat.stdout, chat.stderr
    for name in os.listdir(cluster.run):
        if name.endswith(".log"):
            with open(os.path.join(cluster.run, name)) as file:
                text = file.read()
            assert not any(secret in text for secret in (alice, bob, root, "capital of France", "Paris")), name
    assert cluster.stop() == 0, cluster.said()


def test_a_bad_key_file_is_refused_at_the_start(bin_dir, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"salt": "00112233445566778899aabbccddeeff",\n "tenants": [{"name": "a", "keys": [], "wieght": 2}]}')
    refused = subprocess.run([os.path.join(bin_dir, "baleen-gateway"), "--model", NANO, "--coordinator", "127.0.0.1:1", "--key-file",
                              str(path)], capture_output=True, text=True, timeout=WAIT_S)
    assert refused.returncode == 2 and "tenants[0] has 'wieght'" in refused.stderr


# ---- limits: what the clients' own retries make of them


@pytest.mark.conformance(24)
@pytest.mark.conformance(47)
def test_retries_of_clients(start_cluster, keys, pb):
    alice = keys.add("alice", running_max=1, queue_max=0)
    root = keys.add("root", "--operator")
    cluster = start_cluster("--workers", "2", env={"BALEEN_KEY_FILE": keys.path})
    refused = lambda: of_tenant(cluster, root, "baleen_tenant_refused_total", "alice")

    held = long_stream(openai_of(cluster, alice))
    with pytest.raises(openai.RateLimitError) as error:
        ask(openai_of(cluster, alice))
    headers = error.value.response.headers
    assert headers["retry-after"] == "1" and headers["retry-after-ms"] == "1000" and headers["x-should-retry"] == "true"
    assert error.value.code == "rate_limit_exceeded" and re.search(r"try again in \d+s", error.value.message)

    with grpc.insecure_channel(cluster.grpc) as channel:
        with pytest.raises(grpc.RpcError) as error:
            grpc_answer(pb.v1_grpc.InferenceStub(channel), pb, alice)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(error.value.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == "1000"
    status = pb.rpc.Status.FromString(trailers["grpc-status-details-bin"])
    retry = pb.rpc.RetryInfo()
    assert [detail.type_url for detail in status.details] == ["type.googleapis.com/google.rpc.RetryInfo"]
    retry.ParseFromString(status.details[0].value)
    assert retry.retry_delay.seconds == 1

    # each client tries again by itself, and gets in once there is room
    before = refused()
    thread, result = in_background(lambda: ask(openai_of(cluster, alice, retries=2)))
    wait_for("its first try", lambda: refused() > before)
    held.close()
    thread.join(WAIT_S)
    assert result == ["The capital of France is Paris."]

    held = long_stream(openai_of(cluster, alice, retries=5))
    policy = {"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "5s",
                                                              "backoffMultiplier": 2, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}
    before = refused()
    with grpc.insecure_channel(cluster.grpc, options=[("grpc.service_config", json.dumps(policy))]) as channel:
        thread, result = in_background(lambda: grpc_answer(pb.v1_grpc.InferenceStub(channel), pb, alice))
        wait_for("its first try", lambda: refused() > before)
        held.close()
        thread.join(WAIT_S)
    assert result == ["The capital of France is Paris."]

    # a rate: the time to wait is told
    keys.change("alice", running_max=8, requests_per_minute=2)
    wait_for("the new limits", lambda: gateway_log(cluster).count("key file") == 2)
    for _ in range(2):
        ask(openai_of(cluster, alice))
    with pytest.raises(openai.RateLimitError) as error:
        ask(openai_of(cluster, alice))
    assert 20 <= int(error.value.response.headers["retry-after"]) <= 30
    assert cluster.stop() == 0, cluster.said()


# ---- turns


@pytest.mark.conformance(26)
def test_waiting_and_fairness(start_cluster, keys, pb):
    noisy, quiet, root = keys.add("noisy"), keys.add("quiet"), keys.add("root", "--operator")
    cluster = start_cluster("--workers", "2", env={"BALEEN_KEY_FILE": keys.path, "BALEEN_RUNNING_MAX": "1", "BALEEN_KEEP_ALIVE_MS": "20"})
    held = long_stream(openai_of(cluster, noisy))

    # what waits hears of it, whole answers too, and both are read by the client as ever
    whole_thread, whole = in_background(lambda: ask(openai_of(cluster, noisy)))
    waiting = lambda: of_tenant(cluster, root, "baleen_tenant_waiting", "noisy")
    wait_for("it to wait", lambda: waiting() == 1)
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=WAIT_S)
    body = {"model": "nano", "messages": QUESTION, "stream": True, "temperature": 0, **CHAT}
    connection.request("POST", "/v1/chat/completions", json.dumps(body),
                       {"Content-Type": "application/json", "Authorization": f"Bearer {noisy}"})
    reply = connection.getresponse()
    assert reply.status == 200 and reply.read(14) == b": keep-alive\n\n"
    assert waiting() == 2
    stream_thread, stream = in_background(
        lambda: "".join(chunk.choices[0].delta.content or "" for chunk in openai_of(cluster, noisy).chat.completions.create(
            model="nano", messages=QUESTION, temperature=0, stream=True, extra_body=CHAT)))
    wait_for("it to wait", lambda: waiting() == 3)

    # a flood of one tenant, then two requests of the other: they do not wait for the flood
    def post(name, key):
        sent = http.client.HTTPConnection(cluster.info["http"], timeout=WAIT_S)
        sent.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": False}),
                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "X-Request-Id": name})
        return sent

    flood = [post(f"noisy-{i}", noisy) for i in range(12)]
    wait_for("the flood to wait", lambda: waiting() == 15)
    two = [post(f"quiet-{i}", quiet) for i in range(2)]
    wait_for("both to wait", lambda: of_tenant(cluster, root, "baleen_tenant_waiting", "quiet") == 2)
    assert waiting() == 15  # nothing has begun yet
    held.close()
    for sent in flood + two:
        answer = sent.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["choices"][0]["message"]["content"] == "The capital of France is Paris."
        sent.close()
    for thread, result in (whole_thread, whole), (stream_thread, stream):
        thread.join(WAIT_S)
        assert result == ["The capital of France is Paris."]
    assert b"data: [DONE]" in reply.read()
    wait_for("all lines", lambda: len(re.findall(r"access id (?:noisy|quiet)-\d+ ", gateway_log(cluster))) == 14)
    order = re.findall(r"access id ((?:noisy|quiet)-\d+) ", gateway_log(cluster))
    assert max(order.index("quiet-0"), order.index("quiet-1")) <= 6, " ".join(order)
    wait_for("nothing to run or wait", lambda: not any(values(scrape(cluster, root), "vllm:num_requests_running").values()) and
             not any(values(scrape(cluster, root), "vllm:num_requests_waiting").values()))
    assert cluster.stop() == 0, cluster.said()


def test_streams_belong_to_tenants(start_cluster, keys, pb):
    alice, mallory = keys.add("alice"), keys.add("mallory")
    cluster = start_cluster("--workers", "2", env={"BALEEN_KEY_FILE": keys.path})
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb.v1_grpc.InferenceStub(channel)
        as_alice, as_mallory = (("x-api-key", alice),), (("x-api-key", mallory),)
        request = pb.v1.GenerateRequest(text="a", routing=pb.v1.Routing(request_id="mine", resumable=True),
                                        sampling=pb.v1.Sampling(max_tokens=3000, ignore_eos=True))
        stream = stub.Generate(request, timeout=WAIT_S, metadata=as_alice)
        next(stream), next(stream)
        assert stub.Abort(pb.v1.AbortRequest(request_ids=["mine"]), timeout=WAIT_S, metadata=as_mallory).aborted == 0
        assert stub.Abort(pb.v1.AbortRequest(all=True), timeout=WAIT_S, metadata=as_mallory).aborted == 0
        resume = pb.v1.GenerateRequest(routing=pb.v1.Routing(request_id="mine"), resume_offset=0)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(resume, timeout=WAIT_S, metadata=as_mallory))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND and "alice" not in error.value.details()
        # the same id is free for another tenant
        short = pb.v1.GenerateRequest(text="b", routing=pb.v1.Routing(request_id="mine"), sampling=pb.v1.Sampling(max_tokens=2))
        assert list(stub.Generate(short, timeout=WAIT_S, metadata=as_mallory))[-1].WhichOneof("event") == "finish"
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(short, timeout=WAIT_S, metadata=as_alice))
        assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert stub.Abort(pb.v1.AbortRequest(request_ids=["mine"]), timeout=WAIT_S, metadata=as_alice).aborted == 1
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code() == grpc.StatusCode.ABORTED
    assert cluster.stop() == 0, cluster.said()


# ---- TLS


def peer_serial(address, ca):
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        with ssl.create_default_context(cafile=ca).wrap_socket(raw, server_hostname=host) as secured:
            return secured.getpeercert()["serialNumber"]


@pytest.mark.conformance(42, part="TLS")
def test_tls_on_both_ports(bin_dir, tmp_path, start_cluster, keys, pb):
    def certs(*options):
        made = subprocess.run([os.path.join(bin_dir, "baleen"), "certs", str(tmp_path / "certs"), *options], capture_output=True,
                              text=True, timeout=WAIT_S)
        assert made.returncode == 0, made.stderr

    certs()
    # a coordinator's certificate is a server's, for the names it was made for: any server's will do
    ca, pair = str(tmp_path / "certs/ca.crt"), [str(tmp_path / f"certs/coordinator.{kind}") for kind in ("crt", "key")]
    alice = keys.add("alice")
    cluster = start_cluster("--workers", "2", env={"BALEEN_KEY_FILE": keys.path, "BALEEN_SERVE_CERT": pair[0], "BALEEN_SERVE_KEY": pair[1]})
    assert "https://" in cluster.line
    cluster.http = "https://" + cluster.info["http"]
    client = openai_of(cluster, alice, http_client=httpx.Client(verify=ssl.create_default_context(cafile=ca)))
    assert ask(client) == "The capital of France is Paris."
    text = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, stream=True, extra_body=CHAT))
    assert text == "The capital of France is Paris."
    stream = long_stream(client)
    stream.close()  # a client that goes is seen through TLS too
    wait_for("its end", lambda: " end cancelled " in gateway_log(cluster))
    with pytest.raises(openai.APIConnectionError):
        ask(openai_of(cluster, alice))  # does not trust it
    with pytest.raises((http.client.HTTPException, OSError)):
        plain = http.client.HTTPConnection(cluster.info["http"], timeout=WAIT_S)
        plain.request("GET", "/health")
        plain.getresponse()

    with open(ca, "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    with grpc.secure_channel(cluster.grpc, credentials) as channel:
        assert "Paris" in grpc_answer(pb.v1_grpc.InferenceStub(channel), pb, alice)
    with grpc.insecure_channel(cluster.grpc) as channel:
        with pytest.raises(grpc.RpcError) as error:
            grpc_answer(pb.v1_grpc.InferenceStub(channel), pb, alice)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    chat = subprocess.run([os.path.join(bin_dir, "baleen"), "chat", "--run", cluster.run, "--key", alice, "--serve-ca", ca,
                           "--thinking", "off", "What is the capital of France?"], capture_output=True, text=True, timeout=WAIT_S)
    assert chat.returncode == 0 and "Paris" in chat.stdout, chat.stderr

    before = peer_serial(cluster.info["http"], ca)
    assert peer_serial(cluster.grpc, ca) == before
    certs("--renew")
    assert peer_serial(cluster.info["http"], ca) != before  # for new connections at once
    assert peer_serial(cluster.grpc, ca) == peer_serial(cluster.info["http"], ca)
    assert ask(client) == "The capital of France is Paris."  # on its old connection
    with open(pair[1], "w") as file:
        file.write("no key")
    assert peer_serial(cluster.info["http"], ca) == peer_serial(cluster.grpc, ca)  # the last good pair
    assert "stays in force" in gateway_log(cluster)
    assert cluster.stop() == 0, cluster.said()


# ---- signs of life


def router_line(cluster, trace):
    """What the router says of the trace's request: its prompt, and that it took it."""
    with open(os.path.join(cluster.run, "router-0.log")) as file:
        return re.findall(rf"gateway \d+ stream \d+: \d+ prompt tokens, .*trace 00-{trace}-00f067aa0ba902b7-01: .*", file.read())


@pytest.mark.conformance(53)
def test_metrics_and_traces(start_cluster, keys, pb):
    alice = keys.add("alice")
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    cluster = start_cluster("--workers", "2", "--log-level", "debug", env={"BALEEN_KEY_FILE": keys.path, "BALEEN_METRICS_OPEN": "on"})
    client = openai_of(cluster, alice)

    def counters():
        found = {}
        for family in text_string_to_metric_families(scrape(cluster)):
            assert family.type in ("counter", "gauge", "histogram") and family.documentation, family.name
            for sample in family.samples:
                if family.type == "counter" or sample.name.endswith(("_bucket", "_count", "_sum")):
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    assert key not in found, key
                    found[key] = sample.value
            if family.type == "histogram":
                rows = [sample for sample in family.samples if sample.name.endswith("_bucket")]
                for labels in {tuple(sorted((k, v) for k, v in row.labels.items() if k != "le")) for row in rows}:
                    mine = [row for row in rows if set(labels) <= set(row.labels.items())]
                    counts = [row.value for row in mine]
                    assert counts == sorted(counts) and mine[-1].labels["le"] == "+Inf"
                    assert found[family.name + "_count", labels] == counts[-1]
        return found

    first = counters()
    reply = client.chat.completions.with_raw_response.create(
        model="nano", messages=QUESTION, temperature=0, extra_body=CHAT,
        extra_headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-Id": "traced-1"})
    assert reply.headers["traceparent"] == f"00-{trace}-00f067aa0ba902b7-01" and reply.headers["x-request-id"] == "traced-1"
    usage = reply.parse().usage
    stream = long_stream(client)
    next(stream)
    second = counters()
    assert all(second[key] >= value for key, value in first.items())  # monotonic, and nothing vanishes

    def grown(name, **labels):
        return sum(value - first.get(key, 0) for key, value in second.items()
                   if key[0] == name and set(labels.items()) <= set(key[1]))

    for family in ("vllm", "sglang"):
        assert grown(family + ":time_to_first_token_seconds_count") == 2  # one finished, one running
        assert grown(family + ":e2e_request_latency_seconds_count") == 1
        assert grown(family + ":prompt_tokens_total") == 2 * usage.prompt_tokens
        assert grown(family + ":generation_tokens_total") > usage.completion_tokens
        assert grown(family + ":inter_token_latency_seconds_count") >= usage.completion_tokens - 1
    assert grown("vllm:request_success_total", finished_reason="stop") == 1
    assert grown("vllm:request_prompt_tokens_sum") == usage.prompt_tokens
    assert grown("vllm:request_generation_tokens_sum") == usage.completion_tokens
    assert grown("baleen_tenant_requests_total", tenant="alice") == 2
    assert list(values(scrape(cluster), "vllm:num_requests_running").values()) == [1]
    stream.close()
    wait_for("it to be gone", lambda: list(values(scrape(cluster), "vllm:num_requests_running").values()) == [0])
    assert sum(v for k, v in counters().items() if k[0] == "vllm:request_success_total" and ("finished_reason", "abort") in k[1]) == 1

    line = next(line for line in gateway_log(cluster).splitlines() if "access id traced-1 " in line)
    assert f"tenant alice surface /chat/completions status 200 end stop prompt {usage.prompt_tokens} " \
           f"completion {usage.completion_tokens} " in line and line.endswith("trace " + trace)
    assert router_line(cluster, trace)
    with grpc.insecure_channel(cluster.grpc) as channel:
        call = pb.v1_grpc.InferenceStub(channel).Chat(question(pb), timeout=WAIT_S,
                                                      metadata=(("x-api-key", alice), ("traceparent", f"00-{trace[::-1]}-00f067aa0ba902b7-01")))
        headers = dict(call.initial_metadata())
        list(call)
    assert headers["traceparent"].split("-")[1] == trace[::-1]
    wait_for("its line", lambda: "surface /baleen.v1.Inference/Chat status 0 end stop" in gateway_log(cluster))
    assert trace[::-1] in gateway_log(cluster)
    assert router_line(cluster, trace[::-1])
    assert cluster.stop() == 0, cluster.said()


def status_of(url):
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.conformance(25)
@pytest.mark.conformance(54)
def test_alive_before_ready(bin_dir, tmp_path):
    """No coordinator yet: it lives, says so, and refuses with a time to try again."""
    log = tmp_path / "gateway.log"
    with open(log, "w") as file:
        gateway = subprocess.Popen([os.path.join(bin_dir, "baleen-gateway"), "--model", NANO, "--coordinator", "127.0.0.1:1"], stderr=file)
    try:
        said = wait_for("its address", lambda: re.search(r"http (\S+:\d+) grpc", log.read_text()))
        url = "http://" + said.group(1)
        assert status_of(url + "/health") == 200 and status_of(url + "/ready") == 503
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
        assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"
    finally:
        gateway.terminate()
        assert gateway.wait(WAIT_S) == 0


@pytest.mark.conformance(25)
@pytest.mark.conformance(54)
def test_drain(start_cluster):
    cluster = start_cluster("--workers", "2", "--no-restart")
    client = openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="nano", messages=QUESTION, stream=True, max_tokens=600, extra_body=LONG)
    next(stream)
    os.kill(cluster.processes("gateway")[0]["pid"], signal.SIGTERM)
    wait_for("the drain", lambda: status_of(cluster.http + "/ready") == 503)
    assert status_of(cluster.http + "/health") == 200
    with pytest.raises(openai.InternalServerError) as error:
        ask(client)
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"  # what ran ends as ever


# ---- slow and many connections


def closed_by_server(connection):
    """Whether it has been, without waiting."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("secured", [False, True])
def test_slow_requests(start_cluster, bin_dir, tmp_path, secured):
    env = {"BALEEN_HTTP_TIMEOUT_MS": "500", "BALEEN_CONNECTIONS_PER_ADDRESS_MAX": "8"}
    if secured:
        subprocess.run([os.path.join(bin_dir, "baleen"), "certs", str(tmp_path / "certs")], check=True, timeout=WAIT_S)
        env.update(BALEEN_SERVE_CERT=str(tmp_path / "certs/coordinator.crt"), BALEEN_SERVE_KEY=str(tmp_path / "certs/coordinator.key"))
    cluster = start_cluster("--workers", "2", env=env)
    host, port = cluster.info["http"].rsplit(":", 1)

    def connect(handshake=True):
        raw = socket.create_connection((host, int(port)), timeout=WAIT_S)
        if not secured or not handshake:
            return raw
        return ssl.create_default_context(cafile=str(tmp_path / "certs/ca.crt")).wrap_socket(raw, server_hostname=host)

    starts = [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Drip: ",
              b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"]
    for start in starts:
        drip = connect()
        drip.sendall(start)
        with pytest.raises(OSError):
            while True:  # never silent for as long as the time-out, never complete
                drip.settimeout(WAIT_S)
                drip.sendall(b"a")
                time.sleep(0.02)
        drip.close()
    silent = connect(handshake=False)
    wait_for("the one that says nothing to be closed", lambda: closed_by_server(silent))
    silent.close()

    # an answer may take as long as it takes
    request = json.dumps({"model": "nano", "messages": QUESTION, "stream": True, "max_tokens": 1500, **LONG}).encode()
    patient = connect()
    patient.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(request) + request)
    patient.settimeout(WAIT_S)
    text = b""
    while b"[DONE]" not in text:
        piece = patient.recv(65536)
        assert piece, text[-500:]
        text += piece
    patient.close()

    held = [connect(handshake=False) for _ in range(12)]
    wait_for("some of them to be closed", lambda: sum(map(closed_by_server, held)) >= 4)
    for connection in held:
        connection.close()
    assert cluster.stop() == 0, cluster.said()
