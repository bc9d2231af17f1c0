"""A thousand answers streamed at once by one gateway: each client gets its own words and nothing else, and one that goes away in the
middle disturbs nobody."""
import asyncio
import json

from conftest import wait_for

STREAMS, WORDS = 1000, 60


def leaves(i):
    """Every tenth client, in the middle of an answer so long that it cannot end before the client has got so far."""
    return i % 10 == 9


def words_of(i):
    return " ".join(f"{i}-{k}" for k in range(WORDS * (5 if leaves(i) else 1)))


async def read_stream(address, i, leave_at=None):
    """The text of the answer; leave_at: closes after so many events."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": words_of(i)}], "stream": True, "max_tokens": 1000,
                       "thinking": {"type": "disabled"}}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    text, done, n = "", False, 0
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            n += 1
            choices = json.loads(line[6:])["choices"]
            text += choices[0]["delta"].get("content") or "" if choices else ""
            if n == leave_at:
                break
    writer.close()
    return text if done else None


async def read_all(address):
    return await asyncio.wait_for(asyncio.gather(*(read_stream(address, i, 20 if leaves(i) else None) for i in range(STREAMS))), 600)


def test_each_its_own(start_cluster):
    cluster = start_cluster("--scripted-model", "scripted", env={"BALEEN_SEQUENCES_MAX": "1024", "BALEEN_QUEUE_MAX": "1024",
                                                                 "BALEEN_ROWS_MAX": "4096", "BALEEN_FAILPOINTS": "router_step_slow:10000"})  # none ends meanwhile
    answers = asyncio.run(read_all(cluster.info["http"]))
    for i, text in enumerate(answers):
        assert text == (None if leaves(i) else words_of(i)), i
    assert sum(cluster.metrics()["baleen_requests_finished_total"].values()) >= STREAMS * 9 // 10
    wait_for("those that left to be counted", lambda: sum(cluster.metrics()["baleen_requests_aborted_total"].values()) == STREAMS // 10)
    wait_for("the ledger to be zero", cluster.ledger_is_zero)
