"""What a lost number costs in each layer, in nats per token: one pass forward and one back through the original.

Backward goes the gradient g of the negative log-likelihood of tokens drawn from the model's own prediction, so that
E[g g^T] is the curvature (Fisher information) by which a small error e of an attention output raises the divergence
from the original: e^T E[g g^T] e / 2. With it, errors of different layers are in one unit and can be traded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.core.settings import Settings
from mla_convert.method.calibrate.attention_forward import attention_forward, attention_kwargs
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel, first_output
from mla_convert.method.calibrate.statistics import layer_statistics
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.method.factorise.allocate import LayerLoss, allocate, probes
from mla_convert.method.factorise.layer import build_attention, factorise_layer, fill_attention, mla_config
from mla_convert.method.factorise.sizes import LayerSize, Plan, shares_out, size_unit
from mla_convert.method.factorise.svd import ridged
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.write.writer import Writer

# Tokens that the gradients are taken at, in windows of at most WINDOW.
TOKENS = {"cuda": 8192, "cpu": 4096}
WINDOW = 1024
# Tokens with massive activations (the first one above all) have curvatures of their own; what is compared between layers
# is that of all others: those whose stream is at most this many times as long as the median.
MASSIVE = 5.0
# Tokens that factorised attentions are run on.
ERROR_TOKENS = 4096
# Of the metric's mean diagonal, added to it: few tokens may leave it without full rank.
SHRINKAGE = 1e-3
# Refinement regains more of what de-rotation loses than of what low rank loses, the more so the longer it is: in a trade
# between the two, losses by rotary dims count 1 / (1 + steps / REGAIN_STEPS). docs/research/layer-sizes.md has what was measured.
REGAIN_STEPS = 100


def scratch_bytes(plan: Plan) -> int:
    """Room that `layer_losses` takes on disk while it runs, at most: each layer's inputs, bfloat16 on a GPU, else float32."""
    tokens = max(TOKENS["cuda"] * torch.bfloat16.itemsize, TOKENS["cpu"] * torch.float32.itemsize)
    return plan.shape.layers * plan.shape.hidden_size * tokens


@dataclass(frozen=True)
class Sensitivity:
    """What was measured: each layer's losses by size, and E[g^2] (d,) at each layer's output, over tokens."""

    losses: list[LayerLoss]
    channels: list[Tensor]


def is_measured(plan: Plan, config: Settings) -> bool:
    """Whether a conversion measures at all: to share sizes out, or to know which channels refinement must keep."""
    return config.refine_steps != 0 or shares_out(config, plan)


