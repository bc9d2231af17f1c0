"""Checkpoints made from a config.json alone: the list of tensors as model section 8 has it, written down a second time, and
files of random values in it. For tests and for measuring:  synthetic.py CONFIG DIR [--set KEY=JSON]... [--seed N]"""
import argparse
import json
import os
import random
import struct

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
CHUNK = 1 << 24


def ceil(n, block):
    return -(-n // block)


def fp8(name, out, in_):
    return [(name + ".weight", "F8_E4M3", [out, in_]), (name + ".scale", "F8_E8M0", [ceil(out, 128), ceil(in_, 128)])]


def fp4(name, out, in_):
    return [(name + ".weight", "I8", [out, in_ // 2]), (name + ".scale", "F8_E8M0", [out, ceil(in_, 32)])]


def compressor(name, width, dim, ratio, d):
    return [(name + ".wkv.weight", "BF16", [width, d]), (name + ".wgate.weight", "BF16", [width, d]),
            (name + ".ape", "F32", [ratio, width]), (name + ".norm.weight", "BF16", [dim])]


def hyper(name, mix, scales, c):
    return [(name + "_fn", "F32", [mix, c["hc_mult"] * c["hidden_size"]]), (name + "_base", "F32", [mix]),
            (name + "_scale", "F32", [scales])]


def attention(p, c, ratio):
    d, q = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    o = c["o_groups"] * c["o_lora_rank"]
    rows = [(p + "attn_sink", "F32", [c["num_attention_heads"]]), (p + "q_norm.weight", "BF16", [c["q_lora_rank"]]),
            (p + "kv_norm.weight", "BF16", [c["head_dim"]])]
    rows += fp8(p + "wq_a", c["q_lora_rank"], d) + fp8(p + "wq_b", q, c["q_lora_rank"]) + fp8(p + "wkv", c["head_dim"], d)
    rows += fp8(p + "wo_a", o, q // c["o_groups"]) + fp8(p + "wo_b", d, o)
    if ratio:
        rows += compressor(p + "compressor", (2 if ratio == 4 else 1) * c["head_dim"], c["head_dim"], ratio, d)
    if ratio == 4:
        rows += fp8(p + "indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"])
        rows += [(p + "indexer.weights_proj.weight", "BF16", [c["index_n_heads"], d])]
        rows += compressor(p + "indexer.compressor", 2 * c["index_head_dim"], c["index_head_dim"], 4, d)
    return rows


def block(p, c, ratio, is_hash):
    d, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    mix = (2 + c["hc_mult"]) * c["hc_mult"]
    rows = [(p + "attn_norm.weight", "BF16", [d]), (p + "ffn_norm.weight", "BF16", [d])]
    rows += hyper(p + "hc_attn", mix, 3, c) + hyper(p + "hc_ffn", mix, 3, c) + attention(p + "attn.", c, ratio)
    rows += [(p + "ffn.gate.weight", "BF16", [experts, d])]
    rows += [(p + "ffn.gate.tid2eid", "I64", [c["vocab_size"], c["num_experts_per_tok"]]) if is_hash
             else (p + "ffn.gate.bias", "F32", [experts])]
    for e in range(experts):
        for w, out, in_ in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
            rows += fp4(f"{p}ffn.experts.{e}.{w}", out, in_)
    for w, out, in_ in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
        rows += fp8(f"{p}ffn.shared_experts.{w}", out, in_)
    return rows


def dspark_stage(s, c):
    """What the stages of a DSpark drafter have beside their blocks (model 7.3)."""
    d, p, rank, stages = c["hidden_size"], f"mtp.{s}.", c["dspark_markov_rank"], len(c["dspark_target_layer_ids"])
    rows = []
    if s == 0:
        rows += fp8(p + "main_proj", d, stages * d) + [(p + "main_norm.weight", "BF16", [d])]
    if s == stages - 1:
        rows += [(p + "norm.weight", "BF16", [d])] + hyper(p + "hc_head", c["hc_mult"], 1, c)
        rows += [(p + f"markov_head.markov_w{i}.weight", "BF16", [c["vocab_size"], rank]) for i in (1, 2)]
        rows += [(p + "confidence_head.proj.weight", "BF16", [1, d + rank])]
    return rows


def mtp_stage(s, c):
    d, p = c["hidden_size"], f"mtp.{s}."
    rows = fp8(p + "e_proj", d, d) + fp8(p + "h_proj", d, d)
    return rows + [(p + name + ".weight", "BF16", [d]) for name in ("enorm", "hnorm", "norm")] + hyper(p + "hc_head", c["hc_mult"], 1, c)


def stages(c):
    """The drafter's tensors, one list per stage."""
    if "dspark_target_layer_ids" in c:
        return [block(f"mtp.{s}.", c, 0, False) + dspark_stage(s, c) for s in range(len(c["dspark_target_layer_ids"]))]
    return [block(f"mtp.{s}.", c, 0, False) + mtp_stage(s, c) for s in range(c["num_nextn_predict_layers"])]


def shards(c):
    """All tensors, one list of (name, dtype, shape) per file as released."""
    d = c["hidden_size"]
    files = [[("embed.weight", "BF16", [c["vocab_size"], d])]]
    for layer in range(c["num_hidden_layers"]):
        files.append(block(f"layers.{layer}.", c, c["compress_ratios"][layer], layer < c["num_hash_layers"]))
    files.append([("head.weight", "BF16", [c["vocab_size"], d]), ("norm.weight", "BF16", [d])] + hyper("hc_head", c["hc_mult"], 1, c))
    return files + stages(c)


def size(row):
    n = BYTES[row[1]]
    for dim in row[2]:
        n *= dim
    return n


def values(row, c, rng):
    """Bytes of a tensor in pieces: random, and such that every one is a value."""
    name, dtype, shape = row
    left = size(row)
    if dtype == "I64":
        for _ in range(shape[0]):
            yield struct.pack(f"<{shape[1]}q", *rng.sample(range(c["n_routed_experts"]), shape[1]))
        return
    noise = rng.randbytes(min(left, CHUNK))
    if dtype == "F8_E4M3":
        noise = noise.translate(bytes(b & 0xbf for b in range(256)))  # small, never NaN
    elif dtype == "F8_E8M0":
        noise = noise.translate(bytes(118 + b % 4 for b in range(256)))
    elif dtype in ("BF16", "F32"):
        n = BYTES[dtype]
        noise = bytearray(noise)
        noise[n - 1::n] = bytes(0x3c | b & 0x80 for b in noise[n - 1::n])  # about a hundredth
        noise = bytes(noise)
    while left > 0:
        yield noise[:left]
        left -= min(left, CHUNK)


def write_shard(path, rows, c, rng):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for row in rows:
        header[row[0]] = {"dtype": row[1], "shape": row[2], "data_offsets": [at, at + size(row)]}
        at += size(row)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for row in rows:
            for piece in values(row, c, rng):
                file.write(piece)


def shard_name(i, n):
    return f"model-{i + 1:05}-of-{n:05}.safetensors"


def write_index(folder, files, names):
    weight_map = {row[0]: name for name, rows in zip(names, files) for row in rows}
    total = sum(size(row) for rows in files for row in rows)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file)


def write_checkpoint(folder, c, seed=1):
    rng = random.Random(seed)
    files = shards(c)
    names = [shard_name(i, len(files)) for i in range(len(files))]
    os.makedirs(folder, exist_ok=True)
    for name, rows in zip(names, files):
        write_shard(os.path.join(folder, name), rows, c, rng)
    write_index(folder, files, names)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(c, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with open(args.config, encoding="utf-8") as file:
        config = json.load(file)
    for assignment in args.set:
        key, value = assignment.split("=", 1)
        config[key] = json.loads(value)
    write_checkpoint(args.folder, config, args.seed)


if __name__ == "__main__":
    main()
