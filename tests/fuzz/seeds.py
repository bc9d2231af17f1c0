#!/usr/bin/env python3
"""First inputs of the fuzz targets, from what the tests hold anyway: seeds.py DIR makes DIR/TARGET/NUMBER."""
import glob
import json
import os
import re
import struct
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DATA = os.path.join(ROOT, "tests", "golden", "data")
CHAT, ANTHROPIC, RESPONSES = 0, 4 + 8, 4  # see fuzz_chat.c


def read(path):
    with open(path, "rb") as file:
        return file.read()


def rows(path):
    return [json.loads(line) for line in read(os.path.join(DATA, path)).splitlines()]


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def geometry():
    for pattern in ("tests/unit/data/*.json", "tests/golden/data/model/*/ckpt/config.json", "models/nano/config.json"):
        for path in sorted(glob.glob(os.path.join(ROOT, pattern))):
            yield read(path)


def safetensors():
    """Headers of a few tensors: a whole shard's is too long to mutate well."""
    for path in sorted(glob.glob(os.path.join(DATA, "model", "*", "ckpt", "*.safetensors"))):
        data = read(path)
        n = struct.unpack("<Q", data[:8])[0]
        header = {name: row for name, row in json.loads(data[8:8 + n]).items() if name != "__metadata__"}
        few = sorted(header.items(), key=lambda item: item[1]["data_offsets"])[:4]
        if few and few[0][1]["data_offsets"][0] == 0:
            yield struct.pack("<I", few[-1][1]["data_offsets"][1]) + compact({"__metadata__": {"format": "pt"}, **dict(few)})


def field():
    """Which document, which field, what is done to it, and with what value; see fuzz_field.c."""
    values = ["null", "true", "-1", "0", "1", "7", "0.5", "1e300", "9223372036854775807", '"x"', '"F32"', "[]", "[1,2]", "{}",
              '{"a":1}', "128", "512", "[0,16]"]
    for i, value in enumerate(values):
        for document in range(3):
            yield bytes([document, (37 * i) % 256, i % 4, 0]) + value.encode()
    for document in range(3):
        for how in range(1, 4):
            yield bytes([document, 5 * how, 0, how]) + b"dspark_x"


def grammar():
    """A kind, a seed, a source; see fuzz_grammar.c. The sources are those of the unit test's tables."""
    text = read(os.path.join(ROOT, "tests", "unit", "test_grammar.c")).decode()
    kinds = {"S": 1, "R": 2, "GM_CHOICE": 3, "GM_TOOLS": 4}
    for kind, source in re.findall(r'\{(S|R|GM_CHOICE|GM_TOOLS),\s*"((?:[^"\\]|\\.)*)"', text):
        source = re.sub(r"\\(.)", r"\1", source).encode()
        for seed in range(2):
            yield bytes([kinds[kind], seed]) + source


def byte_symbols():
    """The printable stand-ins of the 256 bytes in byte-level BPE."""
    itself = [b for b in range(256) if 0x21 <= b <= 0x7e or 0xa1 <= b != 0xad]
    other = iter(range(0x100, 0x200))
    return [chr(b) if b in itself else chr(next(other)) for b in range(256)]


def tokenizer():
    """A whole tokenizer.json of bytes, two merges and the added tokens."""
    nano = json.loads(read(os.path.join(ROOT, "models", "nano", "tokenizer.json")))
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    vocab.update({"Th": 256, "The": 257})
    added = [{"id": 258 + i, "content": token["content"], "special": token["special"]}
             for i, token in enumerate(nano["added_tokens"])]
    small = {"pre_tokenizer": nano["pre_tokenizer"], "decoder": {"type": "ByteLevel"}, "added_tokens": added,
             "model": {"type": "BPE", "vocab": vocab, "merges": ["T h", ["Th", "e"]]}}
    yield compact(small)
    small["pre_tokenizer"]["pretokenizers"] = small["pre_tokenizer"]["pretokenizers"][-1:]
    yield compact(small)


def dispatch():
    for which, d, n_row, slots in [(0, 1, 1, [(0, 0)]), (2, 128, 2, [(0, 3), (0, 5), (1, 7)]), (3, 130, 1, [(0, 1)])]:
        blocks = -(-d // 128)
        header = struct.pack("<HHIQQQIIIIIIII", 3, 1, 7, 1, 2, 3, 1, 4, d, n_row, len(slots), blocks, 1, 0)
        payload = b"".join(struct.pack("<IIf", row, expert, 0.5) for row, expert in slots)
        for part in (payload, bytes(n_row * d), bytes(n_row * blocks)):
            header += part + bytes(-len(part) % 64)
        yield bytes([which]) + header


def chat():
    for row in rows("encoding/prompts.jsonl"):
        profile = int(row["profile"] == "P")
        if row["level"] == "encoder":
            yield bytes([profile]) + compact({"messages": row["messages"]})
        elif row["endpoint"] != "completions":
            yield bytes([profile | {"messages": ANTHROPIC, "responses": RESPONSES}.get(row["endpoint"], CHAT)]) + compact(row["body"])


def parser():
    for row in rows("encoding/parse.jsonl"):
        stops = [stop.encode() for stop in row.get("stop", [])][:3]
        flags = int(row["start"] == "reasoning") | int(row["tools"]) << 1 | int(row.get("prefix", False)) << 2 | len(stops) << 6
        yield (bytes([flags, 7, 0]) + b"".join(bytes([len(stop[:15])]) + stop[:15] for stop in stops) + row["text"].encode())


def request():
    for row in rows("encoding/prompts.jsonl"):
        if row["level"] == "request":
            yield bytes([int(row["endpoint"] != "completions")]) + compact(row["body"])
    yield b"\0" + compact({"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"],
                           "stop_token_ids": [7], "stream": True, "stream_options": {"include_usage": True}, "n": 1,
                           "min_tokens": 1, "ignore_eos": False, "include_stop_str_in_output": True})


