"""The loop over layers: load, calibrate, factorise, refine, write, and carry the hidden states to the next layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mla_convert import refine
from mla_convert.activations import Activations
from mla_convert.attention import build_attention, factorise_layer, fill_attention, is_attention_tensor
from mla_convert.calibrate import attention_kwargs, layer_statistics
from mla_convert.checkpoint.reader import check_finite
from mla_convert.checkpoint.writer import Writer
from mla_convert.config import ConvertConfig
from mla_convert.environment import return_freed_memory
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.plan import Plan
from mla_convert.progress import Progress
from mla_convert.skeleton import Skeleton, first_output


@dataclass
class Streams:
    """Hidden states at the current layer boundary, of the original and of the converted model."""

    calib_original: Activations
    calib_converted: Activations
    eval_original: Activations
    eval_converted: Activations


@dataclass
class LayerJob:
    """Everything that stays the same from layer to layer."""

    config: ConvertConfig
    plan: Plan
    skeleton: Skeleton
    mla_config: Any
    dtype: torch.dtype | None
    writer: Writer
    progress: Progress
    refine: refine.RefineSettings

    def shard(self, index: int) -> str:
        """File of the embeddings (0), of layer i (i + 1), or of what comes after the layers (layers + 1)."""
        return f"model-{index + 1:05d}-of-{self.plan.shape.layers + 2:05d}.safetensors"

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the dtype that they are written in: the source's own unless another was asked for."""
        if self.dtype is None:
            return tensors
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def write_ends(job: LayerJob) -> None:
    """Write every tensor outside the layers: embeddings first, the rest (final norm, head) last."""
    reader, inside = job.skeleton.source.reader, job.skeleton.source.family.layers + "."
    outside = [name for name in reader.names() if not name.startswith(inside)]
    # a tied head that is stored too is not among them
    wanted = {name for name, _ in job.skeleton.model.named_parameters()}
    for index, first in ((0, True), (job.plan.shape.layers + 1, False)):
        names = [n for n in outside if n in wanted and (n.startswith(job.skeleton.embedding) == first)]
        if job.shard(index) not in job.writer.finished:
            tensors = reader.read(names)
            check_finite(tensors)
            job.writer.write_shard(job.shard(index), job.stored(tensors))
            del tensors
            return_freed_memory()


def open_streams(skeleton: Skeleton, calib: Tensor, evaluation: Tensor) -> Streams:
    """Embedded windows; both models start from the same states."""
    calib_dtype = torch.bfloat16 if skeleton.device.type == "cuda" else torch.float32
    embedded, evaluated = skeleton.embed(calib), skeleton.embed(evaluation)
    pair = [Activations(embedded, skeleton.device, calib_dtype) for _ in range(2)]
    # read once a layer, in order: host memory will do
    return Streams(*pair, *(Activations(evaluated, skeleton.device, torch.float32, on_host=True) for _ in range(2)))


def convert_layers(job: LayerJob, streams: Streams) -> list[dict[str, Any]]:
    """Convert every layer in order; returns one report entry a layer."""
    skeleton, lengths = job.skeleton, {streams.calib_original.length, streams.eval_original.length}
    kwargs = {length: skeleton.layer_kwargs(length) for length in lengths}
    eager = attention_kwargs(skeleton, streams.calib_original.length)
    reports = []
    for index in range(job.plan.shape.layers):
        tensors = skeleton.layer_tensors(index)
        with skeleton.layer(index, tensors) as layer:
            start = {length: kwargs[length][index] for length in lengths}
            student = build_attention(job.mla_config, _attention(job, layer), skeleton.device)
            file = job.shard(index + 1)
            if file in job.writer.finished:
                report = job.writer.finished[file]["note"]
                written = job.writer.load_shard(file)
                job.progress.skip(job.refine.steps)
            else:
                report = _convert_layer(job, layer, student, streams, start, eager[index])
                written = _layer_tensors(job, index, tensors, student)
                check_finite(written)
                job.writer.write_shard(file, written, report)
            _load_written(job, index, student, written)
            _advance(job, layer, student, streams, start)
        return_freed_memory()
        reports.append({"layer": index, **report})
        job.progress.layer_done(report)
    return reports


