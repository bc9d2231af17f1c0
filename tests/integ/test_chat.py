"""Chat completions with the openai package: tools, thinking, stop strings, usage, prefix and FIM, and malformed output of the model. The
model is scripted: it says the text of the last user or tool message."""
import http.client
import json
import socket
import threading

import openai
import pytest

from conftest import wait_for
from script import END, OPEN, calls, function, invoke, parameter

CHAT = {"thinking": {"type": "disabled"}}
THINK = {"thinking": {"type": "enabled"}}
TOOLS = [function("f", a={"type": "string"}, n={"type": "integer"}), function("g")]


@pytest.fixture(scope="module")
def client(scripted):
    return openai.OpenAI(base_url=scripted.http + "/v1", api_key="none", max_retries=0)


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, text, **fields):
    """text: what the model shall say, or a whole conversation."""
    fields["extra_body"] = {**CHAT, **fields.get("extra_body", {})}
    return client.chat.completions.create(model="scripted", messages=user(text) if isinstance(text, str) else text, **fields)


def post(cluster, path, body, headers=None):
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text)


def tokenize(cluster, **body):
    status, reply = post(cluster, "/tokenize", {"model": "scripted", **body})
    assert status == 200, reply
    return reply["tokens"]


def spelled(cluster, ids):
    status, reply = post(cluster, "/detokenize", {"model": "scripted", "tokens": ids})
    assert status == 200, reply
    return reply["prompt"]


class Joined:
    """What the chunks of one choice join to, with what a client relies on checked on the way."""

    def __init__(self, chunks, index=0):
        self.reasoning, self.content, self.calls, self.finish = "", "", [], None
        for chunk in chunks:
            for choice in chunk.choices:
                if choice.index == index:
                    self.take(choice)
        assert self.finish is not None

    def take(self, choice):
        assert self.finish is None, "nothing follows the finish"
        delta = choice.delta
        self.reasoning += getattr(delta, "reasoning_content", None) or ""
        self.content += delta.content or ""
        for call in delta.tool_calls or []:
            if call.index == len(self.calls):
                assert call.id and call.type == "function" and call.function.name is not None and call.function.arguments == ""
                self.calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            else:
                assert call.index == len(self.calls) - 1, "calls come one after the other"
                assert call.id is None and call.function.name is None, "name and id come once"
                self.calls[-1]["arguments"] += call.function.arguments
        self.finish = choice.finish_reason


def both(client, text, **fields):
    """The same answer whole and streamed: (message, finish, Joined)."""
    whole = ask(client, text, **fields).choices[0]
    joined = Joined(ask(client, text, stream=True, **fields))
    assert (whole.message.content or "") == joined.content
    assert (getattr(whole.message, "reasoning_content", None) or "") == joined.reasoning
    assert whole.finish_reason == joined.finish
    assert [call.function.name for call in whole.message.tool_calls or []] == [call["name"] for call in joined.calls]
    return whole.message, whole.finish_reason, joined


# ---- answers ----

@pytest.mark.conformance(1)
def test_answer(client):
    reply = ask(client, "Hello there")
    assert reply.choices[0].message.content == "Hello there" and reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.prompt_tokens == usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens


@pytest.mark.conformance(2)
def test_stream(client, scripted):
    chunks = list(ask(client, "one two three", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:] if chunk.choices)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert Joined(chunks).content == ask(client, "one two three").choices[0].message.content == "one two three"
    connection = http.client.HTTPConnection(scripted.info["http"], timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "scripted", "messages": user("x"), "stream": True, **CHAT}),
                       {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.getheader("Content-Type").startswith("text/event-stream")
    events = [event for event in reply.read().decode().split("\n\n") if event]
    assert events[-1].splitlines()[-1] == "data: [DONE]"
    connection.close()


@pytest.mark.conformance(3)
def test_thinking(client):
    message, finish, _ = both(client, "I wonder</think>Forty-two", extra_body=THINK)
    assert message.reasoning_content == "I wonder" and message.content == "Forty-two" and finish == "stop"
    reply = ask(client, "I wonder</think>Forty-two", extra_body=THINK)
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < reply.usage.completion_tokens
    default = client.chat.completions.create(model="scripted", messages=user("I wonder</think>Forty-two"))
    assert default.choices[0].message.reasoning_content == "I wonder"
    reply = ask(client, "Forty-two")
    assert "reasoning_content" not in reply.choices[0].message.model_dump()
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.conformance(4)
def test_efforts(client):
    count = {}
    for word in ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"):
        count[word] = client.chat.completions.create(model="scripted", messages=user("solve it"), extra_body={"reasoning_effort": word}).usage.prompt_tokens
    assert count["minimal"] == count["low"] < count["medium"] == count["high"] == count["xhigh"] < count["max"] == count["ultra"]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="scripted", messages=user("solve it"), extra_body={"reasoning_effort": "hard"})


