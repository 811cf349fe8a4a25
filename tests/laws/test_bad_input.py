"""Bad input: the right exit code, one line that names the culprit, and nothing left behind."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
from refusals import INDEX, INPUT, RESOURCE, USAGE, WEIGHTS, change_json, change_weights, shards, truncate

from mla_convert.core.runtime import pick_device
from mla_convert.source.families import FAMILIES

# ---- which source


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "./nowhere", "nowhere.gguf"])
def test_source_not_found(refused, name):
    refused(INPUT, Path(name).name, name)


@pytest.mark.parametrize("typed, meant", [("llama-8bb", "llama-8b"), ("mistral7b", "mistral-7b"), ("dmeo", "demo")])
def test_unknown_alias_suggests_the_nearest(refused, typed, meant):
    refused(INPUT, f"did you mean '{meant}'?", typed)


@pytest.mark.parametrize("name", ["owner/name", "meta-llama/Llama-3.1-8B", "llama-8b"])
def test_hub_out_of_reach(refused, name):
    refused(RESOURCE, name if "/" in name else "meta-llama/Llama-3.1-8B", name)


def test_source_is_some_file(refused, text):
    refused(INPUT, "text.txt", text)


@pytest.mark.parametrize("content", [b"", b"GGUF, or not", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "truncated"])
def test_damaged_gguf(refused, tmp_path, content):
    if content == "truncated":
        content = pico.save_gguf(tmp_path / "whole.gguf").read_bytes()[:-5000]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(INPUT, "model.gguf", tmp_path / "model.gguf")


def test_already_converted(refused, convert_pico):
    refused(INPUT, "converted already", convert_pico("llama").out)


# ---- its configuration


def test_no_config(refused, source):
    (source / "config.json").unlink()
    refused(INPUT, "config.json", source)


@pytest.mark.parametrize("content", ["{not json", "[]", "null", '{"model_type": 5}', "\x00"])
def test_config_not_usable(refused, source, content):
    (source / "config.json").write_text(content)
    refused(INPUT, "5" if "5" in content else "config.json", source)


@pytest.mark.parametrize("fields", [{"hidden_act": "foo"}, {"quantization_config": {"quant_method": "gptq"}}])
def test_configuration_that_makes_no_model_or_a_quantised_one(refused, source, fields):
    change_json(source / "config.json", **fields)
    refused(INPUT, "foo" if "hidden_act" in fields else "quantised", source)


@pytest.mark.parametrize("model_type", ["gptq", "newest", None])
def test_architecture_not_supported_says_which_are(refused, source, model_type):
    change_json(source / "config.json", model_type=model_type)
    refused(INPUT, f"supported are: {', '.join(sorted(FAMILIES))}", source)


@pytest.mark.parametrize("fields", [{"num_key_value_heads": 5}, {"num_key_value_heads": 0}, {"num_hidden_layers": 0},
                                    {"num_hidden_layers": "three"}, {"hidden_size": None}])  # fmt: skip
def test_config_makes_no_sense(refused, source, fields):
    change_json(source / "config.json", **fields)
    refused(INPUT, "source", source)


# ---- its weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_not_finite(refused, source, name, value):
    change_weights(source, name, lambda tensor: tensor.index_fill(0, torch.tensor([1]), value))
    refused(INPUT, name, source)


def test_tensor_missing(refused, source):
    change_weights(source, "model.layers.1.mlp.up_proj.weight", None)
    refused(INPUT, "model.layers.1.mlp.up_proj.weight", source)


def test_tensor_of_another_shape(refused, source):
    change_weights(source, "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor[:-2].clone())
    refused(INPUT, "model.layers.0.self_attn.q_proj.weight", source)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 5}, {"vocab_size": 300}, {"head_dim": 12}])
def test_config_of_another_checkpoint(refused, source, fields):
    change_json(source / "config.json", **fields)
    refused(INPUT, "tensor model.", source)


def test_quantised_weights(refused, source):
    change_weights(source, "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor.to(torch.int8))
    refused(INPUT, "model.layers.0.self_attn.q_proj.weight", source)


def test_single_file_truncated(refused, source):
    truncate(source / WEIGHTS)
    refused(INPUT, WEIGHTS, source)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"<html>not found</html>"])
def test_single_file_is_something_else(refused, source, content):
    (source / WEIGHTS).write_bytes(content)
    refused(INPUT, WEIGHTS, source)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_shard_missing_or_truncated(refused, sharded, damage):
    damage(shards(sharded)[1])
    refused(INPUT, shards(sharded)[1].name if damage is truncate else "model-00002-of", sharded)


def test_shard_lacks_a_tensor_that_the_index_promises(refused, sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    change_json(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": shards(sharded)[0].name})
    refused(INPUT, "model.norm.weight", sharded)


OUTSIDE = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "C:\\x", "", ".."]


@pytest.mark.parametrize("file", OUTSIDE)
def test_index_points_outside(refused, sharded, tmp_path, file):
    shutil.copy(shards(sharded)[0], tmp_path / "x.safetensors")
    change_json(sharded / INDEX, weight_map={"model.norm.weight": file})
    refused(INPUT, INDEX, sharded)


@pytest.mark.parametrize("content", ["{not json", "[]", "null", "{}", '{"weight_map": []}'])
def test_index_not_usable(refused, sharded, content):
    (sharded / INDEX).write_text(content)
    refused(INPUT, INDEX, sharded)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "consolidated.00.pt"])
def test_pickles_are_not_read(refused, source, file):
    (source / WEIGHTS).rename(source / file)
    refused(INPUT, file, source)


def test_no_weights(refused, source):
    (source / WEIGHTS).unlink()
    refused(INPUT, WEIGHTS, source)


def test_no_tokenizer(refused, source):
    for file in source.glob("tokenizer*"):
        file.unlink()
    refused(INPUT, "tokenizer", source)


# ---- options


@pytest.mark.parametrize(
    "options, code, culprit",
    [
        (("--rank", 0), INPUT, "rank 0"),
        (("--rank", -3), INPUT, "rank -3"),
        (("--rank", 25, "--rope-dim", 8), INPUT, "rank 25"),
        (("--rank", 10**30), INPUT, "above full rank"),
        (("--rank", "abc"), USAGE, "abc"),
        (("--rank", "8.5"), USAGE, "8.5"),
        (("--rank", 8, "--kv-ratio", 0.5), USAGE, "kv_ratio"),
        (("--kv-ratio", 0), INPUT, "kv_ratio 0"),
        (("--kv-ratio", 1.5), INPUT, "kv_ratio 1.5"),
        (("--kv-ratio", "nan"), INPUT, "kv_ratio nan"),
        (("--kv-ratio", 0.01), INPUT, "kv_ratio 0.01"),
        (("--kv-ratio", 0.25, "--rope-dim", 8), INPUT, "kv_ratio 0.25"),
        (("--kv-ratio", "half"), USAGE, "--kv-ratio"),
        (("--rank", 8, "--rope-dim", 3), INPUT, "rope_dim 3"),
        (("--rank", 8, "--rope-dim", -2), INPUT, "rope_dim -2"),
        (("--rank", 8, "--rope-dim", 18), INPUT, "rope_dim 18"),
        (("--rope-dim", "wide"), USAGE, "wide"),
        (("--nope-dim", 0), INPUT, "nope_dim 0"),
        (("--nope-dim", 9), INPUT, "nope_dim 9"),
        (("--nope-dim", "half"), USAGE, "half"),
        (("--frobnicate",), USAGE, "--frobnicate"),
        (("--rank",), USAGE, "--rank"),
        (("another",), USAGE, "another"),
        (("--rope-selection", "most"), USAGE, "rope_selection"),
        (("--dtype", "int8"), USAGE, "dtype"),
        (("--device", "tpu"), USAGE, "tpu"),
        (("--device", "meta"), USAGE, "meta"),
        (("--calib-samples", 0), USAGE, "calib_samples"),
        (("--calib-length", 4), USAGE, "calib_length"),
        (("--eval-windows", 0), USAGE, "eval_windows"),
        (("--eval-length", "long"), USAGE, "--eval-length"),
        (("--refine-steps", -1), USAGE, "refine_steps"),
        (("--refine-lr", 0), USAGE, "refine_lr"),
        (("--seed", -1), USAGE, "seed"),
        (("--seed", 1 << 64), USAGE, "seed"),
        (("--revision", "main"), USAGE, "--revision is for a model on the Hub"),
        (("--gpus", 5000, "--device", "cpu"), USAGE, "--gpus 5000 is more than this host has cores"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options(refused, source, options, code, culprit):
    refused(code, culprit, source, *options)


def test_cuda_that_is_not_there(refused, source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(RESOURCE, "cuda", source, "--device", "cuda:1")
    assert pick_device("auto").type == "cpu"


def test_no_arguments_shows_help(cli):
    code, out, err = cli()
    assert code == USAGE and "Usage:" in out and "--rank" in out and not err


def test_help_needs_neither_torch_nor_transformers():
    code = """
