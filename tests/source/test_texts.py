"""Texts: every way to name one, and the windows that are cut from it."""

import gzip
import json

import pico
import pytest
import torch

from mla_convert.core.errors import InputError
from mla_convert.source.texts import load_text
from mla_convert.source.tokens import noised
from mla_convert.source.windows import calibration_windows, evaluation_windows

BOS = 7


class Words:
    """One token per word; with special tokens, also a beginning-of-sequence token."""

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [BOS] * add_special_tokens + [int(word) for word in text.split()]}


def numbered(count):
    return " ".join(str(100 + index) for index in range(count))


@pytest.mark.parametrize(
    "file, content",
    [
        ("a.txt", "one\n\ntwo"),
        ("a.md", "one\n\ntwo"),
        ("a.text-file", "one\n\ntwo"),
        ("a.txt", "one\r\n\r\ntwo"),
        ("a.jsonl", '{"text": "one", "id": 1}\n\n{"text": "two"}\n'),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_files(tmp_path, file, content, pack):
    path = tmp_path / (file + ".gz" * pack)
    path.write_bytes(gzip.compress(content.encode()) if pack else content.encode())
    assert load_text(str(path), "calibration") == ("one\n\ntwo", path.name)


def test_jsonl_keeps_line_separators_inside_strings(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False), encoding="utf-8"
    )
    assert load_text(str(tmp_path / "a.jsonl"), "calibration")[0] == "one\u2028two\x85three"


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_packaged_text_stands_in_for_the_hub(purpose):
    text, label = load_text(None, purpose)
    assert label.startswith(f"mla_demo/{purpose}.txt.gz") and "could not be fetched" in label
    assert load_text(f"package:mla_demo/{purpose}.txt.gz", purpose) == (text, f"mla_demo/{purpose}.txt.gz")
    assert len(text) > 50_000


def test_packaged_texts_do_not_overlap():
    calibration, evaluation = (
        load_text(f"package:mla_demo/{name}.txt.gz", "")[0] for name in ("calibration", "evaluation")
    )
    lines = {line for line in calibration.splitlines() if len(line) > 60}
    assert not lines & set(evaluation.splitlines())


@pytest.mark.parametrize("count, length, found", [(3, 10, 3), (99, 10, 10), (99, 33, 3), (1, 101, 1)])
def test_evaluation_windows_are_the_start_of_the_text_as_it_is(count, length, found):
    windows = evaluation_windows(numbered(100), Words(), count, length, "text")
    assert windows.flatten().tolist() == [BOS, *range(100, 200)][: found * length]
    assert windows.shape == (found, length)


def test_evaluation_text_shorter_than_a_window():
    with pytest.raises(InputError, match="label has 101 tokens"):
        evaluation_windows(numbered(100), Words(), 4, 102, "label")


def test_calibration_windows_are_distinct_runs_behind_the_first_token():
    windows = calibration_windows(numbered(100), Words(), 8, 11, seed=0, label="text")
    assert windows.shape == (8, 11) and (windows[:, 0] == BOS).all()
    assert (windows[:, 1:].diff(dim=1) == 1).all()
    assert len(windows[:, 1].unique()) == 8


def test_calibration_windows_depend_on_the_seed_only():
    first, again, other = (calibration_windows(numbered(999), Words(), 8, 11, seed, "text") for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_calibration_windows_come_from_all_over_a_long_text():
    text = numbered(200_000)  # several pieces
    windows = calibration_windows(text, Words(), 10_000, 11, seed=0, label="text")
    assert windows[:, 1].max() > 150_000 and windows[:, 1].min() < 50_000
    assert windows.unique(dim=0).shape == windows.shape


@pytest.mark.parametrize("count", [11, 10_000])
def test_calibration_text_too_short(count):
    with pytest.raises(InputError, match=f"holds 10 windows of 11 tokens and {count} are wanted"):
        calibration_windows(numbered(100), Words(), count, 11, 0, "text")


def test_no_first_token_where_the_tokenizer_adds_none():
    windows = calibration_windows(pico.text(500), pico.tokenizer(), 3, 16, 0, "text")
    assert windows.shape == (3, 16) and windows.min() > 3


def test_noise_is_in_every_second_window_and_leaves_the_first_token():
    tokenizer = pico.tokenizer()
    windows = torch.full((8, 400), 7)
    found = noised(windows, 0.25, tokenizer, seed=0)
    changed = found != windows
    assert not changed[::2].any() and not changed[:, 0].any()
    assert 0.2 < changed[1::2].float().mean() < 0.3
    assert not set(found[changed].tolist()) & set(tokenizer.all_special_ids) and found[changed].unique().numel() > 100
    assert torch.equal(found, noised(windows, 0.25, tokenizer, seed=0)) and torch.equal(
        windows, torch.full((8, 400), 7)
    )
    assert torch.equal(windows, noised(windows, 0.0, tokenizer, seed=0))


@pytest.mark.parametrize("answer, offline", [(OSError("unreachable"), True), (None, False)])
def test_a_hub_out_of_reach_is_asked_once(monkeypatch, answer, offline):
    """`datasets` would ask again for 24 seconds; its cache is read all the same."""
    import datasets
    import huggingface_hub

    def info(self, name, timeout):
        if answer:
            raise answer

    def load(*_, **__):
        seen.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": ["one", "two"]})

    seen = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_text("owner/name", "calibration") == ("one\n\ntwo", "owner/name")
    assert seen == [(offline, offline)]
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE
