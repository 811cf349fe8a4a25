"""Models whose layers have unlike heads of keys and values (Gemma 4): sizes by layer, what caches hold, and all commands."""

import json
import shutil
from types import SimpleNamespace

import pico
import pytest
import torch
from pico import VOCAB, model
from transformers import AutoModelForCausalLM, DynamicCache

import mla_convert  # noqa: F401  (registers the converted classes)
from mla_convert.method.factorise import layer as factorise_layer
from mla_convert.pipeline.layers import LayerConverter
from mla_convert.source.source import open_source
from mla_convert.write import selfcheck

NAMES = ["gemma4", "gemma4-own-values", "gemma4-shared", "gemma3n"]
LENGTH = 10  # below the window: then all layers cache all tokens


def held_bytes(built):
    """Bytes that a model caches for each token, by layer, measured."""
    cache = DynamicCache(config=built.config)
    with torch.no_grad():
        built(torch.arange(3, 3 + LENGTH)[None], past_key_values=cache, use_cache=True)
    held = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    return [sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) // LENGTH for layer in held]


def loaded(report):
    return AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"rank": "full", "rope_dim": "full"}, {"kv_ratio": 0.5}, {"rank": 20}])
def test_caches_are_counted_as_they_are(cli, sources, convert_pico, name, settings):
    report = convert_pico(name, **settings)
    before, after = held_bytes(model(name)), held_bytes(loaded(report))
    assert (report.cache.bytes_per_token.before, report.cache.bytes_per_token.after) == (sum(before), sum(after))
    arguments = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    planned = json.loads(cli("plan", sources(name), *arguments, "--uniform", "--json")[1])
    assert planned["cache"]["bytes_per_token"] == {"before": sum(before), "after": sum(after)}
    sizes = [4 * (each["kv_lora_rank"] + each["qk_rope_head_dim"]) for each in planned["layers"]]
    assert sizes == after
    found = json.loads(cli("inspect", report.out, "--json")[1])
    assert found["cache_numbers_per_token_per_layer"] == pytest.approx(sum(after) / 4 / len(after), abs=0.05)


def test_half_of_each_layer_where_sizes_are_uniform(convert_pico):
    report = convert_pico("gemma4", kv_ratio=0.5)
    before, after = held_bytes(model("gemma4")), held_bytes(loaded(report))
    assert before == [4 * 48, 4 * 64, 4 * 64] and after == [each // 2 for each in before]


def test_values_that_are_keys_are_cached_once_at_full_rank(convert_pico):
    config = loaded(convert_pico("gemma4", rank="full", rope_dim="full")).config
    assert config.mla_one_projection == [1, 2] and config.kv_lora_ranks == [24, 32, 32]
    assert config.qk_rope_head_dims == [24, 16, 16] and config.qk_nope_head_dims == [0, 16, 16]
    config = loaded(convert_pico("gemma4-own-values", rank="full", rope_dim="full")).config
    # two projections: the full-attention layers have three KV heads of 16 dims, half of which RoPE turns
    assert config.mla_one_projection is None and config.kv_lora_ranks == [24, 72, 72]


@pytest.mark.parametrize("name", ["gemma4", "gemma4-shared", "gemma3n"])
@pytest.mark.parametrize("cache_dtype", ["bf16", "int8", "auto"])
def test_sizes_by_layer_spend_the_budget_and_decode(convert_pico, name, cache_dtype):
    ratio = 0.5 if cache_dtype == "bf16" else 0.8  # the smallest rows
    report = convert_pico(name, kv_ratio=ratio, uniform=False, cache_dtype=cache_dtype, refine_steps=2, refine_batch=4)
    assert report.self_check.passed and report.cache.share_saved > 0
    if cache_dtype == "bf16":
        assert report.cache.bytes_per_token.after <= report.cache.bytes_per_token.before / 2
    converted = loaded(report)
    ids = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=converted.config)
    with torch.no_grad():
        whole = converted(ids).logits
        parts = [converted(ids[:, i:j], past_key_values=cache, use_cache=True).logits for i, j in ((0, 24), (24, 30))]
    span = whole.max() - whole.min()
    tolerance = 1e-4 if cache_dtype == "bf16" else 1e-3  # numbers at the border of two codes may get either
    assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance * span


