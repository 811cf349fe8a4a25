"""Token losses of the source and the converted model, and their divergence, from the outputs of their last layers.

The head is read a slice of the vocabulary at a time: neither the whole head nor a window's logits are ever in memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mla_convert.evaluate.quality.perplexity import Scores
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.calibrate.streamed_head import LOGIT_TOKENS, StreamedHead


@dataclass
class _Readout:
    """One model's outputs (N, L, hidden) of its last layer, and statistics of the logits seen so far, each (N, L-1)."""

    hidden: Tensor
    total: Tensor  # log-sum-exp
    picked: Tensor  # logit of the token that follows
    best: Tensor  # largest logit
    token: Tensor  # with the largest logit

    @classmethod
    def start(cls, hidden: Tensor, shape: torch.Size, device: torch.device) -> _Readout:
        """Before the first slice of the vocabulary."""
        low = torch.full(shape, -torch.inf, device=device)
        return cls(
            hidden, low, torch.zeros_like(low), low.clone(), torch.zeros(shape, dtype=torch.int64, device=device)
        )

    def add(self, part: tuple[int, slice], logits: Tensor, targets: Tensor, first: int) -> None:
        """Add logits (T, rows) of the tokens `part`, for the vocabulary from token `first` on."""
        self.total[part] = torch.logaddexp(self.total[part], logits.logsumexp(-1))
        # A target lies in one slice only. In the others its index is clamped, and the value found there is dropped.
        local = targets[part] - first
        inside = (local >= 0) & (local < logits.shape[-1])
        target_logits = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.picked[part] = torch.where(inside, target_logits, self.picked[part])
        value, index = logits.max(-1)
        # Strictly larger, so that of equal logits the first token stays.
        self.token[part] = torch.where(value > self.best[part], index + first, self.token[part])
        self.best[part] = torch.maximum(self.best[part], value)

    @property
    def losses(self) -> Tensor:
        """Negative log-likelihood (N, L-1) of the tokens that follow, nats."""
        return self.total - self.picked


def shared_scores(layerwise: LayerwiseModel, windows: Tensor, original: Activations, converted: Activations) -> Scores:
    """`scores` of windows that several processes share: all windows, in every process.

    Args:
        layerwise: the source model.
        windows: token ids (N, L) of all processes.
        original: this process's outputs of the source's last layer.
        converted: the same of the converted model.
    """
    processes = original.processes
    own = scores(layerwise, windows[processes.share(len(windows))], original.data, converted.data)
    if processes.alone:
        return own
    parts = processes.gathered([getattr(own, field.name) for field in fields(own)])
    whole = []
    for columns in zip(*parts, strict=True):
        # Processes take windows by turns (`Processes.share`).
        joined = columns[0].new_empty(len(windows), *columns[0].shape[1:])
        for index, column in enumerate(columns):
            joined[index :: processes.count] = column
        whole.append(joined)
    return Scores(*whole)


@torch.no_grad()
def scores(layerwise: LayerwiseModel, windows: Tensor, original: Tensor, converted: Tensor | None = None) -> Scores:
    """Token losses of one model or two, and the divergence of the second from the first, token by token.

    Logits are float32. KL(original || converted) is the sum over the vocabulary of p (z - z') plus the difference of the
    normalisers; the sum is accumulated slice by slice, and rescaled as the normaliser of p grows.

    Args:
        layerwise: the source model, whose head both models share.
        windows: token ids (N, L).
        original: outputs (N, L, hidden) of the source's last layer.
        converted: the same of the converted model; without it, `losses` of the result are the source's.
    """
    head = StreamedHead(layerwise)
    targets = windows[:, 1:].to(layerwise.device)
    readouts = [
        _Readout.start(hidden, targets.shape, layerwise.device)
        for hidden in (original, converted)
        if hidden is not None
    ]
    divergence = torch.zeros(targets.shape, device=layerwise.device)
    chunks = list(itertools.product(range(len(targets)), range(0, targets.shape[1], LOGIT_TOKENS)))
    # Slices in the outer loop, so that each is loaded once.
    for first in head.slices():
        for window, start in chunks:
            part = (window, slice(start, min(start + LOGIT_TOKENS, targets.shape[1])))
            logits = [head.logits(_states(readout.hidden, part, layerwise.device)) for readout in readouts]
            # A copy, because `add` changes it in place, and the sum so far is relative to it.
            before = readouts[0].total[part].clone()
            for readout, slice_logits in zip(readouts, logits, strict=True):
                readout.add(part, slice_logits, targets, first)
            if len(readouts) == 2:
                total = readouts[0].total[part]
                probabilities = (logits[0] - total[:, None]).exp()
                # an impossible token (a logit of -inf) adds nothing, and no NaN
                gap = torch.where(probabilities > 0, probabilities * (logits[0] - logits[1]), 0.0).sum(-1)
                divergence[part] = divergence[part] * (before - total).exp() + gap
    if len(readouts) == 1:
        return Scores(readouts[0].losses.cpu())
    source, student = readouts
    kl = (divergence - source.total + student.total).clamp_min(0)  # rounding can make it negative
    return Scores(student.losses.cpu(), source.losses.cpu(), kl.cpu(), (student.token == source.token).float().cpu())


def _states(hidden: Tensor, part: tuple[int, slice], device: torch.device) -> Tensor:
    """States (1, T, hidden) of some tokens, float32."""
    return hidden[None, part[0], part[1]].to(device, torch.float32)
