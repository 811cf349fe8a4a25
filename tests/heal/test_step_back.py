"""Healing keeps the state nearest to the start among those whose held-out loss is equal."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mla_convert.core.progress import Progress
from mla_convert.heal import HealConfig, heal, loop
from mla_convert.report.html import page
from mla_convert.report.quality_rows import healed_worse
from mla_convert.write.verify import verify

# Held-out loss of the best state, and at 0.75, 0.5 and 0.25 of the way to it; the share that is kept.
LOSSES = {
    "no way back": ([0.5, 0.51, 0.52, 0.6], 1.0),
    "better on the way": ([0.5, 0.4, 0.3, 0.45], 0.5),
    "as good on the way": ([0.5, 0.503, 0.504, 0.52], 0.5),
    "not finite": ([0.5, float("nan"), 0.49, float("inf")], 0.5),
}


@pytest.mark.parametrize("losses, share", LOSSES.values(), ids=LOSSES)
def test_the_nearest_of_equal_states_is_kept(small, tmp_path, monkeypatch, losses, share):
    best, found = {}, iter(losses[1:])
    train, held_out = loop.Trainer.train, loop.Trainer.held_out

    def trained(self):
        run = train(self)
        run.best = losses[0]
        best.update({name: tensor.clone() for name, tensor in self.best.items()})
        return run

    monkeypatch.setattr(loop.Trainer, "train", trained)
    monkeypatch.setattr(
        loop.Trainer, "held_out", lambda self: {**held_out(self), **({"loss": next(found)} if best else {})}
    )
    out = tmp_path / "out"
    report = heal(HealConfig(**{**small, "tokens": 8 * 512}, out=out), Progress(quiet=True))
    assert report["heal"]["share"] == share and not list(found)
    verify(out)
    start, kept = ({} for _ in range(2))
    for tensors, folder in ((start, small["folder"]), (kept, out)):
        for shard in Path(folder).glob("*.safetensors"):
            tensors |= load_file(shard)
    assert best and best.keys() <= kept.keys()
    for name, tensor in best.items():
        assert torch.equal(kept[name], torch.lerp(start[name].float(), tensor, share).to(kept[name].dtype))
    assert any(not torch.equal(kept[name], start[name]) for name in best)


def test_a_mean_divergence_that_rose_is_said(small, tmp_path):
    report = heal(HealConfig(**{**small, "tokens": 4 * 512}, out=tmp_path / "out"), Progress(quiet=True))
    before, after = report.heal.before, report.heal.before.model_copy(deep=True)
    assert healed_worse(before, after) == []
    after.evaluation.suite.kl.value = before.evaluation.suite.kl.value + 0.01
    (said,) = healed_worse(before, after)
    assert f"healed {after.evaluation.suite.kl.value:.4f}" in said
    assert healed_worse(after, before) == []


def test_the_page_says_which_weights_were_kept(small, tmp_path):
    report = heal(HealConfig(**{**small, "tokens": 4 * 512}, out=tmp_path / "out"), Progress(quiet=True))
    for share, words in ((1.0, "was kept"), (0.75, "75% of the way"), (None, "was kept")):
        report.heal.share = share
        assert words in page._heal_note(report.heal)
