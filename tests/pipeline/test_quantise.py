"""`quantize`: another cache format of a converted folder, with a basis that leaves the function as it was."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from uses import IDS

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.pipeline import quantise as module
from mla_convert.pipeline.quantise import quantise
from mla_convert.report import frontier
from mla_convert.write.verify import verify


@pytest.fixture
def folder(convert_pico, tmp_path, request):
    name = getattr(request, "param", "llama")
    return shutil.copytree(convert_pico(name, rank=16, rope_dim=8).out, tmp_path / "converted")


def run(folder, kind, source, **options):
    return quantise(folder, kind, against=str(source), device="cpu", progress=Progress(quiet=True), **options)


@torch.no_grad()
def logits(folder, **changes):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.layers:
        for name, value in changes.items():
            setattr(layer.self_attn, name, value)
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("rope", ["fp8", "int4"])
@pytest.mark.parametrize("folder", ["llama", "qwen2", "qwen3", "gemma4-shared"], indirect=True)
def test_weights_stay_the_same_function(folder, sources, tmp_path, request, rope):
    source = sources(request.node.callspec.params["folder"])
    before = logits(folder)
    report = run(folder, "int4", source, out=tmp_path / "new", cache_rope=rope)
    after = logits(tmp_path / "new", latent_format=None)
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    served = logits(tmp_path / "new")
    assert 0 < (served - before).square().mean() < 0.25 * before.var()
    group = {"fp8": 64, "int4": 48}[rope]
    assert report.cache.latent_cache == {"version": 1, "kind": "int4", "group": group, "rope": rope}
    assert module.NOTE in report.notes
    verify(tmp_path / "new")


def test_eval_in_another_format_measures_what_quantize_would_write(folder, sources, tmp_path, cli):
    text = ("--eval", sources("llama").parent / "text.txt", "--eval-windows", 2, "--eval-length", 48, "--device", "cpu")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, out, err = cli("eval", folder, "--cache-dtype", "int4", "--against", sources("llama"), *text, "--json")
    found = json.loads(out)
    assert code == 0 and found["model"] == "converted in int4", err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir() if file.name != "converted.lock"] == ["converted"]
    run(folder, "int4", sources("llama"), out=tmp_path / "written")
    code, out, _ = cli("eval", tmp_path / "written", "--against", sources("llama"), *text, "--json")
    written = json.loads(out)
    assert found["evaluation"] == written["evaluation"] and found["cache"] == written["cache"]
    plain = json.loads(cli("eval", folder, *text, "--json")[1])
    assert found["cache"]["bytes_per_token"]["after"] < plain["cache"]["bytes_per_token"]["after"]


@pytest.mark.parametrize(
    ("model", "options", "code", "words"),
    [
        ("folder", ("--cache-dtype", "auto"), 2, "auto chooses ranks and bits"),
        ("folder", ("--cache-dtype", "int3"), 2, "'int3' is no cache format: give bf16, fp8, int8, int4"),
        ("folder", ("--cache-dtype", ""), 2, "'' is no cache format"),
        ("folder", ("--cache-dtype", "int4", "--into-report", "--passkey"), 2, "leave out --cache-dtype"),
        ("source", ("--cache-dtype", "int4"), 4, "give a converted folder"),
    ],
)
def test_eval_refuses_a_format_in_one_line(folder, sources, tmp_path, cli, model, options, code, words):
    place = folder if model == "folder" else sources("llama")
    found, out, err = cli("eval", place, *options)
    assert found == code and words in err and err.count("\n") == 1 and not out
    assert [file.name for file in tmp_path.iterdir()] == ["converted"]


def test_there_and_back_in_place(folder, sources, cli):
    before = json.loads((folder / "report.json").read_text())
    code, out, _ = cli(
        "quantize", folder, "--cache-dtype", "int8", "--cache-group", "32", "--against", sources("llama"), "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["cache"]["latent_cache"]["group"] == 32
    assert report["cache"]["bytes_per_token"]["after"] == 3 * 48
    assert report["evaluation"]["after"]["value"] != before["evaluation"]["after"]["value"]
    assert report["evaluation"]["ratio"] == pytest.approx(before["evaluation"]["ratio"], rel=0.02)
    back = run(folder, "bf16", sources("llama"))
    assert [(state.name, bool(state.latent_cache)) for state in back.earlier_states] == [
        ("converted", False),
        ("converted", True),
    ]
    # the conversion was measured on another text, whose path no report holds
    assert [point.series for point in frontier.points(back)] == ["quantised", "rank"]
    assert back.cache.as_dict() == before["cache"]
    assert back.evaluation.ratio == pytest.approx(before["evaluation"]["ratio"], rel=1e-3)
    assert "latent_cache" not in {k for k, v in json.loads((folder / "config.json").read_text()).items() if v}


def test_refusals(folder, sources, convert_pico, cli):
    with pytest.raises(UsageError, match="auto chooses ranks and bits together"):
        run(folder, "auto", sources("llama"))
    with pytest.raises(UsageError, match="cache_group means nothing"):
        run(folder, "bf16", sources("llama"), cache_group=64)
    with pytest.raises(InputError, match="is a converted model"):
        run(folder, "int8", folder)
    with pytest.raises(InputError, match="give a converted folder"):
        run(sources("llama"), "int8", sources("llama"))
    odd = convert_pico("llama", rank=9, rope_dim=8).out
    with pytest.raises(InputError, match="rank 9, and two channels of 4 bits"):
        run(odd, "int4", sources("llama"), out=folder.parent / "odd")
    assert cli("quantize", folder, "--cache-dtype", "int3")[0] == 2
    code, _, err = cli("quantize", folder)
    assert code == 2 and "give --cache-dtype" in err
    with pytest.raises(InputError, match="is not the original of this model: 6 layers, not 3"):
        run(folder, "int8", "demo")
    # as deep and as wide, with wider heads: the bytes before would be another model's
    with pytest.raises(InputError, match="is not the original of this model: 16 dims in a head, not 8"):
        run(folder, "int8", sources("qwen3"))
    with pytest.raises(UsageError, match="cache_rope int4 needs codes of 4 bits"):
        run(folder, "fp8", sources("llama"), cache_rope="int4")


def test_no_output_inside_a_converted_model(folder, sources, cli):
    """The folder lists its files, and a folder more would make it damaged."""
    before = sorted(folder.rglob("*"))
    for command in (
        ("quantize", folder, "--cache-dtype", "int8", "--against", sources("llama")),
        ("convert", sources("llama")),
    ):
        code, out, err = cli(*command, "--out", folder / "inside" / "it")
        assert code == 4 and "is inside a converted model" in err and err.count("\n") == 1 and not out
    assert sorted(folder.rglob("*")) == before


def test_a_failure_leaves_the_folder(folder, sources, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(module, "self_check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, "int4", sources("llama"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_engines_take_no_quantised_cache(folder, sources, tmp_path, cli):
    run(folder, "fp8", sources("llama"))
    code, _, err = cli("export", folder, "--out", tmp_path / "exported")
    assert code == 4 and "--cache-dtype bf16` comes first" in err
    code, _, err = cli("convert", sources("llama"), "--for", "sglang", "--cache-dtype", "int4")
    assert code == 2 and "is not for --for sglang" in err
