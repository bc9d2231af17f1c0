#!/usr/bin/env bash
# A Python environment with the real clients that the integration tests use, in the folder given. Python is for tests only.
set -euo pipefail
venv=$1
want=tests/integ/requirements.txt
if [ -f "$venv/stamp" ] && cmp -s "$want" "$venv/stamp"; then
    exit 0
fi
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$want"
cp "$want" "$venv/stamp"