@pytest.mark.conformance(5)
def test_usage_at_the_end(client):
    chunks = list(ask(client, "one two three", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    chunks = list(ask(client, "one two three", stream=True))
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.conformance(5)
def test_usage_all_the_way(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, "t</think>one two three four", stream=True, stream_options=options, extra_body=THINK))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and len(set(counts)) > 4
    assert chunks[-1].usage.completion_tokens == counts[-1] and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == chunks[-2].usage.completion_tokens_details.reasoning_tokens == 1
    whole = ask(client, "t</think>one two three four", extra_body=THINK).usage
    assert whole == chunks[-1].usage
    with pytest.raises(openai.BadRequestError):
        ask(client, "x", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": "yes"})


# ---- tools ----

@pytest.mark.conformance(6)
def test_a_call(client):
    text = "Let me see." + calls(invoke("f", a='x "quoted"\n<b>', n=3))
    message, finish, joined = both(client, text, tools=TOOLS)
    assert finish == "tool_calls" and message.content == "Let me see."
    call, = message.tool_calls
    assert call.id.startswith("call_00_") and len(call.id) == 32 and call.type == "function" and call.function.name == "f"
    assert json.loads(call.function.arguments) == {"a": 'x "quoted"\n<b>', "n": 3}
    assert joined.calls[0]["arguments"] == call.function.arguments
    message, finish, _ = both(client, calls(invoke("g")), tools=TOOLS)
    assert not message.content and message.tool_calls[0].function.arguments == "{}"


@pytest.mark.conformance(7)
def test_two_calls(client):
    text = "I think</think>" + calls(invoke("f", a="1"), invoke("g", deep={"k": [1, None]}))
    message, finish, joined = both(client, text, tools=TOOLS, extra_body=THINK)
    assert [call["name"] for call in joined.calls] == ["f", "g"] and len({call["id"] for call in joined.calls}) == 2
    assert json.loads(joined.calls[1]["arguments"]) == {"deep": {"k": [1, None]}}
    assert message.reasoning_content == "I think" and finish == "tool_calls"


@pytest.mark.conformance(7)
def test_the_sdk_accumulates(client):
    with client.chat.completions.stream(model="scripted", messages=user("Now." + calls(invoke("f", a="x"), invoke("g"))), tools=TOOLS,
                                        extra_body=CHAT) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert [call.function.name for call in final.message.tool_calls] == ["f", "g"] and final.message.content == "Now."
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"a": "x"}


def history(call, **extra):
    """A conversation in which the call was answered with result."""
    return [{"role": "system", "content": "You help."}, {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [call], **extra},
            {"role": "tool", "tool_call_id": call["id"], "content": "Hm.</think>The answer is 4."}]


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x", "n": 3}'}}


@pytest.mark.conformance(8)
def test_round_trip(client, scripted):
    first = ask(client, "I ask f.</think>" + calls(invoke("f", a="x", n=3)), tools=TOOLS, extra_body=THINK).choices[0].message
    call = {"id": first.tool_calls[0].id, "type": "function",
            "function": {"name": first.tool_calls[0].function.name, "arguments": first.tool_calls[0].function.arguments}}
    messages = history(call, reasoning_content=first.reasoning_content)
    reply = ask(client, messages, tools=TOOLS, extra_body=THINK).choices[0].message
    assert reply.reasoning_content == "Hm." and reply.content == "The answer is 4."
    prompt = spelled(scripted, tokenize(scripted, messages=messages, tools=TOOLS, reasoning_effort="low"))
    assert prompt.startswith("<｜begin▁of▁sentence｜>You help.\n\n## Tools\n\n")
    assert prompt.endswith("<｜User｜>go<｜Assistant｜><think>I ask f.</think>" + calls(invoke("f", a="x", n=3))
                           + "<｜end▁of▁sentence｜><｜User｜><tool_result>Hm.</think>The answer is 4.</tool_result><｜Assistant｜><think>")


@pytest.mark.conformance(9)
def test_round_trip_without_reasoning(client, start_cluster):
    reply = ask(client, history(CALL), tools=TOOLS, extra_body=THINK).choices[0].message
    assert reply.content == "The answer is 4."
    strict = start_cluster("--scripted-model", "scripted", env={"BALEEN_REASONING_REPLAY": "strict"})
    strict_client = openai.OpenAI(base_url=strict.http + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as error:
        ask(strict_client, history(CALL), tools=TOOLS, extra_body=THINK)
    assert error.value.body["message"] == "The `reasoning_content` in the thinking mode must be passed back to the API."
    assert error.value.type == error.value.code == "invalid_request_error"
    for fields in ({"reasoning_content": ""}, {"reasoning": "r"}):
        assert ask(strict_client, history(CALL, **fields), tools=TOOLS, extra_body=THINK).choices[0].message.content
    assert ask(strict_client, history(CALL), tools=TOOLS).choices[0].finish_reason == "stop"  # not thinking: nothing is asked


@pytest.mark.conformance(10, part="none and auto")
def test_tool_choice_none(client, scripted):
    text = "See:" + calls(invoke("f", a="x"))
    message, finish, _ = both(client, text, tools=TOOLS, tool_choice="none")
    assert finish == "stop" and not message.tool_calls and message.content.startswith("See:") and 'invoke name="f"' in message.content
    without = tokenize(scripted, messages=user("x"))
    assert tokenize(scripted, messages=user("x"), tools=TOOLS, tool_choice="none") == without
    assert len(tokenize(scripted, messages=user("x"), tools=TOOLS, tool_choice="auto")) > len(without)
    message, finish, _ = both(client, text)  # no tools at all: the same
    assert finish == "stop" and not message.tool_calls


@pytest.mark.conformance(11)
def test_no_parallel_calls(client):
    text = "Two." + calls(invoke("f", a="1"), invoke("g"), invoke("f", a="2"))
    assert len(both(client, text, tools=TOOLS)[0].tool_calls) == 3
    message, finish, joined = both(client, text, tools=TOOLS, parallel_tool_calls=False)
    assert finish == "tool_calls" and len(message.tool_calls) == 1
    assert json.loads(message.tool_calls[0].function.arguments) == json.loads(joined.calls[0]["arguments"]) == {"a": "1"}
    text = "One." + calls(invoke("f", a="1"))
    assert len(both(client, text, tools=TOOLS, parallel_tool_calls=False)[0].tool_calls) == 1


def test_streams_are_told_again_byte_for_byte(client, scripted):
    """Call ids too: a client that comes back must not hear of another call."""
    body = {"model": "scripted", "messages": user("x" + calls(invoke("f", a="1"), invoke("g"))), "tools": TOOLS, "stream": True, **CHAT,
            "stream_options": {"resumable": True}}
    connection = http.client.HTTPConnection(scripted.info["http"], timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    first = connection.getresponse().read().decode()
    name = first.split("id: ", 1)[1].split(":", 1)[0]
    connection.request("GET", "/v1/streams/" + name)
    again = connection.getresponse()
    assert again.status == 200
    assert again.read().decode() == first and "call_01_" in first
    connection.close()


# ---- output of a model that does not keep to its format ----

@pytest.mark.conformance(56)
@pytest.mark.parametrize("text, want", [
    pytest.param("only thoughts", {"reasoning": "only thoughts", "finish": "stop"}, id="no end of thinking"),
    pytest.param("r</think></think>x", {"reasoning": "r", "content": "x"}, id="two ends of thinking"),
    pytest.param("r</think>a<think>b</think>c", {"reasoning": "rb", "content": "ac"}, id="thinks again"),
    pytest.param("r" + calls(invoke("g")), {"reasoning": "r", "calls": [("g", {})]}, id="calls while thinking"),
    pytest.param("r</think>x" + OPEN + END, {"reasoning": "r", "content": "x", "finish": "stop"}, id="empty block"),
    pytest.param("r</think>x" + OPEN + "noise" + END, {"reasoning": "r", "content": "x", "finish": "stop"}, id="text in the block"),
    pytest.param("r</think>x" + OPEN + '<｜DSML｜invoke name="f', {"reasoning": "r", "content": "x", "finish": "stop"}, id="name cut off"),
    pytest.param("r</think>" + OPEN + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">par',
                 {"reasoning": "r", "partial": ("f", '{"a": "par'), "finish": "tool_calls"}, id="value cut off"),
    pytest.param("r</think>" + OPEN + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x</｜DSML｜',
                 {"reasoning": "r", "partial": ("f", '{"a": "x"'), "finish": "tool_calls"}, id="closing tag cut off"),
    pytest.param("r</think>" + OPEN + invoke("f", a="x"), {"reasoning": "r", "calls": [("f", {"a": "x"})]}, id="block not closed"),
    pytest.param("r</think>" + OPEN + invoke("f", a="x").replace("\n</｜DSML｜invoke>", "\n") + invoke("g") + END,
                 {"reasoning": "r", "calls": [("f", {"a": "x"}), ("g", {})]}, id="call not closed"),
    pytest.param("r</think>" + calls(invoke("f", a="x")) + "more", {"reasoning": "r", "calls": [("f", {"a": "x"})]}, id="text behind the block"),
    pytest.param("r</think>" + calls('<｜DSML｜invoke name="f">\n{"a": "x", "n": 1}\n</｜DSML｜invoke>'),
                 {"reasoning": "r", "calls": [("f", {"a": "x", "n": 1})]}, id="an object in place of parameters"),
    pytest.param("r</think>" + calls(invoke("nobody", a=1)), {"reasoning": "r", "calls": [("nobody", {"a": 1})]}, id="unknown tool"),
    pytest.param("r</think>" + calls(invoke("f").replace("\n\n", "\n" + parameter("a", 5) + "\n")),
                 {"reasoning": "r", "calls": [("f", {"a": 5})]}, id="a number for a string"),
    pytest.param("r</think>x</｜DSML｜tool_calls>y", {"reasoning": "r", "content": "x</｜DSML｜tool_calls>y", "finish": "stop"}, id="end of no block"),
    pytest.param("r</think>" + calls(invoke("f", a="x"), invoke("f", a="x").replace("parameter name", "other name")),
                 {"reasoning": "r", "calls": [("f", {"a": "x"}), ("f", {})]}, id="unknown tag"),
])
def test_malformed(client, text, want):
    message, finish, joined = both(client, text, tools=TOOLS, extra_body=THINK)
    assert (message.reasoning_content or "") == want.get("reasoning", "")
    assert (message.content or "") == want.get("content", "")
    assert finish == want.get("finish", "tool_calls" if "calls" in want else "stop")
    told = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    if "partial" in want:
        assert told == [want["partial"]]
    else:
        assert [(name, json.loads(arguments)) for name, arguments in told] == want.get("calls", [])
    assert [call["arguments"] for call in joined.calls] == [arguments for _, arguments in told]
    assert "｜" not in message.reasoning_content and "end▁of▁sentence" not in str(told)


@pytest.mark.conformance(56)
def test_json_that_is_none(client):
    """Streamed as it came; in the whole object that value is a string, so that the arguments parse."""
    text = calls('<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">not json</｜DSML｜parameter>\n'
                 '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>')
    message, _, joined = both(client, text, tools=TOOLS)
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": "not json", "n": 3}
    assert joined.calls[0]["arguments"] == '{"a": not json, "n": 3}'


@pytest.mark.conformance(56)
def test_end_of_sequence_in_a_call(client):
    """Its text never gets into the arguments."""
    text = OPEN + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x<｜end▁of▁sentence｜>y</｜DSML｜parameter>'
    message, finish, _ = both(client, text, tools=TOOLS)
    assert finish == "tool_calls" and message.tool_calls[0].function.arguments == '{"a": "x'


@pytest.mark.conformance(56)
def test_cut_off_in_a_call(client):
    message, finish, _ = both(client, calls(invoke("f", a="x" * 400)), tools=TOOLS, max_tokens=30)
    assert finish == "length" and message.tool_calls[0].function.arguments.startswith('{"a": "xxx')
    assert not message.tool_calls[0].function.arguments.endswith('}')


# ---- stops, length, text ----

@pytest.mark.conformance(12, part="the word json")
def test_the_word_json(scripted, start_cluster):
    """What is checked of json_object; keeping answers to JSON is another matter."""
    body = {"model": "scripted", "messages": user("an object please"), "response_format": {"type": "json_object"}}
    status, reply = post(scripted, "/tokenize", body)
    assert status == 400 and "'json'" in reply["error"]["message"]
    for content in ("as JSON", [{"type": "text", "text": "give me Json"}]):
        status, reply = post(scripted, "/tokenize", {**body, "messages": [{"role": "system", "content": content}, *user("x")]})
        assert status == 200, reply
    lax = start_cluster("--scripted-model", "scripted", env={"BALEEN_JSON_WORD": "off"})
    assert post(lax, "/tokenize", body)[0] == 200


@pytest.mark.conformance(14)
@pytest.mark.parametrize("stop", ["needle", "dle in", " needle in a ha", "e", "ay"])
def test_stop(client, stop):
    """Wherever token borders fall."""
    text = "a needle in a haystack"
    message, finish, _ = both(client, text, stop=[stop])
    assert message.content == text.split(stop)[0] and finish == "stop"
    message, finish, _ = both(client, text, stop=["zzz", stop, "haystackk"])
    assert message.content == text.split(stop)[0]


@pytest.mark.conformance(14)
def test_stop_is_for_answers(client):
    message, finish, _ = both(client, "a needle</think>no pins", stop=["needle"], extra_body=THINK)
    assert message.reasoning_content == "a needle" and message.content == "no pins" and finish == "stop"
    message, finish, _ = both(client, "x" + calls(invoke("f", a="needle")), stop=["needle"], tools=TOOLS)
    assert finish == "tool_calls" and json.loads(message.tool_calls[0].function.arguments) == {"a": "needle"}
    message, finish, _ = both(client, "never mind", stop=["", "zzz"])
    assert message.content == "never mind"


@pytest.mark.conformance(15)
def test_length_and_characters(client):
    reply = ask(client, "one two three", max_tokens=1)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 1
    text = "日本語のテキスト、한국어, emoji 👍🏽👩‍👩‍👧 und Grüße 𝔘𝔫𝔦"
    for chunk in ask(client, text, stream=True):
        for choice in chunk.choices:
            assert "\ufffd" not in (choice.delta.content or "")
    message, _, joined = both(client, text)
    assert joined.content == text


@pytest.mark.conformance(16)
def test_logprobs(client):
    reply = ask(client, "Grüße 👍", logprobs=True, top_logprobs=5)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "Grüße 👍"
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
    with pytest.raises(openai.BadRequestError):
        ask(client, "x", logprobs=True, top_logprobs=21)


@pytest.mark.conformance(17)
def test_several_answers(client):
    reply = ask(client, "t</think>one", n=3, extra_body=THINK)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {(choice.message.reasoning_content, choice.message.content) for choice in reply.choices} == {("t", "one")}
    chunks = list(ask(client, "x" + calls(invoke("f", a="1"), invoke("g")), tools=TOOLS, n=2, stream=True))
    for index in range(2):
        assert [call["name"] for call in Joined(chunks, index).calls] == ["f", "g"]
    assert len({call["id"] for index in range(2) for call in Joined(chunks, index).calls}) == 4


# ---- prefix and fill in the middle ----

@pytest.mark.conformance(18)
def test_prefix(client, scripted):
    messages = [*user("\nprint(1)\n```\nDone."), {"role": "assistant", "content": "```python\n", "prefix": True}]
    message, finish, _ = both(client, messages, stop=["```"])
    assert message.content == "\nprint(1)\n" and finish == "stop"  # the continuation alone, its leading newline kept
    ids = tokenize(scripted, messages=messages, thinking={"type": "disabled"})
    assert spelled(scripted, ids).endswith("<｜Assistant｜></think>```python\n")
    thinking = [*user("rest"), {"role": "assistant", "reasoning_content": "r", "content": "So: ", "prefix": True}]
    message, _, _ = both(client, thinking, extra_body=THINK)
    assert message.content == "rest" and not getattr(message, "reasoning_content", None)
    beta = openai.OpenAI(base_url=scripted.http + "/beta", api_key="none", max_retries=0)
    assert ask(beta, messages, stop=["```"]).choices[0].message.content == "\nprint(1)\n"


@pytest.mark.conformance(19)
def test_fill_in_the_middle(client):
    """The prompt's ids are BOS, begin, prompt, hole, suffix, end: the script of such a prompt is what stands before the hole."""
    reply = client.completions.create(model="scripted", prompt="def f(x):\n    ", suffix="\n    return y", max_tokens=64)
    assert reply.object == "text_completion" and reply.choices[0].text == "def f(x):\n    " and reply.choices[0].finish_reason == "stop"
    plain = client.completions.create(model="scripted", prompt="def f(x):\n    ", max_tokens=64)
    tail = client.completions.create(model="scripted", prompt="\n    return y", max_tokens=64)
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens + tail.usage.prompt_tokens - 1 + 3  # one BOS less, three marks
    chunks = list(client.completions.create(model="scripted", prompt="def f(x):\n    ", suffix="\n    return y", max_tokens=64, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "def f(x):\n    "


# ---- models, errors, limits ----

@pytest.mark.conformance(20)
def test_models(client, scripted):
    assert [model.id for model in client.models.list()] == ["scripted"] and client.models.retrieve("scripted").id == "scripted"
    bare = openai.OpenAI(base_url=scripted.http, api_key="none", max_retries=0)
    assert [model.id for model in bare.models.list()] == ["scripted"]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"


@pytest.mark.conformance(22)
def test_bad_requests(client, scripted):
    status, reply = post(scripted, "/v1/chat/completions", b'{"model": ')
    assert status == 400 and reply["error"]["message"] and reply["error"]["type"] == "invalid_request_error"
    for fields in ({"temperature": "x"}, {"messages": []}, {"tools": "f"}, {"tools": [{"type": "function"}]}, {"tool_choice": "maybe"},
                   {"parallel_tool_calls": "no"}, {"thinking": {"type": "maybe"}}):
        status, reply = post(scripted, "/v1/chat/completions", {"model": "scripted", "messages": user("x"), **fields})
        assert status == 400 and set(reply["error"]) == {"message", "type", "param", "code"}, fields


@pytest.mark.conformance(23)
def test_too_long(client, scripted):
    def counted():
        metrics = scripted.metrics()
        return {name: sum(metrics[name].values()) for name in ("baleen_prompt_tokens_total", "baleen_requests_refused_total")}

    before = counted()
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "word " * 20000)
    assert error.value.code == "context_length_exceeded"
    assert counted() == {**before, "baleen_requests_refused_total": before["baleen_requests_refused_total"] + 1}
    wait_for("the ledger to be zero", scripted.ledger_is_zero)


@pytest.mark.conformance(57)
def test_the_last_token_of_the_context(client, scripted):
    """Prompts of ids: exactly as long as the context, one less, two less."""
    limit = client.models.retrieve("scripted").max_model_len
    word, = tokenize(scripted, prompt=" a", add_special_tokens=False)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="scripted", prompt=[word] * limit, max_tokens=10)
    assert error.value.code == "context_length_exceeded"
    for left in (1, 2):
        reply = client.completions.create(model="scripted", prompt=[word] * (limit - left), max_tokens=10)
        assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == left
        assert reply.usage.total_tokens == limit


@pytest.mark.conformance(27)
def test_a_client_goes_away(scripted):
    """In the middle of an answer that never ends: it is cancelled at the router, and everything is freed."""
    body = {"model": "scripted", "messages": user("word " * 500), "stream": True, "ignore_eos": True, "max_tokens": 8000, **CHAT}
    aborted = sum(scripted.metrics()["baleen_requests_aborted_total"].values())
    cancelled = scripted.cancelled()
    connection = http.client.HTTPConnection(scripted.info["http"], timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    reply.read(300)
    reply.close()
    connection.close()
    scripted.wait_until_freed(cancelled)
    assert sum(scripted.metrics()["baleen_requests_aborted_total"].values()) == aborted + 1


# ---- request patterns of other clients ----

@pytest.mark.conformance(41, client="Open WebUI's requests over plain HTTP")
def test_how_open_webui_asks(scripted):
    """Models on load without /v1, a stream with usage, titles in parallel; reasoning as its own field; it aborts by closing."""
    connection = http.client.HTTPConnection(scripted.info["http"], timeout=300)
    connection.request("GET", "/models", headers={"Authorization": "Bearer x"})
    listed = json.loads(connection.getresponse().read())
    assert listed["object"] == "list" and listed["data"][0]["id"] == "scripted"
    body = {"model": "scripted", "messages": user("hm</think>hello"), "stream": True, "stream_options": {"include_usage": True},
            "metadata": {"chat_id": "1"}, "features": {"web_search": False}, "session_id": "s", "params": {}}
    connection.request("POST", "/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    lines = [line[6:] for line in connection.getresponse().read().decode().splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and chunks[-1]["usage"]["total_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello"
    connection.close()


@pytest.mark.conformance(41, client="LiteLLM's requests through openai")
def test_how_litellm_asks(client):
    """A one-token health check; fields of other providers; reasoning_content replayed where it is not needed."""
    assert ask(client, "hi", max_tokens=1).choices[0].finish_reason in ("length", "stop")
    messages = [*user("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}, *user("c</think>d")]
    reply = ask(client, messages, extra_body={**THINK, "api_version": None, "drop_params": True}, user="u", metadata={"k": "v"})
    assert reply.choices[0].message.content == "d"


# ---- HTTP ----

@pytest.mark.conformance(51, part="HTTP/1.1", client="sockets")
def test_pipelined_and_chunked(scripted):
    """Several requests on one connection, the second sent before the first is answered; a body in chunks."""
    host, port = scripted.info["http"].split(":")
    body = json.dumps({"model": "scripted", "messages": user("the first"), **CHAT}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=300) as connection, connection.makefile("rb") as replies:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        pieces = [body[:20].replace(b"first", b"other"), body[20:].replace(b"first", b"other")]
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
                           + b"0\r\n\r\n")
        answers = []
        for _ in range(2):
            assert replies.readline().startswith(b"HTTP/1.1 200")
            headers = dict(line.decode().rstrip().lower().split(": ", 1) for line in iter(replies.readline, b"\r\n"))
            answers.append(json.loads(replies.read(int(headers["content-length"])))["choices"][0]["message"]["content"])
    assert answers == ["the first", "the other"]


# ---- many at once ----

@pytest.mark.conformance(58)
def test_two_hundred_mixed(client, scripted):
    """Whole and streamed, chat and completions, with and without tools: each has its own words."""
    wrong = []

    def one(i):
        nonce = f"nonce-{i}-" + "x" * (i % 7)
        if i % 4 == 0:
            got = ask(client, nonce).choices[0].message.content
        elif i % 4 == 1:
            got = Joined(ask(client, nonce, stream=True)).content
        elif i % 4 == 2:
            got = client.completions.create(model="scripted", prompt=nonce, max_tokens=100).choices[0].text
        else:
            joined = Joined(ask(client, calls(invoke("f", a=nonce)), tools=TOOLS, stream=True))
            got = json.loads(joined.calls[0]["arguments"])["a"]
        if got != nonce:
            wrong.append((nonce, got))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    wait_for("the ledger to be zero", scripted.ledger_is_zero)
