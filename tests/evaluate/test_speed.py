"""`bench` on the CPU: bytes and rates, the step that it times, and its messages on bad input."""

import json

import pytest
import torch
from transformers import DynamicCache

from mla_convert.evaluate.speed import decode as bench
from mla_convert.evaluate.speed import models as bench_models
from mla_convert.evaluate.speed.shapes import SHAPES
from mla_convert.modeling.attention_backends import GROUPED
from mla_convert.report.speed import plot, ratios

CPU = torch.device("cpu")
SMALL = {**SHAPES["llama-8b"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def configs():
    original = bench_models.shape_config(SMALL)
    return original, bench_models.converted_config(original, 32, 16)


@pytest.fixture(scope="module")
def models(configs):
    torch.manual_seed(0)
    original, converted = configs
    return (bench_models.random_model(original, torch.float32, CPU),
            bench_models.random_model(converted, torch.float32, CPU, original))  # fmt: skip


@pytest.fixture(scope="module")
def packed(configs):
    torch.manual_seed(0)
    config = bench_models.converted_config(configs[0], 32, 16, "int4")
    return bench_models.random_model(config, torch.float32, CPU, configs[0])


@pytest.mark.parametrize("which", [0, 1, "packed"])
def test_a_step_is_the_model(models, packed, which):
    """On the cache of a prompt, a step gives the logits of the whole model."""
    model = packed if which == "packed" else models[which]
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits[:, -1]
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        cache.layers = [bench_models.FullLayer(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys[:, :, -1] = torch.nan if layer.keys.is_floating_point() else 255  # what the step writes
        model.config._attn_implementation, before = GROUPED, model.config._attn_implementation
        got = model(ids[:, -1:], position_ids=torch.full((2, 1), 8), past_key_values=cache).logits[:, -1]
        model.config._attn_implementation = before
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bytes_of_a_quantised_cache(packed):
    """Rows of 16 bytes of codes, 16 of the rotary key, and two scales in 16."""
    assert bench_models.token_bytes(packed.config, torch.bfloat16) == 2 * 48
    cache = bench_models.full_cache(packed.config, 3, 1030, torch.float32, CPU)
    assert bench_models.held_bytes(CPU, cache) == 3 * 1030 * 2 * 48
    assert torch.equal(cache.layers[0].keys[0, 0, :6], cache.layers[0].keys[2, 0, 1024:])


def test_bytes(configs, models):
    original, converted = configs
    assert bench_models.token_bytes(original, torch.bfloat16) == 2 * 2 * 2 * 16 * 2
    assert bench_models.token_bytes(converted, torch.bfloat16) == 2 * (32 + 16) * 2
    for config, model in zip(configs, models, strict=True):
        cache = bench_models.full_cache(config, 3, 7, torch.float32, CPU)
        assert bench_models.held_bytes(CPU, cache) == 3 * 7 * bench_models.token_bytes(config, torch.float32)
        embedding = model.get_input_embeddings().weight.nbytes
        assert bench_models.read_bytes(model) == sum(w.nbytes for w in model.parameters()) - embedding


def test_figures_and_picture(configs):
    original, converted = configs
    sides = [("ours", lambda: bench_models.random_model(converted, torch.float32, CPU, original)),
             ("theirs", lambda: bench_models.random_model(original, torch.float32, CPU))]  # fmt: skip
    request = bench.BenchRequest((16, 32), (1, 2), (8,), price=3.6, steps=3)
    result = bench.bench(sides, request, CPU)
    figures = result.as_dict()
    assert json.loads(json.dumps(figures)) == figures
    ours, theirs = figures["models"]
    assert (ours["converted"], theirs["converted"]) == (True, False)
    assert [(p["context"], p["batch"]) for p in ours["points"]] == [(16, 1), (16, 2), (32, 1), (32, 2)]
    for point in ours["points"] + theirs["points"]:
        assert point["p99_ms"] >= point["p50_ms"] > 0
        assert point["tokens_per_second"] == pytest.approx(point["batch"] / point["p50_ms"] * 1e3)
        assert point["cost_per_million"] == pytest.approx(1e3 / point["tokens_per_second"])
    assert ours["points"][0]["cache_bytes"] == 16 * ours["cache_bytes_per_token"]
    assert ours["prompts"][0]["tokens"] == 8
    assert len(list(ratios(result))) == 4
    assert "ours: 16:" in str(plot(result))


def test_heads_in_groups_are_the_same(models, monkeypatch):
    """Keys and values expanded for few heads at a time."""
    from mla_convert.modeling import attention_mla

    ids = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = models[1](ids).logits
        monkeypatch.setattr(attention_mla, "EXPANDED_BYTES", 3 * 2 * 20 * 48 * 4)  # three heads of four
        torch.testing.assert_close(models[1](ids).logits, want)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "give MODEL or --config"),
        (("--config", "llama-9b"), 4, "neither a file nor one of"),
        (("--config", "smollm2-135m", "--batch", "max", "--device", "cpu"), 2, "need a CUDA device"),
        (("--config", "smollm2-135m", "--context", "1k"), 2, "whole numbers"),
        (("--config", "smollm2-135m", "--dtype", "int8"), 2, "give bfloat16, float16 or float32"),
        (("--config", "smollm2-135m", "--against", "x"), 2, "--against goes with MODEL"),
        (("--config", "smollm2-135m", "--nope-dim", "32"), 2, "--nope-dim goes with --config and --rank"),
        (("--config", "smollm2-135m", "--rank", "64", "--nope-dim", "65"), 2, "--nope-dim 65 is above 64"),
    ],
)
def test_bad_input(cli, arguments, code, words):
    got, out, err = cli("bench", *arguments)
    assert got == code and words in err and not out


def test_command_line(cli, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))
    options = ("--context", "16", "--steps", "2", "--device", "cpu", "--dtype", "float32")
    code, out, _ = cli("bench", "--config", config, "--rank", "32", "--rope-dim", "16", *options, "--json", "--plot",
                       tmp_path / "p.svg")  # fmt: skip
    assert code == 0 and [model["converted"] for model in json.loads(out)["models"]] == [True, False]
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    sizes = ("--rank", "32", "--rope-dim", "8", "--nope-dim", "8", "--prompt", "12")
    code, out, _ = cli("bench", "--config", config, *sizes, *options, "--json")
    assert code == 0 and json.loads(out)["models"][0]["name"].endswith("32+8, heads 8+8")
    code, out, _ = cli("bench", "--config", config, *options)
    assert code == 0 and "tokens/s" in out
