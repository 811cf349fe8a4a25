"""benchmarks/cache_formats.py: its formats, and a run over a small model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cache_formats", BENCHMARKS / "cache_formats.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cache_formats"] = module
    spec.loader.exec_module(module)
    return module


def test_more_bits_and_more_rank_lose_less(script, sources, tmp_path, monkeypatch, capsys):
    source = sources("llama")
    text = str(source.parent / "text.txt")
    options = ["--calib", text, "--eval", text, "--calib-samples", "8", "--calib-length", "32", "--eval-windows", "4",
               "--eval-length", "32", "--device", "cpu", "--save", str(tmp_path / "rows.json")]  # fmt: skip
    formats = [
        "8+8",
        "24+8",
        "24+8:int8:rope=int8:group=32",
        "24+8:int4:group=32",
        "24+8:mixed:wide=8:pca",
        "24+8:nope=2",
        "24+8:nope=6",
    ]
    monkeypatch.setattr(sys, "argv", ["cache_formats.py", str(source), *formats, *options])
    script.main()
    rows = {row["format"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == formats and capsys.readouterr().out.count("\n") == 2 + len(formats)
    whole, eight, four = (rows[name]["kl"] for name in formats[1:4])
    assert eight == pytest.approx(whole, rel=0.1) and whole < four < rows["8+8"]["kl"]
    assert rows[formats[4]]["kl"] != four
    assert rows["24+8:nope=2"]["kl"] > rows["24+8:nope=6"]["kl"] >= 0.9 * whole
    assert all(
        0 < few < more <= 1 for few, more in zip(*(rows[name]["nope_kept"] for name in formats[5:]), strict=True)
    )
    assert rows["24+8"]["share"] == 1 and rows[formats[3]]["share"] == (16 + 16 + 16) / 64


def test_an_unknown_word_is_refused(script):
    from mla_convert.source.shape import AttentionShape

    with pytest.raises(ValueError, match="unknown bits"):
        script.Candidate.parse("16+8:int4:bits=3", AttentionShape(3, 48, 6, 2, 8))
