"""The original with its own keys and values quantised in its cache: formats, numbers, families, and the option."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from pico import VARIANTS, VOCAB, convert, model

from mla_convert.core.errors import InputError
from mla_convert.core.original_cache import NAMES, OriginalCacheFormat, format_names, words
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import read_report
from mla_convert.evaluate.quality import original_cache
from mla_convert.evaluate.quality.evaluation import evaluate_model
from mla_convert.evaluate.quality.original_cache import (
    QuantisedCache,
    check_loaded,
    quantised,
    replaced,
    restored,
    stock_attention,
)
from mla_convert.evaluate.quality.perplexity import cached_layers
from mla_convert.modeling.latent_format_mla import spreading

FORMATS = ["fp8", "int8", "int4", "int2-hadamard"]
# Their attention calls torch's own function, and none of transformers' that could be replaced.
WRITTEN_OUT = ("falcon",)


def test_quantised_numbers_are_near_by_a_step():
    values = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        step = (values.unflatten(-1, (-1, 32)).amax(-1) - values.unflatten(-1, (-1, 32)).amin(-1)) / (2**bits - 1)
        error = (quantised(values, bits, 32) - values).abs().unflatten(-1, (-1, 32)).amax(-1)
        assert float((error / step).max()) < 0.6 and float(error.max()) > 0
    assert float((quantised(values, 8, 0) / values - 1).abs().median()) < 0.04  # three bits of mantissa
    turn = spreading(64).float()
    assert torch.allclose(turn @ turn, torch.eye(64), atol=1e-5)
    assert OriginalCacheFormat(4, 32).bits_of(64) / 16 == 0.3125 and OriginalCacheFormat(8, 0).bits_of(64) / 16 == 0.5


def test_fp8_has_a_scale_for_each_sequence():
    one, other = torch.randn(2, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    together = quantised(torch.cat([one, 100 * other]), 8, 0)
    assert torch.equal(together[:1], quantised(one, 8, 0)) and torch.equal(together[1:], quantised(100 * other, 8, 0))


@pytest.mark.parametrize("width", [64, 80, 96])
def test_a_hadamard_matrix_is_undone(width):
    """Widths that are no power of two have a matrix of blocks, which is not symmetric."""
    values = torch.randn(1, 2, 5, width, generator=torch.Generator().manual_seed(0))
    fine = OriginalCacheFormat(8, 16, hadamard=True)
    assert float((restored(values, fine) - values).abs().max()) < 0.02


def test_formats_have_names_groups_and_bits():
    assert [OriginalCacheFormat.named(name).bits for name in NAMES] == [8, 8, 4, 3, 2, 4, 3, 2]
    assert OriginalCacheFormat.named("int4").group_of(80) == 20  # the largest divisor up to 32
    assert OriginalCacheFormat.named("int4-hadamard").bits_of(64) / 16 == 0.28125
    assert words("int3-hadamard") == "INT3 + Hadamard" and words("fp8") == "FP8"
    assert format_names(["int4, fp8", "int4"]) == ["int4", "fp8"]
    for wrong in (["int5"], [], "", 4, ["fp8", 3], "fp8,"):
        with pytest.raises(ValueError, match=r"is no format of a cache: give fp8, int8, .* or int2-hadamard"):
            format_names(wrong)


@torch.no_grad()
def logits(built, ids, cache=None):
    with replaced(built, cache) if cache else contextlib.nullcontext():
        return built(ids, use_cache=False).logits


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_family_is_intercepted_or_refused(name, monkeypatch):
    """Every layer's keys and values, with nothing else changed: masks, windows, caps and sinks are the stock model's."""
    built, ids = model(name), torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    if VARIANTS[name][0] in WRITTEN_OUT:
        with pytest.raises(InputError, match="written out in its own code: leave out --original-cache"):
            check_loaded(built, ids[0], "it")
        return
    check_loaded(built, ids[0], "it")
    expected, seen = logits(built, ids), []
    cache = QuantisedCache(OriginalCacheFormat.named("int2"), stock_attention(built))
    rough = logits(built, ids, cache)
    assert len(cache.layers) == cached_layers(built, ids[0]) and 0 < cache.share(2) < 1
    assert (rough - expected).abs().max() > 1e-3
    monkeypatch.setattr(original_cache, "restored", lambda values, cache: seen.append(values) or values)
    assert torch.equal(logits(built, ids, cache), expected) and seen
    seen.clear()
    assert torch.equal(logits(built, ids), expected) and not seen


def test_logits_are_those_of_quantised_keys_and_values():
    """Against Llama's attention written out, with keys quantised after RoPE."""
    from transformers.models.llama import modeling_llama as llama

    built, ids = model("llama"), torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    cache = OriginalCacheFormat.named("int4")
    found = logits(built, ids, QuantisedCache(cache, "sdpa"))

    def forward(self, hidden_states, position_embeddings, **kwargs):
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (
            quantised(part, 4, cache.group_of(self.head_dim)).repeat_interleave(self.num_key_value_groups, 1)
            for part in (key, value)
        )
        scores = (query @ key.mT * self.scaling).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
        return self.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)), None

    for layer in built.model.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)
    assert torch.allclose(logits(built, ids), found, atol=1e-4)


