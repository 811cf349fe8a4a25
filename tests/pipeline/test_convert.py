"""The written folder: loads anywhere, holds what it says, and nothing but the attention has changed."""

import json
import math
import os
import subprocess
import sys

import pico
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from mla_convert.core.recipes import default_name
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.report.tables import report_table
from mla_convert.source import texts
from mla_convert.source.checkpoint.reader import SafetensorsReader
from mla_convert.source.mixture import PACKAGED_LABEL
from mla_convert.source.source import open_source

PROMPT = "The people of the islands"
RANK, ROPE_DIM = 10, 6


@pytest.fixture(scope="module", params=["llama3-rope", "mistral-window", "qwen2"])
def report(request, convert_pico):
    return convert_pico(request.param, rank=RANK, rope_dim=ROPE_DIM, uniform=False)


@pytest.fixture(scope="module")
def folder(report):
    return report.out


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompt(folder, size=1):
    return AutoTokenizer.from_pretrained(folder)([PROMPT] * size, return_tensors="pt")


def greedy(model, folder, **options):
    return model.generate(**prompt(folder), max_new_tokens=12, do_sample=False, **options)[0].tolist()


def tensors(folder):
    reader = SafetensorsReader(folder)
    return reader.read(reader.names())


# Loads a folder with the remote code beside it, in a process that has no mla_convert; writes it again, loads that too.
FOREIGN = """
import json, sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mla_convert", "mla_recipes", "mla_demo"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
result = []
for source, copy in ((sys.argv[1], sys.argv[2]), (sys.argv[2], None)):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    inputs = tokenizer([sys.argv[3]], return_tensors="pt")
    tokens = [model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=cached)[0].tolist()
              for cached in (True, False)]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
    result.append({"tokens": tokens, "logits": logits, "class": type(model).__name__})
    if copy:
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
assert not any(name.partition(".")[0] == "mla_convert" for name in sys.modules)
print(json.dumps(result))
"""
OWN = """
import sys
import mla_convert
assert not {"torch", "transformers"} & sys.modules.keys(), "importing the package is cheap"
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


def python(code, *arguments, **env):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert run.returncode == 0, run.stderr
    return run.stdout


# A process each; tests/source/test_families.py loads every family's code so, in one process.
@pytest.mark.parametrize("report", ["llama3-rope"], indirect=True, scope="module")
def test_loads_where_mla_convert_is_not_installed(folder, model, tmp_path):
    out = python(FOREIGN, folder, tmp_path / "copy", PROMPT, HF_MODULES_CACHE=str(tmp_path / "modules"))
    first, again = json.loads(out)
    assert first == again
    assert first["class"] == type(model).__name__
    assert first["tokens"] == [greedy(model, folder)] * 2
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(first["logits"]), model(**prompt(folder)).logits[0, -1])
    assert {"configuration_mla.py", "modeling_mla.py"} <= {path.name for path in (tmp_path / "copy").iterdir()}


def test_loads_without_the_flag_after_import(convert_pico):
    out = python(OWN, convert_pico("llama3-rope", rank=RANK, rope_dim=ROPE_DIM, uniform=False).out)
    assert out.strip() == "mla_convert.modeling.modeling_mla"


def test_save_and_load_again(folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**prompt(folder)).logits, model(**prompt(folder)).logits)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_cache_holds_rank_and_rope_dim_numbers(folder, model, kind):
    batch, most = 2, 10  # below the sliding window, where every kind of layer holds every token
    cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=most)
    inputs = {name: tensor[:, :most] for name, tensor in prompt(folder, batch).items()}
    model(**inputs, past_key_values=cache, use_cache=True)
    config = model.config
    for index, layer in enumerate(cache.layers):
        stored = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        numbers = config.layer_rank(index) + config.layer_rope_dim(index)
        assert stored == batch * most * numbers * model.dtype.itemsize
    assert len(cache.layers) == model.config.num_hidden_layers


def test_generates_the_same_with_every_cache(folder, model):
    expected = greedy(model, folder)
    assert greedy(model, folder, use_cache=False) == expected
    assert greedy(model, folder, cache_implementation="static") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, sharded", [("llama", True), ("llama-mha-tied", True), ("qwen2", False), ("qwen3", True), ("phi3", True)]
)
def test_everything_but_the_attention_is_untouched(convert_folder, tmp_path, name, sharded, dtype):
    source = pico.save(name, tmp_path / name, dtype, **({"max_shard_size": "60KB"} if sharded else {}))
    assert (source / "model.safetensors.index.json").exists() == sharded
    out = convert_folder(source, kv_ratio=0.5).out
    before, after = tensors(source), tensors(out)
    kept = {key for key in before if ".self_attn." not in key}
    assert kept == {key for key in after if ".self_attn." not in key}
    for key in kept:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8))
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {dtype}
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.dtype == dtype
    assert not any(info.values())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_asked_for(convert_pico, name):
    report = convert_pico("llama", kv_ratio=0.5, dtype=name)
    dtype = getattr(torch, name)
    assert {t.dtype for t in tensors(report.out).values() if t.is_floating_point()} == {dtype}
    assert report.cache["bytes_per_number"] == dtype.itemsize
    assert AutoModelForCausalLM.from_pretrained(report.out).dtype == dtype


def test_index_and_checksums_fit_the_files(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), file.name)
            assert shard.metadata() == {"format": "pt"}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(folder).values())
    assert set(json.loads((folder / "report.json").read_text())["checksums"]) == set(held.values())


def test_files_are_those_of_a_checkpoint(folder):
    files = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert files == {"config.json", "attention_mla.py", "configuration_mla.py", "decode_mla.py", "latent_format_mla.py",
                     "modeling_mla.py", "quantised_latent_mla.py", "stock_mla.py",
                     "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "model.safetensors.index.json", "README.md", "report.json",
                     "report.html", "recipe.yaml", "SHA256SUMS"}  # fmt: skip


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(convert_folder, sources, umask):
    before = os.umask(umask)
    try:
        out = convert_folder(sources("llama")).out
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("steps", [0, 5])
def test_two_runs_give_the_same_bytes(convert_folder, sources, steps):
    first, second = (convert_folder(sources("llama"), refine_steps=steps, kv_ratio=0.4).out for _ in range(2))
    for path in first.iterdir():
        if not path.name.startswith(("report.", "SHA256SUMS")):  # the report holds times, of which the sums are then
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def numbers(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_report(report):
    found = json.loads((report.out / "report.json").read_text())
    assert found == json.loads(json.dumps(report.as_dict()))
    assert found["schema"] == 2
    assert found["source"]["model_type"] in ("llama", "mistral", "qwen2") and found["source"]["revision"] is None
    assert {"mla_convert", "torch", "transformers", "python"} <= found["versions"].keys()
    for field in ("layers", "phases", "cache", "evaluation", "seconds"):
        assert list(numbers(found[field])) and all(map(math.isfinite, numbers(found[field]))), field
    for phase in ("open", "text", "embed", "allocate", "layers", "evaluate"):
        assert found["phases"][phase].keys() >= {"seconds", "peak_host_bytes"}
    assert len(found["layers"]) == pico.COMMON["num_hidden_layers"]
    for index, layer in enumerate(found["layers"]):
        assert layer["layer"] == index and len(layer["plane_frequencies"]) == layer["qk_rope_head_dim"] // 2
        assert layer["energy"].keys() >= {"rope_kept", "rank_kept"} and layer["output_error"] > 0
    # ranks and rotary dims differ from layer to layer; together they are what was asked for
    sizes = [layer["kv_lora_rank"] + layer["qk_rope_head_dim"] for layer in found["layers"]]
    assert len({layer["kv_lora_rank"] for layer in found["layers"]}) > 1
    before, after = (found["cache"]["numbers_per_token_per_layer"][key] for key in ("before", "after"))
    assert (before, after) == (32, RANK + ROPE_DIM) and sum(sizes) == len(sizes) * after
    assert found["cache"]["share_saved"] == pytest.approx(1 - after / before)
    per_token = found["cache"]["bytes_per_token"]
    assert per_token == {"before": 3 * 4 * before, "after": 3 * 4 * after}
    assert list(found["cache"]["bytes_at_context"]) == ["4096", "32768", "131072"]
    for context, size in found["cache"]["bytes_at_context"].items():
        tokens = 12 if found["source"]["model_type"] == "mistral" else int(context)
        assert size == {key: tokens * value for key, value in per_token.items()}
    evaluation = found["evaluation"]
    assert evaluation["ratio"] == pytest.approx(evaluation["after"]["value"] / evaluation["before"]["value"])
    assert evaluation["after"]["windows"] == 4 and evaluation["after"]["length"] == 48


def test_streaming_perplexity_is_that_of_the_loaded_models(report, model):
    tokenizer = AutoTokenizer.from_pretrained(report.out)
    windows = texts.evaluation_windows(pico.text(), tokenizer, 4, 48, "text")
    name = {"llama": "llama3-rope", "mistral": "mistral-window"}.get(report.source["model_type"], "qwen2")
    for key, loaded in (("before", pico.model(name)), ("after", model)):
        expected = measure.perplexity(pico.losses(loaded, windows))
        assert report.evaluation[key]["value"] == pytest.approx(expected.value, rel=1e-4)
        assert report.evaluation[key]["log_error"] == pytest.approx(expected.log_error, rel=1e-3)


def test_model_card(report):
    card = ModelCard.load(report.out / "README.md")
    assert card.data.library_name == "transformers" and "mla" in card.data.tags
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["perplexity"] == report.evaluation["after"]["value"]
    assert results["perplexity of the original"] == report.evaluation["before"]["value"]
    assert f"×{report.perplexity_ratio:.4f}" in card.text and "trust_remote_code=True" in card.text


def test_no_local_path_is_published(report):
    parts = {str(report.out.parent), str(report.out.parent.parent), os.path.expanduser("~") + "/"}
    for path in report.out.iterdir():
        content = path.read_bytes()
        assert not [part for part in parts if part.encode() in content], path.name


def test_json_is_all_there_is_on_stdout(cli, sources, tmp_path):
    source = sources("llama")
    text = source.parent / "text.txt"
    code, out, err = cli(source, "--json", "--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32,
                         "--eval-windows", 2, "--eval-length", 32, "--refine-steps", 2, "--device", "cpu",
                         "--out", tmp_path / "out")  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found.pop("out") == str(tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "layer 3/3" in err


def test_default_texts_offline(cli, sources, tmp_path):
    """Without a network the packaged text stands in for WikiText-2; calibration's texts are packaged anyway: a line each."""
    code, _, err = cli(sources("llama"), "--calib-samples", 8, "--calib-length", 32, "--eval-windows", 2, "--eval-length",
                       32, "--refine-steps", 0, "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("no ")]
    assert len(notes) == 2 and "no calibration text" in notes[0] and PACKAGED_LABEL in notes[0]
    assert "no evaluation text" in notes[1] and "could not be fetched" in notes[1]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == notes


@pytest.mark.slow
def test_demo(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("demo", "--refine-steps", 4, "--calib-samples", 8, "--eval-windows", 2, "--device", "cpu")
    assert code == 0 and "perplexity" in out and "128k" in out and "demo-mla" in out
    assert [path.name for path in tmp_path.iterdir()] == ["demo-mla"]
    folder = tmp_path / "demo-mla"
    evaluation = json.loads((folder / "report.json").read_text())["evaluation"]
    assert evaluation["before"]["value"] < 100 and 1 < evaluation["ratio"] < 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(greedy(model, folder)).startswith(PROMPT)


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_a_gguf_tokenizer_without_the_first_token_is_doubted(tmp_path, monkeypatch, add_bos):
    file = pico.save_gguf(tmp_path / "tiny.gguf", add_bos)
    tokenizer = open_source(str(file)).tokenizer()
    for first in ([1], []):

        def ids(*_, add_special_tokens=True, first=first, **__):
            return {"input_ids": first * add_special_tokens + [9]}

        monkeypatch.setattr(type(tokenizer), "__call__", ids)
        notes = open_source(str(file)).notes
        assert bool(notes) == (add_bos is True and not first)
        assert all("begins with token 1" in note for note in notes)


def test_gguf_source(convert_folder, tmp_path):
    (tmp_path / "text.txt").write_text(pico.text())
    report = convert_folder(pico.save_gguf(tmp_path / "tiny.gguf"), rank="full", rope_dim="full", dtype="float32")
    assert report.source["name"] == "tiny.gguf" and report.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert "quantization_config" not in json.loads((report.out / "config.json").read_text())
    model, original = AutoModelForCausalLM.from_pretrained(report.out).eval(), pico.model("llama")
    tokenizer = AutoTokenizer.from_pretrained(report.out)
    assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT
    assert model.generation_config.eos_token_id == original.config.eos_token_id
    with torch.no_grad():
        found, expected = (m(**prompt(report.out)).logits for m in (model, original))
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    "source, name",
    [("a/b/model", "model-mla"), ("a/b/model/", "model-mla"), ("owner/Name-1B", "Name-1B-mla"), ("x.gguf", "x-mla"),
     (".", "here-mla"), ("..", "above-mla"), ("../other", "other-mla")],
)  # fmt: skip
def test_default_name(tmp_path, monkeypatch, source, name):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert default_name(source) == name


def test_error_of_the_ratio_is_paired(convert_pico):
    report = convert_pico("llama", kv_ratio=0.4)
    losses = [torch.rand(5, 20), torch.rand(5, 20)]
    difference = (losses[0] - losses[1]).double().mean(dim=1)
    found = measure.ratio(*losses)
    assert found.value == pytest.approx(float(difference.mean().exp()))
    assert found.error == pytest.approx(float(difference.std()) / 5**0.5)
    evaluation = report.evaluation
    assert evaluation["ratio"] == pytest.approx(evaluation["after"]["value"] / evaluation["before"]["value"])
    assert 0 < evaluation["ratio_log_error"] < evaluation["after"]["log_error"] + evaluation["before"]["log_error"]
    assert (
        report_table(report).rows[-1][-1]
        == f"×{report.perplexity_ratio:.4f} ± {report.perplexity_ratio * evaluation['ratio_log_error']:.4f}"
    )


def test_held_out_text_is_measured_beside_the_evaluation(convert_pico, sources, tmp_path):
    plain = convert_pico("llama", kv_ratio=0.4)
    text = sources("llama").parent / "text.txt"
    (tmp_path / "other.txt").write_text(text.read_text()[5000:9000])
    other = convert_pico("llama", kv_ratio=0.4, held_out=str(tmp_path / "other.txt"))
    # it changes neither the conversion nor the evaluation
    assert other.checksums == plain.checksums
    shared = {key: value for key, value in other.evaluation.as_dict().items() if key != "held_out"}
    assert shared == plain.evaluation.as_dict()
    assert other.evaluation["held_out"]["text"] == other.settings["held_out"] == "other.txt"
    assert other.evaluation["held_out"]["after"]["windows"] == 4
    assert [row[0] for row in report_table(other).rows][-2:] == ["perplexity", "perplexity, held-out text"]
    assert "other.txt" in (other.out / "report.html").read_text()

    calib = convert_pico("llama", kv_ratio=0.4, held_out="calib")
    assert calib.checksums != plain.checksums  # what is held out is not calibrated on
    assert calib.evaluation["held_out"]["text"] == "the end of text.txt"
    assert calib.evaluation["before"] == plain.evaluation["before"]
    assert "held_out: calib" in (calib.out / "recipe.yaml").read_text()


@pytest.mark.parametrize("settings", [{}, {"cache_dtype": "int8"}, {"refine_steps": 3, "refine_batch": 4}])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_heads_with_fewer_content_dims(convert_pico, name, settings):
    """The self-check compares decoding without a cache, with a dynamic one and with a static one."""
    report = convert_pico(name, rank=10, rope_dim=6, nope_dim=3, uniform=False, **settings)
    model = AutoModelForCausalLM.from_pretrained(report.out)
    attention = model.get_submodule(model.config.mla_layers)[0].self_attn
    assert attention.qk_nope_head_dim == model.config.qk_nope_head_dim == 3
    assert attention.qk_head_dim == 3 + attention.qk_rope_head_dim
    assert all(layer.qk_nope_head_dim == 3 and 0 < layer.energy.nope_kept <= 1 for layer in report.layers)
    # The padding of packed rows leaves room for so many rotary dims that three content dims hold the rest.
    assert "cache_dtype" in settings or any(layer.energy.nope_kept < 1 for layer in report.layers)
    assert report.self_check.passed and "nope_dim: 3\n" in (report.out / "recipe.yaml").read_text()
    assert "heads of 3 content dims, which keep" in (report.out / "README.md").read_text()
    assert "kept by narrower heads" in (report.out / "report.html").read_text()


def test_whole_content_is_the_default(convert_pico):
    reports = [
        convert_pico("llama", rank=10, rope_dim=6, **given) for given in ({}, {"nope_dim": "full"}, {"nope_dim": 8})
    ]
    first, *others = ([path.read_bytes() for path in sorted(r.out.glob("*.safetensors"))] for r in reports)
    assert all(other == first for other in others)
    assert all(math.isnan(layer.energy.nope_kept) for layer in reports[0].layers)
    assert "nope_dim" not in (reports[0].out / "recipe.yaml").read_text()
