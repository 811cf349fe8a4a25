"""Healing: the text, its windows, and what is held out."""

import itertools
import json
from pathlib import Path

import numpy as np
import pico
import pytest
import torch

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.heal import HealConfig, data, heal, loop, prepare_text, windows
from mla_convert.heal.data import Corpus, make_corpus, open_corpus
from mla_convert.heal.record import ADAPTED_NOTE
from mla_convert.heal.schedule import Schedule
from mla_convert.heal.windows import cut
from mla_convert.modeling.loss_terms import IGNORED
from mla_convert.source.load_model import find_model, load_model
from mla_convert.write.verify import verify

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)


def corpus(*lengths):
    ids = np.arange(sum(lengths), dtype=np.int32) % 200 + 10
    return Corpus(ids, np.cumsum([0, *lengths[:-1]]))


def test_documents_do_not_see_each_other(sources):
    """Logits of a window that holds three documents are those of the documents by themselves."""
    model = pico.model("llama")
    batch = cut(corpus(10, 7, 23), [0, 4], 30)
    assert batch.positions[0].tolist() == [*range(10), *range(7), *range(13)]
    with torch.no_grad():
        packed = model(batch.ids, position_ids=batch.positions, use_cache=False).logits
        for row, parts in enumerate([(0, 10, 17, 30), (0, 6, 13, 30)]):
            for start, stop in itertools.pairwise(parts):
                alone = model(batch.ids[row : row + 1, start:stop], use_cache=False).logits[0]
                assert torch.allclose(packed[row, start:stop], alone, atol=1e-4)
                assert batch.labels[row, stop - 1] == IGNORED
                assert batch.labels[row, start : stop - 1].tolist() == batch.ids[row, start + 1 : stop].tolist()
    assert cut(corpus(40), [3], 30).positions is None


def test_windows_of_a_schedule():
    text = corpus(64 * 40)
    schedule = Schedule(text, ((64, 0.75), (128, 0.25)), 256, 200, seed=1)
    tokens = {64: 0, 128: 0}
    for step in range(200):
        length, windows = schedule.step(step)
        begins = [window.begin for window in windows]
        tokens[length] += length * len(begins)
        assert len(begins) * length == schedule.tokens(step) == 256
        assert min(begins) >= 0 and max(begins) + length <= text.train_end  # never the held-out end
    assert tokens[64] / sum(tokens.values()) == pytest.approx(0.75, abs=0.01)
    # a step does not depend on the steps read before; it does on the seed
    again = Schedule(text, ((64, 0.75), (128, 0.25)), 256, 200, seed=1)
    assert again.step(77) == schedule.step(77)
    assert Schedule(text, ((64, 0.75), (128, 0.25)), 256, 200, seed=2).step(77) != schedule.step(77)
    # one pass takes every window once; the next cuts the text at another offset
    single = Schedule(text, ((64, 1.0),), 64, 200, seed=0)
    count = text.train_end // 64 - 1
    first, second = (
        sorted(single.step(step)[1][0].begin for step in range(n * count, (n + 1) * count)) for n in (0, 1)
    )
    assert set(np.diff(first)) == set(np.diff(second)) == {64} and first[0] % 64 != second[0] % 64
    with pytest.raises(InputError, match="give more text"):
        Schedule(corpus(100), ((128, 1.0),), 256, 1, seed=0)
    assert Schedule(text, ((64, 1.0),), 192, 1, seed=0, processes=2).windows == {64: 4}


def test_noise_is_in_some_windows_and_never_a_label():
    text = corpus(4000)
    clean = cut(text, [0, 500, 1000], 400)
    batch = windows.noised(clean, 0.3, torch.arange(5, 264), [None, (0, 1, 1), (0, 1, 2)])
    changed = batch.ids != clean.ids
    assert not changed[0].any() and changed[1:].float().mean() == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(changed[1], changed[2]) and not changed[:, 0].any() and batch.ids.min() >= 5
    kept = batch.labels != IGNORED
    assert not (kept[:, :-1] & changed[:, 1:]).any() and torch.equal(batch.labels[kept], clean.labels[kept])
    again = windows.noised(clean, 0.3, torch.arange(5, 264), [None, (0, 1, 1), (0, 1, 2)])
    assert torch.equal(again.ids, batch.ids)


