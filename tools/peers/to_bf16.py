#!/usr/bin/env python3
"""A checkpoint of `baleen synth` with the same numbers in BF16, for libraries that do not read FP8 and FP4 on a CPU.

  to_bf16.py CHECKPOINT OUT        (numpy)"""
import json
import os
import shutil
import sys

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def e4m3_table():
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0 ** -9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code & 128, -value, value).astype(np.float32)


E4M3 = e4m3_table()


def read(path):
    data = np.memmap(path, np.uint8, "r")
    n = int(data[:8].view("<u8")[0])
    rows = json.loads(bytes(data[8:8 + n]))
    rows.pop("__metadata__", None)
    return {name: (row["dtype"], row["shape"], data[8 + n + row["data_offsets"][0]:8 + n + row["data_offsets"][1]]) for name, row in rows.items()}


def bf16(values):
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def expanded(tensor, scale):
    """Codes times their blocks' powers of two: 128 x 128 codes of FP8, 32 of FP4, of which two are in a byte."""
    dtype, shape, data = tensor
    scales = np.exp2(scale[2].astype(np.float32) - 127).reshape(scale[1])
    codes = np.asarray(data).reshape(shape)
    if dtype == "F8_E4M3":
        values = E4M3[codes]
        scales = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:values.shape[0], :values.shape[1]]
    else:
        values = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(shape[0], -1)]
        scales = np.repeat(scales, 32, 1)
    return bf16(values * scales)


def write(path, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data.tobytes())


def main():
    source, out = sys.argv[1:3]
    os.makedirs(out)
    index = json.load(open(os.path.join(source, "model.safetensors.index.json"), encoding="utf-8"))["weight_map"]
    kept, n_bytes = {}, 0
    for file in sorted(set(index.values())):
        tensors, converted = read(os.path.join(source, file)), {}
        for name, tensor in tensors.items():
            scale = tensors.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
            if name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors:
                continue
            if scale is not None:
                values = expanded(tensor, scale)
                tensor = ("BF16", list(values.shape), values)
            converted[name] = tensor
            kept[name] = file
            n_bytes += tensor[2].nbytes
        write(os.path.join(out, file), converted)
    json.dump({"metadata": {"total_size": n_bytes}, "weight_map": kept}, open(os.path.join(out, "model.safetensors.index.json"), "w", encoding="utf-8"))
    config = json.load(open(os.path.join(source, "config.json"), encoding="utf-8"))
    for key in ("quantization_config", "expert_dtype"):
        config.pop(key, None)
    json.dump(config, open(os.path.join(out, "config.json"), "w", encoding="utf-8"), indent=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.exists(os.path.join(source, file)):
            shutil.copy(os.path.join(source, file), out)


main()
