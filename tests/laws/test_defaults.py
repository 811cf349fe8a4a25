"""Conversions with a source and no options. Sizes are shared out among layers, windows fit the model, zero layers convert."""

import json
import math
import shutil
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_convert.core.settings import Settings
from mla_convert.method.factorise.allocate import most_rope, probes
from mla_convert.method.factorise.sizes import make_plan, size_unit
from mla_convert.source.families import FAMILIES
from mla_convert.source.shape import AttentionShape

WEIGHTS = "model.safetensors"
SMALL = {"uniform": False, "calib_samples": 4, "calib_length": 32, "eval_windows": 1, "eval_length": 32}
INPUT = 4


@pytest.mark.parametrize(
    "variant",
    [name if name in pico.FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in pico.VARIANTS],
)
def test_sizes_are_shared_out_in_every_family(variant, convert_pico):
    report = convert_pico(variant, kv_ratio=0.5, **SMALL)
    assert math.isfinite(report.perplexity_ratio)
    rotary = FAMILIES[pico.VARIANTS[variant][0]].rotary
    sizes = [(layer["kv_lora_rank"], layer["qk_rope_head_dim"]) for layer in report.layers]
    assert all(rank > 0 and (rope >= 0 if rotary else rope == 0) for rank, rope in sizes)
    assert report.cache["share_saved"] >= 0.45


@pytest.mark.parametrize("kv_ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_models_without_rope_share_out_ranks_alone(kv_ratio, head_dim):
    shape = AttentionShape(3, 12 * head_dim, 12, 12, head_dim, has_kv_bias=True, rotary_dim=0)
    plan = make_plan(Settings(kv_ratio=kv_ratio), shape)
    unit = size_unit(plan)
    ranks, ropes = probes(plan, unit)
    assert plan.rope_dim == 0 and ropes == [0] and most_rope(plan, unit) == 0
    assert ranks == sorted(set(ranks)) and all(rank > 0 for rank in ranks)


@pytest.mark.parametrize("variant", ["gpt2", "opt"])
def test_windows_are_no_longer_than_learned_positions(variant, cli, tmp_path):
    source = pico.save(variant, tmp_path / "source")
    text = tmp_path / "long.txt"
    text.write_text(pico.text(40_000))
    options = (
        "--calib",
        text,
        "--eval",
        text,
        "--eval-windows",
        1,
        "--refine-steps",
        0,
        "--device",
        "cpu",
        "--kv-ratio",
        0.5,
    )
    code, _, err = cli(source, *options, "--out", tmp_path / "default", "-q")
    assert code == 0 and not err
    report = json.loads((tmp_path / "default" / "report.json").read_text())
    assert "windows of 256 tokens" in report["calibration"]["protocol"]
    assert "of 256 tokens" in report["evaluation"]["protocol"]
    code, _, err = cli(
        source, *options, "--calib-length", 300, "--calib-samples", 4, "--eval-length", 512, "--out", tmp_path / "asked"
    )
    assert code == 0 and "not --eval-length 512" in err and "not --calib-length 300" in err
    code, _, err = cli(
        "eval", tmp_path / "default", "--eval", text, "--eval-windows", 1, "--eval-length", 512, "--device", "cpu"
    )
    assert "not --eval-length 512" in err and code in (0, INPUT)


def zero(*parts):
    def change(tensors):
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name].zero_()

    return change


def rank_one(tensors):
    for letter in "kv":
        tensors[f"model.layers.1.self_attn.{letter}_proj.weight"][1:] = 0


def twice(tensors):
    for name in tensors:
        if ".layers.1." in name:
            tensors[name].copy_(tensors[name.replace(".1.", ".0.")])


def pruned_head(tensors):
    attention = "model.layers.1.self_attn."
    tensors[f"{attention}k_proj.weight"][:8] = 0
    tensors[f"{attention}v_proj.weight"][8:] = 0
    tensors[f"{attention}o_proj.weight"][:, :16] = 0


