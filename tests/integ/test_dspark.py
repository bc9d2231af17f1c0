"""A checkpoint with a DSpark drafter, as the refreshed releases have: recognised, its trunk served, never taken for one with an
MTP block. Made from tiny-flash, whose trunk and golden logits it keeps."""
import array
import json
import os
import random

import pytest

import synthetic
from test_tools import MODELS, baleen, read_tensors

FLASH = os.path.join(MODELS, "tiny-flash")
DSPARK = {"dspark_block_size": 5, "dspark_noise_token_id": 300, "dspark_target_layer_ids": [2, 3, 4], "dspark_markov_rank": 16}


def trunk_config():
    with open(os.path.join(FLASH, "ckpt", "config.json"), encoding="utf-8") as file:
        return json.load(file)


def dspark_config():
    """As the 0731 config relates to the first Flash one: keys more, stages of window only, and still one next-n layer."""
    config = trunk_config()
    ratios = config["compress_ratios"][:config["num_hidden_layers"]] + [0] * len(DSPARK["dspark_target_layer_ids"])
    return {**config, **DSPARK, "compress_ratios": ratios}


def make(folder, config, drafter):
    """tiny-flash's trunk by link, and the tensors of a drafter as the config of `drafter` has it."""
    files = synthetic.shards(drafter)
    n_trunk = drafter["num_hidden_layers"] + 2
    names = [synthetic.shard_name(i, len(files)) for i in range(len(files))]
    folder.mkdir()
    for i, rows in enumerate(files):
        if i < n_trunk:
            os.symlink(os.path.join(FLASH, "ckpt", synthetic.shard_name(i, n_trunk + 1)), folder / names[i])
        else:
            synthetic.write_shard(folder / names[i], rows, drafter, random.Random(i))
    synthetic.write_index(folder, files, names)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(bin_dir, folder, out, *args):
    with open(os.path.join(FLASH, "prompts.json"), encoding="utf-8") as file:
        fixture = json.load(file)
    prompts = [{"name": str(i), "prompt_ids": prompt["prompt_ids"]} for i, prompt in enumerate(fixture["prompts"])]
    (out / "p.json").write_text(json.dumps(prompts))
    done = baleen(bin_dir, "logits", "--model", str(folder), "--prompts", str(out / "p.json"), "--out", str(out / "o.json"), *args)
    assert done.returncode == 0, done.stderr
    return fixture, json.loads((out / "o.json").read_text())


def test_configs_agree():
    """The config under test has just the keys that 0731 has more than the first Flash config, and three zeros in place of one."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "unit", "data")
    configs = {}
    for name in ("flash", "flash_0731"):
        with open(os.path.join(folder, name + "_config.json"), encoding="utf-8") as file:
            configs[name] = json.load(file)
    assert set(configs["flash_0731"]) - set(configs["flash"]) == set(DSPARK)
    assert {key for key in configs["flash"] if configs["flash"][key] != configs["flash_0731"][key]} == {"compress_ratios"}
    assert configs["flash_0731"]["compress_ratios"] == configs["flash"]["compress_ratios"] + [0, 0]
    tiny, before = dspark_config(), trunk_config()
    assert {key for key in before if before[key] != tiny[key]} == {"compress_ratios"}
    assert tiny["compress_ratios"] == before["compress_ratios"] + [0, 0]


def test_list_is_the_released_one():
    """The second writing of the list gives tiny-flash's own tensors."""
    with open(os.path.join(FLASH, "ckpt", "model.safetensors.index.json"), encoding="utf-8") as file:
        assert {row[0] for rows in synthetic.shards(trunk_config()) for row in rows} == set(json.load(file)["weight_map"])


def test_verify_and_logits(bin_dir, tmp_path):
    folder = make(tmp_path / "dspark", dspark_config(), dspark_config())
    done = baleen(bin_dir, "verify", str(folder), "--write")
    assert done.returncode == 0 and "is in order" in done.stdout, done.stdout + done.stderr
    assert baleen(bin_dir, "verify", str(folder)).returncode == 0
    fixture, answers = logits(bin_dir, folder, tmp_path, "--workers", "2")
    golden = read_tensors(os.path.join(FLASH, "logits.safetensors"))
    for i, (got, want) in enumerate(zip(answers, fixture["prompts"])):
        assert got["greedy"] == want["greedy"]
        assert array.array("f", got["logits"]) == golden[f"p{i}.logits"][-len(got["logits"]):]
    assert len(answers) == len(fixture["prompts"]) > 3


@pytest.mark.parametrize("config, drafter, described, held", [
    (trunk_config, dspark_config, "an MTP drafter by num_nextn_predict_layers", "a DSpark drafter"),
    (dspark_config, trunk_config, "a DSpark drafter by its dspark_ keys", "an MTP drafter")])
def test_one_for_the_other(bin_dir, tmp_path, config, drafter, described, held):
    """Their tensors share names; a config of one with the tensors of the other is refused, and says so."""
    folder = make(tmp_path / "mixed", config(), drafter())
    sentence = f"config.json describes {described}, the tensors are of {held}"
    done = baleen(bin_dir, "verify", str(folder))
    assert done.returncode == 1 and sentence in done.stdout, done.stdout + done.stderr
    (tmp_path / "p.json").write_text('[{"name": "a", "prompt_ids": [1]}]')
    done = baleen(bin_dir, "logits", "--model", str(folder), "--prompts", str(tmp_path / "p.json"), "--out", str(tmp_path / "o.json"))
    assert done.returncode != 0 and sentence in done.stderr and "mtp.0." in done.stderr, done.stderr


@pytest.mark.parametrize("change, said", [
    ({"dspark_target_layer_ids": [2, 3]}, "compress_ratios"), ({"dspark_target_layer_ids": [2, 3, 5]}, "num_hidden_layers 5"),
    ({"dspark_markov_rank": 17}, "dspark_markov_rank"), ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers is 0")])
def test_wrong_keys(bin_dir, tmp_path, change, said):
    folder = make(tmp_path / "wrong", {**dspark_config(), **change}, dspark_config())
    done = baleen(bin_dir, "verify", str(folder))
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
