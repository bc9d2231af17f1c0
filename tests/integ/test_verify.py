"""baleen verify and the manifest of digests beside a checkpoint."""
import json
import os
import shutil
import struct
import subprocess

import pytest

from conftest import NANO, WAIT_S
from test_tools import edit_config

MANIFEST = "baleen.manifest.json"
WEIGHT = "layers.1.ffn.experts.3.w1.weight"  # FP4: any byte is two good values, so only a digest can tell


def verify(bin_dir, folder, *args):
    return subprocess.run([os.path.join(bin_dir, "baleen"), "verify", str(folder), *args], capture_output=True, text=True,
                          timeout=5 * WAIT_S)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(NANO, tmp_path / "nano")


@pytest.fixture
def kept(bin_dir, copy):
    """A copy with its manifest."""
    done = verify(bin_dir, copy, "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


def header(path):
    with open(path, "rb") as file:
        n = struct.unpack("<Q", file.read(8))[0]
        return 8 + n, json.loads(file.read(n))


def flip(folder, name):
    """One bit of the middle byte of a tensor, in place."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    data_at, rows = header(path)
    begin, end = rows[name]["data_offsets"]
    with open(path, "r+b") as file:
        file.seek(data_at + (begin + end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def named(done):
    """The tensors in the table of what is wrong."""
    table = done.stdout.split("\n\n")[0].splitlines()
    return [line.split()[0] for line in table[1:]] if table[0].startswith("tensor or file") else []


def test_write_then_agree(bin_dir, copy):
    done = verify(bin_dir, copy)
    assert done.returncode == 0 and "none" in done.stdout and not (copy / MANIFEST).exists(), done.stdout
    done = verify(bin_dir, copy, "--write")
    assert done.returncode == 0 and "written" in done.stdout and "MB/s" in done.stdout, done.stdout + done.stderr
    manifest = json.loads((copy / MANIFEST).read_text())
    assert manifest["version"] == 1 and manifest["fingerprint"] in done.stdout
    assert set(manifest["tensors"]) == set(json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"])
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in manifest["tensors"].values())
    assert [name for name in os.listdir(copy) if name.startswith(MANIFEST)] == [MANIFEST]
    done = verify(bin_dir, copy)
    assert done.returncode == 0 and "agrees" in done.stdout, done.stdout


def test_a_flipped_bit_is_named(bin_dir, kept):
    flip(kept, WEIGHT)
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and named(done) == [WEIGHT], done.stdout + done.stderr
    done = verify(bin_dir, kept, "--write")  # a new start: what is there is trusted now
    assert done.returncode == 0, done.stdout
    assert verify(bin_dir, kept).returncode == 0


def test_two_flipped_bits_are_both_named(bin_dir, kept):
    flip(kept, WEIGHT)
    flip(kept, "embed.weight")
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and sorted(named(done)) == sorted([WEIGHT, "embed.weight"]), done.stdout


def test_manifest_of_other_tensors(bin_dir, kept):
    edit(kept, lambda m: m["tensors"].update({"layers.0.extra": "0" * 32}))
    edit(kept, lambda m: m["tensors"].pop(WEIGHT))
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and sorted(named(done)) == sorted([WEIGHT, "layers.0.extra"]), done.stdout


# what no tensor shows: only the manifest knows what the released config said
@pytest.mark.parametrize("change, said", [
    ({"rope_theta": 10001}, "rope_theta is 10001, and was 10000"), ({"hc_sinkhorn_iters": 19}, "hc_sinkhorn_iters is 19, and was 20"),
    ({"swiglu_limit": 9.5}, "swiglu_limit is 9.5, and was 10"), ({"sliding_window": 129}, "sliding_window is 129, and was 128"),
    ({"a_key_nobody_reads": 1}, "a_key_nobody_reads is 1, and was nothing"), ({"use_cache": None}, "use_cache is null, and was true"),
    ({"rope_scaling": {"type": "yarn", "factor": 17, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1}},
     "rope_scaling.factor is 17, and was 16")])
def test_other_config(bin_dir, kept, change, said):
    edit_config(kept, **change)
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and named(done) == ["config.json"] and said in done.stdout, done.stdout + done.stderr


def test_config_written_otherwise(bin_dir, kept):
    """The same values in another order: the fingerprint that members compare differs."""
    config = json.loads((kept / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and named(done) == [MANIFEST] and "config.json" in done.stdout, done.stdout


def poke(folder, name, at, data):
    """Other bytes in a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    data_at, rows = header(path)
    with open(path, "r+b") as file:
        file.seek(data_at + rows[name]["data_offsets"][0] + at)
        file.write(data)


TABLE = "layers.0.ffn.gate.tid2eid"  # [4096][4] of 16 experts


@pytest.mark.parametrize("name, at, data, said", [
    ("layers.0.attn.wq_a.scale", 0, b"\xff", "row 0: scale byte 255 is NaN"),
    ("layers.2.ffn.experts.15.w2.scale", 5, b"\xff", "scale byte 255 is NaN"),
    ("layers.3.attn.wo_b.weight", 7, b"\x7f", "row 0: E4M3 code 0x7F is NaN"),
    (TABLE, 7 * 32, struct.pack("<4q", 3, 5, 3, 1), "row 7: expert 3 is repeated"),
    (TABLE, 4095 * 32, struct.pack("<4q", 0, 1, 2, 16), "row 4095: expert 16 is out of range"),
    (TABLE, 0, struct.pack("<q", -1), "row 0: expert -1 is out of range")])
def test_wrong_values(bin_dir, copy, name, at, data, said):
    poke(copy, name, at, data)
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and named(done) == [name] and said in done.stdout, done.stdout + done.stderr


SHARD = "model-00003-of-00008.safetensors"  # layer 1
NORM = "layers.1.attn_norm.weight"


def rewrite(folder, change, cut=None):
    """The shard with its header edited, and its data as it was, up to cut."""
    data_at, rows = header(folder / SHARD)
    data = (folder / SHARD).read_bytes()[data_at:]
    change(rows)
    text = json.dumps(rows).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[:cut])


