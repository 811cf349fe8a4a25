"""The divergence of a model's next-token distribution from its original's, over the whole vocabulary, and its gradient.

Healing minimises it, and so do the last steps of refinement. Logits exist for one chunk of tokens at a time: a single pass
computes the loss and the gradient of a chunk and carries the gradient of its logits back through the head. A vocabulary of
128k therefore needs no more memory than one of 32k.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mla_convert.modeling.head import Head
from mla_convert.modeling.loss_terms import IGNORED, LossWeights

# Logits of a chunk: tokens by vocabulary. 128 MB in bfloat16; a few copies exist at once.
CHUNK = 1 << 26

# (logits, original logits, labels, weights, scale) -> (sums, gradient), as `divergence`.
Divergence = Callable[[Tensor, Tensor, Tensor, LossWeights, float], tuple[Tensor, Tensor]]


def divergence(
    logits: Tensor, original: Tensor, labels: Tensor, weights: LossWeights, scale: float
) -> tuple[Tensor, Tensor]:
    """Loss terms of next-token distributions, and the gradient of the loss; computed in float32.

    Args:
        logits: (N, V), the model's.
        original: (N, V), the original's.
        labels: (N,), next tokens; IGNORED where there is none.
        weights: weights of the terms, and the temperature of the KL divergence.
        scale: factor of the gradient.

    Returns:
        Sums over tokens (4,): the weighted loss, KL(original || model) at temperature 1, and the cross-entropies of model and
        original, in nats, over the labels that are not IGNORED. Then `scale` times the gradient of the loss with respect to
        `logits`, (N, V) in their dtype.
    """
    kept = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    log_p, log_p_original = logits.float().log_softmax(-1), original.float().log_softmax(-1)
    difference = log_p_original.exp() * (log_p_original - log_p)
    kl = difference.sum()
    ce, ce_original = (-(each.gather(-1, target)[:, 0] * kept).sum() for each in (log_p, log_p_original))
    probabilities = log_p.exp()
    if weights.temperature == 1.0:
        soft_kl, gradient = kl, weights.kl * (probabilities - log_p_original.exp())
    else:
        heat = weights.temperature
        soft, soft_original = (logits.float() / heat).log_softmax(-1), (original.float() / heat).log_softmax(-1)
        soft_kl = heat**2 * (soft_original.exp() * (soft_original - soft)).sum()
        gradient = weights.kl * heat * (soft.exp() - soft_original.exp())
    if weights.ce:
        ce_weights = weights.ce * kept[:, None]
        one_hot = torch.arange(logits.shape[-1], device=logits.device) == target
        gradient = gradient + ce_weights * (probabilities - one_hot.to(probabilities.dtype))
    sums = torch.stack([weights.kl * soft_kl + weights.ce * ce, kl, ce, ce_original])
    return sums, (gradient * scale).to(logits.dtype)


def distillation_loss_fn(weights: LossWeights, device: torch.device) -> Divergence:
    """`divergence`, or on a GPU its Triton kernel where that compiles and its result agrees."""
    if device.type != "cuda" or weights.temperature != 1.0 or not importlib.util.find_spec("triton"):
        return divergence
    from mla_convert.modeling import distillation_triton as kernel

    generator = torch.Generator(device).manual_seed(0)
    logits, original = (4 * torch.randn(4, 5000, generator=generator, device=device).bfloat16() for _ in range(2))
    labels = torch.tensor([1, 4999, IGNORED, 0], device=device)
    arguments = (logits, original, labels, weights, 1.0)
    try:
        for result, expected in zip(kernel.divergence(*arguments), divergence(*arguments), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-4)
    except Exception as error:  # a compiler may raise anything
        warnings.warn(f"the loss runs in PyTorch's operations, as its kernel does not work here: {error}", stacklevel=2)
        return divergence
    return kernel.divergence


class _Distillation(torch.autograd.Function):
    """Loss over all chunks. The forward pass computes the gradients, and the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, original_hidden: Tensor, labels: Tensor, head: Head, original_head: Head,
        weights: LossWeights, divergence_: Divergence, differentiate: bool, *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens = len(hidden)
        chunks = -(-tokens * head.output.weight.shape[0] // CHUNK)
        step = -(-tokens // chunks)
        sums = torch.zeros(4, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiate else None
        parameter_gradients = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if differentiate else []
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            with torch.no_grad():
                original = original_head(original_hidden[part])
            with torch.set_grad_enabled(differentiate):
                states = hidden[part].detach().requires_grad_(differentiate)
                logits = head(states)
            chunk_sums, slope = divergence_(logits.detach(), original, labels[part], weights, 1.0 / tokens)
            sums += chunk_sums
            if differentiate:
                of_states, *of_parameters = torch.autograd.grad(logits, [states, *parameters], slope)
                gradient[part] = of_states
                for total, each in zip(parameter_gradients, of_parameters, strict=True):
                    total += each
        if differentiate:
            of_parameters = (g.to(p.dtype) for g, p in zip(parameter_gradients, parameters, strict=True))
            ctx.save_for_backward(gradient, *of_parameters)
        sums = sums / tokens
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_parameters = (slope * each for each in ctx.saved_tensors)
        return of_hidden, None, None, None, None, None, None, None, *of_parameters


def distillation_loss(
    hidden: Tensor,
    original_hidden: Tensor,
    labels: Tensor,
    head: Head,
    original_head: Head,
    weights: LossWeights,
    divergence_: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch and its terms, means over the batch's tokens.

    Args:
        hidden: (B, L, d), output of the model's last norm.
        original_hidden: (B, L, d), output of the original's last norm.
        labels: (B, L), next tokens.
        head: the model's head.
        original_head: the original's head.
        weights: weights of the terms.
        divergence_: `divergence`, or an equivalent of `distillation_loss_fn`.

    Returns:
        The loss, differentiable with respect to `hidden` and the head's trained parameters, and the terms (4,) of
        `divergence` per token.
    """
    differentiate = torch.is_grad_enabled()
    parameters = head.parameters if differentiate else []
    return _Distillation.apply(
        hidden.flatten(0, 1), original_hidden.flatten(0, 1), labels.flatten(), head, original_head, weights, divergence_,
        differentiate, *parameters,
    )  # fmt: skip
