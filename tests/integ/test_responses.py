"""POST /v1/responses with the openai package against a running cluster."""
import http.client
import json
import os
import signal
import threading

import anthropic
import openai
import pytest

from conftest import wait_for
from script import OPEN, calls, invoke

QUESTION = "What is the capital of France?"
CHAT = {"effort": "none"}
LOW = {"effort": "low"}  # adds nothing to the prompt: how nano was trained to think


@pytest.fixture(scope="module")
def client(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def script(scripted):
    return openai.OpenAI(base_url=scripted.http, api_key="none", max_retries=0)  # the bare root is a base, too


def post(cluster, path, body):
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text)


@pytest.mark.conformance(29)
def test_answer(client):
    reply = client.responses.create(model="nano", input=QUESTION, temperature=0, reasoning=CHAT)
    assert reply.output_text == "The capital of France is Paris."
    assert [item.type for item in reply.output] == ["message"]
    assert (reply.object, reply.status, reply.error, reply.incomplete_details) == ("response", "completed", None, None)
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.output_tokens_details.reasoning_tokens == 0
    assert reply.id.startswith("resp_")


@pytest.mark.conformance(29)
def test_stream(client):
    """Every event in its order; what they add up to, by the package's own count, is the last one's response."""
    whole = client.responses.create(model="nano", input="What is 72 - 38?", temperature=0, reasoning=LOW)
    with client.responses.stream(model="nano", input="What is 72 - 38?", temperature=0, reasoning=LOW) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert "34" in final.output_text and final.output_text == whole.output_text
    assert final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.usage == whole.usage and final.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.conformance(32)
def test_incomplete(client):
    reply = client.responses.create(model="nano", input=QUESTION, max_output_tokens=2, reasoning=CHAT)
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model="nano", input=QUESTION, max_output_tokens=2, reasoning=CHAT, stream=True))
    assert events[-1].type == "response.incomplete" and events[-1].response.output[0].status == "incomplete"


@pytest.mark.conformance(32)
def test_nothing_is_stored(client):
    for field, value in (("previous_response_id", "resp_1"), ("conversation", "c"), ("background", True)):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="nano", input=QUESTION, **{field: value})
        assert error.value.param == field and field in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_conversation(client):
    reply = client.responses.create(model="nano", temperature=0, reasoning=CHAT, instructions="You are a helpful assistant.", input=[
        {"role": "user", "content": QUESTION},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "The capital of France is Paris."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "What is the capital of Japan?"}]}])
    assert "Tokyo" in reply.output_text and reply.instructions == "You are a helpful assistant."


@pytest.mark.conformance(16, 29)
def test_logprobs(client):
    """With each token of the text what it and the likeliest were worth, streamed and whole alike, as the package reads them."""
    fields = {"model": "nano", "input": "What is 72 - 38?", "temperature": 0, "reasoning": LOW, "top_logprobs": 3,
              "include": ["message.output_text.logprobs"]}
    text = client.responses.create(**fields).output[-1].content[0]
    assert len(text.logprobs) > 1 and bytes(byte for token in text.logprobs for byte in token.bytes).decode() == text.text
    for token in text.logprobs:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])  # greedy takes the best
    with client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response().output[-1].content[0]
    deltas = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    seen = [(token.token, token.logprob, [(top.token, top.logprob) for top in token.top_logprobs]) for token in text.logprobs]
    for told in (deltas, done.logprobs, final.logprobs):
        assert [(token.token, token.logprob, [(top.token, top.logprob) for top in token.top_logprobs]) for token in told] == seen
    plain = client.responses.create(**{**fields, "include": []}).output[-1].content[0]
    assert plain.text == text.text and plain.logprobs == []


# ---- scripted answers: the model says the text of the last user or tool message ----

