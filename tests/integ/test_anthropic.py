"""The anthropic package against a running cluster: POST /v1/messages and what belongs to it."""
import http.client
import json
import os
import signal
import threading

import anthropic
import pytest

from conftest import wait_for
from script import END, OPEN, calls, invoke

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SUM = [{"role": "user", "content": "What is 72 - 38?"}]
GREEDY = {"temperature": 0}  # the package has no argument for it
CHAT = {"type": "disabled"}
LOW = {"output_config": {"effort": "low"}, **GREEDY}  # low effort adds nothing to the prompt: how nano was trained to think


@pytest.fixture(scope="module")
def client(cluster):
    return anthropic.Anthropic(base_url=cluster.http, api_key="none", max_retries=0)


def post(cluster, path, body, headers=None):
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers or {})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply, json.loads(text)


@pytest.mark.conformance(34)
def test_answer(client):
    reply = client.messages.create(model="nano", max_tokens=50, messages=QUESTION, thinking=CHAT, extra_body=GREEDY)
    assert [block.type for block in reply.content] == ["text"]
    assert reply.content[0].text == "The capital of France is Paris."
    assert (reply.stop_reason, reply.stop_sequence, reply.role, reply.model) == ("end_turn", None, "assistant", "nano")
    assert reply.id.startswith("msg_") and reply._request_id
    assert reply.usage.input_tokens > 0 and reply.usage.output_tokens > 0


