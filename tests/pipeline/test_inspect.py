"""`inspect`: what a checkpoint is, whether it can be converted, what a converted one has become."""

import json
import shutil
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_convert.pipeline.inspect import CONFIG_ONLY, inspect_checkpoint
from mla_convert.source import source as sources_module
from mla_convert.source.families import FAMILIES
from mla_convert.source.shape import kv_heads

WEIGHTS = "model.safetensors"
# variants whose configuration has a sliding window of 12 tokens and no `layer_types`: all three layers have the window
WINDOWED = ("mistral-window", "ministral3-window", "mixtral", "phi3", "phimoe", "starcoder2")
ROPE = {"llama": "default", "llama3-rope": "llama3", "llama-yarn": "yarn", "gemma3": "linear", "olmo3": "yarn"}
KEY_OR_VALUE = ("k_proj", "v_proj", "c_attn", "query_key_value")


@pytest.fixture
def source(sources, tmp_path):
    return Path(shutil.copytree(sources("llama"), tmp_path / "source"))


@pytest.mark.parametrize("name", pico.VARIANTS)
def test_every_family(cli, sources, name):
    code, out, err = cli("inspect", sources(name), "--json")
    found, config = json.loads(out), pico.config(name)
    assert code == 0 and not err and found["convertible"] and found["kind"] == "source"
    assert found["model_type"] == config.model_type and found["dtype"] == "float32"
    shape, groups = found["shape"], kv_heads(config)
    layers = FAMILIES[config.model_type].converted_layers(config) or range(config.num_hidden_layers)
    assert (shape["layers"], shape["attention_layers"]) == (config.num_hidden_layers, len(layers))
    assert (shape["attention_heads"], shape["key_value_heads"]) == (config.num_attention_heads, groups)
    stored = load_file(sources(name) / WEIGHTS)
    assert found["parameters"] == sum(t.numel() for t in stored.values())
    family = FAMILIES[config.model_type]
    caching = range(len(layers) - (getattr(config, family.shared) if family.shared else 0))
    by_layer = [config.per_layer_config[layer] if family.heads_by_layer else None for layer in caching]
    widths = [each.num_key_value_heads * each.head_dim if each else groups * shape["head_dim"] for each in by_layer]
    assert found["cache_bytes_per_token"] == 2 * sum(widths) * 4
    assert found["tied_embeddings"] == config.tie_word_embeddings
    windowed = found["sliding_window"]["layers"] if found["sliding_window"] else 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 3 * (name in WINDOWED)
    if family.shared:
        kinds = kinds[: len(caching)]
    assert windowed == sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds) and (
        not windowed or found["sliding_window"]["tokens"] == 12
    )
    layer = f"{FAMILIES[config.model_type].layers}.{layers[0]}."
    biases = {
        key.removeprefix(layer).removesuffix(".bias") for key in stored if key.startswith(layer) and ".bias" in key
    }
    assert found["biases"] == sorted(biases)
    assert shape["key_value_bias"] == any(part.endswith(KEY_OR_VALUE) for part in biases)
    if name in ROPE:
        assert (found["rope"]["type"], found["rope"]["base"]) == (ROPE[name], 10000.0)
        assert ("factor" in found["rope"]["scaling"]) == (ROPE[name] != "default")
    no_rope = ("jamba", "nemotron-h", "nemotron-h-moe", "olmo-hybrid", "granite4-moe")
    assert bool(found["rope"]) == (FAMILIES[config.model_type].rotary and name not in no_rope)


def test_table(cli, sources):
    code, out, err = cli("inspect", sources("llama-yarn"))
    assert code == 0 and not err
    for words in (
        "6 of 8, 2 for keys and values",
        "yarn, base 10000.0",
        "factor 4.0",
        "float32",
        "384 B",
        "can be converted:",
    ):
        assert words in out


def test_packaged_recipe_and_yaml(cli, source, tmp_path):
    code, out, _ = cli("inspect", "demo", "--json")
    assert code == 0 and json.loads(out)["name"] == "mla_demo"
    (tmp_path / "mine.yaml").write_text(f"description: d\nsource: {source}\n")
    assert json.loads(cli("inspect", tmp_path / "mine.yaml", "--json")[1])["name"] == "source"