TOOLS = [{"type": "function", "name": "shell", "description": "Runs a command", "strict": False,
          "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}, "required": ["command"]}},
         {"type": "custom", "name": "apply_patch", "description": "Applies a patch",
          "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
         {"type": "namespace", "name": "mail", "description": "Mail", "tools": [{"type": "function", "name": "send", "parameters": {}}]},
         {"type": "web_search"}]


def says(client, text, stream=False, **fields):
    fields = {"model": "scripted", "input": text, "tools": TOOLS, "reasoning": LOW, **fields}
    if not stream:
        return client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert events[-1].type == "response.completed"
    done = [event.item for event in events if event.type == "response.output_item.done"]  # where some clients take items from
    assert [item.model_dump() for item in done] == [item.model_dump() for item in events[-1].response.output]
    return events[-1].response


ALL = calls(invoke("shell", command=["ls", '"x"\n']), invoke("apply_patch", input="*** Begin\n\"p\"\n"), invoke("mail__send"))


@pytest.mark.conformance(30)
@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_their_replay(script, stream):
    first = says(script, "Three.</think>See:" + ALL, stream)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "custom_tool_call", "function_call"]
    shell, patch, mail = first.output[2:]
    assert json.loads(shell.arguments) == {"command": ["ls", '"x"\n']} and shell.name == "shell"
    assert (patch.name, patch.input) == ("apply_patch", '*** Begin\n"p"\n')
    assert (mail.name, mail.namespace, mail.arguments) == ("send", "mail", "{}")
    assert len({shell.call_id, patch.call_id, mail.call_id}) == 3
    again = [{"role": "user", "content": "go"}, *[item.model_dump(exclude_none=True) for item in first.output],
             {"type": "function_call_output", "call_id": mail.call_id, "output": "sent"},
             {"type": "custom_tool_call_output", "call_id": patch.call_id, "output": "patched"},
             {"type": "function_call_output", "call_id": shell.call_id, "output": [{"type": "input_text", "text": "a.txt"}]}]
    second = says(script, again, stream, reasoning=CHAT)
    assert second.output_text == "sent"  # the last of the results in the order of the calls


@pytest.mark.conformance(30)
def test_sealed_reasoning(scripted, script):
    """A client that may not look into reasoning brings it back all the same: the prompt is the same as with its text."""
    first = says(script, "Deep thought.</think>" + calls(invoke("shell", command=[])), include=["reasoning.encrypted_content"])
    reasoning = first.output[0].model_dump(exclude_none=True)
    rest = [first.output[1].model_dump(exclude_none=True), {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "x"}]
    sealed = {key: value for key, value in reasoning.items() if key != "content"}
    opened = {key: value for key, value in reasoning.items() if key != "encrypted_content"}
    none = {**opened, "content": []}
    counts = [says(script, [{"role": "user", "content": "go"}, item, *rest], reasoning=LOW).usage.input_tokens for item in (sealed, opened, none)]
    assert counts[0] == counts[1] > counts[2]
    assert "encrypted_content" not in says(script, "a</think>b").output[0].model_dump(exclude_none=True)


def test_one_call_at_most(script):
    for stream in (False, True):
        reply = says(script, "a</think>" + ALL, stream, parallel_tool_calls=False)
        assert [item.type for item in reply.output] == ["reasoning", "function_call"]


@pytest.mark.conformance(56)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text, kinds", [
    ("never ends", ["reasoning"]),
    ("a</think>b<think>c</think>d", ["reasoning", "message", "reasoning", "message"]),
    ("a</think>" + OPEN + "nothing", ["reasoning"]),
    ("a" + calls(invoke("shell", command=[])), ["reasoning", "function_call"]),
    ("a</think>" + OPEN + '<｜DSML｜invoke name="she', ["reasoning"]),
    ("a</think>" + OPEN + '<｜DSML｜invoke name="shell">\n<｜DSML｜parameter name="command" string="true">cut o', ["reasoning", "function_call"]),
    ("a</think>" + OPEN + '<｜DSML｜invoke name="apply_patch">\n<｜DSML｜parameter name="input" string="true">cut o', ["reasoning", "custom_tool_call"]),
    ("a</think>b" + calls(invoke("shell", command=[])) + "after", ["reasoning", "message", "function_call"]),
    ("a</think>" + calls(invoke("no_such_tool", a=1)), ["reasoning", "function_call"]),
])
def test_malformed_output(script, text, kinds, stream):
    assert [item.type for item in says(script, text, stream).output] == kinds


