"""The distance of a model's next-token distribution from its original's, over the whole vocabulary, and its gradient.

Healing minimises it, and so do the last steps of refinement. Logits are never there for more than a chunk of tokens: loss
and gradient of a chunk are found in one pass, in which also its logits' gradient goes back through the head. So a vocabulary
of 128k costs no more memory than one of 32k.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights

# Logits of a chunk: tokens by vocabulary. 128 MB in bfloat16, of which a few copies are held.
CHUNK = 1 << 26


def compare(logits: Tensor, original: Tensor, labels: Tensor, mix: LossWeights, scale: float) -> tuple[Tensor, Tensor]:
    """Sums over tokens, and the gradient of `scale` times their weighted sum with respect to `logits` (N, V), in its dtype.

    The sums (4,) are: weighted loss, KL(original || model) at temperature 1, cross-entropy of the model and of the original
    in nats, the latter two over the labels (N,) that are not IGNORED. Everything is computed in float32.
    """
    kept = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    ours, theirs = logits.float().log_softmax(-1), original.float().log_softmax(-1)
    difference = theirs.exp() * (theirs - ours)
    kl = difference.sum()
    ce, ce_original = (-(each.gather(-1, target)[:, 0] * kept).sum() for each in (ours, theirs))
    probabilities = ours.exp()
    if mix.temperature == 1.0:
        soft_kl, gradient = kl, mix.kl * (probabilities - theirs.exp())
    else:
        heat = mix.temperature
        soft, soft_original = (logits.float() / heat).log_softmax(-1), (original.float() / heat).log_softmax(-1)
        soft_kl = heat**2 * (soft_original.exp() * (soft_original - soft)).sum()
        gradient = mix.kl * heat * (soft.exp() - soft_original.exp())
    if mix.ce:
        weights = mix.ce * kept[:, None]
        hit = torch.arange(logits.shape[-1], device=logits.device) == target
        gradient = gradient + weights * (probabilities - hit.to(probabilities.dtype))
    sums = torch.stack([mix.kl * soft_kl + mix.ce * ce, kl, ce, ce_original])
    return sums, (gradient * scale).to(logits.dtype)


def distillation_loss_fn(mix: LossWeights, device: torch.device) -> Callable:
    """`compare`, or on a GPU the kernel that does the same, where it can be compiled and gives the same."""
    if device.type != "cuda" or mix.temperature != 1.0 or not importlib.util.find_spec("triton"):
        return compare
    from mla_convert.modeling import distillation_triton as kernel

    draw = torch.Generator(device).manual_seed(0)
    ours, theirs = (4 * torch.randn(4, 5000, generator=draw, device=device).bfloat16() for _ in range(2))
    labels = torch.tensor([1, 4999, IGNORED, 0], device=device)
    try:
        pairs = zip(
            kernel.compare(ours, theirs, labels, mix, 1.0), compare(ours, theirs, labels, mix, 1.0), strict=True
        )
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)
    except Exception as error:  # whatever a compiler raises
        warnings.warn(f"the loss runs in PyTorch's operations, as its kernel does not work here: {error}", stacklevel=2)
        return compare
    return kernel.compare


class _Distil(torch.autograd.Function):
    """Loss over all chunks; gradients are made on the way, and only multiplied in `backward`."""

    @staticmethod
    def forward(ctx, hidden, original_hidden, labels, head, original_head, mix, compare_, differentiate, *parameters):
        tokens = len(hidden)
        chunks = -(-tokens * head.output.weight.shape[0] // CHUNK)
        step = -(-tokens // chunks)
        sums = torch.zeros(4, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiate else None
        others = [torch.zeros_like(each, dtype=torch.float32) for each in parameters] if differentiate else []
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            with torch.no_grad():
                original = original_head(original_hidden[part])
            with torch.set_grad_enabled(differentiate):
                states = hidden[part].detach().requires_grad_(differentiate)
                logits = head(states)
            found, slope = compare_(logits.detach(), original, labels[part], mix, 1.0 / tokens)
            sums += found
            if differentiate:
                own, *more = torch.autograd.grad(logits, [states, *parameters], slope)
                gradient[part] = own
                for total, each in zip(others, more, strict=True):
                    total += each
        if differentiate:
            ctx.save_for_backward(gradient, *(g.to(p.dtype) for g, p in zip(others, parameters, strict=True)))
        sums = sums / tokens
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx, slope, _):
        own, *others = (slope * each for each in ctx.saved_tensors)
        return own, None, None, None, None, None, None, None, *others


def distillation_loss(
    hidden: Tensor,
    original_hidden: Tensor,
    labels: Tensor,
    head: Head,
    original_head: Head,
    mix: LossWeights,
    compare_: Callable = compare,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch and its parts, all means over its tokens, from the outputs (B, L, d) of both models' last norm.

    `labels` (B, L) are the next tokens. Returns the loss, differentiable, and the four sums of `compare` by token.
    `compare_` is `compare`, or what does the same.
    """
    differentiate = torch.is_grad_enabled()
    parameters = head.parameters if differentiate else []
    return _Distil.apply(
        hidden.flatten(0, 1), original_hidden.flatten(0, 1), labels.flatten(), head, original_head, mix, compare_,
        differentiate, *parameters,
    )  # fmt: skip