@pytest.fixture(scope="module")
def measured(sources, tmp_path_factory):
    """(report, evaluation) of a conversion with quantised caches of the original."""
    out = tmp_path_factory.mktemp("measured") / "out"
    report = convert(sources("llama"), out, original_cache=FORMATS, suite_windows=1)
    return report, out


def test_a_conversion_measures_the_original(measured):
    report, out = measured
    section = report.original_cache
    assert (section.text, section.protocol) == (report.measured.text, report.measured.protocol)
    kl = {entry.format: entry.kl.value for entry in section.formats}
    assert kl["int8"] < 5e-3 < kl["int4"] < kl["int2-hadamard"] and kl["int8"] < kl["fp8"] < kl["int4"]
    assert kl["int2-hadamard"] > 100 * kl["int8"]
    # float32, heads of 8 numbers: a scale and a zero point of 16 bits each for 8 numbers
    shares = {entry.format: entry.share for entry in section.formats}
    assert shares == {"fp8": 8 / 32, "int8": 12 / 32, "int4": 8 / 32, "int2-hadamard": 6 / 32}
    assert all(entry.suite.kl.value > 0 and entry.suite.kinds.keys() == report.measured.suite.kinds.keys()
               for entry in section.formats)  # fmt: skip
    assert read_report(out).original_cache.as_dict() == section.as_dict()
    assert report.settings["original_cache"] == FORMATS and "original" in report.phases


def test_eval_measures_the_same(measured, sources):
    """The whole model and layers one by one, on the conversion's text and windows."""
    report, out = measured
    found = evaluate_model(
        str(out), str(sources("llama")), text=str(sources("llama").parent / "text.txt"), original_cache=FORMATS,
        progress=Progress(quiet=True),
    )  # fmt: skip
    for mine, other in zip(found.original_cache.formats, report.original_cache.formats, strict=True):
        assert (mine.format, mine.share) == (other.format, pytest.approx(other.share))
        assert mine.kl.value == pytest.approx(other.kl.value, rel=1e-3)
        assert mine.agreement.value == pytest.approx(other.agreement.value, abs=0.01)
        assert mine.ratio == pytest.approx(other.ratio, rel=1e-4)
        assert mine.suite.kl.value == pytest.approx(other.suite.kl.value, rel=1e-3)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4-shared", "qwen3-next", "gpt-oss"])
def test_layers_that_share_or_keep_no_keys_are_measured(name, sources, tmp_path):
    """Layer by layer as in the whole model, where layers read keys of earlier ones, have none, or have sinks."""
    report = convert(sources(name), tmp_path / "out", original_cache=["int4"])
    found = evaluate_model(
        str(tmp_path / "out"), str(sources(name)), text=str(sources(name).parent / "text.txt"),
        original_cache=["int4"], progress=Progress(quiet=True),
    )  # fmt: skip
    (mine,), (other,) = found.original_cache.formats, report.original_cache.formats
    assert mine.kl.value == pytest.approx(other.kl.value, rel=1e-3) and mine.kl.value > 1e-4
    assert mine.share == pytest.approx(other.share)


def test_an_attention_that_cannot_be_intercepted_is_refused_first(sources, tmp_path):
    with pytest.raises(InputError, match="written out in its own code: leave out --original-cache"):
        convert(sources("falcon"), tmp_path / "out", original_cache="int4")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(cli, sources, measured, tmp_path):
    source, (_, out) = sources("llama"), measured
    for arguments, code, why in (
        (("eval", out, "--original-cache", "int4"), 2, "give --against"),
        (("eval", out, "--against", source, "--original-cache", "int5"), 2, "'int5' is no format of a cache"),
        (("convert", source, "--original-cache", "fp8,int1"), 2, "'int1' is no format of a cache"),
        (("convert", source, "--original-cache", "fp8", "--eval", "none"), 2, "original_cache needs an evaluation"),
        (("heal", out, "--original-cache", "x"), 2, "'x' is no format of a cache"),
        (("convert", sources("falcon"), "--original-cache", "fp8", "--out", tmp_path / "a"), 4, "written out"),
    ):
        found, _, error = cli(*arguments)
        assert found == code and why in error and error.count("\n") == 1, error


def test_into_report_adds_them(cli, sources, convert_pico, tmp_path):
    import shutil

    folder = tmp_path / "converted"
    shutil.copytree(convert_pico("llama").out, folder)
    text = sources("llama").parent / "text.txt"
    code, out, error = cli("eval", folder, "--against", sources("llama"), "--eval", text, "--original-cache", "int4",
                           "--original-cache", "fp8", "--into-report", "--json", "--quiet")  # fmt: skip
    assert code == 0, error
    printed, report = json.loads(out)["original_cache"], read_report(folder)
    assert [entry["format"] for entry in printed["formats"]] == ["int4", "fp8"]
    assert report.original_cache.as_dict() == printed
    assert "original, INT4 cache" in (folder / "README.md").read_text(encoding="utf-8")
    assert "original, INT4 cache" in (folder / "report.html").read_text(encoding="utf-8")
    assert cli("verify", folder)[0] == 0


def test_names_of_formats_import_no_torch():
    code = "import sys, mla_convert.core.original_cache, mla_convert.report.frontier; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