import contextlib, sys
from mla_convert.cli.main import main
sys.argv = ["mla-convert", "--help"]
with contextlib.suppress(SystemExit):
    main()
print(sorted({"torch", "transformers", "numpy", "datasets"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rank" in run.stdout and run.stdout.splitlines()[-1] == "[]"


# ---- texts


@pytest.mark.parametrize("option", ["--calib", "--eval"])
@pytest.mark.parametrize(
    "file, content",
    [
        ("missing.txt", None),
        ("missing.jsonl.gz", None),
        ("empty.txt", b""),
        ("blank.txt", b" \n\n"),
        ("latin.txt", "caf\xe9".encode("latin-1") * 999),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n'),
        ("keys.jsonl", b'{"body": "no text field"}\n'),
        ("types.jsonl", b'{"text": 5}\n'),
        ("list.jsonl", b"[1, 2]\n"),
        ("plain.txt.gz", b"not compressed"),
        ("cut.txt.gz", gzip.compress(b"some text " * 999, mtime=0)[:-20]),
        ("flipped.txt.gz", gzip.compress(os.urandom(2000), mtime=0)[:500] + b"\x00" * 500),
    ],
)
def test_text_not_usable(refused, source, tmp_path, option, file, content):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    refused(INPUT, file, source, option, tmp_path / file)


@pytest.mark.parametrize("option, purpose", [("--calib", "calibration"), ("--eval", "evaluation")])
def test_text_too_short(refused, source, tmp_path, option, purpose):
    (tmp_path / "short.txt").write_text("too short")
    refused(INPUT, f"{purpose} text short.txt", source, option, tmp_path / "short.txt")


def test_dataset_out_of_reach(refused, source):
    refused(RESOURCE, "owner/texts", source, "--calib", "owner/texts@train")
