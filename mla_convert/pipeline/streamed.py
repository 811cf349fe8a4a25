"""How a converted model's next token differs from its original's, from what both leave behind their last layers.

The head is read a slice of the vocabulary at a time: neither the whole head nor a window's logits are ever in memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_convert.evaluate.quality.perplexity import Scores
from mla_convert.method.calibrate.layerwise import LOGIT_TOKENS, LayerwiseModel


@dataclass
class _Model:
    """One model's outputs (N, L, hidden) of its last layer, and what is known of its logits so far, each (N, L-1)."""

    hidden: Tensor
    total: Tensor  # log-sum-exp
    picked: Tensor  # logit of the token that follows
    best: Tensor
    token: Tensor  # with the best logit

    @classmethod
    def start(cls, hidden: Tensor, shape: torch.Size, device: torch.device) -> _Model:
        low = torch.full(shape, -torch.inf, device=device)
        return cls(
            hidden, low, torch.zeros_like(low), low.clone(), torch.zeros(shape, dtype=torch.int64, device=device)
        )

    def add(self, part: tuple[int, slice], logits: Tensor, targets: Tensor, first: int) -> None:
        """Take in logits (T, slice) of the vocabulary from `first` on."""
        self.total[part] = torch.logaddexp(self.total[part], logits.logsumexp(-1))
        local = targets[part] - first
        here = (local >= 0) & (local < logits.shape[-1])
        found = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.picked[part] = torch.where(here, found, self.picked[part])
        value, index = logits.max(-1)
        self.token[part] = torch.where(value > self.best[part], index + first, self.token[part])
        self.best[part] = torch.maximum(self.best[part], value)

    @property
    def losses(self) -> Tensor:
        """Negative log-likelihood of the tokens that follow."""
        return self.total - self.picked


@torch.no_grad()
def scores(layerwise: LayerwiseModel, windows: Tensor, original: Tensor, converted: Tensor | None = None) -> Scores:
    """Losses of windows (N, L) by one model or by two, and how far the second is from the first, token by token.

    `original` and `converted` are outputs (N, L, hidden) of the last layers. Without the latter, `losses` are the original's.
    Logits are float32. The divergence is summed slice by slice as well: sum of p (z - z') over the vocabulary, where p is
    rescaled as its normaliser grows.
    """
    targets = windows[:, 1:].to(layerwise.device)
    models = [
        _Model.start(hidden, targets.shape, layerwise.device) for hidden in (original, converted) if hidden is not None
    ]
    apart = torch.zeros(targets.shape, device=layerwise.device)
    chunks = list(itertools.product(range(len(targets)), range(0, targets.shape[1], LOGIT_TOKENS)))
    for first in layerwise.head_slices():
        for window, start in chunks:
            part = (window, slice(start, min(start + LOGIT_TOKENS, targets.shape[1])))
            logits = [layerwise.logits(_states(model.hidden, part, layerwise.device)) for model in models]
            before = models[0].total[part].clone()
            for model, own in zip(models, logits, strict=True):
                model.add(part, own, targets, first)
            if len(models) == 2:
                now = models[0].total[part]
                share = (logits[0] - now[:, None]).exp()
                # an impossible token (a logit of -inf) adds nothing, and no NaN
                gap = torch.where(share > 0, share * (logits[0] - logits[1]), 0.0).sum(-1)
                apart[part] = apart[part] * (before - now).exp() + gap
    if len(models) == 1:
        return Scores(models[0].losses.cpu())
    ours, theirs = models[1], models[0]
    kl = (apart - theirs.total + ours.total).clamp_min(0)  # rounding can take it below
    return Scores(ours.losses.cpu(), theirs.losses.cpu(), kl.cpu(), (ours.token == theirs.token).float().cpu())


def _states(hidden: Tensor, part: tuple[int, slice], device: torch.device) -> Tensor:
    """Some tokens' states (1, T, hidden), float32."""
    return hidden[None, part[0], part[1]].to(device, torch.float32)
