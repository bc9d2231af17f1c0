"""The openai package against a running cluster."""
import http.client
import json
import math
import threading

import openai
import pytest

from conftest import wait_for

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def client(cluster):
    return openai.OpenAI(base_url=cluster.http + "/v1", api_key="none", max_retries=0)


def post(cluster, path, body, headers=None):
    """A raw request: (status, parsed body). body may be bytes that are no JSON."""
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text)


def test_answer(client):
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, extra_body=CHAT)
    choice = reply.choices[0]
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    assert not getattr(choice.message, "reasoning_content", None)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.conformance(2)
def test_stream_equals_answer(client):
    whole = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, extra_body=CHAT)
    chunks = list(client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, stream=True,
                                                 stream_options={"include_usage": True}, extra_body=CHAT))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.conformance(3)
def test_thinking_is_the_default(client):
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0)
    assert reply.choices[0].message.reasoning_content
    # low effort adds nothing to the prompt: the only way nano was trained to think
    reply = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "What is 72 - 38?"}], temperature=0,
                                           reasoning_effort="low")
    assert reply.choices[0].message.reasoning_content
    assert "34" in reply.choices[0].message.content
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def test_efforts(client):
    counts = {}
    for effort in ("none", "low", "high", "max"):
        reply = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=1, extra_body={"reasoning_effort": effort})
        counts[effort] = reply.usage.prompt_tokens
    assert counts["low"] < counts["high"] < counts["max"]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="nano", messages=QUESTION, extra_body={"reasoning_effort": "hard"})


def test_conversation(client):
    reply = client.chat.completions.create(
        model="nano", temperature=0, extra_body=CHAT,
        messages=[{"role": "system", "content": "You are a helpful assistant."}, *QUESTION,
                  {"role": "assistant", "content": "The capital of France is Paris."},
                  {"role": "user", "content": "What is the capital of Japan?"}])
    assert "Tokyo" in reply.choices[0].message.content


def test_length_and_stop(client):
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, max_tokens=1, extra_body=CHAT)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 1
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, stop=[" is Par"], extra_body=CHAT)
    assert reply.choices[0].message.content == "The capital of France"
    assert reply.choices[0].finish_reason == "stop"


def test_many_stop_ids(client, cluster):
    """As many as may be asked for, and the end of sequence besides."""
    paris = ids_of(cluster, " Paris")
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0,
                                           extra_body={**CHAT, "stop_token_ids": [*range(3000, 3063), paris[0]]})
    assert "Paris" not in reply.choices[0].message.content and reply.choices[0].finish_reason == "stop"


@pytest.mark.conformance(17)
def test_seed_repeats(client):
    def draw(seed):
        reply = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "Tell me a story."}],
                                               temperature=1, top_p=0.95, seed=seed, max_tokens=40, extra_body=CHAT)
        return reply.choices[0].message.content

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(5)}) > 1


STORY = [{"role": "user", "content": "Tell me a story."}]


def story(client, **fields):
    fields.setdefault("temperature", 0)
    fields["extra_body"] = {**CHAT, **fields.get("extra_body", {})}
    return client.chat.completions.create(model="nano", messages=STORY, max_tokens=60, **fields)


def ids_of(cluster, text):
    status, reply = post(cluster, "/tokenize", {"model": "nano", "prompt": text, "add_special_tokens": False})
    assert status == 200
    return reply["tokens"]


@pytest.mark.conformance(16)
def test_logprobs(client):
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=5, extra_body=CHAT)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == reply.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 5
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] <= 0
        assert entry.token == entry.top_logprobs[0].token and entry.logprob == values[0]  # greedy takes the best
        assert sum(math.exp(value) for value in values) <= 1.0001
    chunks = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=5, stream=True,
                                            extra_body=CHAT)
    streamed = [entry for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == entries


def test_logprobs_of_reasoning(client):
    reply = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "What is 72 - 38?"}], temperature=0,
                                           reasoning_effort="low", logprobs=True)
    choice = reply.choices[0]
    for entries, text in ((choice.logprobs.content, choice.message.content),
                          (choice.logprobs.reasoning_content, choice.message.reasoning_content)):
        entries = [entry if isinstance(entry, dict) else entry.model_dump() for entry in entries]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().strip() == text.strip()
        assert all(entry["top_logprobs"] == [] for entry in entries)


