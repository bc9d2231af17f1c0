"""Prompts that begin as an earlier one did: what is told of them, and that nothing else changes."""
import concurrent.futures
import os
import random
import signal

import anthropic
import grpc
import openai
import pytest

from conftest import wait_for
from test_grpc import pb  # noqa: F401: a fixture

CHAT = {"thinking": {"type": "disabled"}}
PAGE = 128  # tokens
WORDS = "river stone cloud amber seven quiet garden window lamp copper north paper winter orange bridge salt candle forest".split()


def story(seed, n=400):
    """A text of some n words that no other seed gives."""
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(n))


def user(text):
    return [{"role": "user", "content": text}]


def client_of(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(cluster):
    return client_of(cluster)


def ask(client, messages, **fields):
    """(text, usage)"""
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    fields["extra_body"] = {**CHAT, "ignore_eos": True, **fields.get("extra_body", {})}
    reply = client.chat.completions.create(model="nano", messages=user(messages) if isinstance(messages, str) else messages, **fields)
    return reply.choices[0].message.content, reply.usage


def cached(usage):
    return usage.prompt_tokens_details.cached_tokens


def total(cluster, name):
    return sum(cluster.metrics().get(name, {}).values())


@pytest.mark.conformance(28)
def test_the_same_prompt_again(client):
    first, usage = ask(client, story("again"))
    assert cached(usage) == 0
    for _ in range(2):
        second, again = ask(client, story("again"))
        assert second == first
        assert again.prompt_tokens == usage.prompt_tokens and again.completion_tokens == usage.completion_tokens
        # all whole pages but the last token, whose row gives the answer
        assert cached(again) == (again.prompt_tokens - 1) // PAGE * PAGE > 0
        assert again.prompt_cache_hit_tokens == cached(again)
        assert again.prompt_cache_miss_tokens == again.prompt_tokens - cached(again)


@pytest.mark.conformance(28)
def test_streamed(client):
    whole, _ = ask(client, story("streamed"))
    chunks = list(client.chat.completions.create(model="nano", messages=user(story("streamed")), temperature=0, max_tokens=24, stream=True,
                                                 stream_options={"include_usage": True}, extra_body={**CHAT, "ignore_eos": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert cached(chunks[-1].usage) >= PAGE


def test_sampled_answers_are_the_same(client):
    """Sampling is no part of what is kept: other seeds go on from the same place, equal ones say the same."""
    fields = {"temperature": 1, "top_p": 0.95, "max_tokens": 40}
    texts = [ask(client, story("sampled"), seed=seed, **fields)[0] for seed in (1, 2, 3)]
    for seed, text in zip((3, 1, 2), (texts[2], texts[0], texts[1])):
        again, usage = ask(client, story("sampled"), seed=seed, **fields)
        assert again == text and cached(usage) > 0


def test_conversation(client):
    """Every turn goes on behind what the turns before left, answers included."""
    messages, before = user(story("turns", 300)), 0
    for turn in range(4):
        text, usage = ask(client, messages, max_tokens=150)
        assert cached(usage) >= before // PAGE * PAGE - PAGE
        if turn > 0:
            assert cached(usage) > 0
        fresh = ask(client, messages, max_tokens=150, extra_body={"cache_salt": f"turn {turn}"})
        assert fresh[0] == text and cached(fresh[1]) == 0
        before = usage.prompt_tokens
        messages += [{"role": "assistant", "content": text}, *user(f"And then {turn}?")]


def test_what_two_have_in_common(client):
    """Two prompts part in the middle: the second has nothing to go on from there, and leaves it for the third."""
    common = story("common", 500)
    ask(client, common + " " + story("one", 300))
    ask(client, common + " " + story("two", 300))
    third, usage = ask(client, common + " " + story("three", 300))
    assert cached(usage) >= 3 * PAGE
    assert ask(client, common + " " + story("three", 300), extra_body={"cache_salt": "x"})[0] == third


def test_salts(client):
    prompt = story("salts")
    plain, _ = ask(client, prompt)
    for name in ("user_id", "user", "safety_identifier", "prompt_cache_key", "cache_salt"):
        text, usage = ask(client, prompt, extra_body={name: "somebody"})
        assert text == plain and cached(usage) == 0, name
        assert cached(ask(client, prompt, extra_body={name: "somebody"})[1]) > 0, name
        assert cached(ask(client, prompt, extra_body={name: "somebody else"})[1]) == 0, name
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        ask(client, "x", extra_body={"cache_salt": "x" * 513})


@pytest.mark.conformance(28)
def test_messages(cluster):
    client = anthropic.Anthropic(base_url=cluster.http, api_key="none", max_retries=0)
    fields = {"model": "claude-any", "max_tokens": 16, "messages": user(story("messages")), "thinking": {"type": "disabled"},
              "extra_body": {"temperature": 0}}
    first = client.messages.create(**fields)
    second = client.messages.create(**fields)
    assert first.usage.cache_read_input_tokens == 0 and second.usage.cache_read_input_tokens >= PAGE
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == first.usage.input_tokens
    assert second.content == first.content
    with client.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert final.usage.cache_read_input_tokens == second.usage.cache_read_input_tokens
    assert final.usage.input_tokens == second.usage.input_tokens


@pytest.mark.conformance(28)
def test_responses(client):
    fields = {"model": "nano", "input": story("responses"), "max_output_tokens": 16, "temperature": 0, "reasoning": {"effort": "none"}}
    first = client.responses.create(**fields)
    second = client.responses.create(**fields)
    assert first.usage.input_tokens_details.cached_tokens == 0 and second.usage.input_tokens_details.cached_tokens >= PAGE
    assert second.output_text == first.output_text


def test_grpc_usage(cluster, pb):
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb.v1_grpc.InferenceStub(channel)
        request = pb.v1.GenerateRequest(text=story("grpc"), sampling=pb.v1.Sampling(temperature=0, max_tokens=8, ignore_eos=True))
        usages = []
        for _ in range(2):
            for event in stub.Generate(request):
                if event.HasField("finish"):
                    usages.append(event.finish.usage)
    assert usages[0].cached_tokens == 0 and usages[1].cached_tokens >= PAGE


def test_counted(cluster, client):
    names = ("baleen_prefix_cache_queries_total", "baleen_prefix_cache_hits_total")
    before = [total(cluster, name) for name in names]
    ask(client, story("counted"))
    hit = cached(ask(client, story("counted"))[1])
    assert hit > 0
    wait_for("the hits to be told", lambda: total(cluster, names[1]) >= before[1] + hit)
    assert total(cluster, names[0]) > before[0]
    metrics = cluster.metrics()
    assert sum(metrics["vllm:prefix_cache_hits_total"].values()) >= hit
    assert sum(metrics["vllm:prefix_cache_queries_total"].values()) > hit
    # at rest nothing is in use, and what is kept is called so
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    wait_for("pages to be kept", lambda: total(cluster, "baleen_kv_pages_kept") > 0)
    assert total(cluster, "baleen_prefix_states") > 0


def test_n_answers(client):
    """One prompt computed once: n answers of it do not pay for it n times, and are what they are alone."""
    fields = {"temperature": 1, "seed": 7, "max_tokens": 16}
    reply = client.chat.completions.create(model="nano", messages=user(story("n")), n=3, extra_body={**CHAT, "ignore_eos": True}, **fields)
    again = client.chat.completions.create(model="nano", messages=user(story("n")), n=3, extra_body={**CHAT, "ignore_eos": True}, **fields)
    assert [c.message.content for c in reply.choices] == [c.message.content for c in again.choices]
    assert cached(reply.usage) == 0 and cached(again.usage) > 0


# ---- memory ----

def test_little_memory(start_cluster):
    """Pages and states for a few prompts, and many prompts: kept ones make room, nothing else changes."""
    cluster = start_cluster("--workers", "1", env={"BALEEN_KV_BYTES": "2m", "BALEEN_PREFIX_BYTES": "4m", "BALEEN_SEQUENCES_MAX": "4"})
    client = client_of(cluster)
    texts = {seed: ask(client, story(seed, 300), max_tokens=16)[0] for seed in range(12)}
    pages = total(cluster, "baleen_kv_pages")
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            results = list(pool.map(lambda seed: ask(client, story(seed, 300), max_tokens=16), texts))
        assert [text for text, _ in results] == list(texts.values())
    assert ask(client, story(0, 300), max_tokens=16)[0] == texts[0]
    assert cached(ask(client, story(0, 300), max_tokens=16)[1]) > 0, "what was asked last is still there"
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    assert total(cluster, "baleen_kv_pages_kept") <= pages
    assert total(cluster, "baleen_kv_pages_kept") > 0


def test_switched_off(start_cluster):
    cluster = start_cluster("--workers", "1", env={"BALEEN_PREFIX_BYTES": "0"})
    client = client_of(cluster)
    first, _ = ask(client, story("off"))
    second, usage = ask(client, story("off"))
    assert first == second and cached(usage) == 0
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
    assert total(cluster, "baleen_kv_pages_kept") == 0


# ---- several routers ----

def test_the_same_router_again(start_cluster):
    """Prompts that begin alike go where they were; a router's death loses what it kept and no token."""
    cluster = start_cluster("--workers", "1", "--routers", "3", "--no-restart")
    client = client_of(cluster)
    texts = {}
    for seed in range(6):
        texts[seed], usage = ask(client, story(seed))
        assert cached(usage) == 0
    for seed in range(6):
        text, usage = ask(client, story(seed))
        assert text == texts[seed] and cached(usage) > 0, seed
    os.kill(cluster.processes("router")[0]["pid"], signal.SIGKILL)
    for seed in range(6):
        assert ask(client, story(seed))[0] == texts[seed]
    for seed in range(6):
        text, usage = ask(client, story(seed))
        assert text == texts[seed] and cached(usage) > 0, seed


def test_killed_in_the_middle(start_cluster):
    """Answers that began behind a kept prompt go on at another router, with the same tokens."""
    cluster = start_cluster("--workers", "1", "--routers", "2", env={"BALEEN_FAILPOINTS": "router_step_slow:10000"})
    client = client_of(cluster)
    seeds = range(4)
    texts = [ask(client, story(seed, 200), max_tokens=140)[0] for seed in seeds]
    n_chunks = [0] * len(seeds)

    def read(seed):
        text = ""
        for chunk in client.chat.completions.create(model="nano", messages=user(story(seed, 200)), temperature=0, max_tokens=140, stream=True,
                                                    extra_body={**CHAT, "ignore_eos": True}):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            n_chunks[seed] += 1
        return text

    with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
        answers = [pool.submit(read, seed) for seed in seeds]
        wait_for("all to be in the middle", lambda: min(n_chunks) >= 10)
        for router in cluster.processes("router")[:1]:
            os.kill(router["pid"], signal.SIGKILL)
        assert [answer.result() for answer in answers] == texts
