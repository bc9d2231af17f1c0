"""Live streams for the reports on a changing cluster (chaos, resize): many clients, each asking again and again, each answer
compared with the one of rest; a client whose gateway is away comes back with Last-Event-ID."""
import http.client
import json
import os
import statistics
import threading
import time

PROMPTS = ["Count from 1 to 100.", "Count from 1 to 60.", "Tell me a story.", "Count from 20 to 90."]
TRY_S = 90  # for a stream to come back


def body_of(i):
    """Eight different requests, greedy and drawn, all long."""
    body = {"model": "nano", "messages": [{"role": "user", "content": PROMPTS[i % 4]}], "stream": True, "max_tokens": 160,
            "ignore_eos": True, "thinking": {"type": "disabled"}, "stream_options": {"resumable": True}}
    return {**body, "temperature": 0} if i % 8 < 4 else {**body, "temperature": 1, "top_p": 0.9, "seed": i % 8}


class Stream:
    """One request, read to its end over whatever happens."""

    def __init__(self, address, i, stopped=None):
        self.address, self.i, self.stopped = address, i, stopped
        self.text, self.last, self.done, self.times, self.resumed = "", None, False, [], 0

    def attempt(self):
        """Reads on from where it is. OSError and HTTPException: the gateway is away."""
        connection = http.client.HTTPConnection(self.address, timeout=TRY_S)
        headers = {"Content-Type": "application/json"}
        if self.last is not None:
            headers["Last-Event-ID"] = self.last
        connection.request("POST", "/v1/chat/completions", json.dumps(body_of(self.i)), headers)
        reply = connection.getresponse()
        if reply.status == 503:
            raise OSError(reply.read(300))  # not ready again
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.read(300)}")
        for line in reply:
            self.take(line.decode().rstrip("\n"))
        connection.close()

    def take(self, line):
        if line.startswith("id: "):
            self.last = line[4:]
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            self.times.append(time.monotonic())
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                self.text += choice["delta"].get("content") or ""

    def read(self):
        until = time.monotonic() + TRY_S
        while not self.done:
            seen = len(self.times)
            try:
                self.attempt()
            except (OSError, http.client.HTTPException):
                pass
            if len(self.times) > seen:
                until = time.monotonic() + TRY_S
            if not self.done:
                if time.monotonic() > until:
                    raise RuntimeError(f"no event in {TRY_S} s, the last was {self.last}")
                self.resumed += self.last is not None
                time.sleep(0.02)
        return self.text


class Load:
    def __init__(self, address, n):
        self.expected = {i: Stream(address, i).read() for i in range(8)}
        self.address, self.over = address, threading.Event()
        self.lost, self.n_done, self.n_resumed, self.gaps = [], 0, 0, []
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(n)]
        for thread in self.threads:
            thread.start()

    def run(self, i):
        while not self.over.is_set():
            stream = Stream(self.address, i % 8)
            try:
                text = stream.read()
                wrong = None if text == self.expected[i % 8] else f"{text!r} in place of {self.expected[i % 8]!r}"
            except Exception as error:  # any: the point is that there is none
                wrong = repr(error)
            with self.lock:
                self.n_done += 1
                self.n_resumed += stream.resumed > 0
                self.gaps += list(zip(stream.times, stream.times[1:]))
                if wrong:
                    self.lost.append(f"request {i % 8}: {wrong}")

    def join(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


def running(cluster):
    with open(os.path.join(cluster.run, "cluster.json")) as file:
        return {p["name"]: p for p in json.load(file)["processes"]}


def whole(cluster):
    """Everybody is there and in the epoch in force."""
    try:
        status = cluster.status()
    except AssertionError:
        return False
    members = [m for m in status["members"] if m["state"] == "ready" and m["epoch"] == status["epoch"]]
    return "change" not in status and len(members) == len(running(cluster))


def quantiles(values):
    values = sorted(values)
    return (statistics.median(values), values[min(len(values) - 1, int(len(values) * 0.99))], values[-1])
