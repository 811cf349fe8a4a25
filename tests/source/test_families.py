"""Every family beyond exactness (tests/laws/test_exactness.py): budgets, storage, refusals, and the families page."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
from pico import FIRST, HALF, QUARTER, VARIANTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mla_convert.source.families import FAMILIES, LATENT, REFUSED, WHOLES
from mla_convert.source.source import open_source

FIGURES = re.compile(r"\d\.\de-\d\d \| \d+% \| \d+%")
LENGTH = 40
# The first variant of every family; the others of the longer tests run with -m slow.
MOST = [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
# What a family has that a conversion below full rank treats in a way of its own; the first family of each combination.
WAYS = ("rotary", "partial_rotary", "interleaved", "backwards", "q_norm", "v_norm", "norm_after_rope", "one_projection",
        "heads_by_layer", "shared", "layer_inputs", "streams", "state_mixer", "query_growth", "gate", "key_multiplier",
        "softcap", "sinks", "residual_multiplier")  # fmt: skip
ONE_OF_EACH = {
    tuple(bool(getattr(FAMILIES[VARIANTS[name][0]], way)) for way in WAYS): name for name in reversed(FIRST.values())
}


@pytest.fixture(scope="module")
def batch():
    """Text of the same kind as the calibration's; the first row is padded on the left."""
    ids = torch.tensor(pico.tokenizer()(pico.text()[5000:9000])["input_ids"])[: 2 * LENGTH].view(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


# ---- everything but attention


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_not_attention_is_untouched(sources, convert_pico, name):
    attention = f".{FAMILIES[VARIANTS[name][0]].attention}."
    # the model's tensors, not the stored ones: checkpoints may store experts one by one
    before = AutoModelForCausalLM.from_pretrained(sources(name), dtype="auto").state_dict()
    tied = AutoModelForCausalLM.from_pretrained(sources(name)).all_tied_weights_keys
    after = tensors(convert_pico(name, **HALF).out)
    kept = {key for key in before if attention not in key and key not in tied}
    assert kept == {key for key in after if attention not in key}
    assert all(same_bytes(before[key], after[key]) for key in kept)


@pytest.mark.parametrize("name", [name for name in VARIANTS if FAMILIES[VARIANTS[name][0]].q_norm])
def test_norms_stand_behind_the_originals_projections(sources, convert_pico, name):
    before, after = tensors(sources(name)), tensors(convert_pico(name, **HALF).out)
    kept = {key for key in before if re.search(r"self_attn\..*norm", key)}
    kept |= {re.sub(r"[qk]_(layer)?norm.*", f"{part}_proj.weight", key) for part in "qkv" for key in kept}
    if FAMILIES[
        VARIANTS[name][0]
    ].one_projection:  # weights of a norm of keys that are a map of values move into the map
        kept = {key for key in kept if "k_norm" not in key or key.replace("k_norm", "v_proj") in before}
    kept &= {*before}  # a fused projection is split into these three
    if FAMILIES[VARIANTS[name][0]].norm_after_rope:  # the weights of such norms move behind RoPE
        kept = {key for key in kept if "norm" not in key}
    assert all(same_bytes(before[key], after[key]) for key in kept)
    assert not kept or all(any(f".{part}." in key for key in after) for part in ("q_b_proj", "kv_a_proj_with_mqa"))


# ---- a real budget


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def halved(request, convert_pico):
    return AutoModelForCausalLM.from_pretrained(convert_pico(request.param, **HALF).out, dtype=torch.float32).eval()


@torch.no_grad()
def test_absorbed_equals_expanded(halved, batch):
    """Chunks with a cache use attention on latents, the whole text attention on keys and values; both give the same logits."""
    ids, mask = batch
    whole, cache, start, parts = halved(ids, attention_mask=mask).logits, None, 0, []
    # transformers' Jamba continues from a cache by one token at a time, and its Bamba counts positions from 0 unless told
    jamba, bamba = (halved.config.model_type == f"mla_{name}" for name in ("jamba", "bamba"))
    # the first chunk is long enough that dynamic RoPE keeps the frequencies of the whole text
    for size in (LENGTH - 8, *([1] * 8 if jamba else (4, 1, 1, 2))):
        stop = start + size
        given = {"position_ids": torch.arange(start, stop).expand(2, -1)} if bamba else {}
        output = halved(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True, **given
        )
        cache, start = output.past_key_values, stop
        parts.append(output.logits)
    assert all(torch.isfinite(part).all() for part in parts)
    difference = (torch.cat(parts, 1) - whole).abs()[mask.bool()].max()
    assert difference <= 1e-4 * (whole.max() - whole.min())
    for index in halved.config.caching_layers():
        layer = cache.layers[index]
        sizes = [halved.config.layer_rank(index), halved.config.layer_rope_dim(index)]
        assert [part.shape[1::2] for part in (layer.keys, layer.values)] == [(1, size) for size in sizes]


@torch.no_grad()
def test_caches_agree(halved, batch):
    ids, mask = batch
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}

    def generate(**own):
        halved(ids[:, :1])
        return halved.generate(ids, **options, **own)

    assert torch.equal(generate(cache_implementation="static"), generate())


