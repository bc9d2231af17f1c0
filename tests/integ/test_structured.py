"""Structured output with real processes: whatever is demanded of an answer, the answer is, at any temperature, with and
without thinking and speculation. A budget may end an answer early; what there is of it then is the beginning of one."""
import collections
import concurrent.futures
import json
import os
import re
import typing

import jsonschema
import openai
import pydantic
import pytest

from conftest import wait_for
from schemas import is_bounded, schema
from test_openai import post

QUESTION = [{"role": "user", "content": "Describe a city as JSON."}]
CHAT = {"thinking": {"type": "disabled"}}
CITY = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "minimum": 0},
                                         "kind": {"enum": ["small", "large"]}},
        "required": ["name", "people", "kind"], "additionalProperties": False}


def pytest_generate_tests(metafunc):
    if "schema_seed" in metafunc.fixturenames:
        first, n = (int(word) for word in os.environ.get("TEST_SCHEMAS", "1:24").split(":"))
        metafunc.parametrize("schema_seed", [(first, n)], ids=[f"seeds{first}to{first + n - 1}"])


@pytest.fixture(scope="module")
def client(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


def ask(client, seed, extra=None, **fields):
    reply = client.chat.completions.create(model="nano", messages=fields.pop("messages", QUESTION), temperature=fields.pop("temperature", 1),
                                           seed=seed, max_tokens=fields.pop("max_tokens", 2000),
                                           extra_body={**(CHAT if extra is None else extra)}, **fields)
    assert fields.get("stream") or reply.choices, f"seed {seed}: {reply}"  # an error after the status line was on its way
    return reply


def format_of(of):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": of, "strict": True}}


def test_json_schema(client):
    for seed in range(5):
        choice = ask(client, seed, response_format=format_of(CITY)).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), CITY)


@pytest.mark.conformance(12)
def test_json_object(client):
    for seed in range(5):
        choice = ask(client, seed, max_tokens=300, response_format={"type": "json_object"}).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_regex_and_choice(client):
    for seed in range(5):
        text = ask(client, seed, {**CHAT, "structured_outputs": {"regex": r"(yes|no), \d{3}[a-f]{2,4}!"}}).choices[0].message.content
        assert re.fullmatch(r"(yes|no), \d{3}[a-f]{2,4}!", text)
        text = ask(client, seed, {**CHAT, "guided_choice": ["red", "green", "dark green"]}).choices[0].message.content
        assert text in ("red", "green", "dark green")
    text = client.completions.create(model="nano", prompt="The capital", max_tokens=50, temperature=1, seed=1,
                                     extra_body={"guided_regex": "[ab]{7}"}).choices[0].text
    assert re.fullmatch("[ab]{7}", text)


def test_greedy_and_penalties(client):
    choice = ask(client, 1, temperature=0, frequency_penalty=2, presence_penalty=2, top_p=0.1, response_format=format_of(CITY)).choices[0]
    jsonschema.validate(json.loads(choice.message.content), CITY)
    # min_tokens cannot keep a complete answer from ending
    choice = ask(client, 1, {**CHAT, "guided_choice": ["red"], "min_tokens": 30}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("red", "stop")
    # a bias cannot bring in what is not allowed
    choice = ask(client, 1, {**CHAT, "guided_choice": ["red"]}, logit_bias={str(i): 100 for i in range(100, 1000)}).choices[0]
    assert choice.message.content == "red"


def test_logprobs_are_of_what_is_allowed(client):
    choice = ask(client, 1, {**CHAT, "guided_regex": "a"}, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs.content[0].logprob == 0  # the only token there may be
    assert choice.logprobs.content[0].top_logprobs[1].logprob == -9999


def test_after_thinking(client):
    for seed in range(3):
        choice = ask(client, seed, {}, messages=[{"role": "user", "content": "What is 72 - 38?"}], reasoning_effort="low", temperature=0.6,
                     response_format=format_of(CITY), max_tokens=3000).choices[0]
        assert choice.message.reasoning_content
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), CITY)
        else:
            assert choice.finish_reason == "length"
    finished = ask(client, 1, {}, messages=[{"role": "user", "content": "What is 72 - 38?"}], reasoning_effort="low", temperature=0,
                   response_format=format_of(CITY), max_tokens=3000).choices[0]
    assert finished.finish_reason == "stop" and finished.message.reasoning_content
    jsonschema.validate(json.loads(finished.message.content), CITY)


class Weather(pydantic.BaseModel):
    sky: typing.Literal["clear", "grey"]
    wet: bool
    parts: list[typing.Literal["day", "night"]] = pydantic.Field(min_length=1, max_length=2)


@pytest.mark.conformance(13)
def test_parse(client):
    """The SDK's own schema of a class, and its own reading of the answer."""
    for thinking in (CHAT, {}):
        reply = client.chat.completions.parse(model="nano", messages=[{"role": "user", "content": "What is 72 - 38?"}], temperature=0,
                                              response_format=Weather, max_tokens=3000, extra_body=thinking)
        assert isinstance(reply.choices[0].message.parsed, Weather), reply
        assert bool(getattr(reply.choices[0].message, "reasoning_content", None)) == (thinking == {})


