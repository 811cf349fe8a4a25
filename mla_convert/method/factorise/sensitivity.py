"""Loss of each layer by its sizes, in nats per token, from one forward and one backward pass through the source.

We backpropagate the NLL of tokens sampled from the model itself; E[g g^T] of the gradient g at an attention's output is then
the Fisher information, and an output error e raises the divergence from the source by about e^T E[g g^T] e / 2 nats. Second
derivatives rank weights to be removed in the same way in Optimal Brain Surgeon (Hassibi and Stork, 1993). Errors of different
layers are thus in one unit and can be traded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mla_convert.core.errors import InputError
from mla_convert.core.processes import Processes, alone
from mla_convert.core.progress import Progress
from mla_convert.core.settings import Settings
from mla_convert.method.calibrate.attention_forward import attention_forward, attention_kwargs
from mla_convert.method.calibrate.beside import Beside, Key, Layout, Part
from mla_convert.method.calibrate.exchange import Exchange, exchange_of
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel, first_output
from mla_convert.method.calibrate.statistics import layer_statistics
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.method.factorise.allocate import LayerLoss, allocate, probes, wide_probes
from mla_convert.method.factorise.basis import in_basis
from mla_convert.method.factorise.layer import build_attention, factorise_layer, fill_attention, mla_config
from mla_convert.method.factorise.linalg import ridged
from mla_convert.method.factorise.sizes import CacheFormat, LayerSize, Plan, shares_out, size_unit
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.write.writer import Writer

# Tokens at which gradients are computed, in windows of at most WINDOW tokens.
TOKENS = {"cuda": 8192, "cpu": 4096}
WINDOW = 1024
# Tokens with massive activations (arXiv 2402.17762; above all the first one) have a different curvature and are left out:
# those whose residual stream has more than MASSIVE times the median norm.
MASSIVE = 5.0
# Tokens on which factorised attentions are run.
ERROR_TOKENS = 4096
# Ridge of the metric, as a fraction of its mean diagonal: on few tokens it may be rank-deficient.
SHRINKAGE = 1e-3
# Refinement recovers more of the loss of de-rotation than of that of low rank, the more so the longer it is: in a trade
# between the two, losses by rotary dims have the weight 1 / (1 + steps / REGAIN_STEPS). See docs/research/layer-sizes.md.
REGAIN_STEPS = 100


def scratch_bytes(plan: Plan) -> int:
    """Bytes on disk that `sensitivities` takes at most while it runs: each layer's inputs, bfloat16 on a GPU, else float32."""
    tokens = max(TOKENS["cuda"] * torch.bfloat16.itemsize, TOKENS["cpu"] * torch.float32.itemsize)
    return plan.shape.layers * plan.shape.hidden_size * tokens


@dataclass(frozen=True)
class Sensitivity:
    """Measurements of all layers."""

    losses: list[LayerLoss]  # of each converted layer, by size; empty if only channels were measured
    channels: list[Tensor]  # E[g^2] (d,) at every layer's output, over tokens