@pytest.mark.conformance(34)
@pytest.mark.parametrize("base", ["", "/anthropic"])
def test_stream_equals_answer(cluster, base):
    client = anthropic.Anthropic(base_url=cluster.http + base, auth_token="none", max_retries=0)
    whole = client.messages.create(model="nano", max_tokens=50, messages=QUESTION, thinking=CHAT, extra_body=GREEDY)
    with client.messages.stream(model="nano", max_tokens=50, messages=QUESTION, thinking=CHAT, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.usage == whole.usage and final.stop_reason == whole.stop_reason
    assert [block.text for block in final.content] == [block.text for block in whole.content]


@pytest.mark.conformance(34)
def test_order_of_events(client):
    events = list(client.messages.create(model="nano", max_tokens=80, messages=SUM, stream=True, extra_body=LOW))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    open_block, n_blocks = None, 0
    for event in events:
        if event.type == "content_block_start":
            assert open_block is None and event.index == n_blocks
            open_block, n_blocks = event.index, n_blocks + 1
        elif event.type == "content_block_delta":
            assert event.index == open_block
        elif event.type == "content_block_stop":
            assert event.index == open_block
            open_block = None
    assert open_block is None and n_blocks == 2


@pytest.mark.conformance(35)
def test_thinking_and_its_replay(client):
    with client.messages.stream(model="nano", max_tokens=200, messages=SUM, extra_body=LOW) as stream:
        kinds = [event.delta.type for event in stream if event.type == "content_block_delta"]
        first = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "text"]
    assert kinds.count("signature_delta") == 1
    assert first.content[0].thinking and first.content[0].signature and "34" in first.content[1].text
    second = client.messages.create(model="nano", max_tokens=200, extra_body=LOW, messages=[
        *SUM, {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": "What is the capital of Japan?"}])
    assert second.content[-1].text


def test_length_and_stop_sequence(client):
    reply = client.messages.create(model="nano", max_tokens=1, messages=QUESTION, thinking=CHAT, extra_body=GREEDY)
    assert reply.stop_reason == "max_tokens" and reply.usage.output_tokens == 1
    reply = client.messages.create(model="nano", max_tokens=50, messages=QUESTION, thinking=CHAT, stop_sequences=[" is Par", "zzz"],
                                   extra_body=GREEDY)
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", " is Par")
    assert reply.content[0].text == "The capital of France"


def test_prefix_is_continued(client):
    reply = client.messages.create(model="nano", max_tokens=50, thinking=CHAT, extra_body=GREEDY,
                                   messages=[*QUESTION, {"role": "assistant", "content": "The capital of France is"}])
    assert "Paris" in reply.content[0].text and "capital" not in reply.content[0].text


TOOLS = [{"name": "get_weather", "description": "Weather of a city", "cache_control": {"type": "ephemeral"},
          "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]
CALLS = [{"role": "user", "content": "Weather in Paris and Rome?"},
         {"role": "assistant", "content": [{"type": "thinking", "thinking": "Two calls.", "signature": "s"},
                                           {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}},
                                           {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "Rome"}}]}]


def result(identity, content, **more):
    return {"type": "tool_result", "tool_use_id": identity, "content": content, **more}


def count(client, **fields):
    return client.messages.count_tokens(model="claude-haiku-4-5", **fields).input_tokens


@pytest.mark.conformance(36)
def test_tool_results(client):
    """As a string, as blocks, as an error; in any order, the prompt is the same."""
    as_strings = [*CALLS, {"role": "user", "content": [result("a", "sunny"), result("b", "rain"), {"type": "text", "text": "So?"}]}]
    swapped = [*CALLS, {"role": "user", "content": [result("b", "rain", is_error=True), result("a", [{"type": "text", "text": "sunny"}]),
                                                    {"type": "text", "text": "So?"}]}]
    assert count(client, messages=as_strings, tools=TOOLS) == count(client, messages=swapped, tools=TOOLS)
    replies = [client.messages.create(model="nano", max_tokens=20, messages=messages, tools=TOOLS, extra_body=GREEDY)
               for messages in (as_strings, swapped)]
    plain = [[block.model_dump(exclude={"signature", "id"}) for block in reply.content] for reply in replies]
    assert plain[0] == plain[1]


@pytest.mark.conformance(37)
def test_count_is_what_is_generated_from(client):
    for fields in ({"messages": QUESTION}, {"messages": SUM, "system": "Be brief."}, {"messages": QUESTION, "tools": TOOLS},
                   {"messages": CALLS + [{"role": "user", "content": [result("a", "1"), result("b", "2")]}], "tools": TOOLS},
                   {"messages": QUESTION, "thinking": CHAT}):
        usage = client.messages.create(model="nano", max_tokens=1, **fields).usage
        assert count(client, **fields) == usage.input_tokens + usage.cache_read_input_tokens, fields


def test_system_in_the_middle(client):
    messages = [*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "system", "content": "Now be brief."}, *QUESTION]
    assert client.messages.create(model="nano", max_tokens=10, messages=messages, thinking=CHAT).content


def test_same_answer_in_company(client):
    alone, together = {}, {}

    def ask(country, into):
        with client.messages.stream(model="nano", max_tokens=50, thinking=CHAT, extra_body=GREEDY,
                                    messages=[{"role": "user", "content": f"What is the capital of {country}?"}]) as stream:
            into[country] = stream.get_final_text()

    countries = ["France", "Japan", "Peru", "Italy", "Kenya", "Canada"]
    for country in countries:
        ask(country, alone)
    threads = [threading.Thread(target=ask, args=(country, together)) for country in countries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and "Paris" in alone["France"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").display_name == "nano"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


# ---- scripted answers: the model says the text of the last user or tool message ----

@pytest.fixture(scope="module")
def script(scripted):
    return anthropic.Anthropic(base_url=scripted.http, api_key="none", max_retries=0)


def says(client, text, stream=False, **fields):
    """The message in which the model says text, after it has been told to think or not."""
    fields = {"model": "scripted", "max_tokens": 4000, "messages": [{"role": "user", "content": text}], "tools": TOOLS, "thinking": CHAT, **fields}
    if not stream:
        return client.messages.create(**fields)
    with client.messages.stream(**fields) as events:
        return events.get_final_message()


BOTH = calls(invoke("get_weather", city='Paris "x"\n<y>', n=[1, {"a": None}]), invoke("get_weather"))


@pytest.mark.conformance(37, 38)
def test_what_coding_agents_send(script):
    """Many tools, system in blocks with cache_control, a beta header, ?beta=true, other models' names, all at once."""
    tools = [{"name": f"tool_{i}", "description": "Does something with a file. " * 10,
              "input_schema": {"type": "object", "properties": {"path": {"type": "string"}, "all": {"type": "boolean"}}}} for i in range(60)]
    assert len(json.dumps(tools)) > 20000
    fields = {"max_tokens": 8, "tools": tools, "metadata": {"user_id": "u"},
              "betas": ["claude-code-20250219", "no-such-beta-2030-01-01"],
              "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
                         {"type": "text", "text": "Be careful."}],
              "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello</think>Hi", "cache_control": {"type": "ephemeral"}}]}]}
    with script.beta.messages.stream(model="claude-opus-4-6", thinking={"type": "enabled", "budget_tokens": 1024},
                                     extra_body={"context_management": {"edits": []}}, **fields) as stream:
        answers = {"opus": stream.get_final_message()}

    def title():  # a small model asked in parallel
        answers["haiku"] = script.beta.messages.create(model="claude-haiku-4-5", max_tokens=10, messages=QUESTION, thinking=CHAT)

    thread = threading.Thread(target=title)
    thread.start()
    tokens = script.beta.messages.count_tokens(model="claude-opus-4-6", **{key: fields[key] for key in ("tools", "system", "messages", "betas")})
    thread.join()
    assert tokens.input_tokens == answers["opus"].usage.input_tokens
    assert answers["haiku"].content[0].type == "text"


