#!/usr/bin/env python3
"""Time to the first token of a quiet tenant alone, and beside one that floods: a cluster of its own, real HTTP, one line each.

    build/venv/bin/python tests/integ/fairness.py [--bin build/release/bin] [--flood 96] [--asks 30] [--sequences 16]

The quiet tenant asks one request at a time. The flood keeps so many requests open at once, several times what the router can run.
"""
import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from conftest import NANO, ROOT, Cluster  # noqa: E402


def ask(address, key, tokens):
    """(seconds to the first piece of text, answered whole)"""
    body = {"model": "nano", "prompt": "The capital of France is", "stream": True, "max_tokens": tokens, "ignore_eos": True}
    connection = http.client.HTTPConnection(address, timeout=600)
    begin = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    reply = connection.getresponse()
    first, line = None, reply.readline()
    while line:
        if first is None and b'"text":"' in line and b'"text":""' not in line:
            first = time.monotonic() - begin
        line = reply.readline()
    connection.close()
    return first, reply.status == 200


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bin", default=os.path.join(ROOT, "build", "release", "bin"))
    options.add_argument("--flood", type=int, default=96)
    options.add_argument("--asks", type=int, default=30)
    options.add_argument("--sequences", type=int, default=16)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = {}
        for name in ("noisy", "quiet"):
            keys[name] = subprocess.run([os.path.join(args.bin, "baleen"), "keys", os.path.join(folder, "keys"), name], check=True,
                                        capture_output=True, text=True).stdout.strip()
        run = os.path.join(folder, "run")
        os.mkdir(run)
        cluster = Cluster(args.bin, run, "--model", NANO, "--workers", "2",
                          env={"BALEEN_KEY_FILE": os.path.join(folder, "keys"), "BALEEN_SEQUENCES_MAX": str(args.sequences)})
        address = cluster.info["http"]

        def measure(label):
            seconds = sorted(ask(address, keys["quiet"], 16)[0] for _ in range(args.asks))
            print(f"{label:22} median {1e3 * statistics.median(seconds):8.1f} ms   90% {1e3 * seconds[int(0.9 * len(seconds))]:8.1f} ms",
                  flush=True)
            return statistics.median(seconds)

        over, served = threading.Event(), []

        def flood():
            while not over.is_set():
                if ask(address, keys["noisy"], 128)[1]:
                    served.append(1)

        measure("(warm-up)")
        solo = measure("quiet alone")
        threads = [threading.Thread(target=flood, daemon=True) for _ in range(args.flood)]
        for thread in threads:
            thread.start()
        while len(served) < args.sequences:  # all of the room is the flood's by now
            time.sleep(0.05)
        beside = measure("quiet beside a flood")
        over.set()
        for thread in threads:
            thread.join()
        print(f"ratio {beside / solo:.1f}; the flood: {args.flood} requests at once, {len(served)} answered; room for {args.sequences}")
        return cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