@pytest.mark.parametrize("name", ["gemma4-shared", "gemma3n"])
@pytest.mark.parametrize("block", [2, 3])
def test_shared_latents_in_blocks_and_groups_of_layers(convert_pico, name, block):
    """Layers read latents of earlier blocks, of earlier layers of their block, and train these through them."""
    steps = {"refine_steps": 3, "refine_batch": 4, "block_steps": 3, "output_steps": 3}
    settings = {"kv_ratio": 0.25, "calib_noise": 0, "refine_block": block, "output_layers": 4}
    report = convert_pico(name, **settings, **steps)
    assert report.self_check.passed and [layer.latent_of for layer in report.layers] == [None, None, 0, 1, 1]
    assert all(layer.block_error <= layer.block_error_before for layer in report.layers if layer.block)
    assert report.layers[-1].output_kl < report.layers[-1].output_kl_before
    exact = convert_pico(name, rank="full", rope_dim="full", refine_block=block, output_layers=4, **steps)
    assert exact.perplexity_ratio == pytest.approx(1.0, abs=1e-3)


def test_a_size_that_no_layer_can_have_is_refused(cli, sources):
    code, _, err = cli("plan", sources("gemma4"), "--rank", "100")
    assert code == 4 and "rank 100 is above full rank" in err
    code, _, err = cli("plan", sources("gemma4"), "--rope-dim", "40")
    assert code == 4 and "rope_dim 40 is above the 24 rotary dims" in err


def test_shape_of_each_layer(sources):
    shape = open_source(str(sources("gemma4"))).shape
    assert [shape.of(layer).head_dim for layer in range(3)] == [8, 16, 16]
    assert [shape.of(layer).full_rope_dim for layer in range(3)] == [24, 16, 16]
    assert shape.cache_widths == [48, 64, 64]


@pytest.mark.parametrize("name, layers", [("gemma4", 2), ("gemma4-unified", 1), ("gemma4-shared", 5)])
def test_first_layers_of_a_model_that_does_not_fit_are_checked(convert_pico, monkeypatch, name, layers):
    report = convert_pico(name, kv_ratio=0.5)
    size = sum(file.stat().st_size for file in report.out.glob("*.safetensors"))
    room = {"available": size * (layers + 0.5) / 5 if name == "gemma4-shared" else size * (layers + 0.5) / 3}
    monkeypatch.setattr(selfcheck, "SHARE", 1.0)
    monkeypatch.setattr(selfcheck.psutil, "virtual_memory", lambda: SimpleNamespace(**room))
    found = selfcheck.self_check(report.out)
    assert found["passed"] and found["layers"] == layers  # one table holds the inputs of all of the last one's layers


def test_latents_serve_all_layers_that_attend_to_them(sources, convert_folder, monkeypatch, tmp_path):
    """The closed form weighs later layers' queries and outputs, at the expense of the layer that makes the latent."""

    def errors(name):
        shutil.copytree(sources("gemma4-shared").parent, tmp_path / name)
        report = convert_folder(tmp_path / name / "source", kv_ratio=0.25, calib_noise=0, calib_samples=32)
        return [layer.output_error_closed_form for layer in report.layers]

    with_readers = errors("with")
    monkeypatch.setattr(factorise_layer, "readers_of", lambda *_: None)
    without = errors("without")
    assert all(a > b for a, b in zip(with_readers[:2], without[:2], strict=True))
    assert all(a < b for a, b in zip(with_readers[2:], without[2:], strict=True))


def test_an_interrupted_run_takes_over_latents_of_layers_that_it_wrote(sources, tmp_path, monkeypatch):
    source = shutil.copytree(sources("gemma4-shared").parent, tmp_path / "folder") / "source"
    settings = {"kv_ratio": 0.5, "refine_steps": 2, "refine_batch": 4, "refine_block": 2, "block_steps": 2,
                "output_steps": 2, "output_layers": 4}  # fmt: skip
    whole = pico.convert(source, tmp_path / "whole", **settings).out
    convert_layer = LayerConverter._convert_layer

    def stop(self, layer, *states):
        if layer.index == 3:
            raise KeyboardInterrupt
        return convert_layer(self, layer, *states)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LayerConverter, "_convert_layer", stop)
        pico.convert(source, tmp_path / "parts", **settings)
    parts = pico.convert(source, tmp_path / "parts", **settings).out
    files = sorted(file.name for file in whole.glob("*.safetensors"))
    assert len(files) == 7 and all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)


def test_random_weights_of_unlike_layers_are_refused(cli, sources):
    code, _, err = cli("bench", "--config", sources("gemma4") / "config.json", "--rank", "16", "--device", "cpu")
    assert code == 4 and "bench a converted folder" in err
