"""Hybrid models: layers with attention are converted, the others stay byte for byte, and every step passes through them."""

import json
import shutil

import pico
import pytest
import torch
from pico import HALF, VARIANTS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from mla_convert.core.errors import InputError
from mla_convert.evaluate.speed import models as bench_models
from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.fixed_states import fixed_state_bytes, held_state_bytes
from mla_convert.source.families import FAMILIES
from mla_convert.source.source import open_source
from mla_convert.write.verify import verify
from mla_convert.write.writer import Writer

CPU = torch.device("cpu")
HYBRIDS = [name for name, (model_type, _) in VARIANTS.items() if FAMILIES[model_type].state_mixer]
# Two layers in three or two in four have attention: blocks of two hold both kinds.
BLOCKS = {"kv_ratio": 0.5, "calib_noise": 0, "refine_steps": 2, "refine_block": 2, "block_steps": 2, "output_steps": 2,
          "output_layers": 4, "refine_batch": 2, "uniform": False}  # fmt: skip
ENDS = ["qwen3-next", "lfm2", "nemotron-h", "falcon-h1"]


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", HYBRIDS)
def test_other_layers_are_untouched(sources, convert_pico, name):
    before, after = pico.model(name).state_dict(), tensors(convert_pico(name, **HALF).out)
    source = open_source(str(sources(name)))
    tied = pico.model(name).all_tied_weights_keys
    kept = {key for key in before if not source.is_replaced(key) and key not in tied}
    assert kept == {key for key in after if not source.is_replaced(key)}
    assert all(torch.equal(before[key], after[key]) for key in kept)
    replaced = {key.split(".")[2] for key in after if source.is_replaced(key)}
    assert replaced == {str(index) for index in source.shape.converted_layers}


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_reported_bytes_are_those_of_a_cache(convert_pico, name):
    """What grows with the context, and what does not, of both models."""
    report, tokens = convert_pico(name, **HALF), 24
    ids = torch.randint(3, pico.VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    for side, model in (("before", pico.model(name)), ("after", loaded(report.out))):
        cache = DynamicCache(config=model.config)
        model(ids, **with_cache(model, cache))
        assert bench_models.held_bytes(CPU, cache) == tokens * report.cache["bytes_per_token"][side]
        assert held_state_bytes(cache) == report.cache["fixed_bytes"] > 0
        assert bench_models.token_bytes(model.config, torch.float32) == report.cache["bytes_per_token"][side]
        assert fixed_state_bytes(model.config, torch.float32) == report.cache["fixed_bytes"]
    share, grown = report.cache["growing_share_at_context"]["4096"], report.cache["bytes_at_context"]["4096"]
    for side in ("before", "after"):
        assert share[side] == pytest.approx(grown[side] / (grown[side] + report.cache["fixed_bytes"]))
    assert report.cache["layers"] == len(report.layers) == len(loaded(report.out).config.converted_layers())


@pytest.mark.parametrize("name", ["lfm2", "falcon-h1"])
@torch.no_grad()
def test_a_quantised_cache_beside_fixed_states(convert_pico, name):
    report, tokens = convert_pico(name, kv_ratio=1.0, cache_dtype="auto", uniform=False), 24
    model = loaded(report.out)
    config, converted = model.config, model.config.converted_layers()
    assert len(config.latent_cache["wide"]) == config.num_hidden_layers
    assert report.cache["latent_cache"] == config.latent_cache and report.cache["layers"] == len(converted)
    cache = DynamicCache(config=config)
    model(torch.randint(3, pico.VOCAB, (1, tokens)), **with_cache(model, cache))
    assert all(cache.layers[index].keys.dtype == torch.uint8 for index in converted)
    assert bench_models.held_bytes(CPU, cache) == tokens * report.cache["bytes_per_token"]["after"]
    assert held_state_bytes(cache) == report.cache["fixed_bytes"] > 0


@pytest.mark.parametrize("name", ENDS)
def test_blocks_and_the_output_pass_through_other_layers(convert_pico, name):
    report = convert_pico(name, **BLOCKS)
    converted = loaded(report.out).config.converted_layers()
    assert [entry["layer"] for entry in report.layers] == converted
    assert all(entry["block_error"] <= entry["block_error_before"] for entry in report.layers if "block" in entry)
    assert any("block" in entry for entry in report.layers)
    last = report.layers[-1]
    assert last["output_kl"] <= last["output_kl_before"] and last["output_layers"] == len(converted)
    assert 0.4 < report.perplexity_ratio < 2.5


@pytest.mark.parametrize("name", ["nemotron-h", "lfm2"])
def test_an_interrupted_run_is_resumed(convert_folder, convert_pico, sources, tmp_path, monkeypatch, name):
    write, written, out = Writer.write_shard, [], tmp_path / "out"

    def killed(self, file, *rest):
        if len(written) == 4:  # embeddings, head, and two layers, one of which has no attention
            raise KeyboardInterrupt
        written.append(file)
        write(self, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(sources(name), **BLOCKS, out=out)
    convert_folder(sources(name), **BLOCKS, out=out)
    whole = convert_pico(name, **BLOCKS).out
    assert verify(out).shards == verify(whole).shards
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", [*ENDS[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in ENDS[1:])])
def test_from_plan_to_the_hub(cli, hub, convert_pico, sources, tmp_path, name):
    report = convert_pico(name, kv_ratio=0.25, calib_noise=0, uniform=False)
    folder = shutil.copytree(report.out, tmp_path / "tiny")

    code, out, err = cli("plan", sources(name), "--kv-ratio", "0.25", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["cache"]["fixed_bytes"] == report.cache["fixed_bytes"] and plan["cache"]["layers"] == len(report.layers)
    assert [layer["layer"] for layer in plan["layers"]] == [entry["layer"] for entry in report.layers]
    code, out, err = cli("plan", sources(name), "--kv-ratio", "0.25", "--gpu", "l4")
    assert code == 0 and "whatever its length; share of the whole that grows: 4k" in " ".join(out.split()), err

    code, out, err = cli("inspect", sources(name), "--json")
    found = json.loads(out)
    assert code == 0 and found["fixed_cache_bytes"] == report.cache["fixed_bytes"], err
    assert found["cache_bytes_per_token"] == report.cache["bytes_per_token"]["before"]
    code, out, err = cli("inspect", folder, "--json")
    assert code == 0 and json.loads(out)["layers"] == len(report.layers), err
    assert json.loads(out)["cache_numbers_per_token_per_layer"] == report.cache["numbers_per_token_per_layer"]["after"]

    text = sources(name).parent / "text.txt"
    code, out, err = cli("heal", folder, "--teacher", sources(name), "--data", text, "--tokens", "12288", "--length", "64",
                         "--step-tokens", "512", "--micro-tokens", "256", "--evaluations", "4", "--lr", "0.003", "--noise", "0",
                         "--device", "cpu", "--self-share", "0", "--eval-windows", "2", "--eval-length", "48",
                         "--eval", "package:mla_demo/calibration.txt.gz", "--train", "attention")  # fmt: skip
    assert code == 0, err
    healed = json.loads((folder / "report.json").read_text())
    assert healed["heal"]["tokens"] >= 12288
    assert verify(folder).tensors > 0

    code, out, err = cli("bench", folder, "--against", sources(name), "--context", "16", "--steps", "2", "--prompt", "8",
                         "--device", "cpu", "--dtype", "float32", "--json")  # fmt: skip
    assert code == 0, err
    ours, theirs = json.loads(out)["models"]
    assert ours["fixed_bytes_per_sequence"] == theirs["fixed_bytes_per_sequence"] == report.cache["fixed_bytes"]
    assert ours["points"][0]["cache_bytes"] == 16 * report.cache["bytes_per_token"]["after"]

    code, out, err = cli("eval", folder, "--against", sources(name), "--eval", text, "--json")
    assert code == 0, err
    assert json.loads(out)["cache"]["bytes_per_token"]["after"] == report.cache["bytes_per_token"]["after"]

    code, out, err = cli("push", folder, "me/tiny-hybrid")
    assert code == 0 and "model.safetensors.index.json" in hub.files("me/tiny-hybrid"), err


def test_a_model_without_attention_is_refused(sources, tmp_path):
    folder = shutil.copytree(sources("lfm2"), tmp_path / "source")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["conv"] * 3}))
    with pytest.raises(InputError, match="has no layer with attention"):
        open_source(str(folder))
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "layer_types": ["conv", "sliding_attention", "hybrid"]})
    )
    with pytest.raises(InputError, match="layers of 'hybrid', which are not supported"):
        open_source(str(folder))
