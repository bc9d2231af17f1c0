"""A cluster whose model is a script: it says the text of the last user or tool message. What every other test of surfaces builds on."""
import json
import os
import signal
import subprocess
import threading

import openai
import pytest

from conftest import NANO, WAIT_S, wait_for

CHAT = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def client(scripted):
    return openai.OpenAI(base_url=scripted.http + "/v1", api_key="none", max_retries=0)


def ask(client, text, **fields):
    fields["extra_body"] = {**CHAT, **fields.get("extra_body", {})}
    return client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": text}], **fields)


def test_no_workers(scripted):
    roles = [process["role"] for process in scripted.info["processes"]]
    assert sorted(roles) == ["coordinator", "gateway", "router"]
    assert scripted.info["model"] == "scripted"


@pytest.mark.parametrize("text", ["Hello wörld 🎉", "a", "  leading\n\ttabs  ", "日本語のテキスト", "x" * 3000, "\n\nnewlines\n\n"])
def test_says_what_it_is_told(client, text):
    reply = ask(client, text)
    assert reply.choices[0].message.content == text.lstrip("\n")  # the parser's rule, not the script's
    assert reply.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, text, stream=True) if chunk.choices]
    assert "".join(pieces) == text.lstrip("\n")


def test_says_nothing(client):
    reply = ask(client, "")
    assert not reply.choices[0].message.content and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 0


def test_thinking_is_in_the_script(client):
    def thinking(text):
        return client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": text}]).choices[0].message

    message = thinking("I wonder</think>The answer")
    assert message.reasoning_content == "I wonder" and message.content == "The answer"
    message = thinking("no end")
    assert message.reasoning_content == "no end" and not message.content


def test_raw_prompts_echo(client):
    assert client.completions.create(model="scripted", prompt="once upon a time").choices[0].text == "once upon a time"


def test_the_rest_is_the_real_path(client):
    assert ask(client, "one two three", stop=[" two"]).choices[0].message.content == "one"
    reply = ask(client, "one two three", max_tokens=1)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 1
    reply = ask(client, "one two three", n=2, seed=1, temperature=2)
    assert [choice.message.content for choice in reply.choices] == ["one two three"] * 2
    entries = ask(client, "one two three", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(entry.logprob == 0 and entry.top_logprobs[0].token == entry.token for entry in entries)
    assert all(entry.top_logprobs[1].logprob == -9999 for entry in entries)


def test_goes_on_at_another_router(start_cluster):
    """A router dies in the middle of its scripts: the other one goes on at the same token."""
    running = start_cluster("--scripted-model", "scripted", "--routers", "2", "--no-restart", "--failpoints", "router_step_slow:10000")
    client = openai.OpenAI(base_url=running.http + "/v1", api_key="none", max_retries=0)
    words = [" ".join(f"{i}:{k}" for k in range(40)) for i in range(8)]
    got = [""] * len(words)

    def read(i):
        for chunk in ask(client, words[i], stream=True):
            got[i] += chunk.choices[0].delta.content or "" if chunk.choices else ""

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(words))]
    for thread in threads:
        thread.start()
    wait_for("all streams to say something", lambda: all(len(text) > 20 for text in got))
    os.kill(running.processes("router")[0]["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert got == words
    assert sum(running.metrics()["baleen_streams_reopened_total"].values()) >= 1


def test_a_request_that_ends_its_routers(start_cluster):
    """It is refused after three of them, and clients are told not to send it again; streams that were there with it lose nothing."""
    running = start_cluster("--scripted-model", "scripted", "--routers", "2", "--failpoints", "router_step_slow:10000,router_script_ends_it:10000")
    client = openai.OpenAI(base_url=running.http + "/v1", api_key="none", max_retries=2)
    words = [" ".join(f"{i}:{k}" for k in range(60)) for i in range(6)]
    got = [""] * len(words)

    def read(i):
        for chunk in ask(client, words[i], stream=True):
            got[i] += chunk.choices[0].delta.content or "" if chunk.choices else ""

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(words))]
    for thread in threads:
        thread.start()
    wait_for("all streams to say something", lambda: all(len(text) > 20 for text in got))
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client, "poison, and more")
    assert refused.value.code == "internal_error" and "3 routers failed" in refused.value.message
    assert refused.value.response.headers["x-should-retry"] == "false"
    for thread in threads:
        thread.join()
    assert got == words
    assert sum(running.metrics()["baleen_streams_condemned_total"].values()) == 1  # retried by nobody
    with open(os.path.join(running.run, "up.err")) as file:
        assert file.read().count("signal 9") == 3
    assert ask(client, "and on").choices[0].message.content == "and on"


def test_many_streams_keep_apart(client, scripted):
    """More than there are slots, each its own words."""
    answers = {}

    def one(i):
        words = " ".join(f"nonce-{i}-{k}" for k in range(20))
        answers[i] = ask(client, words).choices[0].message.content == words

    threads = [threading.Thread(target=one, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 100 and all(answers.values())
    wait_for("the ledger to be zero", scripted.ledger_is_zero)


def test_bench(bin_dir):
    """The benchmark of a gateway, small: it says what it measured, and ends its cluster."""
    out = subprocess.run([os.path.join(bin_dir, "baleen"), "bench", "serve.stream", "--streams", "20", "--stream_tokens", "16", "--rounds", "2",
                          "--model", NANO], capture_output=True, text=True, timeout=WAIT_S)
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout.strip().splitlines()[-1])
    assert report["streams"] == 20 and report["stream_bytes"] > 0 and report["bare_send_s"]["median"] > 0 and report["drop_s"]["max"] > 0
    out = subprocess.run([os.path.join(bin_dir, "baleen"), "bench", "serve.stream", "--model", "/nonexistent"], capture_output=True, text=True,
                         timeout=WAIT_S)
    assert out.returncode == 1 and "/nonexistent" in out.stderr
