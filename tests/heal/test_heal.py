"""Healing: loss and gradients, the pair of models, the windows of a run, resuming, and the command line."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mla_convert.core.cuda_graph import CaptureError
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import parse_report
from mla_convert.core.units import parse_lengths, parse_tokens
from mla_convert.heal import HealConfig, HealSettings, cuda_graph, data, heal, loop, prepare_text
from mla_convert.heal.data import Corpus, cut, make_corpus, open_corpus
from mla_convert.heal.record import ADAPTED_NOTE, ERRORS_NOTE
from mla_convert.heal.schedule import Schedule
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.modeling import distillation
from mla_convert.modeling.distillation import distillation_loss
from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights
from mla_convert.report.html.page import page_text
from mla_convert.source.load_model import find_model, load_model
from mla_convert.write.verify import verify

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)


def pair_of(source, converted, **settings):
    settings = HealSettings(tokens=1, **settings)
    student = load_model(find_model(str(converted)), torch.float32, CPU)
    return TeacherStudent.build(
        student, load_model(find_model(str(source)), torch.float32, CPU), settings, torch.float32
    )


@pytest.fixture
def small(convert_pico, sources):
    """A pico model at a third of its cache, and settings that heal it in a second or two."""
    converted = convert_pico("llama", rank=16, rope_dim=6, refine_steps=4).out
    text = sources("llama").parent / "text.txt"
    settings = {
        "folder": converted, "teacher": str(sources("llama")), "data": str(text), "device": "cpu", "tokens": 24 * 512,
        "length": "64", "step_tokens": 512, "micro_tokens": 256, "evaluations": 4, "lr": 0.01, "eval_windows": 2,
        "eval_length": 48, "eval": "package:mla_demo/calibration.txt.gz", "self_share": 0, "noise": 0,
    }  # fmt: skip
    return settings


# The loss


@pytest.mark.parametrize(
    "mix", [LossWeights(), LossWeights(0.5, 0.7, 1.0), LossWeights(1.0, 0.3, 2.0), LossWeights(0.0, 1.0)]
)
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, mix):
    torch.manual_seed(0)
    model, original = pico.model("llama").requires_grad_(True), pico.model("llama").requires_grad_(False)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(4, pico.VOCAB, (2, 24))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 5] = IGNORED

    def run(chunked):
        model.zero_grad()
        hidden, theirs = (each.model(ids, use_cache=False).last_hidden_state for each in (model, original))
        if chunked:
            loss, sums = distillation_loss(hidden, theirs, labels, Head(model), Head(original), mix)
        else:
            heat, tokens = mix.temperature, ids.numel()
            ours, target = model.lm_head(hidden).flatten(0, 1), original.lm_head(theirs).flatten(0, 1)
            kl = F.kl_div(
                (ours / heat).log_softmax(-1), (target / heat).log_softmax(-1), reduction="sum", log_target=True
            )
            ce = F.cross_entropy(ours, labels.flatten(), ignore_index=IGNORED, reduction="sum")
            loss, sums = (mix.kl * heat**2 * kl + mix.ce * ce) / tokens, None
        (loss * 3).backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}, sums

    monkeypatch.setattr(distillation, "CHUNK", 7 * pico.VOCAB)  # 48 tokens in chunks of 7
    loss, gradients, sums = run(chunked=True)
    expected, wanted, _ = run(chunked=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert float(sums[0]) == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    ("mix", "dtype"),
    [(LossWeights(), torch.float32), (LossWeights(0.5, 0.7), torch.float32), (LossWeights(), torch.bfloat16)],
)
def test_kernel_is_the_loss(mix, dtype):
    from mla_convert.modeling import distillation_triton as kernel

    draw = torch.Generator().manual_seed(0)
    ours, theirs = (
        5 * torch.randn(7, 4999, generator=draw) for _ in range(2)
    )  # more than one block of the kernel, and no multiple of it
    ours, theirs = ours.to(dtype), (ours + 0.5 * theirs).to(dtype)
    labels = torch.randint(4999, (7,), generator=draw)
    labels[2] = IGNORED
    (sums, slope), (wanted, wanted_slope) = (
        f(ours, theirs, labels, mix, 0.3) for f in (kernel.divergence, distillation.divergence)
    )
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "opt", "falcon", "nanochat", "gemma4"]
)
def test_head_gives_the_logits_of_the_model(name):
    model = pico.model(name)
    ids = torch.randint(4, pico.VOCAB, (1, 9))
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        assert torch.allclose(Head(model)(hidden[0]), model(ids).logits[0], atol=1e-5)


# The pair


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "gemma2",
        "pythia",
        "gpt2",
        "mixtral",
        "gpt-oss",
        "falcon",
        "hunyuan_v1_dense",
        "ministral3",
        "gemma4-shared",
    ],
)
def test_pair_is_the_converted_model_and_its_original(convert_pico, sources, name):
    converted = convert_pico(name, kv_ratio=0.5).out
    ids = torch.randint(4, pico.VOCAB, (2, 20))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    original, student = (load_model(find_model(str(each)), torch.float32, CPU) for each in (sources(name), converted))
    with torch.no_grad():
        theirs, ours = (each(ids).logits.log_softmax(-1) for each in (original, student))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    sizes = {}
    for train in ("all", "attention"):
        pair = pair_of(sources(name), converted, train=train)
        assert pair.shares == (train == "attention")
        loss, sums = pair(ids, labels)
        assert float(loss.detach()) == pytest.approx(kl, rel=1e-3)
        ce = [float(-each[:, :-1].gather(-1, ids[:, 1:, None]).sum() / ids.numel()) for each in (ours, theirs)]
        assert sums[2:].tolist() == pytest.approx(ce, rel=1e-4)
        loss.backward()
        assert all(p.grad is not None for p in pair.parameters() if p.requires_grad)
        sizes[train] = sum(p.numel() for p in {*pair.parameters(), *pair.original.parameters()})
    layers = original.get_submodule(student.config.mla_layers)
    attention = sum(p.numel() for each in layers for p in getattr(each, student.config.mla_attention).parameters())
    assert sizes["all"] - sizes["attention"] == sum(p.numel() for p in original.parameters()) - attention


def test_hidden_states_can_be_part_of_the_loss(convert_pico, sources):
    converted = convert_pico("llama", rank=10, rope_dim=6).out
    ids = torch.randint(4, pico.VOCAB, (1, 20))
    plain, with_hidden = (pair_of(sources("llama"), converted, hidden_weight=weight) for weight in (0.0, 2.0))
    without, loss = (float(each(ids, ids)[0].detach()) for each in (plain, with_hidden))
    with torch.no_grad():
        states = [
            model.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
            for model in (with_hidden.student, with_hidden.original)
        ]
    parts = [((a - b).square().mean(-1) / b.square().mean(-1)).log1p().mean() for a, b in zip(*states, strict=True)]
    assert loss - without == pytest.approx(2.0 * float(torch.stack(parts).mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "attention"])
def test_compiling_changes_nothing(convert_pico, sources, train):
    converted = convert_pico("llama", kv_ratio=0.4, refine_steps=2).out  # layers of several sizes
    ids = torch.randint(5, 200, (2, 24))
    found = []
    for compiled in (False, True):
        pair = pair_of(sources("llama"), converted, train=train)
        if compiled:
            pair.compile()
        loss, _ = pair(ids, ids)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in pair.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_windows_of_one_document_need_no_mask(convert_pico, sources, monkeypatch):
    pair = pair_of(sources("llama"), convert_pico("llama", rank=16, rope_dim=6).out)
    ids = torch.randint(4, pico.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    labels, positions = ids.roll(-1, 1), torch.arange(24).expand(2, -1)
    with torch.no_grad():
        plain, masked = pair(ids, labels)[1], pair(ids, labels, positions)[1]
        packed = pair(ids, labels, positions % 12)[1]
    assert torch.allclose(plain, masked, rtol=1e-5) and not torch.allclose(plain, packed, rtol=1e-3)
    assert pair.student.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("replay", ["right", "wrong", "refused"])
def test_captured_passes_are_checked(monkeypatch, replay):
    """A captured pass has to equal an eager one, else training continues without graphs. The graph is a fake."""
    weight = torch.nn.Parameter(torch.ones(3))
    batches = [
        data.Batch(torch.full((1, 3), float(n)), torch.zeros(1, 3), torch.zeros(1, 3) if n == 3 else None)
        for n in range(1, 10)
    ]
    eager = []

    def run(ids, labels, positions, grad_scale):
        eager.append(float(ids[0, 0]))
        loss = (weight * ids).sum() * grad_scale
        loss.backward()
        return loss.detach()

    class Captured:
        def __init__(self, run, ids, labels):
            if replay == "refused":
                raise CaptureError("operation not permitted when stream is capturing")
            self.output = None

        def __call__(self, ids, labels):
            scale = 2.0 if replay == "wrong" else 1.0
            weight.grad += scale * ids[0] * 0.5
            self.output = (weight * ids).sum().detach() * 0.5
            return self.output

    monkeypatch.setattr(cuda_graph, "CapturedCall", Captured)
    weight.grad = torch.zeros(3)
    call = cuda_graph.GraphedStep(run, [weight], capture=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in batches:
            weight.grad.zero_()
            assert float(call(batch, 0.5, first=True)) == 1.5 * float(batch.ids[0, 0])
            assert torch.equal(weight.grad, 0.5 * batch.ids[0])
    assert (len(said), call.capture) == ((0, True) if replay == "right" else (1, False))
    first = cuda_graph.EAGER_PASSES + 2  # one of the batches is packed, and runs eagerly
    once_more = [float(first)] if replay == "wrong" else []
    rest = [] if replay == "right" else [float(n) for n in range(first + 1, 10)]
    assert eager == [float(n) for n in range(1, first + 1)] + once_more + rest


def test_gradient_checkpointing_changes_nothing(convert_pico, sources):
    converted, ids = convert_pico("llama", rank=10, rope_dim=6).out, torch.randint(4, pico.VOCAB, (1, 20))
    gradients = []
    for checkpointing in (False, True):
        pair = pair_of(sources("llama"), converted, train="attention")
        if checkpointing:
            pair.checkpoint_gradients()
        pair(ids, ids)[0].backward()
        gradients.append([p.grad for p in pair.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pair_refuses_what_is_not_the_original(convert_pico, sources, tmp_path):
    other = pico.config("llama")
    other.num_hidden_layers = 2
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(other, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="2 layers"):
        pair_of(tmp_path, convert_pico("llama", rank=10, rope_dim=6).out)


# The text


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
    batch = data.noised(clean, 0.3, torch.arange(5, 264), [None, (0, 1, 1), (0, 1, 2)])
    changed = batch.ids != clean.ids
    assert not changed[0].any() and changed[1:].float().mean() == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(changed[1], changed[2]) and not changed[:, 0].any() and batch.ids.min() >= 5
    kept = batch.labels != IGNORED
    assert not (kept[:, :-1] & changed[:, 1:]).any() and torch.equal(batch.labels[kept], clean.labels[kept])
    again = data.noised(clean, 0.3, torch.arange(5, 264), [None, (0, 1, 1), (0, 1, 2)])
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
    taken = data._thinned([text], 500)
    assert sum(map(len, taken)) < len(text) / 4 and taken[0] == parts[0]
    assert parts.index(taken[-1]) > 0.8 * len(parts)
    assert data._thinned([text], 10**6) == [text]


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
    windows = [window for step in range(100) for window in schedule.step(step)[1]]
    written = [window for window in windows if window.begin < 1000]
    assert len(written) == len(windows) / 4 and max(window.begin for window in written) + 16 <= 950
    assert sum(window.odd for window in written) == len(written) / 2  # so noise is in both kinds alike
    given, own = data.GIVEN_KIND, data.OWN_KIND
    assert data.held_out(found, 32, 0.0, most=6 * 32) == {given: [4800, 4832, 4864, 4896, 4928, 4960]}
    assert data.held_out(found, 32, 0.5, most=6 * 32) == {given: [4800, 4864, 4928], own: [950]}


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
    assert data.held_out(found, 32) == {"a.txt": [found.train_end], "b.txt": [found.train_end + 32]}


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


# The run


def test_heals(small, tmp_path):
    before = json.loads((small["folder"] / "report.json").read_text())
    report = heal(HealConfig(**small, original_cache="int8,int4", out=tmp_path / "healed"), QUIET)
    assert [entry["format"] for entry in report["original_cache"]["formats"]] == ["int8", "int4"]
    assert report["original_cache"]["text"] == report["evaluation"]["text"]
    (state,) = report["earlier_states"]
    assert state.name == "converted" and state.ratio == before["evaluation"]["ratio"]
    assert ERRORS_NOTE in report["notes"] and ADAPTED_NOTE not in report["notes"]
    record = report["heal"]
    assert [entry["tokens"] for entry in record["curve"]] == [0, *(6 * 512 * n for n in range(1, 5))]
    assert record["curve"][-1]["kl"] < 0.8 * record["curve"][0]["kl"]
    assert report["evaluation"]["ratio"] < record["before"]["evaluation"]["ratio"]
    assert report["probes"]["next_token"]["kl"]["value"] < record["before"]["probes"]["next_token"]["kl"]["value"]
    assert record.conversion.evaluation.as_dict() == before["evaluation"]
    verify(tmp_path / "healed")
    written = json.loads((tmp_path / "healed" / "report.json").read_text())
    assert written["checksums"] != before["checksums"] and written["heal"]["curve"] == record.as_dict()["curve"]
    assert "Healing" in page_text(parse_report(written)) and str(tmp_path) not in json.dumps(written)
    assert "distilled from the original on 12,288 tokens of text.txt" in (tmp_path / "healed" / "README.md").read_text()
    names = {file.name for file in small["folder"].iterdir()}
    assert {file.name for file in (tmp_path / "healed").iterdir()} == names
    assert {file.name for file in tmp_path.iterdir()} == {"healed"}  # no state, no lock


def test_in_place_and_attention_alone(small, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", small["folder"], folder], check=True)
    old = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    report = heal(HealConfig(**{**small, "folder": folder, "train": "attention"}), QUIET)
    verify(folder)
    new = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert "everything else is the original's" in (folder / "README.md").read_text()
    # again, on the healed model
    again = heal(HealConfig(**{**small, "folder": folder, "train": "attention", "tokens": 8 * 512}), QUIET)
    assert again["heal"]["before"]["evaluation"]["ratio"] == report["evaluation"]["ratio"]


def test_lora(small, tmp_path):
    pytest.importorskip("peft")
    report = heal(HealConfig(**{**small, "train": "lora", "lr": 0.01, "lora_rank": 8}, out=tmp_path / "out"), QUIET)
    curve = report["heal"]["curve"]
    verify(tmp_path / "out")
    assert curve[-1]["kl"] < 0.9 * curve[0]["kl"]
    # the adapters are merged into their projections
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]


def test_same_seed_same_bytes(small, tmp_path):
    first, second, other = (
        heal(HealConfig(**{**small, "tokens": 8 * 512, "seed": seed}, out=tmp_path / name), QUIET)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["checksums"] == second["checksums"] != other["checksums"]
    noisy = heal(HealConfig(**{**small, "tokens": 8 * 512, "noise": 0.3}, out=tmp_path / "d"), QUIET)
    assert noisy["checksums"] != first["checksums"]


@pytest.mark.slow
def test_every_try_of_a_race_has_its_own_loss(small, tmp_path):
    benchmark, results = Path(__file__).parents[2] / "benchmarks" / "heal", tmp_path / "race.jsonl"
    common = "lr=0.01,noise=0,self_share=0"
    tries = [common, common, f"{common},ce_weight=4", f"{common},hidden_weight=1", f"{common},temperature=2", common]
    command = [sys.executable, benchmark, "race", small["folder"], "--teacher", small["teacher"], "--data", small["data"],
               "--eval", small["data"], "--results", results, "--work", tmp_path / "work", "--length", 48,
               "--step-tokens", 480, "--steps", 6, "--tokens", 9999, "--try", *tries]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    first, again, *others, last = (row["held_out"] for row in rows if row["part"] == "race")
    assert first == again == last and len(others) == 3
    for other in others:
        assert other[0] == first[0] and other[-1] != first[-1]


def test_killed_and_resumed(small, tmp_path):
    """After SIGKILL the same command resumes, and gives the loss curve and the bytes of an uninterrupted run."""
    options = {**small, "tokens": 24 * 512, "checkpoint_minutes": 0.0}
    whole = heal(HealConfig(**options, out=tmp_path / "whole"), QUIET)
    code = (
        "import json, sys; from mla_convert.heal import HealConfig, heal; from mla_convert.core.progress import Progress\n"
        "heal(HealConfig(**json.loads(sys.argv[1])), Progress(quiet=True))"
    )
    arguments = json.dumps({**options, "out": str(tmp_path / "killed")}, default=str)
    process = subprocess.Popen([sys.executable, "-c", code, arguments])
    checkpoint = tmp_path / ".killed.heal" / "checkpoint" / "run.json"

    def step():
        try:
            return json.loads(checkpoint.read_text())["step"]
        except (OSError, ValueError):
            return 0

    while step() < 7:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() and 7 <= step() < 24
    seen = []
    advance = Progress.advance
    resumed = Progress(quiet=True)
    resumed.advance = lambda done: seen.append(done) or advance(resumed, done)
    report = heal(HealConfig(**options, out=tmp_path / "killed"), resumed)
    assert seen[0] > 7  # it resumed, and did not start again
    for key in ("loss", "kl", "perplexity", "tokens"):
        assert [e[key] for e in report["heal"]["curve"]] == [e[key] for e in whole["heal"]["curve"]]
    assert report["checksums"] == whole["checksums"]
    assert not (tmp_path / ".killed.heal").exists()


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_bad_losses_stop_the_run_and_the_best_state_is_kept(small, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loop, "RECENT", 4)
    monkeypatch.setattr(loop, "SPIKES", 2)
    original, calls = loop.Trainer._step, []

    def step(self, number):
        calls.append(number)
        found = original(self, number)
        if number >= 14:
            found = found * (float("nan") if kind == "nan" else 100.0)
            with torch.no_grad():  # as such a gradient would
                for parameter in self.parameters:
                    parameter.add_(float("nan") if kind == "nan" else 1.0)
        return found

    monkeypatch.setattr(loop.Trainer, "_step", step)
    report = heal(HealConfig(**small, out=tmp_path / "out"), QUIET)
    assert report["heal"]["stopped"] == ("the loss was not finite" if kind == "nan" else "the loss ran away")
    assert len(calls) < 24 and report["heal"]["best_tokens"] == 12 * 512
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]
    verify(tmp_path / "out")


def test_nothing_gained_nothing_written(small, convert_pico, tmp_path):
    exact = convert_pico("llama", rank="full", rope_dim="full").out
    with pytest.raises(InputError, match="nothing better than the start"):
        heal(HealConfig(**{**small, "folder": exact, "lr": 1.0, "patience": 1}, out=tmp_path / "out"), QUIET)
    assert not list(tmp_path.iterdir())


def test_early_stop(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EVALUATION_MIN", 256)
    monkeypatch.setattr(loop, "rate_factor", lambda step, steps: 1.0 if step < 6 else 0.0)
    settings = {**small, "tokens": 60 * 512, "evaluations": 10, "patience": 2}
    report = heal(HealConfig(**settings, out=tmp_path / "out"), QUIET)
    record = report["heal"]
    assert record["stopped"] == "no improvement in 2 held-out evaluations"
    assert record["tokens"] == 18 * 512 and record["best_tokens"] == 6 * 512


def test_patience_counts_from_the_first_evaluation_behind_the_start(small, tmp_path, monkeypatch):
    """The loss may rise above the start before it falls: the run continues while it improves."""
    losses, held_out = iter([1.0, 3.0, 2.5, 2.0, 1.5, 0.5]), loop.Trainer.held_out
    monkeypatch.setattr(loop.Trainer, "held_out", lambda self: {**held_out(self), "loss": next(losses)})
    monkeypatch.setattr(data, "EVALUATION_MIN", 256)
    settings = {**small, "tokens": 20 * 512, "evaluations": 5, "patience": 2}
    record = heal(HealConfig(**settings, out=tmp_path / "out"), QUIET)["heal"]
    assert record["stopped"] is None and record["best_tokens"] == record["tokens"] == 20 * 512


def test_evaluations_take_a_small_part_of_a_run():
    for tokens, most, found in ((2 * 10**7, 20, (20, 1 << 17)), (4 * 10**6, 20, (20, 40000)), (200_000, 20, (9, 4444)),
                                (20_000, 20, (4, 4096)), (10**8, 3, (3, 1 << 17))):  # fmt: skip
        assert data.evaluations(tokens, most) == found


def test_schedule_of_the_learning_rate():
    rates = [loop.rate_factor(step, 100) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == rates[4] == 1.0 and rates[-1] < 0.03
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_several_processes_give_the_same_curve(small, tmp_path):
    """Two processes by DDP: the same windows, the same losses, one output."""
    options = {**small, "tokens": 8 * 512}
    alone = heal(HealConfig(**options, out=tmp_path / "alone"), QUIET)
    names = {"folder": None, "eval": "--eval"}
    words = [str(options["folder"])]
    for key, value in {**options, "out": tmp_path / "both"}.items():
        if names.get(key, "") is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mla_convert.heal"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *words, "--json", "-q"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["heal"]["processes"] == 2
    for ours, theirs in zip(report["heal"]["curve"], alone["heal"]["curve"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
    verify(tmp_path / "both")


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mla_convert.heal.settings import HealSettings
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.source.load_model import find_model, load_model

dist.init_process_group("gloo")
rank, mesh, cpu = dist.get_rank(), init_device_mesh("cpu", (2,)), torch.device("cpu")
torch.manual_seed(0)
ids = torch.randint(4, 264, (2, 32))
for train in ("all", "attention"):
    settings = HealSettings(tokens=1, train=train)
    whole, sharded = (
        TeacherStudent.build(*(load_model(find_model(name), torch.float32, cpu) for name in sys.argv[1:]), settings, torch.float32)
        for _ in range(2)
    )
    whole(ids, ids)[0].backward()
    for layer in sharded._layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(ids[rank : rank + 1], ids[rank : rank + 1])[0].backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            gradient, expected = parameter.grad.full_tensor(), wanted[name].grad
            assert (gradient - expected).norm() < 1e-4 * expected.norm(), name
"""