@pytest.mark.parametrize("name", MOST)
def test_half_precision_and_training(convert_pico, batch, name):
    ids, mask = batch
    model = AutoModelForCausalLM.from_pretrained(convert_pico(name, **HALF).out, dtype=torch.bfloat16)
    tokens = model.eval().generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, LENGTH + 3)
    loss = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)
    inside = f".{model.config.mla_attention}."
    for key, parameter in model.named_parameters():
        if inside in key and parameter.numel():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


def worst(report, key="output_error"):
    return max(layer[key] for layer in report.layers)


@pytest.mark.parametrize(
    "name",
    [name if name in ONE_OF_EACH.values() else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_a_real_budget_is_finite_and_close(convert_pico, name):
    """Random weights are the worst case: no direction is unimportant."""
    half, quarter = convert_pico(name, **HALF), convert_pico(name, **QUARTER)
    for report in (half, quarter):
        assert all(torch.isfinite(t).all() for t in tensors(report.out).values() if t.is_floating_point())
        assert 0.4 < report.perplexity_ratio < 2.5
        assert worst(report, "residual_error") <= worst(report, "residual_error_closed_form")
    assert report.cache["share_saved"] == pytest.approx(0.75, abs=0.05)
    assert worst(half, "output_error_closed_form") < 0.65
    # on random weights a quarter may be no better than no attention, but never much worse
    assert worst(half, "output_error_closed_form") <= worst(quarter, "output_error_closed_form") + 1e-6 < 1.1


# Loads every folder by its own code in a process without mla_convert, saves it, and loads the copy.
FOREIGN = """
import json, sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mla_convert", "mla_recipes", "mla_demo"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
for line in sys.stdin:
    source, copy = json.loads(line)
    for folder in (source, copy):
        model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        print(json.dumps(model.eval()(torch.arange(3, 33)[None]).logits[0, -1].tolist()))
        if folder != copy:
            model.save_pretrained(copy)
"""


@torch.no_grad()
def test_loads_without_this_package(convert_pico, tmp_path):
    folders = {name: convert_pico(name, **HALF).out for name in VARIANTS}
    lines = [json.dumps([str(folder), str(tmp_path / name)]) for name, folder in folders.items()]
    run = subprocess.run([sys.executable, "-c", FOREIGN], input="\n".join(lines), capture_output=True, text=True,
                         env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = iter(map(json.loads, run.stdout.splitlines()))
    for folder in folders.values():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = model(torch.arange(3, 33)[None]).logits[0, -1]
        for _ in range(2):
            torch.testing.assert_close(torch.tensor(next(answers)), expected, rtol=1e-4, atol=1e-4)


# ---- how checkpoints are stored


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_the_models_prefix(sources, tmp_path, name, prefix):
    folder = shutil.copytree(sources(name), tmp_path / "source")
    stored = load_file(folder / "model.safetensors")
    stored["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)  # a mask, as old checkpoints hold
    save_file(
        {key.removeprefix(prefix): t for key, t in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    short, whole = open_source(str(folder)).reader, open_source(str(sources(name))).reader
    assert set(short.names()) == set(whole.names())
    assert all(torch.equal(t, short.read([key])[key]) for key, t in whole.read(whole.names()).items())


def test_older_names_and_buffers(sources, tmp_path):
    folder = shutil.copytree(sources("pythia"), tmp_path / "source")
    stored = load_file(folder / "model.safetensors")
    stored["embed_out.weight"] = stored.pop("lm_head.weight", stored.get("embed_out.weight"))
    stored["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(float("-inf"))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert set(open_source(str(folder)).reader.names()) == set(open_source(str(sources("pythia"))).reader.names())


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_stored_one_by_one(sources, tmp_path, name):
    folder = shutil.copytree(sources(name), tmp_path / "source")
    reader, model = open_source(str(folder)).reader, pico.model(name)
    for key, tensor in model.state_dict().items():
        assert reader.shape(key) == tensor.shape and torch.equal(reader.read([key])[key], tensor)
        assert torch.equal(reader.rows(key, 1, 3), tensor[1:3])
    stored = load_file(folder / "model.safetensors")
    lost = next(key for key in sorted(stored) if ".experts.2." in key)
    del stored[lost]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"expert 2 of .* has no"):
        open_source(str(folder))


def test_language_model_of_a_multimodal_checkpoint(cli, sources, tmp_path, convert_folder):
    text = pico.config("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    whole, inner = Gemma3ForConditionalGeneration(config), pico.model("gemma3")
    whole.model.language_model.load_state_dict(inner.model.state_dict())
    whole.tie_weights()
    folder = shutil.copytree(sources("gemma3"), tmp_path / "source")
    whole.save_pretrained(folder)
    shutil.copy(sources("gemma3").parent / "text.txt", tmp_path)
    for command in ("inspect", "plan"):
        assert "its language model is converted, its other parts stay as they are" in cli(command, folder)[1]
    report = convert_folder(folder, rank="full", rope_dim="full")
    assert any("its language model is converted, its other parts stay as they are" in note for note in report.notes)
    converted = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected, found = inner.eval()(ids).logits, converted(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


# ---- what is refused, each in one line with exit code 4


def refusal(cli, folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    for command in ((folder,), ("inspect", folder), ("plan", folder)):
        code, out, err = cli(*command)
        (line,) = err.splitlines()
        assert code == 4 and not out
    return line


@pytest.fixture
def llama(sources, tmp_path):
    return shutil.copytree(sources("llama"), tmp_path / "source")


@pytest.mark.parametrize("model_type", LATENT)
def test_latent_models_are_left_alone(cli, llama, model_type):
    assert "latent attention already: nothing to do" in refusal(cli, llama, model_type=model_type)


def test_latent_models_of_any_name_are_left_alone(cli, llama):
    assert "latent attention already: nothing to do" in refusal(cli, llama, model_type="some_mla", kv_lora_rank=512)


@pytest.mark.parametrize("model_type", {reason: name for name, reason in REFUSED.items()}.values())
def test_refused_types_hear_why(cli, llama, model_type):
    assert REFUSED[model_type] in refusal(cli, llama, model_type=model_type)


def test_every_causal_type_of_transformers_has_a_verdict():
    known = {*FAMILIES, *REFUSED, *LATENT, *WHOLES}
    assert not [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    assert not {*FAMILIES} & {*REFUSED} and not {*FAMILIES} & {*LATENT} and not {*REFUSED} & {*LATENT}


def test_multimodal_models_name_their_language_model(cli, llama):
    text = "minimax_m3_vl_text"
    line = refusal(cli, llama, model_type="minimax_m3_vl", text_config={"model_type": text}, vision_config={})
    assert f"minimax_m3_vl is multimodal, and its language model ({text}) is not supported: {REFUSED[text]}" in line
    line = refusal(cli, llama, model_type="new", text_config={"model_type": "newer"}, vision_config={})
    assert "its language model (newer) is not supported: supported are: afmoe, " in line


@pytest.mark.parametrize(
    "field", ["layers", "attention", "input_norm", "output_norm", "query", "output", "sinks", "final_norm"]
)
def test_a_wrong_name_in_a_family_is_one_line(cli, llama, monkeypatch, field):
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], **{field: "wrong"}))
    assert f"the family llama has {field} = 'wrong', and in transformers " in refusal(cli, llama)


def test_a_type_that_the_installed_transformers_lacks(cli, llama, monkeypatch):
    monkeypatch.setitem(FAMILIES, "new", dataclasses.replace(FAMILIES["llama"], model_type="new"))
    monkeypatch.setitem(FAMILIES, "llama4_text", dataclasses.replace(FAMILIES["llama4_text"], needs="99.0"))
    for model_type in ("new", "llama4_text"):
        assert f"has no working {model_type}: install a newer one" in refusal(cli, llama, model_type=model_type)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_checkpoints_are_refused_by_method(cli, llama, method):
    assert f"quantised ({method})" in refusal(cli, llama, quantization_config={"quant_method": method})


@pytest.mark.parametrize("name, fields", [("opt", {"do_layer_norm_before": False}), ("gpt2", {"add_cross_attention": True}),
                                          ("gemma2", {"use_bidirectional_attention": True})])  # fmt: skip
def test_settings_that_a_family_relies_on(cli, sources, tmp_path, name, fields):
    folder = shutil.copytree(sources(name), tmp_path / "source")
    assert next(iter(fields)) in refusal(cli, folder, **fields)


# ---- the page


def test_page_is_up_to_date():
    """The figures are those of the machine that made the page; all other text must be what the script makes now."""
    script = load_script("make_families_page")
    made = script.page(lambda family: script.Measured(1e-6, 0.5, 0.5))
    page = script.PAGE.read_text(encoding="utf-8")
    assert FIGURES.sub("#", page) == FIGURES.sub("#", made), "stale: run scripts/make_families_page.py"
    figures = script.figures_of_page(page)
    assert figures.keys() == FAMILIES.keys() and max(each.error for each in figures.values()) <= 1e-4


def test_page_of_one_family_keeps_the_others(monkeypatch, tmp_path):
    script = load_script("make_families_page")
    before = script.PAGE.read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(before, encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(script, "measure_by_conversion", lambda family: script.Measured(2e-5, 0.12, 0.46))
    monkeypatch.setattr(sys, "argv", ["make_families_page.py", "--only", "opt"])
    script.main()
    changed = set(before.splitlines()) ^ set(script.PAGE.read_text(encoding="utf-8").splitlines())
    assert len(changed) == 2 and all(row.startswith("| `opt` |") for row in changed)
    assert any(row.endswith("| 2.0e-05 | 12% | 46% |") for row in changed)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
