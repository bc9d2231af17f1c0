#!/usr/bin/env python3
"""Who may include whom (the table of the README's rooms). Prints one line per folder; any wrong-way #include is an error."""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# folder -> folders it may include besides itself; what a folder holds, in a sentence
ROOMS = {
    "common/base": ([], "status, log, assertions, memory, rng, clock, options, counters, failpoints; stands on libc alone"),
    "common/net": (["common/base"], "links between processes: the transport table, its layer, ucx, shm, local and mpi"),
    "common/model": (["common/base"], "the checkpoint and its text: geometry, safetensors, tokenizer, chat encoding, parser"),
    "common/grammar": (["common/base", "common/model"], "what a model may say: grammars and their masks over a vocabulary"),
    "common/proc": (["common/base", "common/net", "proto"], "what every process has: loop, gRPC server and client, membership"),
    "proto": (["common/base"], "messages, row frames, placement as a value"),
    "kernels": (["common/base"], "the operations of the model: table, oracle (ref), portable CPU path (cpu)"),
    "router": (["common", "proto", "kernels"], "sequences: scheduler, KV, dense path, dispatch of rows to experts"),
    "worker": (["common", "proto", "kernels"], "routed experts: shard, gathering, expert engine"),
    "coordinator": (["common", "proto"], "members, epochs, placement decisions, epoch log, admin service"),
    "gateway": (["common", "proto"], "clients: HTTP, gRPC, streams, request validation"),
    "tools": (["common", "proto", "kernels", "router", "worker", "coordinator", "gateway"], "the baleen command, the benchmarks and the checks"),
    "tests": (["common", "proto", "kernels", "router", "worker", "coordinator", "gateway", "tools"],
              "unit, simulator, golden, integration"),
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


def room_of(path):
    for room in sorted(ROOMS, key=len, reverse=True):
        if path == room or path.startswith(room + "/"):
            return room
    return None


def allowed(room, target):
    return target == room or any(target == may or target.startswith(may + "/") for may in ROOMS[room][0])


def sources():
    for room in ROOMS:
        for folder, folders, names in os.walk(os.path.join(ROOT, room)):
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), ROOT)
                if name.endswith((".c", ".h", ".def")) and room_of(path) == room:
                    yield room, path


def main():
    wrong, seen = [], {room: {"files": 0, "uses": set()} for room in ROOMS}
    for room, path in sources():
        seen[room]["files"] += 1
        with open(os.path.join(ROOT, path), encoding="utf-8") as source:
            for number, line in enumerate(source, 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                target = room_of(match.group(1))
                if target is None:
                    wrong.append(f"{path}:{number}: \"{match.group(1)}\" is not written from the root of the tree")
                elif not allowed(room, target):
                    wrong.append(f"{path}:{number}: {room} may not include {target}")
                elif (match.group(1).endswith("_private.h") and target != room and room != "tests"
                      and not path.startswith("tools/bench/")):  # benchmarks of single parts, as tests of them
                    wrong.append(f"{path}:{number}: {match.group(1)} is private to {target}")
                elif target != room:
                    seen[room]["uses"].add(target)
    for room, (_, what) in ROOMS.items():
        uses = ", ".join(sorted(seen[room]["uses"])) or "nothing of ours"
        print(f"{room:13} {seen[room]['files']:3} files  {what}\n{'':13}            includes {uses}")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"include check: {len(wrong)} wrong-way includes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