def test_rows_are_documents_unless_joined(tmp_path):
    file, tokenizer = tmp_path / "rows.jsonl", pico.tokenizer()
    file.write_text("".join(json.dumps({"text": word * 20}) + "\n" for word in ("one ", "two ", "three ")))
    assert make_corpus(str(file), tokenizer, 1000, tmp_path / "a") == ["rows.jsonl"]
    found = open_corpus(tmp_path / "a")
    assert found.starts.tolist() == [0, 80, 160] and len(found.ids) == 280
    make_corpus(str(file), tokenizer, 1000, tmp_path / "b", joined=True)
    assert open_corpus(tmp_path / "b").starts.tolist() == [0]
    make_corpus(str(file), tokenizer, 100, tmp_path / "c")
    assert len(open_corpus(tmp_path / "c").ids) == 100


def test_pieces_are_from_all_over_a_long_text(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)
    text = "".join(f"line {number:04d} of the text\n" for number in range(1000))
    parts = data.pieces(text)
    assert "".join(parts) == text and all(part.endswith("\n") and len(part) <= 100 for part in parts)
    tokenizer = pico.tokenizer()
    taken = data._thinned([text], 2000, tokenizer)
    tokens = len(tokenizer("".join(taken), add_special_tokens=False)["input_ids"])
    assert 2000 <= tokens < 2400 and taken[0] == parts[0]
    assert parts.index(taken[-1]) > 0.8 * len(parts)
    assert data._thinned([text], 10**6, tokenizer) == [text]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_heads_with_fewer_content_dims_are_healed(small, convert_pico, sources, tmp_path, name):
    converted = convert_pico(name, rank=12, rope_dim=6, nope_dim=2).out
    settings = small | {"folder": converted, "teacher": str(sources(name)), "tokens": 12 * 512}
    report = heal(HealConfig(**settings, out=tmp_path / "healed"), QUIET)
    curve = [entry["kl"] for entry in report["heal"]["curve"]]
    assert curve[-1] < 0.9 * curve[0]
    healed = load_model(find_model(str(tmp_path / "healed")), torch.float32, CPU)
    assert healed.config.qk_nope_head_dim == 2 and verify(tmp_path / "healed").shards


def test_healing_on_self_generated_text(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text.self_generated, "TEXT_TOKENS", 64)
    added, add = [], data.add_generated
    monkeypatch.setattr(data, "add_generated", lambda folder, ids: (added.append(ids), add(folder, ids)))
    own = {**small, "tokens": 16 * 512, "self_share": 0.5}
    report = heal(HealConfig(**own, out=tmp_path / "out"), QUIET)
    plain = heal(HealConfig(**{**own, "self_share": 0}, out=tmp_path / "plain"), QUIET)
    assert [len(ids) for ids in added] == [4 * 512]
    assert report["heal"]["settings"]["self_share"] == 0.5
    curves = [[entry["kl"] for entry in each["heal"]["curve"]] for each in (report, plain)]
    assert curves[0][-1] < 0.9 * curves[0][0] and curves[0][-1] != curves[1][-1]


@pytest.mark.parametrize("kl_weight, has_labels", [(1.0, False), (0.0, True)])
def test_cross_entropy_is_that_of_the_given_text(small, tmp_path, monkeypatch, kl_weight, has_labels):
    monkeypatch.setattr(prepare_text.self_generated, "TEXT_TOKENS", 64)
    seen, inner = [], loop.Trainer._cut

    def cut(trainer, begins, length):
        """Record of each window: whether it is self-generated, whether it is held out, whether it has labels."""
        found, corpus = inner(trainer, begins, length), trainer.corpus
        for begin, labels in zip(begins, found.labels, strict=True):
            written = begin < corpus.generated
            held = begin >= (corpus.generated_end if written else corpus.train_end)
            seen.append((written, held, bool((labels != IGNORED).any())))
        return found

    monkeypatch.setattr(loop.Trainer, "_cut", cut)
    own = {**small, "tokens": 16 * 512, "self_share": 0.5, "ce_weight": 0.5, "kl_weight": kl_weight}
    report = heal(HealConfig(**own, out=tmp_path / "out"), QUIET)
    assert report["notes"].count(ADAPTED_NOTE) == 1
    assert "cross-entropy counted as well, with weight 0.5" in (tmp_path / "out" / "report.html").read_text()
    assert "cross-entropy, weight 0.5" in (tmp_path / "out" / "README.md").read_text()
    assert set(seen) == {(True, held, has_labels) for held in (False, True)} | {
        (False, held, True) for held in (False, True)
    }


