"""Perplexity: exp of the mean negative log-likelihood over non-overlapping windows, with its standard error."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """`value`, and the standard error of its logarithm over windows."""

    value: float
    log_error: float
    windows: int
    length: int

    def as_dict(self) -> dict:
        return asdict(self)


def perplexity(losses: Tensor) -> Perplexity:
    """From token losses (windows, length-1) in nats."""
    means = losses.double().mean(dim=1)
    spread = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    value = math.exp(min(float(means.mean()), 700.0))
    return Perplexity(value, spread, len(means), losses.shape[1] + 1)


@torch.no_grad()
def model_losses(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Token losses (N, L-1) of a loaded causal language model, logits in float32."""
    device = next(model.parameters()).device
    rows = []
    for ids in windows.to(device):
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        rows.append(F.cross_entropy(logits, ids[1:], reduction="none").cpu())
    return torch.stack(rows)
