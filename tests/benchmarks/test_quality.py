"""benchmarks/quality.py: one table over budgets and settings, also where a run fails; and its references."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla_convert import ConvertConfig
from mla_convert.core.errors import InputError
from mla_convert.core.original_cache import OriginalCacheFormat
from mla_convert.method.calibrate.statistics import Statistics

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def rope_kept(sources):
    spec = importlib.util.spec_from_file_location("rope_kept", BENCHMARKS / "low_rank_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(name=None, **settings):
        if name is None:
            return script
        text = str(sources(name).parent / "text.txt")
        small = {
            "calib": text,
            "eval": text,
            "calib_samples": 8,
            "calib_length": 32,
            "eval_windows": 4,
            "eval_length": 32,
        }
        return script.evaluate(ConvertConfig(source=str(sources(name)), device="cpu", **{**small, **settings}))

    return run


def test_table(sources, tmp_path):
    source = sources("llama")
    text = source.parent / "text.txt"
    words = ("--budgets", 0.5, "--settings", "uniform", "--add", "bad=--rope-dim five", "--quick", "--jobs", 2, "--save",
             tmp_path, "--calib", text, "--eval", text, "--calib-samples", 8, "--calib-length", 32, "--eval-length", 32,
             "--device", "cpu", "--refine-steps", 0)  # fmt: skip
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "quality.py", source, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr  # one run failed, and says why
    uniform, bad = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert (uniform["setting"], bad["setting"]) == ("uniform", "bad")
    assert "'five' is neither a whole number nor 'full'" in bad["failed"]
    assert (uniform["numbers"], uniform["rank"], uniform["rope_dim"]) == (16, 12, 4)
    assert uniform["protocol"] == "4 windows of 32 tokens, not overlapping"
    assert min(uniform[key] for key in ("ratio", "stderr", "peak_bytes", "seconds")) > 0
    markdown = (tmp_path / "quality.md").read_text()
    assert markdown.count("\n| 0.5 |") == 2 and f"| {uniform['ratio']:.4f} | {uniform['stderr']:.4f} |" in markdown
    assert all(line in done.stdout for line in markdown.splitlines())
    assert str(tmp_path) not in markdown


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rope_kept_is_exact_at_full_rank(rope_kept, name):
    assert rope_kept(name, kv_ratio=1)["evaluation"]["ratio"] == pytest.approx(1, abs=1e-4)


def test_rope_kept_is_no_worse_than_a_conversion_of_the_same_size(rope_kept, convert_pico):
    found = rope_kept("llama", kv_ratio=0.5, calib_noise=0, calib_samples=48, eval_windows=40)
    assert found["cache"]["kv_lora_rank"] == 16 and found["cache"]["qk_rope_head_dim"] == 0
    sizes = {"calib_noise": 0, "calib_samples": 48, "calib_length": 32, "eval_windows": 40, "eval_length": 32}
    assert found["evaluation"]["ratio"] < convert_pico("llama", kv_ratio=0.5, **sizes).perplexity_ratio


@pytest.fixture(scope="module")
def quantised(sources):
    spec = importlib.util.spec_from_file_location("quantised_cache", BENCHMARKS / "quantised_cache.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_quantised_cache_is_measured_as_a_conversion_is(quantised, sources):
    text = str(sources("llama").parent / "text.txt")
    settings = {
        "calib": text,
        "eval": text,
        "calib_samples": 1,
        "calib_length": 32,
        "eval_windows": 2,
        "eval_length": 32,
    }
    config = ConvertConfig(source=str(sources("llama")), device="cpu", suite_windows=1, **settings)
    fine, rough = (quantised.evaluate(config, OriginalCacheFormat(bits, 8)) for bits in (8, 2))
    divergence = [found["evaluation"]["kl"]["value"] for found in (fine, rough)]
    assert divergence[0] < 5e-3 and divergence[1] > 20 * divergence[0]
    assert fine["evaluation"]["suite"]["worst"]["ratio"] and fine["cache"]["share_saved"] == 1 - 12 / 16
    with pytest.raises(InputError, match="do not come in groups of 5"):
        quantised.evaluate(config, OriginalCacheFormat(4, 5))


def test_rotated_mean_is_the_mean_over_distances(rope_kept):
    """Against logits: q^T R_D^T e, squared, as complex numbers."""
    generator = torch.Generator().manual_seed(0)
    query, error = (torch.randn(1, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    inv_freq, distance = torch.tensor([1.0, 0.3, 0.1, 0.01]), torch.tensor([[0.2, 0.5, 0.3]])
    q, e = (torch.complex(*side.view(2, 4)) for side in (query, error))
    logits = [float((q.conj() * e * torch.exp(-1j * steps * inv_freq.double())).sum().real) for steps in range(3)]
    expected = sum(share * logit**2 for share, logit in zip([0.2, 0.5, 0.3], logits, strict=True))
    statistics = Statistics(second_moment=None, distance=distance, inv_freq=inv_freq)
    cost = rope_kept().rotated_mean((query.mT @ query)[None], statistics)[0]
    assert float(error @ cost @ error.mT) == pytest.approx(expected, rel=1e-5)
