"""Checkpoints of random weights, and the benchmarks of whole models: that they run, count and refuse right; not how fast anything is."""
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import xml.etree.ElementTree

import pytest

from conftest import NANO, WAIT_S, wait_for


def baleen(bin_dir, *args):
    return subprocess.run([os.path.join(bin_dir, "baleen"), *map(str, args)], capture_output=True, text=True, timeout=10 * WAIT_S)


def report(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def synthetic(bin_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "model"
    done = baleen(bin_dir, "synth", NANO, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_synth_is_a_checkpoint(bin_dir, synthetic):
    done = baleen(bin_dir, "verify", synthetic)
    assert done.returncode == 0 and "is in order" in done.stdout, done.stdout + done.stderr


def test_synth_repeats_itself(bin_dir, synthetic, tmp_path):
    for seed in (1, 2):
        assert baleen(bin_dir, "synth", NANO, tmp_path / str(seed), "--seed", seed).returncode == 0
    same, other, first = digests(tmp_path / "1"), digests(tmp_path / "2"), digests(synthetic)
    assert same == first
    assert {name for name in first if other[name] != first[name]} == {name for name in first if name.endswith(".safetensors")}


def test_synth_computes(bin_dir, synthetic, tmp_path):
    """Activations neither vanish nor blow up: logits are of the size that the head gives a normed row, and follow the prompt."""
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps([{"name": str(i), "prompt_ids": [0] + [7 * i + k for k in range(40)]} for i in range(3)]))
    done = baleen(bin_dir, "logits", "--model", synthetic, "--prompts", prompts, "--out", out)
    assert done.returncode == 0, done.stderr
    answers = json.loads(out.read_text())
    for answer in answers:
        logits = answer["logits"]
        mean = sum(logits) / len(logits)
        deviation = (sum((v - mean) ** 2 for v in logits) / len(logits)) ** 0.5
        assert 0.5 < deviation < 2, deviation
    assert len({tuple(answer["greedy"]) for answer in answers}) == 3


def e4m3(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa * 2 ** -9 if exponent == 0 else (8 + mantissa) * 2 ** (exponent - 10)
    return -value if code & 128 else value


def e2m1(code):
    value = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
    return -value if code & 8 else value


def test_synth_values(synthetic):
    """Quantized weights are normal with a deviation of 1 / sqrt(inputs), and use the range of their formats."""
    files = {}
    for name, file in json.loads((synthetic / "model.safetensors.index.json").read_text())["weight_map"].items():
        files[name] = synthetic / file

    def tensor(name):
        data = files[name].read_bytes()
        n = struct.unpack("<Q", data[:8])[0]
        row = json.loads(data[8:8 + n])[name]
        begin, end = row["data_offsets"]
        return row["shape"], data[8 + n + begin:8 + n + end]

    for base, block, decode in (("layers.1.attn.wq_b", (128, 128), lambda data: [e4m3(b) for b in data]),
                                ("layers.1.ffn.experts.3.w1", (1, 32), lambda data: [e2m1(c) for b in data for c in (b & 15, b >> 4)])):
        (n_out, _), data = tensor(base + ".weight")
        (_, n_scale), scales = tensor(base + ".scale")
        codes = decode(data)
        n_in = len(codes) // n_out
        values = [v * 2.0 ** (scales[i // n_in // block[0] * n_scale + i % n_in // block[1]] - 127) for i, v in enumerate(codes)]
        deviation = (sum(v * v for v in values) / len(values)) ** 0.5
        assert deviation * n_in ** 0.5 == pytest.approx(1, abs=0.05), base
        assert abs(sum(values)) / len(values) < 0.1 * deviation
        assert max(map(abs, codes)) > (224 if block[0] == 128 else 3)


def test_synth_refuses(bin_dir, synthetic, tmp_path):
    done = baleen(bin_dir, "synth", NANO, synthetic)
    assert done.returncode == 1 and "not there yet" in done.stderr
    done = baleen(bin_dir, "synth", NANO)
    assert done.returncode == 2 and "usage" in done.stderr
    (tmp_path / "small").mkdir()
    config = json.loads(open(os.path.join(NANO, "config.json"), encoding="utf-8").read())
    config["vocab_size"] = 128
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    done = baleen(bin_dir, "synth", tmp_path / "small", tmp_path / "out")
    assert done.returncode == 1 and "vocab_size" in done.stderr and not (tmp_path / "out").exists()


def test_serve_model(bin_dir, synthetic, tmp_path):
    """The peer's line of another batch, however alike its name, is not taken for this one's."""
    peer = ("printf 'peer=x case=decode_b10_1t value=5\\npeer=x case=decode_b1_1t value=2 unit=tok/s\\n';"
            "printf 'peer=y skipped=no model: make one\\n'")
    chart = tmp_path / "chart.svg"
    result = report(baleen(bin_dir, "bench", "serve.model", "--model", synthetic, "--rounds", 1, "--batches", "1,3", "--steps", 8,
                           "--prompt", 64, "--peer", peer, "--svg", chart))
    rows = {row["case"]: row for row in result["results"]}
    assert list(rows) == ["decode_b1", "decode_b3", "prefill_p64"]
    alone = rows["decode_b1"]["peers"]
    assert [(p["peer"], p["tokens_s"]["median"]) for p in alone] == [("x", 2)]
    assert alone[0]["ratio"]["median"] == pytest.approx(rows["decode_b1"]["cpu_tokens_s"]["median"] / 2, rel=1e-3)
    assert result["peers_skipped"] == [{"peer": "y", "reason": "no model: make one"}]
    assert rows["decode_b3"]["peers"] == [] == rows["prefill_p64"]["peers"]
    assert rows["decode_b3"]["step_bytes"] > rows["decode_b1"]["step_bytes"]
    svg = xml.etree.ElementTree.parse(chart).getroot()
    words = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"by processor time", "on the wall", "reading weights alone", "x", "tokens a second, logarithmic", "median of 1 round"} <= set(words) and "y" not in words


def test_serve_model_refuses(bin_dir, synthetic):
    done = baleen(bin_dir, "bench", "serve.model", "--model", synthetic, "--batches", "1,x")
    assert done.returncode == 1 and "--batches 1,x" in done.stderr
    done = baleen(bin_dir, "bench", "serve.model", "--model", "/nonexistent")
    assert done.returncode == 1 and "/nonexistent" in done.stderr
    done = baleen(bin_dir, "bench", "serve.model", "--model", synthetic, "--rounds", 1, "--batches", 1, "--steps", 2, "--prompt", 8,
                  "--peer", "false")
    assert done.returncode == 1 and "--peer" in done.stderr


def test_curves(bin_dir, synthetic, tmp_path):
    result = report(baleen(bin_dir, "bench", "serve.workers", "--model", synthetic, "--workers", 2, "--rounds", 1, "--batches", 1,
                           "--steps", 4, "--prompt", 8, "--svg", tmp_path / "w.svg"))
    assert [(row["workers"], row["case"]) for row in result["results"]] == [(n, c) for n in (1, 2) for c in ("decode_b1", "prefill_p8")]
    result = report(baleen(bin_dir, "bench", "step.context", "--model", synthetic, "--context", 2048, "--rounds", 1, "--steps", 2,
                           "--svg", tmp_path / "c.svg"))
    assert [row["context"] for row in result["results"]] == [1024, 2048]
    assert result["results"][1]["limit_s"] > 0
    for name in ("w.svg", "c.svg"):
        assert os.path.getsize(tmp_path / name) < 30000
        xml.etree.ElementTree.parse(tmp_path / name)


def verdict_of(ratio):
    """As an operator would judge: by the median, and by the spread's better end where that misses."""
    sign, limit = (1, ratio["at_most"]) if "at_most" in ratio else (-1, ratio["at_least"])
    edges = [("median", "met"), ("min" if sign == 1 else "max", "at its edge")]
    each = [next((word for key, word in edges if sign * v[key] <= sign * limit), "missed") for v in ratio["values"]]
    return next((word for word in ("missed", "at its edge", "met") if word in each), "not measured")


QUICK = ("--rounds", 2, "--layers", 2, "--batch", 8, "--processes", "2", "--net", "local,shm", "--d", 128)


def test_several(bin_dir, tmp_path):
    """From a folder without models: one table of all of them, gates judged; what fails is told of and the others run."""
    done = subprocess.run([os.path.join(bin_dir, "baleen"), "bench", "ep.exchange", "step.overlap", "host.step", *map(str, QUICK)],
                          capture_output=True, text=True, cwd=tmp_path, timeout=10 * WAIT_S)
    result = report(done)
    assert [(row["bench"], row["outcome"]) for row in result["results"]] == [(n, "ok") for n in ("step.overlap", "host.step", "ep.exchange")]
    assert all(row["seconds"] > 0 for row in result["results"])
    ratios = [ratio for row in result["results"] for ratio in row["ratios"]]
    assert len(ratios[0]["values"]) == 3 and len(ratios[1]["values"]) == 1 and len(ratios[2]["values"]) == 6, ratios
    gated = [ratio for ratio in ratios if "verdict" in ratio]
    assert len(gated) == 4 and all(ratio["verdict"] == verdict_of(ratio) for ratio in gated), gated
    assert sum(result["gates"].values()) == 4  # one of them not measured: more processes
    assert result["rounds"] == 2 and "--rounds 7" in done.stdout and "3 of 3, ep.exchange" in done.stderr

    done = baleen(bin_dir, "bench", "host.step", "ep.exchange", *QUICK, "--net", "none")
    assert done.returncode == 1
    rows = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])["results"]
    assert [row["outcome"] for row in rows] == ["ok", "failed"]


def test_skips(bin_dir, tmp_path):
    """A program without models and servers beside it says so before it begins; that is no failure of the others."""
    (tmp_path / "bin").mkdir()
    shutil.copy(os.path.join(bin_dir, "baleen"), tmp_path / "bin")
    done = baleen(tmp_path / "bin", "bench", "host.step", "step.overlap", "serve.stream", *QUICK)
    result = report(done)
    assert [(row["bench"], row["outcome"]) for row in result["results"]] == [
        ("step.overlap", "skipped"), ("host.step", "ok"), ("serve.stream", "skipped")]
    assert "no model nano" in result["results"][0]["reason"] and "--model DIR" in result["results"][0]["reason"]
    assert "no program baleen-" in result["results"][2]["reason"]
    said = done.stderr.index
    assert said("step.overlap will be skipped") < said("serve.stream will be skipped") < said("host.step; about")
    done = baleen(tmp_path / "bin", "bench", "step.overlap")
    assert done.returncode == 1 and "no model nano" in done.stderr


def test_several_refuses(bin_dir, tmp_path):
    for words, code, sentence in ((("all", "--model", tmp_path / "absent"), 1, "absent/config.json"), (("host.step", "nothing"), 2, "'nothing'"),
                                  (("all", "--svg", tmp_path / "x.svg"), 2, "--svg")):
        done = baleen(bin_dir, "bench", *words)
        assert done.returncode == code and sentence in done.stderr and done.stdout == "", done.stderr


def test_load_weights(bin_dir, synthetic):
    result = report(baleen(bin_dir, "bench", "load.weights", "--model", synthetic, "--rounds", 1, "--threads", 2))
    assert [(row["who"], row["hot"]) for row in result["results"]] == [
        (who, hot) for who in ("read", "kept", "worker", "router") for hot in (False, True)]
    assert all(row["bytes_s"]["median"] > 0 for row in result["results"])


def test_leaves_nothing(bin_dir, synthetic, tmp_path):
    """Neither when it ends nor when it is told to, in the middle of a run with a cluster of its own; of a failure only logs."""
    command = [os.path.join(bin_dir, "baleen"), "bench", "serve.model", "--model", str(synthetic), "--batches", "1", "--prompt", "8"]
    quick = ["--rounds", "1", "--steps", "2"]
    env = dict(os.environ, TMPDIR=str(tmp_path))
    assert subprocess.run(command + quick, env=env, capture_output=True, timeout=10 * WAIT_S).returncode == 0
    assert os.listdir(tmp_path) == []
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(command + ["--rounds", "99"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            wait_for("a router's log", lambda: list(tmp_path.glob("*/run/router*")))
            running.send_signal(number)
            running.communicate(timeout=WAIT_S)
            assert running.returncode == 1
        assert os.listdir(tmp_path) == []
    done = subprocess.run(command + quick + ["--peer", "false"], env=env, capture_output=True, text=True, timeout=10 * WAIT_S)
    assert done.returncode == 1 and str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.glob("*/*")] == ["run"]