@pytest.mark.conformance(36)
@pytest.mark.parametrize("stream", [False, True])
def test_tool_use(script, stream):
    reply = says(script, "Two calls.</think>See:" + BOTH, stream, thinking={"type": "adaptive"})
    assert [block.type for block in reply.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (reply.content[0].thinking, reply.content[1].text) == ("Two calls.", "See:")
    assert [block.input for block in reply.content[2:]] == [{"city": 'Paris "x"\n<y>', "n": [1, {"a": None}]}, {}]
    assert reply.content[2].id != reply.content[3].id and all(block.id.startswith("toolu_") for block in reply.content[2:])
    assert reply.stop_reason == "tool_use"


@pytest.mark.conformance(36)
def test_tool_round_trip(script):
    """What came out goes in again; the answer to it is what the last tool gave."""
    first = says(script, "hm</think>" + BOTH, thinking={"type": "enabled", "budget_tokens": 1024})
    history = [{"role": "user", "content": "go"}, {"role": "assistant", "content": [block.model_dump() for block in first.content]}]
    identities = [block.id for block in first.content if block.type == "tool_use"]
    for results in ([result(identities[0], "one"), result(identities[1], "two")],
                    [result(identities[1], [{"type": "text", "text": "two"}]), result(identities[0], "one", is_error=True)]):
        second = says(script, None, messages=[*history, {"role": "user", "content": results}])
        assert second.content[0].text == "two"  # in the order of the calls, whatever the order of the results


def test_one_tool_at_most(script):
    for stream in (False, True):
        reply = says(script, BOTH, stream, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert [block.type for block in reply.content] == ["tool_use"] and reply.stop_reason == "tool_use"


def test_no_tools(script):
    """Without tools, or with choice none, their markup is text."""
    for fields in ({"tools": []}, {"tool_choice": {"type": "none"}}):
        reply = says(script, "x" + BOTH, **fields)
        assert [block.type for block in reply.content] == ["text"] and "invoke" in reply.content[0].text


@pytest.mark.conformance(56)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text, kinds, stop", [
    ("never ends", ["thinking"], "end_turn"),
    ("a</think>b<think>c</think>d", ["thinking", "text", "thinking", "text"], "end_turn"),
    ("a</think></think>b", ["thinking", "text"], "end_turn"),
    ("a</think>" + OPEN + "nothing", ["thinking"], "end_turn"),
    ("a" + calls(invoke("get_weather", city="x")), ["thinking", "tool_use"], "tool_use"),
    ("a</think>" + OPEN + '<｜DSML｜invoke name="get_w', ["thinking"], "end_turn"),
    ("a</think>" + OPEN + '<｜DSML｜invoke name="get_weather">\n', ["thinking", "tool_use"], "tool_use"),
    ("a</think>b" + calls(invoke("get_weather")) + "after", ["thinking", "text", "tool_use"], "tool_use"),
    ("a</think>" + calls(invoke("no_such_tool", a=1)).replace(END, ""), ["thinking", "tool_use"], "tool_use"),
])
def test_malformed_output(script, text, kinds, stop, stream):
    reply = says(script, text, stream, thinking={"type": "adaptive"})
    assert [block.type for block in reply.content] == kinds and reply.stop_reason == stop
    assert all(isinstance(block.input, dict) for block in reply.content if block.type == "tool_use")


@pytest.mark.conformance(56)
def test_a_value_that_is_no_json(script):
    text = calls(invoke("get_weather", city=5)).replace(">5<", ">five<")
    assert says(script, text).content[0].input == {"city": "five"}


def test_a_call_that_is_cut_off(script):
    reply = says(script, calls(invoke("get_weather", city="x" * 400)), max_tokens=60)
    assert reply.stop_reason == "max_tokens" and list(reply.content[0].input) == ["arguments"]


# ---- errors, in this interface's own shape ----

@pytest.mark.conformance(39)
def test_errors_are_the_packages_own(client):
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(model="gpt-5", max_tokens=5, messages=QUESTION)
    assert error.value.body["error"]["type"] == "not_found_error" and error.value.body["request_id"] == error.value.request_id
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(model="nano", max_tokens=0, messages=QUESTION)
    assert error.value.body["error"]["type"] == "invalid_request_error" and "max_tokens" in error.value.message
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(model="nano", max_tokens=5, messages=[{"role": "user", "content": "word " * 20000}])
    assert error.value.body["error"]["message"].startswith("prompt is too long: ") and "> 16383 maximum" in error.value.message


@pytest.mark.parametrize("field, value", [
    ("max_tokens", None), ("max_tokens", "many"), ("temperature", "warm"), ("temperature", 3), ("top_p", 2), ("top_k", -5),
    ("stop_sequences", 5), ("stream", "yes"), ("messages", []), ("messages", "hello"), ("messages", [{"role": "user"}]),
    ("messages", [{"role": "wizard", "content": "x"}]), ("messages", [{"role": "user", "content": [{"type": "image"}]}]),
    ("tools", {}), ("tools", [{"name": "x"}]), ("tool_choice", {"type": "maybe"}), ("system", 5),
])
def test_wrong_fields(cluster, field, value):
    body = {"model": "nano", "max_tokens": 2, "messages": QUESTION, field: value}
    reply, error = post(cluster, "/v1/messages", body)
    assert reply.status == 400 and error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert field in error["error"]["message"]
    assert error["request_id"] == reply.getheader("request-id")