def test_streams_and_several_answers(client):
    whole = ask(client, 7, response_format=format_of(CITY), n=3)
    chunks = list(ask(client, 7, response_format=format_of(CITY), n=3, stream=True))
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content), CITY)
        text = "".join(part.delta.content or "" for chunk in chunks for part in chunk.choices if part.index == choice.index)
        assert text == choice.message.content


def tool(name, properties, **more):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties, "required": list(properties)},
                                             **more}}


@pytest.mark.conformance(10)
def test_tool_calls(client):
    tools = [tool("set", {"level": {"type": "integer", "minimum": 1, "maximum": 9}, "mode": {"enum": ["on", "off"]}}),
             tool("say", {"words": {"type": "string", "maxLength": 12}})]
    for seed in range(3):
        choice = ask(client, seed, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 1 and not choice.message.content
        call = choice.message.tool_calls[0].function
        jsonschema.validate(json.loads(call.arguments), next(t["function"]["parameters"] for t in tools if t["function"]["name"] == call.name))
        named = {"type": "function", "function": {"name": "set"}}
        call = ask(client, seed, tools=tools, tool_choice=named).choices[0].message.tool_calls[0].function
        assert call.name == "set" and 1 <= json.loads(call.arguments)["level"] <= 9


def test_refusals_name_the_field_and_the_place(cluster):
    def refused(fields, param, text, stream=False):
        status, reply = post(cluster, "/v1/chat/completions", {"model": "nano", "messages": QUESTION, "stream": stream, **fields})
        assert status == 400 and reply["error"]["param"] == param and text in reply["error"]["message"], reply

    bad = {"type": "object", "properties": {"a": {"not": {}}}}
    for stream in (False, True):
        refused({"response_format": format_of(bad)}, "response_format.json_schema", "/properties/a: not is not supported", stream)
    refused({"guided_regex": "(a"}, "guided_regex", "without its )")
    refused({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one")
    refused({"guided_json": "{"}, "guided_json", "not JSON")
    refused({"guided_grammar": "x"}, "guided_grammar", "not supported")
    refused({"guided_json": False}, "guided_json", "no text can satisfy")
    refused({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "cannot both be demanded")
    refused({"guided_regex": "a", "messages": QUESTION + [{"role": "assistant", "content": "b", "prefix": True}]}, "guided_regex", "beginning")


def test_speculation_changes_no_bit(client, start_cluster):
    without = start_cluster("--workers", "1", env={"BALEEN_DRAFTS_MAX": "0"})
    plain = openai.OpenAI(base_url=without.http + "/v1", api_key="none", max_retries=0)
    for seed in range(4):
        for fields in ({"response_format": format_of(schema(seed))}, {"temperature": 0, "response_format": {"type": "json_object"}, "max_tokens": 150}):
            a, b = ask(client, seed, **fields), ask(plain, seed, **fields)
            assert a.choices[0].message.content == b.choices[0].message.content


def test_known_constraints_are_not_compiled_again(start_cluster):
    own = start_cluster("--workers", "1")
    client = openai.OpenAI(base_url=own.http + "/v1", api_key="none", max_retries=0)
    for seed in range(12):
        ask(client, seed, response_format=format_of(CITY))

    def counted(name):
        return sum(own.metrics().get(name, {}).values())

    wait_for("twelve constraints", lambda: counted("baleen_constraints_total") == 12)  # counters come with heartbeats
    assert counted("baleen_constraints_compiled_total") == 1


def check_schema(client, checker, seed):
    """How the answer ended."""
    of = schema(seed)
    jsonschema.Draft202012Validator.check_schema(of)
    budget = 12000 if is_bounded(seed) else 1500
    choice = ask(client, seed, response_format=format_of(of), max_tokens=budget).choices[0]
    if choice.finish_reason == "stop":
        try:
            jsonschema.Draft202012Validator(of, format_checker=checker).validate(json.loads(choice.message.content))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {json.dumps(of)}\nanswered {choice.message.content}") from error
    return choice.finish_reason


def test_random_schemas(client, schema_seed):
    """TEST_SCHEMAS=FIRST:N runs others."""
    first, n = schema_seed
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        ends = list(pool.map(lambda seed: check_schema(client, checker, seed), range(first, first + n)))
    bounded = [end for seed, end in enumerate(ends, first) if is_bounded(seed)]
    print(f"seeds {first} to {first + n - 1}: {collections.Counter(ends)}; of schemas with an end: {collections.Counter(bounded)}")
    assert set(ends) <= {"stop", "length"}  # at temperature 1 a map or a repeated pattern may outlast its budget
    assert set(bounded) == {"stop"}