def test_self_generated_text_has_its_fraction_of_the_windows(tmp_path):
    data.save_corpus(tmp_path, np.arange(4000, dtype=np.int32), np.array([0, 60]))
    data.add_generated(tmp_path, np.full(1000, 7))
    found = open_corpus(tmp_path)
    assert found.starts.tolist() == [0, 1000, 1060] and found.ids[[0, 999, 1000, 1001]].tolist() == [7, 7, 0, 1]
    assert found.generated_end == 950 and found.train_end == 4800  # a twentieth of each
    schedule = Schedule(found, ((16, 1.0),), 128, 100, seed=0, self_fraction=0.25)
    every = [window for step in range(100) for window in schedule.step(step)[1]]
    written = [window for window in every if window.begin < 1000]
    assert len(written) == len(every) / 4 and max(window.begin for window in written) + 16 <= 950
    assert sum(window.odd for window in written) == len(written) / 2  # so noise is in both kinds alike
    given, own = data.GIVEN_KIND, data.OWN_KIND
    assert windows.held_out(found, 32, 0.0, most=6 * 32) == {given: [4800, 4832, 4864, 4896, 4928, 4960]}
    assert windows.held_out(found, 32, 0.5, most=6 * 32) == {given: [4800, 4864, 4928], own: [950]}


def test_every_text_of_a_mixture_is_held_out(tmp_path):
    for name, count in (("a", 4000), ("b", 400), ("c", 60)):
        (tmp_path / f"{name}.txt").write_text(name * count)
    given = [f"{tmp_path}/a.txt=3", str(tmp_path / "b.txt"), str(tmp_path / "c.txt")]
    labels = make_corpus(given, pico.tokenizer(), 1000, tmp_path / "corpus", window=32)
    found = open_corpus(tmp_path / "corpus")
    assert labels == ["a.txt", "b.txt", "c.txt"]
    # three fifths of a; b and c share the rest, and c has fewer than its share
    sizes = {label: end - begin for label, begin, end in found.held_out_ranges()}
    assert sizes == {"a.txt": 32, "b.txt": 32, "c.txt": 15} and found.train_end == 600 + 200 + 60 - 32 - 32 - 15
    a, b = np.searchsorted(found.starts, [0, 568])
    assert found.starts[a] == 0 and found.starts[b] == 568
    texts = {label: {*found.ids[begin:end].tolist()} for label, begin, end in found.held_out_ranges()}
    assert all(len(tokens) == 1 for tokens in texts.values()) and len(set.union(*texts.values())) == 3
    assert windows.held_out(found, 32) == {"a.txt": [found.train_end], "b.txt": [found.train_end + 32]}


def test_training_never_runs_attention_of_cudnn(small, tmp_path, monkeypatch):
    """Its backward pass gives NaN on Hopper where all scores of a row are far below zero."""
    enabled, step = [], loop.Trainer._step
    monkeypatch.setattr(
        loop.Trainer, "_step", lambda *given: (enabled.append(torch.backends.cuda.cudnn_sdp_enabled()), step(*given))[1]
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    heal(HealConfig(**{**small, "tokens": 4 * 512}, out=tmp_path / "out"), QUIET)
    assert enabled and not any(enabled) and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_best_state_is_that_of_the_worst_kind(small, tmp_path):
    code = tmp_path / "code.txt"
    code.write_text("def f(x):\n    return x + 1\n" * 400)
    mixture = {**small, "data": [f"{small['data']}=2", str(code)], "tokens": 8 * 512}
    report = heal(HealConfig(**mixture, out=tmp_path / "out"), QUIET)
    assert report["heal"]["text"] == f"{Path(small['data']).name} ×2, code.txt"
    curve = report["heal"]["curve"]
    assert list(curve[0]["kinds"]) == [Path(small["data"]).name, "code.txt"]
    worst = [max(entry["kinds"].values()) for entry in curve]
    assert report["heal"]["best_tokens"] == curve[int(np.argmin(worst))]["tokens"] > 0