def extra(rows):
    end = max(row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__")
    rows["layers.1.attn.wq_a.bias"] = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}


@pytest.mark.parametrize("change, name, said", [
    (lambda rows: rows.update({"layers.1.attn_normal.weight": rows.pop(NORM)}), NORM, "which lacks it"),
    (lambda rows: rows.update({"model." + NORM: rows.pop(NORM)}), "model." + NORM, "misnamed"),
    (extra, "layers.1.attn.wq_a.bias", "is extra"),
    (lambda rows: rows[NORM].update(shape=[128, 2]), NORM, "it is [128, 2] and must be [256]"),
    (lambda rows: rows["layers.1.attn.wq_a.weight"].update(shape=[256, 128]), "layers.1.attn.wq_a.weight",
     "it is [256, 128] and must be [128, 256] (by q_lora_rank, hidden_size)"),
    (lambda rows: rows["layers.1.attn.wq_a.weight"].update(dtype="I8"), "layers.1.attn.wq_a.weight", "it is I8 and must be F8_E4M3"),
    (lambda rows: rows[NORM].update(dtype="F32"), NORM, "dtype and shape need 1024"),
    (lambda rows: rows[NORM].update(dtype="F64"), NORM, "unknown dtype F64")])
def test_wrong_header(bin_dir, copy, change, name, said):
    rewrite(copy, change)
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and name in named(done) and said in done.stdout, done.stdout + done.stderr


def test_truncated(bin_dir, copy):
    rewrite(copy, lambda rows: None, cut=-1)
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and "truncated" in done.stdout and SHARD in done.stdout, done.stdout + done.stderr
    (copy / SHARD).unlink()
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and named(done) == [SHARD] and "No such file" in done.stdout, done.stdout + done.stderr


def test_missing_tensor(bin_dir, copy):
    """The last one, in its shard and in the index."""
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    _, rows = header(copy / SHARD)
    name, row = max(((n, r) for n, r in rows.items() if n != "__metadata__"), key=lambda item: item[1]["data_offsets"])
    size = row["data_offsets"][1] - row["data_offsets"][0]
    rewrite(copy, lambda rows: rows.pop(name), cut=-size)
    del index["weight_map"][name]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and named(done) == [name] and "is missing" in done.stdout, done.stdout + done.stderr


def test_wrong_values_get_no_manifest(bin_dir, copy):
    data_at, rows = header(copy / "model-00002-of-00008.safetensors")
    with open(copy / "model-00002-of-00008.safetensors", "r+b") as file:
        file.seek(data_at + rows["layers.0.attn.wq_a.scale"]["data_offsets"][0])
        file.write(b"\xff")
    done = verify(bin_dir, copy, "--write")
    assert done.returncode == 1 and named(done) == ["layers.0.attn.wq_a.scale"], done.stdout
    assert not (copy / MANIFEST).exists()


@pytest.mark.parametrize("what, word", [
    ("", "line"), ("{", "line"), ("[]", "version"), ('{"version": 2}', "version 2"), ('{"version": 1}', "fingerprint"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32}), "config"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32, "config": {}}), "tensors"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32, "config": {}, "tensors": {"embed.weight": "0" * 31 + "g"}}), "embed.weight"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32, "config": {}, "tensors": {"embed.weight": 7}}), "embed.weight"),
    ('{"version": 1, "version": 1}', "line")])
def test_corrupt_manifest(bin_dir, copy, what, word):
    (copy / MANIFEST).write_text(what)
    done = verify(bin_dir, copy)
    assert done.returncode == 1 and MANIFEST in done.stderr and word in done.stderr, done.stdout + done.stderr
    assert done.stdout == ""


def test_manifest_that_cannot_be_written(bin_dir, copy):
    (copy / MANIFEST).mkdir()
    done = verify(bin_dir, copy, "--write")
    assert done.returncode == 1 and MANIFEST in done.stderr, done.stdout + done.stderr
    assert not (copy / (MANIFEST + ".new")).exists()