def is_measured(plan: Plan, config: Settings) -> bool:
    """Whether a conversion measures sensitivities: to choose sizes by layer, or to weight channels in refinement."""
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
    """Choose the sizes of each layer by its sensitivity, where the plan and the settings leave a choice.

    Args:
        plan: mean sizes.
        config: of the conversion.
        steps: of refinement that each layer will get.
        layerwise: the source model.
        states: embedded calibration windows; a few of them are used.
        writer: whose folder holds each layer's inputs meanwhile.
        progress: told twice a layer.

    Returns:
        The plan, and E[g^2] (d,) of each layer's channels, or None if nothing was measured.
    """
    if not is_measured(plan, config):
        return plan, None
    shared = shares_out(config, plan)
    length = min(states.length, WINDOW)
    windows = min(states.total, max(1, TOKENS[layerwise.device.type] // length))
    few = _first(layerwise, states, windows, length)
    progress.start(2 * plan.shape.layers, 0, "measuring step")
    try:
        measured = sensitivities(
            layerwise, few, plan, config.seed, writer, shared, progress.layer_measured, states.processes
        )
    finally:
        progress.stop()
    if shared:
        plan = replace(plan, sizes=allocate(plan, measured.losses, size_unit(plan), 1 / (1 + steps / REGAIN_STEPS)))
    states.processes.make_equal(measured.channels)
    return states.processes.told(lambda: plan), measured.channels


def _first(layerwise: LayerwiseModel, states: Activations, windows: int, length: int) -> Activations:
    """The first tokens of the first windows of all processes, and the layers' own inputs for them.

    They are in every process, as one step of the backward pass follows another; the layers' losses are shared out.
    """
    layers, width = len(layerwise.layers), layerwise.input_width
    states.look(
        Layout(states.hidden_size, tuple(Part(("input", layer), (width,)) for layer in range(layers if width else 0)))
    )
    whole = states.processes.alone and states.beside is None
    rows = (states.data[:windows] if whole else states.together(torch.arange(windows)))[:, :length]
    few = Activations(rows[..., : states.hidden_size], layerwise.device, states.data.dtype)
    if states.beside is not None:
        inputs = rows[..., states.hidden_size :].flatten(0, 1).unflatten(-1, (layers, -1)).cpu() if width else None
        few.beside = Beside(layerwise.device, torch.arange(windows * length).view(windows, length), inputs)
    return few


def sensitivities(
    layerwise: LayerwiseModel,
    states: Activations,
    plan: Plan,
    seed: int,
    writer: Writer,
    by_size: bool = True,
    tick: Callable[[], None] = lambda: None,
    processes: Processes | None = None,
) -> Sensitivity:
    """Expected loss of every layer by rank, by rotary dims and by channel.

    Args:
        layerwise: the source model.
        states: embedded windows, changed in place.
        plan: sizes around which losses are measured.
        seed: of the sampled tokens.
        writer: whose folder holds the layers' inputs between the two passes.
        by_size: without, only channels are measured.
        tick: called twice a layer.
        processes: that share out the layers whose losses are measured.
    """
    processes = processes or alone(layerwise.device)
    count, channels = plan.shape.layers, []
    losses: dict[int, LayerLoss] = {}
    kwargs = layerwise.layer_kwargs(states.length)
    eager = attention_kwargs(layerwise, states.length)
    for index in range(count):
        writer.spill(_file(index), states.data.cpu())
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer, layerwise.autocast():
            exchange = exchange_of(layerwise, index)
            states.look(exchange.layout)
            states.advance_and_keep(partial(exchange.run_and_keep, layer, kwargs[index]))
        states.check_finite(f"layer {layerwise.layer_prefix(index)[:-1]}")
        tick()
    generator = torch.Generator(layerwise.device).manual_seed(seed)
    gradient = StreamedHead(layerwise).output_gradient(states.data, generator)
    shared: dict[Key, Tensor] = {}
    for index in reversed(range(count)):
        states.data.copy_(writer.load_spilled(_file(index)))
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
            converted = index in plan.shape.converted_layers
            exchange = exchange_of(layerwise, index)
            states.look(exchange.layout)
            metric, squares = _backward(layerwise, layer, converted, states, gradient, kwargs[index], exchange, shared)
            channels.append(squares)
            if by_size and index in plan.shape.caching_layers and index in processes.share(count):
                own = states.plain()
                losses[index] = _losses(layerwise, layer, own, metric, plan, kwargs[index], eager[index])
        tick()
    everyones = {index: loss for part in processes.gathered(losses) for index, loss in part.items()}
    return Sensitivity([everyones[index] for index in sorted(everyones)], channels[::-1])


def _file(index: int) -> str:
    return f"inputs-{index}.tmp"


def _backward(
    layerwise: LayerwiseModel,
    layer: nn.Module,
    converted: bool,
    states: Activations,
    gradient: Tensor,
    kwargs: LayerKwargs,
    exchange: Exchange,
    shared: dict[Key, Tensor],
) -> tuple[Tensor, Tensor]:
    """Backpropagate through one layer.

    Args:
        layerwise: the source model.
        layer: loaded.
        converted: whether its attention is converted; if not, the first result is zero.
        states: hidden states before the layer.
        gradient: (N, L, d) at the layer's output; at its input afterwards.
        kwargs: the layer's keyword arguments.
        exchange: the layer's.
        shared: gradients (N, L, .) of what layers hand over to later ones, to which those of this layer are added.

    Returns:
        E[g g^T] (d, d) at the attention's output, and E[g^2] (d,) at the layer's output.

    Raises:
        InputError: they are not finite.
    """
    family = layerwise.source.family
    attention, kept = getattr(layer, family.attention, None), []

    def keep(_module, _args, output):
        kept.append(first_output(output))
        kept[0].retain_grad()

    width = layerwise.source.shape.hidden_size
    metric = torch.zeros(width, width, dtype=torch.float64, device=states.device)
    squares = torch.zeros(states.hidden_size, dtype=torch.float64, device=states.device)
    tokens, hook = 0, attention.register_forward_hook(keep) if converted else contextlib.nullcontext()
    with hook:
        for window in range(states.windows):
            part = slice(window, window + 1)
            rows = states.get(part).requires_grad_(True)
            with torch.enable_grad(), layerwise.autocast():
                output, made = exchange.run_and_keep(layer, kwargs, rows)
            behind = gradient[part].to(output.device, output.dtype)
            read = [(columns, shared[key][part].to(columns)) for key, columns in made.items() if key in shared]
            torch.autograd.backward(*zip((output, behind), *read, strict=True))
            with torch.no_grad():
                residual = family.residual(layer)(rows[..., : states.hidden_size])
                ordinary = _without_massive(residual + family.exit(layer)(kept[0]) if converted else output)[0]
                exchange.add_gradients(shared, part, rows.grad, states.windows)
            if converted:
                slopes = kept[0].grad[0].float()[ordinary]
                metric += (slopes.T @ slopes).double()
            squares += behind[0].float()[ordinary].square().sum(0).double()
            gradient[part] = rows.grad[..., : states.hidden_size].to(gradient.device)
            tokens += int(ordinary.sum())
            kept.clear()
    _check_gradient(layerwise.path_of(layer), metric, squares)
    return metric / tokens, squares / tokens


def _check_gradient(path: str, *moments: Tensor) -> None:
    if not all(torch.isfinite(moment).all() for moment in moments):
        raise InputError(
            f"the model's loss has no finite gradient at layer {path}: weights behind it are too large to compute with, so the "
            f"checkpoint is damaged; fetch it again"
        )


@torch.no_grad()
def _losses(
    layerwise: LayerwiseModel,
    layer: nn.Module,
    states: Activations,
    metric: Tensor,
    plan: Plan,
    kwargs: LayerKwargs,
    eager: LayerKwargs,
) -> LayerLoss:
    """Losses of one layer's attention, factorised at several sizes: by rank at the plan's rotary dims, by these at full rank."""
    family, source = layerwise.source.family, layerwise.source
    attention, norm = getattr(layer, family.attention), family.entry(layer)
    size, rotation = plan.layer(attention.layer_idx), layerwise.rotation(attention.layer_idx, eager)
    own, unit = plan.of(attention.layer_idx), size_unit(plan)
    full = own.shape.full_rank(size.rope_dim)
    nope_dim = plan.most_nope_dim(attention.layer_idx)
    exact = replace(plan, cache=CacheFormat())
    statistics = layer_statistics(layerwise, layer, states, eager, _module(layerwise, exact, attention, size))
    hidden = states.get(slice(0, max(1, ERROR_TOKENS // states.length)))
    expected = attention_forward(attention, norm, kwargs, layerwise.autocast)(hidden)
    ordinary = _without_massive(family.residual(layer)(hidden) + family.exit(layer)(expected))
    root = torch.linalg.cholesky(ridged(metric, SHRINKAGE)).float()

    def error(module: MlaAttention) -> float:
        output = attention_forward(module, norm, kwargs, layerwise.autocast)(hidden)
        return float(((output - expected) @ root).square().sum(-1)[ordinary].mean() / 2)

    def build(rank: int | None, rope_dim: int) -> MlaAttention:
        weights = factorise_layer(source, attention, statistics, rank, rope_dim, "by_loss", rotation, nope_dim)
        module = _module(layerwise, exact, attention, LayerSize(weights.kv_b.shape[1], rope_dim))
        fill_attention(module, weights, family.freq_stride)
        return module

    def by_bits() -> dict[int, float]:
        """Loss that quantisation adds, by channels with 8 bits."""
        weights = factorise_layer(
            source, attention, statistics, size.rank, size.rope_dim, "by_loss", rotation, nope_dim
        )
        losses = {}
        for wide in wide_probes(own, plan.cache.units(unit)[0]):
            mixed = replace(size, wide=wide)
            module = _module(layerwise, plan, attention, mixed)
            fill_attention(module, in_basis(weights, plan.cache.row(mixed)), family.freq_stride)
            losses[wide] = error(module)
        rounded = min(losses.values()) - 1e-12  # the most bits that a cache has: what remains is low rank
        return {wide: loss - rounded for wide, loss in losses.items()}

    ranks, ropes = probes(own, unit)
    by_rope = {rope_dim: error(build(None, rope_dim)) for rope_dim in (ropes if rotation.num_rotary_freqs else [0])}
    module, by_rank = build(full, size.rope_dim), {}
    for rank in sorted({full, *(rank for rank in ranks if rank < full)}, reverse=True):
        # the elements of a latent are ordered: without the last ones it is that of a lower rank
        for parameter in module.kv_a_proj_with_mqa.parameters():
            parameter.data[rank:full] = 0
        by_rank[rank] = error(module)
    loss = LayerLoss(by_rank, by_rope, by_bits() if plan.cache.kind == "mixed" else {})
    return loss.times(len(plan.shape.readers_of(attention.layer_idx)))


def _module(layerwise: LayerwiseModel, plan: Plan, attention: nn.Module, size: LayerSize) -> MlaAttention:
    """An attention of some size to replace one stock attention, with uninitialised weights."""
    sized = replace(plan, sizes=(size,) * len(plan.shape.caching_layers))
    return build_attention(mla_config(layerwise.source, sized, torch.float32), attention, layerwise.device)


def _without_massive(stream: Tensor) -> Tensor:
    """Mask (B, L) of the tokens of a residual stream (B, L, d) without massive activations."""
    size = stream.norm(dim=-1)
    return size <= MASSIVE * size.median()