def part(number, data):
    """A field of a message whose length is given."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def kserve():
    """ModelInferRequests, raw and not: name 1, datatype 2, shape 3, contents 5 of an input; see proto/kserve.proto."""
    def tensor(name, datatype, shape, contents=b""):
        return part(5, part(1, name) + part(2, datatype) + part(3, bytes(shape)) + (part(5, contents) if contents else b""))

    head = part(1, b"nano") + part(3, b"7")
    text = tensor(b"text_input", b"BYTES", [1], part(8, b"Hi"))
    sampling = tensor(b"sampling_parameters", b"BYTES", [1], part(8, b'{"max_tokens": 4}'))
    yield head + text + sampling + tensor(b"exclude_input_in_output", b"BOOL", [1], part(1, b"\1"))
    yield head + tensor(b"messages", b"BYTES", [1, 1], part(8, b'[{"role":"user","content":"x"}]')) + tensor(b"stream", b"BOOL", [1], part(1, b"\1"))
    yield head + tensor(b"input_ids", b"INT32", [1, 3], part(2, bytes([5, 6, 7])))
    yield (head + tensor(b"input_ids", b"INT32", [2]) + tensor(b"stream", b"BOOL", [1]) + tensor(b"sampling_parameters", b"BYTES", [1])
           + part(7, struct.pack("<ii", 5, 6)) + part(7, b"\1") + part(7, struct.pack("<I", 11) + b'{"seed": 1}')
           + part(4, part(1, b"triton_enable_empty_final_response") + part(2, bytes([8, 1]))) + part(6, part(1, b"text_output")))


def grpc():
    """Requests of the three kinds; see fuzz_grpc.c, proto/baleen_v1.proto and proto/vllm_engine.proto."""
    sampling = bytes([0x08, 4, 0x50, 7]) + part(11, b"stop") + part(12, bytes([9]))
    for role in range(1, 6):
        yield bytes([0]) + part(1, b"nano") + part(2, bytes([0x08, role]) + part(2, b"Hi")) + part(10, sampling)
    yield bytes([1]) + part(1, b"nano") + part(3, part(1, bytes([5, 6, 7]))) + part(4, sampling)
    yield bytes([1]) + part(2, b"Hi") + part(4, bytes([0x1d]) + struct.pack("<f", 0.5))
    yield bytes([2]) + part(1, b"id") + part(2, part(1, b"Hi") + part(2, bytes([5, 6]))) + part(4, part(10, b"stop") + bytes([64, 4]))
    yield bytes([2]) + part(1, b"id") + part(3, b"Hi") + part(4, part(17, b"a+"))


def http():
    yield b"chatcmpl-68f3228fcb53c46c57d401697200a74a:17"
    yield b"cmpl-1:7.9.4"
    yield b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    yield b"/v1/streams/a%2Fb%zz%4"


def surface():
    for row in rows("encoding/prompts.jsonl"):
        if row["level"] == "request" and row["endpoint"] in ("messages", "responses"):
            yield bytes([int(row["endpoint"] == "responses")]) + compact({"stream": True, **row["body"]})
    text = next(row["text"] for row in rows("encoding/parse.jsonl") if "invoke" in row["text"])
    user = [{"role": "user", "content": "x"}]
    for stream in (False, True):
        yield b"\2" + compact({"system": text, "max_tokens": 9, "stream": stream, "messages": user, "stop_sequences": ["a"],
                               "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "metadata": {"user_id": "u"}})
        yield b"\1" + compact({"input": text, "stream": stream, "include": ["reasoning.encrypted_content"], "temperature": 0.5, "tools": [
            {"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
            {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]}, {"type": "web_search"}]})
    yield b"\1" + compact({"input": [*user, {"type": "reasoning", "summary": [], "encrypted_content": "bl1.cjI="},
                                     {"type": "custom_tool_call", "call_id": "1", "name": "p", "input": "a"},
                                     {"type": "function_call", "call_id": "2", "name": "g", "namespace": "n", "arguments": "{}"},
                                     {"type": "custom_tool_call_output", "call_id": "1", "output": "o"}],
                           "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}})


def main():
    for make in (geometry, safetensors, field, tokenizer, dispatch, chat, parser, request, kserve, surface, grammar, grpc, http):
        folder = os.path.join(sys.argv[1], make.__name__)
        os.makedirs(folder)
        for i, seed in enumerate(make()):
            with open(os.path.join(folder, str(i)), "wb") as file:
                file.write(seed)


if __name__ == "__main__":
    main()
