"""The loop over layers: load, calibrate, factorise, refine, write, and carry the hidden states to the next layer."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mla_convert.core.progress import Progress
from mla_convert.core.runtime import return_freed_memory
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel, first_output
from mla_convert.method.calibrate.statistics import attention_kwargs, layer_statistics
from mla_convert.method.factorise.layer import build_attention, factorise_layer, fill_attention, is_attention_tensor
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.refine import optimise as refine
from mla_convert.method.refine.schedule import groups
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.source.checkpoint.reader import check_finite
from mla_convert.write.writer import Writer

# Of a block's step size, that of the last steps, where one block takes them; of more layers together it is less by as much.
OUTPUT_RATE = 1 / 3
# What is read was looked at before, so that this is ours.
FAILED = "it was finite before its conversion; try another --seed, --calib-samples or --dtype float32, and report it"


@dataclass
class Streams:
    """Hidden states at the current layer boundary, of the original and of the converted model."""

    calib_original: Activations
    calib_converted: Activations
    eval_original: Activations
    eval_converted: Activations
    # of the packaged suite, where it is measured
    suite_original: Activations | None = None
    suite_converted: Activations | None = None

    @property
    def measured_original(self) -> tuple[Activations, ...]:
        """The original's states that only figures come from."""
        return tuple(states for states in (self.eval_original, self.suite_original) if states)

    @property
    def measured_converted(self) -> tuple[Activations, ...]:
        """The converted model's."""
        return tuple(states for states in (self.eval_converted, self.suite_converted) if states)


@dataclass
class LayerJob:
    """Everything that stays the same from layer to layer."""

    config: ConvertConfig
    plan: Plan
    layerwise: LayerwiseModel
    mla_config: Any
    dtype: torch.dtype | None
    writer: Writer
    progress: Progress
    refine: refine.RefineSettings
    # E[g^2] (d,) at each layer's output: what an error in a channel costs
    channels: list[Tensor] | None = None

    def distance(self, index: int, targets: Activations) -> refine.Distance:
        """What refinement towards `targets` minimises behind layer `index`."""
        weight = None if self.channels is None else refine.channel_weights(self.channels[index], targets)
        return partial(refine.relative_error, weight=weight)

    def shard(self, index: int) -> str:
        """File of the embeddings (0), of layer i (i + 1), or of what comes after the layers (layers + 1)."""
        return f"model-{index + 1:05d}-of-{self.plan.shape.layers + 2:05d}.safetensors"

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the dtype that they are written in: the source's own unless another was asked for."""
        if self.dtype is None:
            return tensors
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def write_embeddings_and_head(job: LayerJob) -> None:
    """Write every tensor outside the layers: embeddings first, the rest (final norm, head) last."""
    reader, inside = job.layerwise.source.reader, job.layerwise.source.family.layers + "."
    outside = [name for name in reader.names() if not name.startswith(inside)]
    # a tied head that is stored too is not among them
    wanted = {name for name, _ in job.layerwise.model.named_parameters()}
    for index, first in ((0, True), (job.plan.shape.layers + 1, False)):
        names = [n for n in outside if n in wanted and (n.startswith(job.layerwise.embedding) == first)]
        if job.shard(index) not in job.writer.finished:
            tensors = reader.read(names)
            check_finite(tensors)
            job.writer.write_shard(job.shard(index), job.stored(tensors))
            del tensors
            return_freed_memory()


def open_streams(layerwise: LayerwiseModel, calib: Tensor, evaluation: Tensor, suite: Tensor | None = None) -> Streams:
    """Embedded windows (N, L) of each kind; both models start from the same states."""
    calib_dtype = torch.bfloat16 if layerwise.device.type == "cuda" else torch.float32
    embedded = layerwise.embed(calib)
    pairs = [[Activations(embedded, layerwise.device, calib_dtype) for _ in range(2)]]
    pairs[0][0].check_finite(f"the embedding {layerwise.embedding}")
    for windows in (evaluation, suite):
        if windows is not None:
            embedded = layerwise.embed(windows)
            # read once a layer, in order: host memory will do
            pairs.append([Activations(embedded, layerwise.device, torch.float32, on_host=True) for _ in range(2)])
    return Streams(*itertools.chain(*pairs))


@dataclass
class _Member:
    """One layer of a block while that is converted."""

    index: int
    tensors: dict[str, Tensor]
    layer: nn.Module
    student: MlaAttention
    # keyword arguments of the layer by window length, and those under eager attention
    kwargs: dict[int, dict[str, Any]]
    eager: dict[str, Any]


