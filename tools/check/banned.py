#!/usr/bin/env python3
"""Calls that have one home each: time, randomness, environment, sockets, sleeping and malloc. Outside it they are errors."""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FOLDERS = ["common", "proto", "kernels", "router", "worker", "coordinator", "gateway", "tools", "tests"]

# call -> the files (or folders, ending in /) where it may stand
HOMES = {
    r"malloc|calloc|realloc|free|aligned_alloc|posix_memalign|strdup|strndup|asprintf|vasprintf": ["common/base/mem.c", "tests/"],
    r"time|gettimeofday|clock_gettime|clock": ["common/base/clock.c"],
    r"rand|srand|random|drand48|getrandom|arc4random": ["common/base/rng.c"],
    r"getenv|secure_getenv|setenv|putenv|unsetenv": ["common/base/config.c", "tests/"],
    r"socket|bind|connect|listen|accept|sendto|recvfrom": ["common/net/"],
    r"sleep|usleep|nanosleep|clock_nanosleep": [],
    r"sprintf|strcpy|strcat|gets": [],
    r"exit|_exit|abort": ["common/base/assert.c", "common/base/mem.c", "common/proc/process.c", "tools/baleen/spawn.c", "tests/"],
}
CALL = {re.compile(r"(?<![\w.>])(" + names + r")\s*\("): homes for names, homes in HOMES.items()}
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", re.S)


def strip(text):
    """Comments and strings blanked, line numbers kept."""
    return COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)


def main():
    wrong = 0
    for top in FOLDERS:
        for folder, _, names in os.walk(os.path.join(ROOT, top)):
            for name in sorted(names):
                if not name.endswith((".c", ".h")):
                    continue
                path = os.path.relpath(os.path.join(folder, name), ROOT)
                with open(os.path.join(ROOT, path), encoding="utf-8") as source:
                    text = strip(source.read())
                for number, line in enumerate(text.split("\n"), 1):
                    for call, homes in CALL.items():
                        match = call.search(line)
                        if match and not any(path == home or (home.endswith("/") and path.startswith(home)) for home in homes):
                            print(f"{path}:{number}: {match.group(1)}() has its home in {', '.join(homes) or 'no file'}",
                                  file=sys.stderr)
                            wrong += 1
    print(f"banned calls: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