def measure(
    plan: Plan,
    config: Settings,
    steps: int,
    layerwise: LayerwiseModel,
    states: Activations,
    writer: Writer,
    progress: Progress,
) -> tuple[Plan, list[Tensor] | None]:
    """The plan with sizes layer by layer, where it leaves anything to choose and the settings do not forbid it; E[g^2].

    :param steps: of refinement that each layer will get.
    :param states: embedded calibration windows; a few of them are used.
    """
    if not is_measured(plan, config):
        return plan, None
    shared = shares_out(config, plan)
    length = min(states.length, WINDOW)
    windows = min(states.windows, max(1, TOKENS[layerwise.device.type] // length))
    few = Activations(states.data[:windows, :length], layerwise.device, states.data.dtype)
    progress.start(2 * plan.shape.layers, 0, "measuring step")
    try:
        found = sensitivities(layerwise, few, plan, config.seed, writer, shared, progress.layer_measured)
    finally:
        progress.stop()
    if shared:
        plan = replace(plan, sizes=allocate(plan, found.losses, size_unit(plan), 1 / (1 + steps / REGAIN_STEPS)))
    return plan, found.channels


def sensitivities(
    layerwise: LayerwiseModel,
    states: Activations,
    plan: Plan,
    seed: int,
    writer: Writer,
    by_size: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Expected loss of every layer by rank and by rotary dims, and by channel, from embedded windows (changed in place).

    :param writer: has room for the layers' inputs between the two passes.
    :param by_size: without, only channels are measured.
    :param tick: called twice a layer.
    """
    count, losses, channels = plan.shape.layers, [], []
    kwargs = layerwise.layer_kwargs(states.length)
    eager = attention_kwargs(layerwise, states.length)
    for index in range(count):
        writer.spill(_file(index), states.data.cpu())
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer, layerwise.autocast():
            states.advance(lambda hidden, layer=layer, own=kwargs[index]: first_output(layer(hidden, **own)))
        states.check_finite(f"layer {layerwise.layer_prefix(index)[:-1]}")
        tick()
    generator = torch.Generator(layerwise.device).manual_seed(seed)
    gradient = StreamedHead(layerwise).output_gradient(states.data, generator)
    for index in reversed(range(count)):
        states.data.copy_(writer.load_spilled(_file(index)))
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
            metric, squares = _backward(layerwise, layer, states, gradient, kwargs[index])
            channels.append(squares)
            if by_size:
                losses.append(_losses(layerwise, layer, states, metric, plan, kwargs[index], eager[index]))
        tick()
    return Sensitivity(losses[::-1], channels[::-1])


def _file(index: int) -> str:
    return f"inputs-{index}.tmp"


def _backward(
    layerwise: LayerwiseModel, layer: nn.Module, states: Activations, gradient: Tensor, kwargs: dict
) -> tuple[Tensor, Tensor]:
    """Carry `gradient` (N, L, d), in place, from a layer's output to its input.

    Returns E[g g^T] (d, d) at its attention's output, and E[g^2] (d,) at its own.

    Raises:
        InputError: they are not finite.
    """
    family = layerwise.source.family
    attention, leave, kept = getattr(layer, family.attention), family.exit(layer), []

    def keep(_module, _args, output):
        kept.append(first_output(output))
        kept[0].retain_grad()

    metric = torch.zeros(states.hidden_size, states.hidden_size, dtype=torch.float64, device=states.device)
    squares = torch.zeros(states.hidden_size, dtype=torch.float64, device=states.device)
    tokens, hook = 0, attention.register_forward_hook(keep)
    try:
        for window in range(states.windows):
            part = slice(window, window + 1)
            hidden = states.get(part).requires_grad_(True)
            with torch.enable_grad(), layerwise.autocast():
                output = first_output(layer(hidden, **kwargs))
            behind = gradient[part].to(output.device, output.dtype)
            output.backward(behind)
            with torch.no_grad():
                usual = _usual(hidden + leave(kept[0]))[0]
            rows = kept[0].grad[0].float()[usual]
            metric += (rows.T @ rows).double()
            squares += behind[0].float()[usual].square().sum(0).double()
            gradient[part] = hidden.grad.to(gradient.device)
            tokens += len(rows)
            kept.clear()
    finally:
        hook.remove()
    if not (torch.isfinite(metric).all() and torch.isfinite(squares).all()):
        raise InputError(
            f"the model's loss has no finite gradient at layer {attention.layer_idx}: weights behind it are too large to "
            f"compute with, so the checkpoint is damaged; fetch it again"
        )
    return metric / tokens, squares / tokens


@torch.no_grad()
def _losses(
    layerwise: LayerwiseModel,
    layer: nn.Module,
    states: Activations,
    metric: Tensor,
    plan: Plan,
    kwargs: dict,
    eager: dict,
) -> LayerLoss:
    """Run one layer's attention, factorised at several sizes, and compare: rank and rotary dims each with the other whole."""
    family, source = layerwise.source.family, layerwise.source
    attention, norm = getattr(layer, family.attention), family.entry(layer)
    size, rotation = plan.layer(attention.layer_idx), layerwise.rotation(attention.layer_idx, eager)
    full = plan.shape.full_rank(size.rope_dim)
    statistics = layer_statistics(layerwise, layer, states, eager, _module(layerwise, plan, attention, size))
    hidden = states.get(slice(0, max(1, ERROR_TOKENS // states.length)))
    expected = attention_forward(attention, norm, kwargs, layerwise.autocast)(hidden)
    usual = _usual(hidden + family.exit(layer)(expected))
    root = torch.linalg.cholesky(ridged(metric, SHRINKAGE)).float()

    def error(module: MlaAttention) -> float:
        found = attention_forward(module, norm, kwargs, layerwise.autocast)(hidden)
        return float(((found - expected) @ root).square().sum(-1)[usual].mean() / 2)

    def build(rank: int | None, rope_dim: int) -> MlaAttention:
        weights = factorise_layer(source, attention, statistics, rank, rope_dim, "by_loss", rotation)
        module = _module(layerwise, plan, attention, LayerSize(weights.kv_b.shape[1], rope_dim))
        fill_attention(module, weights, family.freq_stride)
        return module

    ranks, ropes = probes(plan, size_unit(plan))
    by_rope = {rope_dim: error(build(None, rope_dim)) for rope_dim in (ropes if rotation.num_rotary_freqs else [0])}
    module, by_rank = build(full, size.rope_dim), {}
    for rank in sorted({full, *(rank for rank in ranks if rank < full)}, reverse=True):
        # latents are ordered: without the last ones it is the module of a lower rank
        for parameter in module.kv_a_proj_with_mqa.parameters():
            parameter.data[rank:full] = 0
        by_rank[rank] = error(module)
    return LayerLoss(by_rank, by_rope)


def _module(layerwise: LayerwiseModel, plan: Plan, attention: nn.Module, size: LayerSize) -> MlaAttention:
    """An attention of some size for one stock attention, without values."""
    sized = replace(plan, sizes=(size,) * plan.shape.layers)
    return build_attention(mla_config(layerwise.source, sized, torch.float32), attention, layerwise.device)


def _usual(stream: Tensor) -> Tensor:
    """Which tokens (B, L) of a residual stream (B, L, d) have no massive activations."""
    size = stream.norm(dim=-1)
    return size <= MASSIVE * size.median()