def convert_layers(job: LayerJob, streams: Streams) -> list[dict[str, Any]]:
    """Convert every layer in order, block after block; returns one report entry a layer."""
    layerwise = job.layerwise
    lengths = {states.length for states in (streams.calib_original, *streams.measured_original)}
    kwargs = {length: layerwise.layer_kwargs(length) for length in lengths}
    eager = attention_kwargs(layerwise, streams.calib_original.length)
    reports = []
    for indices in groups(job.plan.shape.layers, job.refine):
        with contextlib.ExitStack() as stack:
            parts: list[list[_Member]] = []
            for block in indices:
                parts.append([])
                for index in block:
                    tensors = layerwise.layer_tensors(index)
                    layer = stack.enter_context(layerwise.layer(index, tensors))
                    student = build_attention(job.mla_config, _attention(job, layer), layerwise.device)
                    own = {length: kwargs[length][index] for length in lengths}
                    parts[-1].append(_Member(index, tensors, layer, student, own, eager[index]))
            members = list(itertools.chain(*parts))
            if all(job.shard(index + 1) in job.writer.finished for index in itertools.chain(*indices)):
                job.progress.skip(len(members) * job.refine.steps_per_layer)
                for member in members:
                    _load_written(job, member, job.writer.load_shard(job.shard(member.index + 1)))
                    _advance(job, member, (streams.calib_original, *streams.measured_original), original=True)
            else:
                _convert_group(job, parts, streams)
            for member in members:
                _advance(job, member, (streams.calib_converted, *streams.measured_converted), original=False)
        return_freed_memory()
        for index in itertools.chain(*indices):
            reports.append({"layer": index, **job.writer.finished[job.shard(index + 1)]["note"]})
            job.progress.layer_done(reports[-1])
    return reports


def _convert_group(job: LayerJob, parts: list[list[_Member]], streams: Streams) -> None:
    """Factorise and refine blocks of layers, together too if they are the last ones, and write them.

    The original's states are carried past the group; the converted model's stay before it.
    """
    members = list(itertools.chain(*parts))
    entry, reports = streams.calib_converted, []
    if len(parts) > 1:
        streams.calib_converted = entry.clone()
    for part in parts:
        reports += _convert_block(job, part, streams)
        for member in part if len(parts) > 1 else []:
            _advance(job, member, (streams.calib_converted,), original=False)
    streams.calib_converted = entry
    if job.refine.output_steps and members[-1].index == job.plan.shape.layers - 1:
        found = _refine_output(job, members, streams)
        reports = [report | found for report in reports]
    for member, report in zip(members, reports, strict=True):
        written = _layer_tensors(job, member)
        check_finite(written, _too_large(member, dtype=job.dtype or job.layerwise.source.dtype) or FAILED)
        job.writer.write_shard(job.shard(member.index + 1), written, report)
        _load_written(job, member, written)


def _convert_block(job: LayerJob, members: list[_Member], streams: Streams) -> list[dict[str, Any]]:
    """Factorise and refine the layers of a block one by one, then together; returns their report entries.

    The original's states are carried past the block; the converted model's stay before it.
    """
    entry = streams.calib_converted if len(members) == 1 else streams.calib_converted.clone()
    reports = []
    for member in members:
        reports.append(_convert_layer(job, member, entry, streams.calib_original))
        _advance(job, member, (streams.calib_original, *streams.measured_original), original=True)
        if len(members) > 1:
            _advance(job, member, (entry,), original=False)
    if len(members) > 1 and job.refine.block_steps:
        # the copy has been carried to the block's end, which is of no more use: it makes room for the targets
        del entry
        found = _refine_block(job, members, streams)
        reports = [report | found for report in reports]
    return reports


def _refine_block(job: LayerJob, members: list[_Member], streams: Streams) -> dict[str, Any]:
    """Refine the attentions of a block together against the original's residual stream behind it; a part of their report."""
    clock = _Clock(job.layerwise.device)
    own, result = _refine_together(job, members, streams, job.refine.block_steps, job.refine.block_lr)
    clock.lap("refine_block")
    return {
        "block": [members[0].index, members[-1].index],
        "block_own_error": own,
        "block_error_before": result.error_before,
        "block_error": result.error_after,
        "block_steps": result.steps,
        "block_seconds": clock.seconds["refine_block"],
    }


def _refine_output(job: LayerJob, members: list[_Member], streams: Streams) -> dict[str, Any]:
    """Refine the last layers against what the original makes of the stream behind it: its next-token distribution."""
    clock = _Clock(job.layerwise.device)
    lr = OUTPUT_RATE * job.refine.block_lr * min(1.0, job.refine.block / len(members))
    with job.layerwise.divergence() as divergence:
        _, result = _refine_together(job, members, streams, job.refine.output_steps, lr, divergence)
    clock.lap("refine_output")
    return {
        "output_kl_before": result.error_before,
        "output_kl": result.error_after,
        "output_steps": result.steps,
        "output_layers": len(members),
        "output_seconds": clock.seconds["refine_output"],
    }


def _refine_together(
    job: LayerJob,
    members: list[_Member],
    streams: Streams,
    steps: int,
    lr: float,
    aim: refine.Distance | None = None,
) -> tuple[float, refine.RefineResult]:
    """Refine layers from the converted model's states before them towards the original's behind them, by what `aim` makes of
    the two: their relative error, if None. Returns also the layers' own relative error, which the step size follows."""
    inputs, targets = streams.calib_converted, streams.calib_original
    distance = job.distance(members[-1].index, targets)

    def through(hidden: Tensor) -> Tensor:
        states = hidden
        with job.layerwise.autocast():
            for member in members:
                states = first_output(member.layer(states, **member.kwargs[inputs.length]))
        return states.float() - hidden

    original = refine.streams(through, inputs)
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.enter_context(_converted(job, member))
        own = refine.residual_error(through, inputs, original, distance)
        del original
        settings = replace(job.refine, steps=steps, lr=refine.step_size(lr, own))
        together = nn.ModuleList(member.student for member in members)
        advance = partial(job.progress.step, len(members))
        return own, refine.refine(together, through, inputs, targets, settings, advance, aim or distance)


