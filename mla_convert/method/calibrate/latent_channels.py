"""Second moments of what a converted model caches, and what an error in each number costs, by one pass over some text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mla_convert.modeling.attention_mla import MlaAttention


def channel_moments(
    model: nn.Module, windows: Tensor, seed: int, tick: Callable[[], None] = lambda: None
) -> list[tuple[Tensor, Tensor]]:
    """E[c^2] and E[g^2] (r + 2m,) of every layer's latent and rotary key c, with g the gradient of a loss in them.

    The loss is the NLL of tokens that the model samples. E[g^2] is then the diagonal of the Fisher information: an error e_i of
    number i raises the divergence by about E[g_i^2] e_i^2 / 2 nats per token. The rotary key is taken before RoPE, and both
    figures are means over the two dims of a plane, which RoPE turns.

    Args:
        model: a converted model; its cache format is left out meanwhile.
        windows: token ids (N, L).
        seed: of the sampled tokens.
        tick: called after every window.

    Returns:
        For each layer with a latent of its own, both in float64 on the CPU.
    """
    attentions = (module for module in model.modules() if isinstance(module, MlaAttention))
    layers = [module for module in attentions if module.source_idx == module.layer_idx]
    formats, kept = [layer.latent_format for layer in layers], {}
    hooks = [
        layer.kv_a_proj_with_mqa.register_forward_hook(
            lambda _module, _inputs, output, index=index: kept.__setitem__(index, _watched(output))
        )
        for index, layer in enumerate(layers)
    ]
    hooks.append(model.get_input_embeddings().register_forward_hook(_leaf))
    sums = [torch.zeros(2, layer.kv_lora_rank + layer.qk_rope_head_dim, dtype=torch.float64) for layer in layers]
    generator = torch.Generator(windows.device if windows.is_cuda else "cpu").manual_seed(seed)
    try:
        for layer in layers:
            layer.latent_format = None
        for ids in windows:
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (-logits.log_softmax(-1).gather(1, sampled)).sum().backward()
            for index, total in enumerate(sums):
                rows = kept[index][0].detach(), kept[index].grad[0]
                total += torch.stack([part.double().square().sum(0) for part in rows]).cpu()
            kept.clear()
            tick()
    finally:
        for hook in hooks:
            hook.remove()
        for layer, row in zip(layers, formats, strict=True):
            layer.latent_format = row
    for layer, total in zip(layers, sums, strict=True):
        planes = total[:, layer.kv_lora_rank :].unflatten(1, (2, -1))
        planes.copy_(planes.mean(1, keepdim=True).expand_as(planes))
    return [tuple(total / windows.numel()) for total in sums]


def _leaf(_module, _inputs, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True)


def _watched(output: Tensor) -> Tensor:
    output.retain_grad()
    return output