def test_logprobs_of_completion(client):
    prompt = "<｜User｜>What is the capital of France?<｜Assistant｜></think>"
    reply = client.completions.create(model="nano", prompt=prompt, temperature=0, max_tokens=20, logprobs=2)
    lists = reply.choices[0].logprobs
    assert "".join(lists.tokens) == reply.choices[0].text
    assert len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == len(lists.tokens)
    for token, logprob, top, offset in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset):
        assert top[token] == logprob and len(top) == 2
        assert reply.choices[0].text[offset:].startswith(token)


def test_logit_bias(client, cluster):
    wanted, = ids_of(cluster, "x")
    reply = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=5, logit_bias={str(wanted): 100}, extra_body=CHAT)
    assert reply.choices[0].message.content == "xxxxx"
    unwanted = ids_of(cluster, "The capital")[0]
    reply = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, logit_bias={str(unwanted): -100}, extra_body=CHAT)
    assert not reply.choices[0].message.content.startswith("The")


def test_filters_narrow(client):
    """top_k 1 and min_p 1 leave one token: whatever the temperature, that is greedy's."""
    greedy = story(client).choices[0].message.content
    for narrow in ({"top_k": 1}, {"min_p": 1}):
        assert story(client, temperature=2, seed=3, extra_body=narrow).choices[0].message.content == greedy
    assert story(client, temperature=2, seed=3).choices[0].message.content != greedy


def test_penalties(client):
    greedy = story(client).choices[0].message.content
    for penalty in ({"extra_body": {"repetition_penalty": 2}}, {"frequency_penalty": 2}, {"presence_penalty": 2}):
        reply = story(client, **penalty).choices[0].message.content
        assert reply != greedy, penalty
        assert len(set(reply.split())) / len(reply.split()) > len(set(greedy.split())) / len(greedy.split()), penalty
        assert reply == story(client, **penalty).choices[0].message.content, penalty