def test_what_coding_agents_send(script):
    """As Codex does: standing instructions, many tools, nothing stored, text verbosity, headers of its own."""
    tools = TOOLS + [{"type": "function", "name": f"tool_{i}", "description": "Does something. " * 20, "strict": True,
                      "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}} for i in range(40)]
    with script.responses.stream(
            model="scripted", instructions="You are an agent. " * 100, tools=tools, tool_choice="auto", parallel_tool_calls=True,
            store=False, include=["reasoning.encrypted_content"], prompt_cache_key="session-1", text={"verbosity": "low"},
            reasoning={"effort": "medium", "summary": "auto"}, service_tier="auto", extra_headers={"originator": "codex", "session_id": "s"},
            input=[{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
                   {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go</think>" + ALL}]}]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.created", "response.output_item.done", "response.completed"} <= kinds
    assert final.output[0].encrypted_content and len(final.output) == 4


# ---- errors, long silences, clients that go ----

@pytest.mark.parametrize("field, value", [
    ("input", 5), ("input", []), ("input", [{"role": "wizard", "content": "x"}]), ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
    ("max_output_tokens", 0), ("temperature", "warm"), ("top_p", 2), ("stream", "yes"), ("tools", {}), ("tools", [{"type": "file_search"}]),
    ("tool_choice", "maybe"), ("instructions", 5), ("reasoning", {"effort": "hard"}), ("parallel_tool_calls", 1),
    ("include", "message.output_text.logprobs"), ("top_logprobs", 21), ("top_logprobs", "3"),
])
def test_wrong_fields(cluster, field, value):
    status, reply = post(cluster, "/v1/responses", {"model": "nano", "input": "x", "max_output_tokens": 2, field: value})
    assert status == 400 and reply["error"]["code"] == "invalid_request_error", reply
    assert field in reply["error"]["message"]


def test_errors(client, cluster):
    with pytest.raises(openai.NotFoundError) as error:
        client.responses.create(model="gpt-5", input="x")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="nano", input="word " * 20000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "input"
    status, reply = post(cluster, "/responses", b"{")
    assert status == 400 and "JSON" in reply["error"]["message"]


@pytest.mark.conformance(33)
def test_heartbeats_during_a_long_prompt(start_cluster):
    """Events, not comments: a client that counts only those hears something, and its place in the answer stays the same."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_KEEP_ALIVE_MS": "20"})
    client = openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)
    events = list(client.responses.create(model="nano", input="word " * 1500, max_output_tokens=3, stream=True))
    first = [event.type for event in events].index("response.output_item.added")
    beats = events[2:first]
    assert beats and {event.type for event in beats} == {"response.in_progress"} and {event.sequence_number for event in beats} == {1}
    told = [event.sequence_number for event in events if event.type != "response.in_progress"]
    assert told == [0, *range(2, told[-1] + 1)]
    assert events[-1].type == "response.incomplete"


def test_failure_on_the_way(start_cluster):
    cluster = start_cluster("--workers", "1", "--no-restart", env={"BALEEN_REOPEN_MS": "500"})
    client = openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)
    events = []
    for event in client.responses.create(model="nano", input=QUESTION, reasoning=CHAT, stream=True, extra_body={"ignore_eos": True}):
        events.append(event)
        if len(events) == 8:
            os.kill(cluster.processes("router")[0]["pid"], signal.SIGKILL)
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert events[-1].response.error.code == "unavailable" and events[-1].response.output


def test_disconnect_frees_everything(cluster, client):
    cancelled = cluster.cancelled()
    stream = client.responses.create(model="nano", input=QUESTION, stream=True, extra_body={"ignore_eos": True})
    for _ in zip(range(8), stream):
        pass
    stream.close()
    cluster.wait_until_freed(cancelled)


def test_come_back(scripted):
    def events(reply):
        return [event for event in reply.read().decode().split("\n\n") if event]

    connection = http.client.HTTPConnection(scripted.info["http"], timeout=300)
    connection.request("POST", "/v1/responses", json.dumps({"model": "scripted", "stream": True, "input": "hm</think>So:" + ALL, "tools": TOOLS,
                                                            "include": ["reasoning.encrypted_content"]}))
    whole = events(connection.getresponse())
    assert len(whole) > 30
    for at in (1, 2, len(whole) // 2, len(whole) - 1):
        identity = whole[at - 1].split("\n")[0].removeprefix("id: ")
        connection.request("POST", "/v1/responses", "{}", headers={"Last-Event-ID": identity})
        assert events(connection.getresponse()) == whole[at:]
    connection.close()


@pytest.mark.conformance(58)
def test_three_surfaces_keep_apart(scripted):
    """Many at once over all HTTP surfaces, each its own words."""
    messages = anthropic.Anthropic(base_url=scripted.http, api_key="none", max_retries=0)
    client = openai.OpenAI(base_url=scripted.http + "/v1", api_key="none", max_retries=0)
    got = {}

    def one(i):
        nonce, thinking = f"nonce-{i}-" + "x" * (i % 7), {"type": "disabled"}
        if i % 3 == 0:
            with messages.messages.stream(model="scripted", max_tokens=100, thinking=thinking, messages=[{"role": "user", "content": nonce}]) as s:
                got[nonce] = s.get_final_text()
        elif i % 3 == 1:
            got[nonce] = client.responses.create(model="scripted", input=nonce, reasoning=CHAT).output_text
        else:
            got[nonce] = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": nonce}],
                                                        extra_body={"thinking": thinking}).choices[0].message.content

    threads = [threading.Thread(target=one, args=(i,)) for i in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 150 and all(nonce == text for nonce, text in got.items())
    wait_for("the ledger to be zero", scripted.ledger_is_zero)


def test_after_all_that(client, cluster):
    test_answer(client)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
