#!/usr/bin/env bash
# What a bare Debian 12 lacks to build and test Baleen. Installs it; with nothing missing it does nothing and asks nobody.
#   tools/deps.sh build | test
set -euo pipefail

build=(build-essential cmake ninja-build pkg-config libucx-dev libgrpc-dev protobuf-compiler libprotobuf-c-dev
       protobuf-c-compiler libevent-dev libjansson-dev libpcre2-dev libsqlite3-dev libxxhash-dev libssl-dev libcmocka-dev
       libarchive-dev zlib1g-dev libhwloc-dev)
test=(openssl python3 python3-venv clang clang-format libclang-rt-14-dev etcd-server libopenmpi-dev openmpi-bin)

packages=("${build[@]}")
[ "${1:-build}" = test ] && packages+=("${test[@]}")

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "baleen needs: ${missing[*]}; install them as root (no sudo here)" >&2; exit 1; }
    as_root=(sudo)
fi
echo "installing from Debian: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
