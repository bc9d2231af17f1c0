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


def test_other_config(bin_dir, kept):
    edit_config(kept, a_key_nobody_reads=1)
    done = verify(bin_dir, kept)
    assert done.returncode == 1 and named(done) == [MANIFEST] and "config.json" in done.stdout, done.stdout


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
    (json.dumps({"version": 1, "fingerprint": "0" * 32}), "tensors"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32, "tensors": {"embed.weight": "0" * 31 + "g"}}), "embed.weight"),
    (json.dumps({"version": 1, "fingerprint": "0" * 32, "tensors": {"embed.weight": 7}}), "embed.weight"),
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