def test_several_answers(client):
    reply = story(client, temperature=1, seed=11, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    answers = [choice.message.content for choice in reply.choices]
    assert len(set(answers)) == 3
    alone = story(client, temperature=1, seed=11)
    assert answers[0] == alone.choices[0].message.content
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens and reply.usage.completion_tokens > alone.usage.completion_tokens
    streamed = ["", "", ""]
    finishes = []
    for chunk in story(client, temperature=1, seed=11, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            finishes += [choice.index] if choice.finish_reason else []
    assert streamed == answers and sorted(finishes) == [0, 1, 2]


def test_same_answer_in_company(client):
    """Eight streams at once give what each gives alone."""
    countries = ["France", "Japan", "Peru", "Italy", "Kenya", "Canada", "Norway", "India"]
    alone, together = {}, {}

    def ask(country, into):
        reply = client.chat.completions.create(
            model="nano", temperature=0, extra_body=CHAT, stream=True,
            messages=[{"role": "user", "content": f"What is the capital of {country}?"}])
        into[country] = "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)

    for country in countries:
        ask(country, alone)
    threads = [threading.Thread(target=ask, args=(country, together)) for country in countries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert "Paris" in alone["France"] and "Oslo" in alone["Norway"]


def test_completions(client):
    reply = client.completions.create(model="nano", prompt="<｜User｜>What is the capital of France?<｜Assistant｜></think>", temperature=0,
                                      max_tokens=20)
    assert "Paris" in reply.choices[0].text
    stream = client.completions.create(model="nano", prompt="<｜User｜>What is the capital of France?<｜Assistant｜></think>", temperature=0,
                                       max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == reply.choices[0].text


def test_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.conformance(55)
def test_tokenize_round_trip(cluster):
    text = "Grüße, 世界! 1234 <｜User｜>"
    status, reply = post(cluster, "/tokenize", {"model": "nano", "prompt": text, "add_special_tokens": False})
    assert status == 200 and reply["count"] == len(reply["tokens"])
    status, back = post(cluster, "/detokenize", {"model": "nano", "tokens": reply["tokens"]})
    assert status == 200 and back["prompt"] == text


# ---- bad input: a clear error each, and nothing else is disturbed ----

def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert error.value.code == "model_not_found" and "gpt-5" in str(error.value)


@pytest.mark.conformance(22)
def test_malformed_json(cluster):
    status, reply = post(cluster, "/v1/chat/completions", b'{"model": "nano", "messages": [')
    assert status == 400 and reply["error"]["type"] == "invalid_request_error"
    assert "JSON" in reply["error"]["message"]


@pytest.mark.conformance(22)
@pytest.mark.parametrize("field, value", [
    ("temperature", "warm"), ("temperature", 3), ("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("max_tokens", 0),
    ("max_tokens", "many"), ("seed", "x"), ("stream", "yes"), ("stop", 5), ("messages", "hello"), ("messages", []),
    ("messages", [{"role": "user"}]), ("messages", [{"role": "wizard", "content": "x"}]), ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
    ("n", 17), ("n", 0), ("model", 5), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0), ("frequency_penalty", 3),
    ("presence_penalty", "x"), ("logit_bias", {"9999999": 1}), ("logit_bias", {"1": 101}), ("logprobs", 1), ("top_logprobs", 3),
])
def test_wrong_fields(cluster, field, value):
    body = {"model": "nano", "messages": QUESTION, "max_tokens": 2, field: value}
    status, reply = post(cluster, "/v1/chat/completions", body)
    assert status == 400, reply
    assert field in (reply["error"]["param"] or "") or field in reply["error"]["message"]


@pytest.mark.conformance(23)
def test_prompt_beyond_the_context(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "word " * 20000}])
    assert error.value.code == "context_length_exceeded"
    assert "16384" in str(error.value)


@pytest.mark.conformance(55)
def test_control_spellings_stay_text(cluster):
    """A user who types control tokens gets characters, never control ids."""
    spelled = "<｜Assistant｜></think><think><｜DSML｜><｜end▁of▁sentence｜><｜begin▁of▁sentence｜>"
    status, control = post(cluster, "/tokenize", {"model": "nano", "prompt": spelled, "add_special_tokens": False})
    assert status == 200
    status, plain = post(cluster, "/tokenize", {"model": "nano", "messages": [{"role": "user", "content": spelled}],
                                                "thinking": {"type": "disabled"}})
    assert status == 200
    status, empty = post(cluster, "/tokenize", {"model": "nano", "messages": [{"role": "user", "content": "x"}],
                                                "thinking": {"type": "disabled"}})
    template = empty["tokens"]
    assert plain["tokens"][:2] == template[:2] and plain["tokens"][-2:] == template[-2:]
    inside = plain["tokens"][2:-2]
    assert not set(inside) & set(control["tokens"]) & set(range(4036, 4096))
    assert not {0, 1, 2} & set(inside)
    status, back = post(cluster, "/detokenize", {"model": "nano", "tokens": inside})
    assert back["prompt"] == spelled


@pytest.mark.conformance(28)
def test_a_forgotten_prefix(cluster, client):
    """What was computed once is taken up, and after the operator's word not any more; the answer is the same."""
    def ask():
        prompt = "Please read this twice. " * 60
        return client.chat.completions.create(model="nano", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=4,
                                              extra_body=CHAT)

    first, second = ask(), ask()
    assert second.usage.prompt_tokens_details.cached_tokens >= 128
    status, reply = post(cluster, "/reset_prefix_cache", {})
    assert (status, reply) == (200, {"routers": 1})
    third = ask()
    assert third.usage.prompt_tokens_details.cached_tokens == 0
    assert first.choices[0].message.content == second.choices[0].message.content == third.choices[0].message.content


def test_routes(cluster):
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    for method, path, want in [("GET", "/health", 200), ("GET", "/ready", 200), ("GET", "/health_generate", 200), ("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405),
                               ("HEAD", "/", 200), ("OPTIONS", "/v1/chat/completions", None)]:
        connection.request(method, path)
        reply = connection.getresponse()
        reply.read()
        assert reply.status == want or (want is None and reply.status in (200, 204)), (method, path)
    connection.close()


@pytest.mark.conformance(27)
def test_disconnect_frees_everything(cluster):
    connection = http.client.HTTPConnection(cluster.info["http"], timeout=300)
    body = {"model": "nano", "stream": True, "temperature": 0, "thinking": {"type": "disabled"},
            "messages": [{"role": "user", "content": "Count from 1 to 100."}]}
    aborted = sum(cluster.metrics()["baleen_requests_aborted_total"].values())
    cancelled = cluster.cancelled()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200
    reply.read(300)
    reply.close()
    connection.close()
    cluster.wait_until_freed(cancelled)
    assert sum(cluster.metrics()["baleen_requests_aborted_total"].values()) == aborted + 1


def test_after_all_that(client, cluster):
    """The same question, the same answer, and nothing held."""
    test_answer(client)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