def test_gguf_by_its_metadata(tmp_path, monkeypatch):
    file = pico.save_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(sources_module.AutoModelForCausalLM, "from_pretrained", None)
    found = inspect_checkpoint(str(file)).as_dict()
    assert found["convertible"] and found["basis"] == CONFIG_ONLY and found["shape"]["head_dim"] == 8


def test_hub_by_its_configuration(sources, tmp_path, monkeypatch):
    def download(name, revision=None, allow_patterns=None):
        assert set(allow_patterns) <= {"config.json", "report.json"}
        folder = tmp_path / "0123abc"
        folder.mkdir(exist_ok=True)
        return shutil.copy(sources("qwen2") / "config.json", folder) and folder

    monkeypatch.setattr("mla_convert.source.place.snapshot_download", download)
    found = inspect_checkpoint("owner/name").as_dict()
    assert (found["name"], found["revision"], found["basis"]) == ("owner/name", "0123abc", CONFIG_ONLY)
    assert found["biases"] == ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]


# ---- what cannot be converted


def change_weights(folder, name, change):
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / WEIGHTS, {"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LAYER = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "architecture": (lambda folder: change_config(folder, model_type="bloom"), "'bloom' is not supported"),
    "nonsense": (lambda folder: change_config(folder, hidden_act="foo"), "configuration of source does not make a model"),
    "no heads": (lambda folder: change_config(folder, num_attention_heads=0), "num_attention_heads = 0"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "damaged"),
    "missing": (lambda folder: change_weights(folder, LAYER, lambda _: None), f"tensor {LAYER} is missing"),
    "shape": (lambda folder: change_weights(folder, LAYER, lambda t: t[:5].clone()), f"tensor {LAYER} of source has shape"),
    "quantised": (lambda folder: change_weights(folder, LAYER, lambda t: t.to(torch.int8)), f"tensor {LAYER} is stored as I8"),
    "tokenizer": (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_converted_and_why(cli, source, fault):
    spoil, reason = FAULTS[fault]
    spoil(source)
    code, out, err = cli("inspect", source)
    (line,) = err.splitlines()
    assert code == 4 and reason in line and not out
    code, out, again = cli("inspect", source, "--json")
    found = json.loads(out)
    assert code == 4 and again == err and found["convertible"] is False and line == f"mla-convert: {found['reason']}"


@pytest.mark.parametrize("name, code", [("nowhere", 4), ("owner/name", 5), ("nowhere.gguf", 4)])
def test_not_there(cli, name, code):
    found, out, err = cli("inspect", name)
    assert found == code and name in err and len(err.splitlines()) == 1 and not out


# ---- converted folders


def test_converted(cli, convert_pico):
    report = convert_pico("llama")
    code, out, err = cli("inspect", report.out, "--json")
    found = json.loads(out)
    assert code == 0 and not err and found["kind"] == "converted" and not found["convertible"]
    assert (found["kv_lora_rank"], found["qk_rope_head_dim"]) == (
        report.cache["kv_lora_rank"],
        report.cache["qk_rope_head_dim"],
    )
    told = found["report"]
    assert told["source"] == "source" and told["share_saved"] == report.cache["share_saved"]
    assert told["perplexity"] == {side: report.evaluation[side]["value"] for side in ("before", "after")}
    code, out, _ = cli("inspect", report.out)
    assert (
        code == 0
        and f"×{report.perplexity_ratio:.4f}" in out
        and "converted already" in out
        and f"{told['share_saved']:.1%}" in out
    )


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"evaluation": null}', "nan"])
def test_converted_without_a_whole_report(cli, convert_pico, tmp_path, content):
    folder = Path(shutil.copytree(convert_pico("llama").out, tmp_path / "converted"))
    if content == "nan":  # what report.json holds for a figure that is not finite
        report = json.loads((folder / "report.json").read_text())
        report["evaluation"]["after"]["value"] = report["evaluation"]["ratio"] = None
        (folder / "report.json").write_text(json.dumps(report))
    elif content is None:
        (folder / "report.json").unlink()
    else:
        (folder / "report.json").write_text(content)
    code, out, err = cli("inspect", folder)
    assert code == 0 and not err
    assert ("not finite" if content == "nan" else "no complete report.json") in out


def test_converted_config_is_damaged(cli, convert_pico, tmp_path):
    folder = Path(shutil.copytree(convert_pico("llama").out, tmp_path / "converted"))
    change_config(folder, kv_lora_rank=None)
    code, out, err = cli("inspect", folder)
    assert code == 4 and "lacks what a converted model has" in err and not out