def test_malformed_json_and_routes(cluster):
    reply, error = post(cluster, "/v1/messages", b'{"model": ')
    assert reply.status == 400 and "JSON" in error["error"]["message"]
    reply, error = post(cluster, "/v1/messages/batches", {})
    assert reply.status == 404 and error["error"]["type"] == "not_found_error"
    reply, error = post(cluster, "/api/event_logging/batch", {})
    assert reply.status == 404
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    connection.request("GET", "/v1/messages")
    assert connection.getresponse().status == 405


@pytest.mark.conformance(39)
def test_overload_is_529(start_cluster):
    """More at once than are let in: told to wait, and how long; the package tries again by itself."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_STREAMS_MAX": "1"})
    client = anthropic.Anthropic(base_url=cluster.http, api_key="none", max_retries=0)
    long = [{"role": "user", "content": "Count from 1 to 100."}]
    with client.messages.stream(model="nano", max_tokens=4000, messages=long, thinking=CHAT, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        with pytest.raises(anthropic.APIStatusError) as error:
            client.messages.create(model="nano", max_tokens=5, messages=QUESTION)
        assert error.value.status_code == 529 and error.value.body["error"]["type"] == "overloaded_error"
        assert type(error.value).__name__ == "OverloadedError"
        assert int(error.value.response.headers["retry-after"]) >= 1
        waiting = client.with_options(max_retries=20)
        got = []
        thread = threading.Thread(target=lambda: got.append(waiting.messages.create(model="nano", max_tokens=5, messages=QUESTION)))
        thread.start()
    thread.join()
    assert got and got[0].usage.output_tokens == 5


@pytest.mark.conformance(39)
def test_failure_on_the_way(start_cluster):
    """The router of a stream is killed and none comes: an error event, which the package raises."""
    cluster = start_cluster("--workers", "1", "--no-restart", env={"BALEEN_REOPEN_MS": "500"})
    client = anthropic.Anthropic(base_url=cluster.http, api_key="none", max_retries=0)
    with pytest.raises(anthropic.APIStatusError) as error:
        with client.messages.stream(model="nano", max_tokens=4000, messages=QUESTION, thinking=CHAT, extra_body={"ignore_eos": True}) as stream:
            for n, _ in enumerate(stream):
                if n == 5:
                    os.kill(cluster.processes("router")[0]["pid"], signal.SIGKILL)
    assert error.value.body["error"]["type"] == "overloaded_error"


def test_pings_during_a_long_prompt(start_cluster):
    cluster = start_cluster("--workers", "1", env={"BALEEN_KEEP_ALIVE_MS": "20"})
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    body = {"model": "nano", "max_tokens": 3, "stream": True, "messages": [{"role": "user", "content": "word " * 1500}]}
    connection.request("POST", "/v1/messages", json.dumps(body))
    events = connection.getresponse().read().decode().split("\n\n")
    before = events[:[n for n, event in enumerate(events) if "content_block_start" in event][0]]
    assert sum('{"type":"ping"}' in event for event in before) > 1, events[:5]
    assert sum("id: " in event and '{"type":"ping"}' in event for event in events) == 1  # the answer's own


def test_disconnect_frees_everything(cluster):
    cancelled = cluster.cancelled()
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    body = {"model": "nano", "max_tokens": 4000, "stream": True, "ignore_eos": True, "messages": QUESTION}
    connection.request("POST", "/v1/messages", json.dumps(body))
    reply = connection.getresponse()
    reply.read(300)
    reply.close()
    connection.close()
    cluster.wait_until_freed(cancelled)


def test_come_back(cluster):
    """From every event on: the same rest, also when the client went away in the middle."""
    def events(reply):
        return [event for event in reply.read().decode().split("\n\n") if event]

    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    body = {"model": "nano", "max_tokens": 60, "stream": True, "stream_options": {"resumable": True}, "temperature": 0,
            "messages": SUM, "output_config": {"effort": "low"}}
    connection.request("POST", "/v1/messages", json.dumps(body))
    whole = events(connection.getresponse())
    for at in (1, 2, len(whole) // 2, len(whole) - 1):
        identity = whole[at - 1].split("\n")[0].removeprefix("id: ")
        connection.request("GET", "/v1/streams/" + identity.split(":")[0], headers={"Last-Event-ID": identity})
        assert events(connection.getresponse()) == whole[at:]
    connection.close()


def test_after_all_that(client, cluster):
    test_answer(client)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
