"""`distillation.divergence` at temperature 1 as one Triton kernel.

It reads both rows of logits twice, the second time from the GPU's cache, and writes the gradient once. Eager operations move
about ten times as many bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla_convert.modeling.loss_terms import IGNORED, LossWeights

BLOCK, WARPS = 4096, 8  # logits that a program holds at once, and its warps

PADDING = tl.constexpr(-1e30)  # logit of columns past the vocabulary


@triton.jit
def _divergence(
    logits,
    original,
    labels,
    gradient,
    sums,
    kl_weight,
    ce_weight,
    ignored,
    vocabulary: tl.constexpr,
    size: tl.constexpr,
):
    """KL divergence, both cross-entropies and the gradient of one row of logits.

    With s for the model and t for the original:
    KL = sum p_t (z_t - z_s) - lse_t + lse_s,   gradient = kl_weight (p_s - p_t) + ce_weight (p_s - onehot).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    original += row * vocabulary
    gradient += row * vocabulary
    label = tl.load(labels + row)
    kept = label != ignored
    columns = tl.arange(0, size)

    largest, largest_t = -float("inf"), -float("inf")
    total, total_t, difference = 0.0, 0.0, 0.0
    for start in range(0, vocabulary, size):
        inside = start + columns < vocabulary
        s = tl.load(logits + start + columns, mask=inside, other=PADDING).to(tl.float32)
        t = tl.load(original + start + columns, mask=inside, other=PADDING).to(tl.float32)
        new, new_t = tl.maximum(largest, tl.max(s, 0)), tl.maximum(largest_t, tl.max(t, 0))
        weight = tl.exp(t - new_t)
        shrink = tl.exp(largest_t - new_t)
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(s - new), 0)
        total_t = total_t * shrink + tl.sum(weight, 0)
        difference = difference * shrink + tl.sum(weight * (t - s), 0)
        largest, largest_t = new, new_t
    lse, lse_t = largest + tl.log(total), largest_t + tl.log(total_t)
    target = tl.where(kept, label, 0)
    tl.store(sums + row * 3, difference / total_t - lse_t + lse)
    tl.store(sums + row * 3 + 1, tl.where(kept, lse - tl.load(logits + target).to(tl.float32), 0.0))
    tl.store(sums + row * 3 + 2, tl.where(kept, lse_t - tl.load(original + target).to(tl.float32), 0.0))

    ce = tl.where(kept, ce_weight, 0.0)
    for start in range(0, vocabulary, size):
        inside = start + columns < vocabulary
        s = tl.load(logits + start + columns, mask=inside, other=PADDING).to(tl.float32)
        t = tl.load(original + start + columns, mask=inside, other=PADDING).to(tl.float32)
        slope = (kl_weight + ce) * tl.exp(s - lse) - kl_weight * tl.exp(t - lse_t)
        slope = tl.where(start + columns == target, slope - ce, slope)
        tl.store(gradient + start + columns, slope.to(gradient.dtype.element_ty), mask=inside)


def divergence(
    logits: Tensor, original: Tensor, labels: Tensor, weights: LossWeights, scale: float
) -> tuple[Tensor, Tensor]:
    """`distillation.divergence` for weights of temperature 1, with the same arguments and results."""
    assert weights.temperature == 1.0
    logits, original = logits.contiguous(), original.contiguous()
    rows, vocabulary = logits.shape
    gradient = torch.empty_like(logits)
    sums = torch.empty(rows, 3, device=logits.device)
    _divergence[(rows,)](
        logits, original, labels, gradient, sums, weights.kl * scale, weights.ce * scale, IGNORED,
        vocabulary=vocabulary, size=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    kl, ce, ce_original = sums.sum(0)
    return torch.stack([weights.kl * kl + weights.ce * ce, kl, ce, ce_original]), gradient
