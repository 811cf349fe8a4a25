"""Calibration on several texts: each gives windows in proportion to its weight, from all of it, and the report says so."""

import pico
import pytest
import torch
import yaml

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.recipes import build_config
from mla_convert.core.settings import ConvertConfig
from mla_convert.heal.checks import check_conversion, conversion_text
from mla_convert.source import mixture, texts
from mla_convert.source.mixture import Part, parts, quotas


@pytest.fixture
def files(tmp_path):
    """Texts that each consist of one letter."""
    for name, size in (("a", 4000), ("b", 4000), ("c", 130)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    return tmp_path


def load(config, tokenizer=None):
    return texts.load_windows(config, tokenizer or pico.tokenizer(), False, texts.Reach(256), 48)


def config(files, *calib, **settings):
    given = {"calib_samples": 12, "calib_length": 40, "calib_noise": 0, "eval": str(files / "a.txt"), "eval_windows": 1}
    calib = [spec if "/" in spec else f"{files}/{spec}" for spec in calib]
    return ConvertConfig(source="x", calib=calib, **{**given, **settings})


def letters(windows):
    decoded = [pico.tokenizer().decode(row[1:2]) for row in windows]
    return {letter: decoded.count(letter) for letter in sorted(set(decoded))}


def test_weights_as_typed(tmp_path):
    assert parts("a.txt") == [Part("a.txt")] and parts(["a.txt", "b.txt=2.5"]) == [Part("a.txt"), Part("b.txt", 2.5)]
    assert [str(part) for part in parts(["a.txt", "b.txt=2.5"])] == ["a.txt", "b.txt=2.5"]
    odd = tmp_path / "k=3"
    odd.write_text("x")
    assert parts(str(odd)) == [Part(str(odd))]  # a file is a file
    assert [part.spec for part in parts(None)] == list(mixture.PACKAGED)
    for wrong in ("a.txt=0", "a.txt=-1", "a.txt=nan", "a.txt=inf", "a.txt=much"):
        with pytest.raises(InputError, match=r"is no weight of calibration text a\.txt: give a number above 0"):
            parts(wrong)
    with pytest.raises(InputError, match=r"a\.txt is given twice"):
        parts(["a.txt", "a.txt=2"])


def test_quotas_are_whole_and_add_up():
    assert quotas([1, 1], 5) in ([3, 2], [2, 3]) and quotas([1, 3], 8) == [2, 6] and quotas([1], 7) == [7]
    assert sum(quotas([1, 2.5, 0.3, 7], 101)) == 101


def test_windows_by_weight(files):
    found = load(config(files, "a.txt", "b.txt=3"))
    assert letters(found.calib) == {"a": 3, "b": 9} and found.calib_counts == {"a.txt": 3, "b.txt": 9}
    assert found.calib_protocol() == "a.txt, b.txt ×3, 12 windows of 40 tokens"
    assert torch.equal(found.calib, load(config(files, "a.txt", "b.txt=3")).calib)
    # in one random order, not one text after another
    first = pico.tokenizer().decode(found.calib[:3, 1])
    assert load(config(files, "a.txt", "b.txt=3", seed=1)).calib.shape == (12, 40) and set(first) <= {"a", "b"}


def test_a_short_text_is_made_up_for(files):
    found = load(config(files, "a.txt", "c.txt"))
    assert found.calib_counts == {"a.txt": 9, "c.txt": 3} and len(found.calib) == 12
    with pytest.raises(InputError, match=r"together they hold \d+ windows of 40 tokens and 1200 are wanted"):
        load(config(files, "a.txt", "c.txt", calib_samples=1200))


def test_a_text_that_gives_nothing_is_refused(files):
    (files / "d.txt").write_text("too short")
    with pytest.raises(InputError, match=r"calibration text d\.txt is too short: it holds 0 windows"):
        load(config(files, "a.txt", "d.txt"))


def test_one_text_is_cut_as_before(files):
    alone = load(ConvertConfig(**{**config(files, "a.txt").model_dump(), "calib": f"{files}/a.txt"}))
    assert torch.equal(alone.calib, load(config(files, "a.txt")).calib) and alone.calib_text == "a.txt"


def test_the_end_of_each_text_is_held_out(files):
    found = load(config(files, "a.txt", "b.txt", held_out="calib", eval_length=100, eval_windows=8))
    held = pico.tokenizer().decode(found.held_out.flatten())
    assert "a" in held and "b" in held and found.held_out_text == "the end of a.txt, b.txt"


def test_packaged_texts_are_the_default(files):
    found = load(ConvertConfig(source="x", eval=str(files / "a.txt"), eval_windows=1))
    assert found.calib_text == mixture.PACKAGED_LABEL and len(found.calib) == 32
    assert len(found.calib_counts) == len(mixture.PACKAGED) and min(found.calib_counts.values()) >= 4
    assert found.notes == [f"no calibration text was given: using {mixture.PACKAGED_LABEL}"]


def test_a_recipe_repeats_it(convert_folder, sources, tmp_path):
    text = sources("llama").parent / "text.txt"
    other = tmp_path / "other.txt"
    other.write_text(pico.text(8000)[4000:])
    report = convert_folder(sources("llama"), calib=[str(text), f"{other}=3"])
    assert report.settings["calib"] == "text.txt, other.txt ×3"
    assert report.calibration["windows"] == {"text.txt": 4, "other.txt": 12}
    written = (report.out / "recipe.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written)["settings"]["calib"] == ["text.txt", "other.txt=3"]
    assert "other.txt was a local file" in written and str(tmp_path) not in written


def test_options_and_healing(files):
    assert build_config({"source": "x/y", "calib": ["a", "b=2"]}).calib == ["a", "b=2"]
    several = config(files, "a.txt", "b.txt", heal_tokens=1000, eval=str(files / "c.txt"))
    check_conversion(several, 256)  # healing trains on what calibration reads
    assert conversion_text(several) == several.calib
    check_conversion(several.model_copy(update={"heal_data": [str(files / "b.txt=2")]}), 256)
    with pytest.raises(UsageError, match=r"a\.txt is the text to train on"):
        check_conversion(several.model_copy(update={"eval": str(files / "a.txt")}), 256)