def _attention(job: LayerJob, layer: nn.Module) -> nn.Module:
    return getattr(layer, job.layerwise.source.family.attention)


def _convert_layer(job: LayerJob, member: _Member, states: Activations, states_original: Activations) -> dict[str, Any]:
    """Factorise and refine one layer, from the converted model's states and the original's; returns its report entry."""
    layerwise, clock, module = job.layerwise, _Clock(job.layerwise.device), member.student
    family, own, attention = layerwise.source.family, member.kwargs[states.length], _attention(job, member.layer)
    norm, after = family.entry(member.layer), family.exit(member.layer)
    original = refine.attend(attention, norm, own, layerwise.autocast, after)
    student = refine.attend(module, norm, own, layerwise.autocast, after)

    statistics = layer_statistics(layerwise, member.layer, states, member.eager, module)
    clock.lap("calibrate")
    size, rotation = job.plan.layer(member.index), layerwise.rotation(member.index, member.eager)
    weights = factorise_layer(
        layerwise.source, attention, statistics, size.rank, size.rope_dim, job.config.rope_selection, rotation
    )
    fill_attention(module, weights, family.table_step)
    clock.lap("factorise")
    closed_form = refine.output_error(student, original, states_original)
    targets = refine.residual_targets(original, states_original)
    distance = job.distance(member.index, targets)
    own = refine.residual_error(student, states, refine.streams(original, states), distance)
    settings = replace(job.refine, lr=refine.step_size(job.refine.lr, own))
    result = refine.refine(module, student, states, targets, settings, job.progress.step, distance)
    clock.lap("refine")
    return {
        "kv_lora_rank": module.kv_lora_rank,
        "qk_rope_head_dim": module.qk_rope_head_dim,
        "plane_frequencies": weights.freq_index.tolist(),
        "energy": weights.energy,
        "output_error_closed_form": closed_form,
        "output_error": refine.output_error(student, original, states_original),
        "own_error_closed_form": own,
        "residual_error_closed_form": result.error_before,
        "residual_error": result.error_after,
        "refine_steps": result.steps,
        "seconds": clock.seconds,
    }


class _Clock:
    """Seconds of a layer's steps."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._since = device, {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = round(now - self._since, 3)
        self._since = now


def _layer_tensors(job: LayerJob, member: _Member) -> dict[str, Tensor]:
    """What is written for one layer: the source's tensors but attention's, and the student's, in the output dtype."""
    prefix = f"{job.layerwise.layer_prefix(member.index)}{job.layerwise.source.family.attention}."
    kept = {name: t for name, t in member.tensors.items() if not is_attention_tensor(job.layerwise.source, name)}
    dtype = job.dtype or job.layerwise.source.dtype
    own = {}
    for name, tensor in member.student.state_dict().items():
        own[prefix + name] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return {**job.stored(kept), **own}


def _too_large(member: _Member, dtype: torch.dtype) -> str | None:
    """What to do where numbers that were finite are not as they are written, in a narrow dtype."""
    finite = all(tensor.isfinite().all() for tensor in member.student.state_dict().values())
    if not finite or torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
        return None
    return f"{str(dtype).removeprefix('torch.')} has no room for it; give --dtype bfloat16 or float32"


def _load_written(job: LayerJob, member: _Member, written: dict[str, Tensor]) -> None:
    """The student as it was written, rounding included: what follows sees the model that users will load."""
    prefix = f"{job.layerwise.layer_prefix(member.index)}{job.layerwise.source.family.attention}."
    state = {name.removeprefix(prefix): t for name, t in written.items() if name.startswith(prefix)}
    member.student.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})


@contextlib.contextmanager
def _converted(job: LayerJob, member: _Member) -> Iterator[None]:
    """The layer with the converted attention in it."""
    name, original = job.layerwise.source.family.attention, _attention(job, member.layer)
    setattr(member.layer, name, member.student)
    try:
        yield
    finally:
        setattr(member.layer, name, original)


@torch.no_grad()
def _advance(job: LayerJob, member: _Member, streams: tuple[Activations, ...], original: bool) -> None:
    """Carry hidden states through the layer, the original's or the converted model's."""
    with contextlib.nullcontext() if original else _converted(job, member):
        for states in streams:
            own = member.kwargs[states.length]
            with job.layerwise.autocast():
                states.advance(lambda hidden, own=own: first_output(member.layer(hidden, **own)))
            states.check_finite(
                f"layer {job.layerwise.layer_prefix(member.index)[:-1]}{'' if original else ', converted,'}"
            )