@pytest.mark.slow
def test_sharded_gradients_are_the_same(small):
    """FSDP2 over two processes on the CPU, for two models and for a pair that shares its frozen weights."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(small["folder"]).parent / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run([*launch, script, small["folder"], small["teacher"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# Bad input


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"folder": "nowhere"}, InputError, "not a folder"),
        ({"teacher": None}, UsageError, "give --teacher"),
        ({"length": "512"}, UsageError, "longer than the model's context of 256"),
        ({"data": "nowhere.txt"}, InputError, "not found"),
        ({"eval": "same"}, UsageError, "is the text to train on"),
        ({"teacher": "itself"}, InputError, "is a converted model"),
    ],
)
def test_refuses(small, tmp_path, change, kind, words):
    change = {
        key: {"same": small["data"], "itself": str(small["folder"])}.get(value, value) for key, value in change.items()
    }
    with pytest.raises(kind, match=words):
        heal(HealConfig(**{**small, **change}, out=tmp_path / "out"), QUIET)
    assert not list(tmp_path.iterdir())


def test_amounts():
    assert [parse_tokens(text) for text in ("200k", "20M", "1.5b", "77", 5)] == [
        200_000,
        20_000_000,
        1_500_000_000,
        77,
        5,
    ]
    assert parse_lengths("1024:3,4096:1") == ((1024, 0.75), (4096, 0.25)) and parse_lengths(64) == ((64, 1.0),)
    for bad in ("", "k", "many", "0", "-3M"):
        with pytest.raises(ValueError, match="number of tokens"):
            parse_tokens(bad)
    for bad in ("", "8", "64:0", "64,64", "64:x"):
        with pytest.raises(ValueError, match="length"):
            parse_lengths(bad)


# On the command line, and as part of a conversion


def test_command(cli, small, tmp_path):
    words = ["--teacher", small["teacher"], "--data", small["data"], "--tokens", "4k", "--length", "64:0.5,128:0.5",
             "--step-tokens", 512, "--eval", small["eval"], "--eval-windows", 2, "--eval-length", 48, "--device", "cpu",
             "--lr", 0.01, "--passkey-length", 200, "--out", tmp_path / "out"]  # fmt: skip
    code, out, err = cli("heal", small["folder"], *words)
    assert code == 0, err
    assert (
        "perplexity over the original's" in out
        and "pass key found, 200 tokens" in out
        and "windows of 64:0.5,128:0.5" in out
    )
    code, _, err = cli("heal", small["folder"], "--tokens", "many")
    assert code == 2 and "'many' is no number of tokens" in err
    code, _, err = cli("heal", small["folder"], "--kl-weight", 0)
    assert code == 2 and "every weight of the loss is 0" in err


def test_conversion_that_heals(cli, sources, tmp_path):
    text = sources("llama").parent / "text.txt"
    words = ["--calib", text, "--calib-samples", 8, "--calib-length", 32, "--refine-steps", 0, "--rank", 16, "--rope-dim", 6,
             "--uniform", "--eval", "package:mla_demo/calibration.txt.gz", "--eval-windows", 2, "--eval-length", 48,
             "--device", "cpu"]  # fmt: skip
    out = tmp_path / "out"
    code, shown, err = cli(sources("llama"), *words, "--heal-tokens", "40k", "--heal-length", 64, "--out", out)
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["heal"]["text"] == "text.txt" and "perplexity, not healed" in shown
    assert report["evaluation"]["ratio"] < report["heal"]["before"]["evaluation"]["ratio"]
    recipe = (out / "recipe.yaml").read_text()
    assert "heal_tokens: 40000" in recipe and "heal_length: '64'" in recipe and "heal_lr" not in recipe
    verify(out)
    # settings with which healing would fail are refused before the conversion
    for more, words_ in ((["--heal-tokens", "40k", "--heal-length", 512], "context of 256"),
                         (["--heal-lr", 0.1], "heal_lr means nothing without heal_tokens"),
                         (["--heal-tokens", "40k", "--heal-data", "nowhere.txt"], "not found")):  # fmt: skip
        code, _, err = cli(sources("llama"), *words, *more, "--out", tmp_path / "refused")
        assert code and words_ in err and not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_demo_heals_in_a_minute(cli, tmp_path):
    """A short `mla-convert demo --heal-tokens 200k` at a quarter of the cache recovers a tenth of the loss."""
    code, _, err = cli("demo", "--kv-ratio", 0.25, "--refine-steps", 4, "--calib-samples", 8, "--calib-length", 128, "--uniform",
                       "--eval-windows", 2, "--eval-length", 256, "--heal-tokens", "20k", "--heal-length", 256, "--device", "cpu",
                       "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["heal"]["before"]["evaluation"]["ratio"], report["evaluation"]["ratio"]
    assert after - 1 < 0.9 * (before - 1)
    assert Path(tmp_path / "out" / "report.html").read_text().count("Healing")


def test_the_default_rate_falls_with_the_width():
    rates = {
        train: [loop.peak_rate(HealSettings(train=train), width) for width in (64, 576, 1152)] for train in loop.RATES
    }
    assert rates == {"attention": [0.004, 0.004, 0.002], "all": [0.001, 0.001, 0.0005], "lora": [0.001] * 3}
    assert loop.peak_rate(HealSettings(lr=0.01), 4096) == 0.01
