"""The golden vectors through a gateway: DeepSeek-V4's own tokenizer and config.json, without a weight, behind scripted answers."""
import json
import os
import shutil

import openai
import pytest

from conftest import ROOT, Cluster
from script import function
from test_chat import CHAT, THINK, Joined, post

GOLDEN = os.path.join(ROOT, "tests", "golden", "data")


def rows(*path):
    with open(os.path.join(GOLDEN, *path)) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def official(bin_dir, tmp_path_factory):
    model = tmp_path_factory.mktemp("v4")
    shutil.copy(os.path.join(ROOT, "tests", "unit", "data", "pro_0813_config.json"), model / "config.json")
    os.symlink(os.path.join(GOLDEN, "tokenizer", "tokenizer.json"), model / "tokenizer.json")
    running = Cluster(bin_dir, tmp_path_factory.mktemp("official"), "--model", str(model), "--scripted-model", "scripted")
    yield running
    assert running.stop() == 0, running.said()


@pytest.fixture(scope="module")
def client(official):
    return openai.OpenAI(base_url=official.http + "/v1", api_key="none", max_retries=0)


@pytest.mark.conformance(55)
def test_tokens(official):
    n = 0
    for row in rows("tokenizer", "encode.jsonl"):
        status, reply = post(official, "/tokenize", {"prompt": row["text"], "add_special_tokens": False})
        assert status == 200 and reply["tokens"] == row["ids"], row
        status, reply = post(official, "/detokenize", {"tokens": row["ids"]})
        assert status == 200 and reply["prompt"] == row["text"], row
        n += 1
    assert n == 1404


@pytest.mark.conformance(55)
def test_control_spellings(official):
    """In a raw prompt they act, in a message they are its characters."""
    for row in rows("tokenizer", "control.jsonl"):
        status, reply = post(official, "/tokenize", {"prompt": row["text"], "add_special_tokens": False})
        assert status == 200 and reply["tokens"] == row["special"], row
        status, reply = post(official, "/tokenize", {"messages": [{"role": "user", "content": row["text"]}], **CHAT})
        assert status == 200 and reply["tokens"] == [0, 128803, *row["plain"], 128804, 128822], row


@pytest.mark.conformance(8)
def test_prompts(official):
    """What /tokenize counts is what is generated from: every golden request for chat completions."""
    seen = 0
    for row in rows("encoding", "prompts.jsonl"):
        if row["level"] != "request" or row["profile"] != "G" or "chat/completions" not in row["endpoint"]:
            continue
        status, reply = post(official, "/tokenize", {**row["body"], "model": "scripted"})
        if "error" in row:
            assert status == 400, row["name"]
        else:
            assert status == 200 and reply["tokens"] == row["ids"], row["name"]
        seen += 1
    assert seen > 20


@pytest.mark.conformance(56)
@pytest.mark.parametrize("row", rows("encoding", "parse.jsonl"), ids=lambda row: row["name"])
def test_completions_parse(client, official, row):
    """Every golden completion, well formed or not, as the model's answer: whole and streamed."""
    messages = [{"role": "user", "content": row["text"]}]
    if row.get("prefix"):
        messages.append({"role": "assistant", "content": "So: ", "prefix": True})
    fields = {"extra_body": THINK if row["start"] == "reasoning" else CHAT}
    if row["tools"]:
        fields["tools"] = [function("f")]
    if row.get("stop"):
        fields["stop"] = row["stop"]
    if row["engine"] == "length":
        fields["max_tokens"] = post(official, "/tokenize", {"prompt": row["text"], "add_special_tokens": False})[1]["count"]
    want = row["expect"]

    whole = client.chat.completions.create(model="scripted", messages=messages, **fields).choices[0]
    assert (getattr(whole.message, "reasoning_content", None) or "") == want["reasoning_content"]
    assert (whole.message.content or "") == (want["content"] or "")
    assert whole.finish_reason == want["finish_reason"]
    calls = [{"name": call.function.name, "arguments": call.function.arguments} for call in whole.message.tool_calls or []]
    if row.get("compare_arguments") == "json":
        assert [json.loads(call["arguments"]) for call in calls] == [json.loads(call["arguments"]) for call in want["tool_calls"]]
    else:
        assert calls == [{"name": call["name"], "arguments": call["arguments"]} for call in want["tool_calls"]]

    joined = Joined(client.chat.completions.create(model="scripted", messages=messages, stream=True, **fields))
    assert (joined.reasoning, joined.content, joined.finish) == (want["reasoning_content"], want["content"] or "", want["finish_reason"])
    assert [call["name"] for call in joined.calls] == [call["name"] for call in calls]
    assert [call["arguments"] for call in joined.calls] == [wanted.get("stream_arguments", told["arguments"])
                                                            for wanted, told in zip(want["tool_calls"], calls)]
