"""The baleen command without a cluster: logits and verify."""
import array
import json
import os
import shutil
import struct
import subprocess

import pytest

from conftest import NANO, ROOT, WAIT_S

MODELS = os.path.join(ROOT, "tests", "golden", "data", "model")


def baleen(bin_dir, *args):
    return subprocess.run([os.path.join(bin_dir, "baleen"), *args], capture_output=True, text=True, timeout=5 * WAIT_S)


def read_tensors(path):
    """The F32 tensors of a safetensors file, flat."""
    with open(path, "rb") as file:
        data = file.read()
    n = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + n]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            tensors[name] = array.array("f", data[8 + n + begin:8 + n + end])
    return tensors


@pytest.mark.parametrize("model", ["tiny-pro", "tiny-flash", "tiny-base", "tiny-odd"])
def test_logits_same_bytes(bin_dir, tmp_path, model):
    """1, 2, 3 and 5 workers, both transports: the same file, within the fixture's tolerance."""
    with open(os.path.join(MODELS, model, "prompts.json")) as file:
        fixture = json.load(file)
    prompts = [{"name": str(i), "prompt_ids": prompt["prompt_ids"]} for i, prompt in enumerate(fixture["prompts"])]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    outputs = set()
    for transport in ("local", "ucx"):
        for workers in (1, 2, 3, 5):
            out = tmp_path / f"{transport}{workers}.json"
            done = baleen(bin_dir, "logits", "--model", os.path.join(MODELS, model, "ckpt"), "--prompts", str(tmp_path / "p.json"),
                          "--out", str(out), "--workers", str(workers), "--transport", transport)
            assert done.returncode == 0, done.stderr
            outputs.add(out.read_bytes())
    assert len(outputs) == 1
    golden = read_tensors(os.path.join(MODELS, model, "logits.safetensors"))
    for i, (got, want) in enumerate(zip(json.loads(outputs.pop()), fixture["prompts"])):
        assert got["greedy"] == want["greedy"]
        assert got["prompt_ids"] == want["prompt_ids"]
        last = golden[f"p{i}.logits"][-len(got["logits"]):]
        assert max(abs(a - b) for a, b in zip(got["logits"], last)) <= fixture["tol"]["D"]["max_abs"]


def test_logits_refuses_bad_prompts(bin_dir, tmp_path):
    for text, word in [("[", "JSON"), ("{}", "list"), ('[{"name": "a", "prompt_ids": []}]', "a"),
                       ('[{"name": "a", "prompt_ids": [99999]}]', "99999")]:
        (tmp_path / "p.json").write_text(text)
        done = baleen(bin_dir, "logits", "--model", NANO, "--prompts", str(tmp_path / "p.json"), "--out", str(tmp_path / "o.json"))
        assert done.returncode == 1 and word in done.stderr, done.stderr
        assert not (tmp_path / "o.json").exists()


def test_verify_accepts_nano(bin_dir):
    done = baleen(bin_dir, "verify", NANO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "792" in done.stdout


def edit_header(path, change):
    """Rewrites a shard's header; data offsets stay valid because they count from the header's end."""
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])


def edit_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    config.update(keys)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
    path = folder / "model-00003-of-00008.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def poison_scale(folder):
    path = folder / "model-00002-of-00008.safetensors"
    data = bytearray(path.read_bytes())
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    data[8 + n + header["layers.0.attn.wq_a.scale"]["data_offsets"][0]] = 255
    path.write_bytes(data)


SHARD = "model-00002-of-00008.safetensors"
BREAKS = {
    "truncated file": (truncate, "model-00003-of-00008.safetensors"),
    "missing tensor": (lambda f: edit_header(f / SHARD, lambda h: h.pop("layers.0.attn_norm.weight")), SHARD),
    "extra tensor": (lambda f: edit_header(f / SHARD, lambda h: h.update({"layers.0.extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})), "layers.0.extra"),
    "misnamed tensor": (lambda f: edit_header(f / SHARD, lambda h: h.update({"layers.0.attn_nrom.weight": h.pop("layers.0.attn_norm.weight")})), "layers.0.attn"),
    "misshapen tensor": (lambda f: edit_header(f / SHARD, lambda h: h["layers.0.attn_norm.weight"].update(shape=[2, 128])), "layers.0.attn_norm.weight"),
    "NaN scale byte": (poison_scale, "layers.0.attn.wq_a.scale"),
    "config that does not fit": (lambda f: edit_config(f, moe_intermediate_size=256), "layers.0.ffn"),
    "impossible config": (lambda f: edit_config(f, num_experts_per_tok=99), "num_experts_per_tok"),
    "missing shard": (lambda f: (f / SHARD).unlink(), SHARD),
}


@pytest.mark.parametrize("what", BREAKS)
def test_broken_checkpoints_are_named(bin_dir, tmp_path, what):
    change, word = BREAKS[what]
    copy = tmp_path / "nano"
    shutil.copytree(NANO, copy)
    change(copy)
    done = baleen(bin_dir, "verify", str(copy))
    assert done.returncode == 1 and word in done.stdout + done.stderr, done.stdout + done.stderr
    served = subprocess.run([os.path.join(bin_dir, "baleen-router"), "--model", str(copy), "--coordinator", "127.0.0.1:1"],
                            capture_output=True, text=True, timeout=WAIT_S)
    assert served.returncode == 1 and word in served.stderr, served.stderr


def test_plan(bin_dir):
    """nano on three workers, and what is refused or too little."""
    plan = baleen(bin_dir, "plan", NANO, "--workers", "3", "--context", "1024")
    assert plan.returncode == 0, plan.stderr
    assert "workers    3," in plan.stdout and "a step of decoding at 1024 tokens" in plan.stdout
    few = baleen(bin_dir, "plan", NANO, "--workers", "1", "--expert-bytes-max", "1m", "--context", "1024")
    assert few.returncode == 0 and "TOO FEW" in few.stdout
    long = baleen(bin_dir, "plan", NANO, "--context", "4000000000")
    assert long.returncode == 2 and "context" in long.stderr
    assert baleen(bin_dir, "plan").returncode == 2
