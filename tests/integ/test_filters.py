"""baleen tokenize, encode and parse: every row of the golden text vectors through the binary."""
import json
import os
import subprocess

import pytest

from conftest import ROOT, WAIT_S

DATA = os.path.join(ROOT, "tests", "golden", "data")
TOKENIZER = os.path.join(DATA, "tokenizer", "tokenizer.json")


def rows_of(path):
    with open(os.path.join(DATA, path), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def filter_text(bin_dir, text, verb, *args):
    """The finished process, and the answers: one for each line."""
    done = subprocess.run([os.path.join(bin_dir, "baleen"), verb, *args], input=text.encode(), capture_output=True, timeout=5 * WAIT_S)
    return done, [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]


def filter_rows(bin_dir, rows, verb, *args):
    return filter_text(bin_dir, "".join(json.dumps(row) + "\n" for row in rows), verb, *args)


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize("name, question, key, special", [
    ("encode", "text", "ids", "off"), ("encode", "text", "ids", "on"), ("bytes", "hex", "ids", "off"),
    ("control", "text", "plain", "off"), ("control", "text", "special", "on")])
def test_tokenize(bin_dir, name, question, key, special):
    rows = rows_of(f"tokenizer/{name}.jsonl")
    done, answers = filter_rows(bin_dir, [{question: row[question]} for row in rows], "tokenize", "--tokenizer", TOKENIZER,
                                "--special", special)
    assert done.returncode == 0, done.stderr
    assert answers == [{"ids": row[key]} for row in rows]


def test_decode(bin_dir):
    rows = rows_of("tokenizer/decode.jsonl")
    done, answers = filter_rows(bin_dir, [{"ids": row["ids"]} for row in rows], "tokenize", "--tokenizer", TOKENIZER,
                                "--decode", "on")
    assert done.returncode == 0, done.stderr
    assert answers == [{"pieces": row["pieces"], "text": row["text"]} for row in rows]


@pytest.mark.parametrize("profile", ["G", "P", None])
def test_encode(bin_dir, profile):
    """With their profile in the rows, or, where the rows leave it out, from the option."""
    rows = [row for row in rows_of("encoding/prompts.jsonl") if profile in (None, row["profile"])]
    hidden = ["prompt", "ids", "ids_reference", "error", "note", "name"] + (["profile"] if profile else [])
    done, answers = filter_rows(bin_dir, [without(row, *hidden) for row in rows], "encode", "--tokenizer", TOKENIZER,
                                *(["--profile", profile] if profile else []))
    assert len(answers) == len(rows)
    for row, answer in zip(rows, answers):
        if "error" in row:
            assert list(answer) == ["error"] and answer["error"], row["name"]
        else:
            assert answer == {"prompt": row["prompt"], "ids": row["ids"]}, row["name"]
    assert done.returncode == int(any("error" in row for row in rows)), done.stderr


def result(answer, values):
    """With values, arguments compare as JSON and not as text."""
    calls = [dict(call, arguments=json.loads(call["arguments"])) if values else call for call in answer["tool_calls"]]
    return dict(answer, tool_calls=calls)


def test_parse(bin_dir):
    rows = rows_of("encoding/parse.jsonl")
    done, answers = filter_rows(bin_dir, [without(row, "expect", "compare_arguments") for row in rows], "parse")
    assert done.returncode == 0, done.stderr
    assert len(answers) == len(rows)
    for row, answer in zip(rows, answers):
        values = row.get("compare_arguments") == "json"
        assert result(answer, values) == result(row["expect"], values), row["name"]


GOOD = {"tokenize": '{"text": "Hello"}', "decode": '{"ids": [19923]}', "parse": '{"start": "content", "text": "a"}',
        "encode": '{"level": "encoder", "mode": "chat", "messages": [{"role": "user", "content": "Hello"}]}'}
BAD = {
    "tokenize": ["", "[", "7", "{}", '{"text": 7}', '{"text": "a", "hex": "61"}', '{"hex": "6"}', '{"hex": "6g"}', '{"hex": 6}'],
    "decode": ['{"ids": 7}', '{"ids": [-1]}', '{"ids": [129280]}', '{"ids": [4294967296]}', '{"ids": [1.5]}', '{"ids": ["a"]}'],
    "encode": ["[]", "{}", '{"level": "x"}', '{"level": "encoder"}', '{"level": "encoder", "messages": []}',
               '{"endpoint": "x", "body": {}}', '{"endpoint": "completions", "body": {}}', '{"endpoint": "messages", "body": []}',
               '{"endpoint": "completions", "body": {"prompt": "a", "suffix": 7}}', '{"profile": "X", "body": {}}',
               json.dumps({"body": {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "x" + "\u00e9" * 40}},
                          ensure_ascii=False)],
    "parse": ["{}", '{"start": "content"}', '{"start": "x", "text": "a"}', '{"start": "content", "text": "a", "tools": 1}',
              '{"start": "content", "text": "a", "stop": "x"}', '{"start": "content", "text": "a", "stop": [1]}'],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_lines_do_not_end_it(bin_dir, what):
    """Each bad line has an error for an answer; the good ones around it are answered; the exit code tells."""
    lines = [line for bad in BAD[what] for line in (GOOD[what], bad)] + [GOOD[what]]
    args = {"tokenize": ["tokenize", "--tokenizer", TOKENIZER], "encode": ["encode", "--tokenizer", TOKENIZER],
            "decode": ["tokenize", "--tokenizer", TOKENIZER, "--decode", "on"], "parse": ["parse"]}[what]
    done, answers = filter_text(bin_dir, "\n".join(lines), *args)  # the last line without its end
    assert done.returncode == 1, done.stderr
    assert f"{len(BAD[what])} of {len(lines)}".encode() in done.stderr
    assert len(answers) == len(lines)
    for i, (line, answer) in enumerate(zip(lines, answers)):
        assert (list(answer) == ["error"] and answer["error"] != "") if i % 2 else "error" not in answer, (line, answer)


def test_a_script_can_wait_for_each_answer(bin_dir):
    with subprocess.Popen([os.path.join(bin_dir, "baleen"), "parse"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        for text in ("a", "b"):
            running.stdin.write(json.dumps({"start": "content", "text": text}).encode() + b"\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["content"] == text
        running.stdin.close()
        assert running.wait(timeout=WAIT_S) == 0


@pytest.mark.parametrize("args, code, word", [
    (["tokenize"], 2, "--tokenizer"), (["encode"], 2, "--tokenizer"), (["encode", "--profile", "X"], 2, "profile"),
    (["tokenize", "--tokenizer", TOKENIZER, "--special", "on", "--decode", "on"], 2, "--decode"),
    (["tokenize", "--tokenizer", "/nonexistent/t.json"], 1, "/nonexistent/t.json"), (["parse", "x"], 2, "x")])
def test_usage(bin_dir, args, code, word):
    done, answers = filter_text(bin_dir, "", *args)
    assert done.returncode == code and word in done.stderr.decode() and answers == [], done.stderr
