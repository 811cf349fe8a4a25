"""benchmarks/unnormed_keys.py: exact at full rank, and bytes of factors are taken from the rank."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("unnormed_keys", BENCHMARKS / "unnormed_keys.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["unnormed_keys"] = module
    spec.loader.exec_module(module)
    return module


def schemes(program, monkeypatch, capsys, source, *options):
    text = str(source.parent / "text.txt")
    argv = ["unnormed_keys.py", str(source), "--calib", text, "--calib-samples", "16", "--calib-length", "48", "--eval", text,
            "--eval-windows", "2", "--eval-length", "48", "--device", "cpu", *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    return json.loads(capsys.readouterr().out)["schemes"]


@pytest.mark.parametrize("variant", ["gemma3", "olmo2", "qwen3"])
def test_exact_at_full_rank_but_for_rounded_factors(program, monkeypatch, capsys, sources, variant):
    found = schemes(program, monkeypatch, capsys, sources(variant), "--kv-ratio", "1", "--rope-dim", "full")
    divergence = {form: entry["evaluation"]["kl"]["value"] for form, entry in found.items()}
    assert max(divergence[form] for form in ("normed", "float32")) < 1e-6
    assert divergence["bf16"] < divergence["log8"] < divergence["e4m3"]


def test_the_bytes_of_factors_are_taken_from_the_rank(program, monkeypatch, capsys, sources):
    options = ("--kv-ratio", "0.5", "--forms", "normed", "float32", "fitted8", "bf16")
    ranks = {
        form: entry["rank"] for form, entry in schemes(program, monkeypatch, capsys, sources("qwen3"), *options).items()
    }
    # two KV heads, and two bytes an element
    assert ranks == {form: ranks["normed"] - less for form, less in zip(ranks, (0, 0, 1, 2), strict=True)}


def test_refinement_lowers_errors(program, monkeypatch, capsys, sources):
    options = ("--kv-ratio", "0.5", "--refine-steps", "4", "--refine-batch", "4", "--forms", "normed", "fitted8")
    found = schemes(program, monkeypatch, capsys, sources("qwen3"), *options)
    for entry in found.values():
        gains = [before - after for before, after in entry["residual_errors"]]
        assert len(gains) == 3 and min(gains) >= 0 and max(gains) > 0


def test_a_model_without_a_norm_on_keys_is_refused(program, monkeypatch, capsys, sources):
    with pytest.raises(SystemExit, match="has no norm on its keys before RoPE"):
        schemes(program, monkeypatch, capsys, sources("llama"))