SILENT = {
    "q": zero("layers.1.self_attn.q_proj"),
    "k": zero("layers.1.self_attn.k_proj"),
    "v": zero("layers.1.self_attn.v_proj"),
    "kv": zero("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
    "o": zero("layers.1.self_attn.o_proj"),
    "o and down": zero("layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"),
    "all o": zero("self_attn.o_proj"),
    "everything": zero("layers.2.self_attn"),
    "rank one": rank_one,
    "twice": twice,
    "pruned head": pruned_head,
}


# All of llama; where biases or norms stand behind a projection, those that leave nothing else of keys or of a layer.
@pytest.mark.parametrize(
    "variant, name",
    [
        pytest.param(
            variant, name, marks=() if variant == "llama" or name in ("kv", "everything") else pytest.mark.slow
        )
        for variant in ("llama", "qwen2", "qwen3")
        for name in SILENT
    ],
)
def test_layers_that_say_nothing(variant, name, sources, convert_folder, tmp_path):
    source = Path(shutil.copytree(sources(variant), tmp_path / "source"))
    (tmp_path / "text.txt").write_text(pico.text(8000))
    tensors = load_file(source / WEIGHTS)
    SILENT[name](tensors)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    whole = convert_folder(source, rank="full", rope_dim="full", dtype="float32")
    assert whole.perplexity_ratio == pytest.approx(1, abs=1e-4)
    half = convert_folder(source, kv_ratio=0.5, refine_steps=2, dtype="float32", **SMALL)
    assert 0.2 < half.perplexity_ratio < 4


TENSORS = ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight",
           "model.layers.1.input_layernorm.weight",
           "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]  # fmt: skip


@pytest.mark.parametrize("size", [3e38, 9e17])
@pytest.mark.parametrize("options", [(), ("--uniform",), ("--eval", "none")])
@pytest.mark.parametrize("name", TENSORS)
def test_weights_too_large_to_compute_with(name, options, size, cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    text = tmp_path / "text.txt"
    text.write_text(pico.text(8000))
    tensors = load_file(source / WEIGHTS)
    tensors[name][:] = size * torch.where(tensors[name] > 0, 1.0, -1.0)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    small = ("--calib", text, "--eval", text, "--calib-samples", 4, "--calib-length", 32, "--eval-windows", 1,
             "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", tmp_path / "out", "-q")  # fmt: skip
    code, out, err = cli(source, *small, *options)
    if code == 0 and size < 1e18:  # what can be computed with gives figures
        evaluation = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
        assert options == ("--eval", "none") or math.isfinite(evaluation["after"]["value"])
        return
    assert code == INPUT and not out and len(err.splitlines()) == 1, err
    assert size < 1e18 or name in err
    assert not (tmp_path / "out").exists()


def test_float16_that_overflows_says_which_dtype_would_do(cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("qwen2"), tmp_path / "source"))
    text = tmp_path / "text.txt"
    text.write_text(pico.text(8000))
    tensors = load_file(source / WEIGHTS)
    for letter in "kv":
        tensors[f"model.layers.1.self_attn.{letter}_proj.weight"] *= 60_000
    save_file({name: t.clamp(-65000, 65000) for name, t in tensors.items()}, source / WEIGHTS, {"format": "pt"})
    code, _, err = cli(source, "--calib", text, "--eval", text, "--calib-samples", 4, "--calib-length", 32, "--eval-windows", 1,
                       "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--dtype", "float16", "--rank", "full",
                       "--rope-dim", "full", "--out", tmp_path / "out", "-q")  # fmt: skip
    assert code == 0 or (code == INPUT and "bfloat16 or float32" in err and len(err.splitlines()) == 1), err


def test_a_tokenizer_with_more_tokens_than_the_embedding(cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    text = tmp_path / "text.txt"
    options = ("--calib", text, "--eval", text, "--calib-samples", 4, "--calib-length", 32, "--eval-windows", 1,
               "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", tmp_path / "out", "-q")  # fmt: skip
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(40)])
    tokenizer.save_pretrained(source)
    text.write_text(pico.text(8000))
    assert cli(source, *options, "--calib-noise", 1)[0] == 0, "tokens that no text has do no harm"
    text.write_text("<extra39> and more " + pico.text(8000))
    shutil.rmtree(tmp_path / "out")
    code, out, err = cli(source, *options)
    assert code == INPUT and len(err.splitlines()) == 1 and "embedding has 264 rows" in err and not out


@pytest.mark.parametrize("damage", ["version", "vocab", "added", "cut", "deep", "not json"])
def test_a_damaged_tokenizer(damage, cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    content = json.loads((source / "tokenizer.json").read_text())
    if damage == "version":
        content["version"] = "x"
    if damage == "vocab":
        content["model"]["vocab"] = None
    if damage == "added":
        content["added_tokens"] = {}
    text = json.dumps(content)
    text = {"cut": text[:-200], "deep": "[" * 100_000, "not json": "hello"}.get(damage, text)
    (source / "tokenizer.json").write_text(text)
    code, out, err = cli("inspect", source)
    assert code == INPUT and len(err.splitlines()) == 1 and "no readable tokenizer" in err and not out


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**12}, {"hidden_size": 10**9}, {"vocab_size": 10**12},
     {"head_dim": 10**8}, {"num_attention_heads": 10**9}, {"hidden_size": 1e400}],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "inspect", "convert"])
def test_sizes_that_no_model_has(fields, command, cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **fields}))
    code, out, err = cli(command, source)
    assert code == INPUT and len(err.splitlines()) == 1 and next(iter(fields)) in err and not out


def test_more_layers_than_there_are_weights_for(cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 900}))
    code, _, err = cli("inspect", source)
    assert code == INPUT and "model.layers.3.* is missing" in err


@pytest.mark.parametrize(
    "fields", [{"pad_token_id": 10**30}, {"num_hidden_layers": 10**400}, {"bos_token_id": -(10**400)}]
)
def test_numbers_that_no_machine_has(fields, cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **fields}))
    code, out, err = cli("inspect", source)
    assert code == INPUT and len(err.splitlines()) == 1 and next(iter(fields)) in err and not out


def test_a_scale_that_is_no_number(cli, sources, tmp_path):
    source = Path(shutil.copytree(sources("gemma3"), tmp_path / "source"))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "query_pre_attn_scalar": -8}))
    code, _, err = cli("inspect", source)
    assert code == INPUT and len(err.splitlines()) == 1 and "scaled by" in err
