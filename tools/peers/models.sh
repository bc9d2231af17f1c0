#!/usr/bin/env bash
# Other programs that run a whole model, for `baleen bench serve.model --peer`; one that is not there is skipped with the reason.
#   tools/peers/models.sh [--gguf FILE] [--bf16 DIR] [--python PROGRAM] [--llama PROGRAM] [--threads N] [--batches N,N] [--prompt N] [--steps N]
# Give batches, prompt and threads as to the benchmark. to_gguf.py and to_bf16.py make the two models of one of baleen synth.
set -u
here=$(cd "$(dirname "$0")" && pwd)
gguf='' bf16='' python=python3 llama=$here/../../build/release/bin/llama_decode threads=1 batches=1,8,32 prompt=512 steps=8
while [ $# -gt 0 ]; do
    case "$1" in
    --gguf | --bf16 | --python | --llama | --threads | --batches | --prompt | --steps) declare "${1#--}=${2-}" ;;
    *) echo "usage: see the head of $0" >&2; exit 2 ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
if [ ! -x "$llama" ]; then
    echo "peer=llama.cpp skipped=no program $llama: it is built where llama.cpp is found, or --llama"
elif [ ! -f "$gguf" ]; then
    echo "peer=llama.cpp skipped=no model '$gguf': --gguf FILE, made by to_gguf.py"
else
    OMP_WAIT_POLICY=passive "$llama" "$gguf" "$threads" "$batches" "$prompt" "$steps" || exit
fi
if ! "$python" -c 'import torch, transformers' 2>/dev/null; then
    echo "peer=transformers skipped=no torch and transformers in $python: --python PROGRAM"
elif [ ! -d "$bf16" ]; then
    echo "peer=transformers skipped=no model '$bf16': --bf16 DIR, made by to_bf16.py"
else
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$threads "$python" "$here/transformers_decode.py" "$bf16" "$threads" "$batches" "$prompt" "$steps" 2>/dev/null || exit
fi