def _attention(job: LayerJob, layer: nn.Module) -> nn.Module:
    return getattr(layer, job.skeleton.source.family.attention)


def _convert_layer(
    job: LayerJob, layer: nn.Module, module: MlaAttention, streams: Streams, kwargs: dict, eager: dict
) -> dict[str, Any]:
    """Factorise and refine one layer into `module`; returns its report entry."""
    skeleton, clock = job.skeleton, _Clock(job.skeleton.device)
    family, own, attention = skeleton.source.family, kwargs[streams.calib_original.length], _attention(job, layer)
    norm, after = family.entry(layer), family.exit(layer)
    original = refine.attend(attention, norm, own, skeleton.autocast, after)
    student = refine.attend(module, norm, own, skeleton.autocast, after)

    statistics = layer_statistics(skeleton, layer, streams.calib_converted, eager, module)
    clock.lap("calibrate")
    size, rotation = job.plan.layer(module.layer_idx), skeleton.rotation(module.layer_idx, eager)
    weights = factorise_layer(
        skeleton.source, attention, statistics, size.rank, size.rope_dim, job.config.planes, rotation
    )
    fill_attention(module, weights, family.table_step)
    clock.lap("factorise")
    closed_form = refine.output_error(student, original, streams.calib_original)
    targets = refine.residual_targets(original, streams.calib_original)
    result = refine.refine(module, student, streams.calib_converted, targets, job.refine, job.progress.step)
    clock.lap("refine")
    return {
        "kv_lora_rank": module.kv_lora_rank,
        "qk_rope_head_dim": module.qk_rope_head_dim,
        "plane_frequencies": weights.freq_index.tolist(),
        "energy": weights.energy,
        "output_error_closed_form": closed_form,
        "output_error": refine.output_error(student, original, streams.calib_original),
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


def _layer_tensors(job: LayerJob, index: int, source: dict[str, Tensor], student: MlaAttention) -> dict[str, Tensor]:
    """What is written for one layer: the source's tensors but attention's, and the student's, in the output dtype."""
    prefix = f"{job.skeleton.layer_prefix(index)}{job.skeleton.source.family.attention}."
    kept = {name: t for name, t in source.items() if not is_attention_tensor(job.skeleton.source, name)}
    dtype = job.dtype or job.skeleton.source.dtype
    own = {}
    for name, tensor in student.state_dict().items():
        own[prefix + name] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return {**job.stored(kept), **own}


def _load_written(job: LayerJob, index: int, student: MlaAttention, written: dict[str, Tensor]) -> None:
    """The student as it was written, rounding included: what follows sees the model that users will load."""
    prefix = f"{job.skeleton.layer_prefix(index)}{job.skeleton.source.family.attention}."
    state = {name.removeprefix(prefix): t for name, t in written.items() if name.startswith(prefix)}
    student.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})


@torch.no_grad()
def _advance(job: LayerJob, layer: nn.Module, student: MlaAttention, streams: Streams, kwargs: dict) -> None:
    """Carry both models' hidden states through the layer; the converted one's attention is swapped in for its turn."""
    name = job.skeleton.source.family.attention
    original = getattr(layer, name)

    def run(states: Activations) -> None:
        own = kwargs[states.length]
        with job.skeleton.autocast():
            states.advance(lambda hidden: first_output(layer(hidden, **own)))

    run(streams.calib_original)
    run(streams.eval_original)
    setattr(layer, name, student)
    try:
        run(streams.calib_converted)
        run(streams.eval_converted)
    finally:
        setattr(layer, name, original)


def refine_settings(config: ConvertConfig, device: torch.device, length: int) -> refine.RefineSettings:
    """Steps and batch where none are given: what a GPU does in a minute or two, and a token amount on a CPU."""
    cuda = device.type == "cuda"
    steps = (300 if cuda else 30) if config.refine_steps is None else config.refine_steps
    batch = max(1, (8192 if cuda else 2048) // length) if config.refine_batch is None else config.refine_batch
    return refine.RefineSettings(steps, batch, config.refine_lr, config.seed)
