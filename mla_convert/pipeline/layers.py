"""The loop over layers: load, calibrate, factorise, refine, write, and carry the hidden states to the next layer."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mla_convert.core.processes import Processes
from mla_convert.core.progress import Progress
from mla_convert.core.runtime import return_freed_memory
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate.attention_forward import Forward, attention_forward, attention_kwargs
from mla_convert.method.calibrate.exchange import exchange_of, layout_of
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel
from mla_convert.method.calibrate.statistics import Statistics, layer_statistics
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.method.factorise.basis import in_basis
from mla_convert.method.factorise.layer import (
    TAKEN_OVER,
    build_attention,
    factorise_layer,
    fill_attention,
    fill_from_source,
)
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.factorise.svd import MlaWeights
from mla_convert.method.refine import optimise
from mla_convert.method.refine.block import LayerPair, Stage, StageResult, refine_jointly
from mla_convert.method.refine.schedule import OUTPUT_EVALUATIONS, groups, output_lr
from mla_convert.pipeline.layer_files import LayerFiles, LayerReader
from mla_convert.pipeline.streams import Streams


@dataclass
class LayerConverter:
    """Converts the layers of one model in order.

    Attributes:
        config: settings of the conversion.
        plan: sizes of every layer.
        layerwise: the source model.
        mla_config: configuration of the converted model.
        files: what is written, and what an interrupted run has written.
        processes: of the conversion; the first one writes.
        progress: told of every step.
        refine: steps, batch and blocks.
        channels: E[g^2] (d,) at each layer's output, where refinement weighs channels by it.
    """

    config: ConvertConfig
    plan: Plan
    layerwise: LayerwiseModel
    mla_config: Any
    files: LayerFiles
    processes: Processes
    progress: Progress
    refine: optimise.RefineSettings
    channels: list[Tensor] | None = None
    # weights of the converted attentions whose latents later layers attend to, by layer
    sources: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def convert(self, streams: Streams) -> list[dict[str, Any]]:
        """Convert every layer, block after block.

        Args:
            streams: hidden states at the input of the first layer; behind the last one at the end.

        Returns:
            The report's entry of every converted layer.

        Raises:
            InputError: a hidden state or a result is not finite.
        """
        lengths = {states.length for states in streams.original}
        # Masks and position embeddings depend on the length alone: they are made once, not in every layer.
        kwargs = {length: self.layerwise.layer_kwargs(length) for length in lengths}
        eager = attention_kwargs(self.layerwise, streams.calib_original.length)
        entries = []
        order = groups(self.plan.shape.layers, self.refine)
        with LayerReader(self.layerwise) as reader:
            for group, following in itertools.zip_longest(order, order[1:]):
                with contextlib.ExitStack() as stack:
                    open_layer = partial(self._open_layer, stack, reader, kwargs, eager)
                    blocks = [[open_layer(index) for index in block] for block in group]
                    if following:
                        reader.begin(following[0].start)
                    self._pass(blocks, streams)
                    converted = [layer.index for layer in itertools.chain(*blocks) if layer.student is not None]
                    del blocks  # before the next layers are read
                return_freed_memory()
                for index in converted:
                    entries.append({"layer": index, **self.files.entry(index)})
                    self.progress.layer_done(entries[-1])
        return entries

    def _pass(self, blocks: list[list[LayerPair]], streams: Streams) -> None:
        """Convert the layers of a group, or take over those that an earlier run has written; carry all states past them."""
        layers = list(itertools.chain(*blocks))
        # A group is taken over only as a whole, because its last steps train all of its layers.
        if all(self.files.is_written(layer.index) for layer in layers):
            students = sum(layer.student is not None for layer in layers)
            self.progress.skip(students * self.refine.steps_per_layer)
            for layer in layers:
                self.files.load(layer)
                self._advance(layer, streams.original)
        else:
            self._convert_group(blocks, streams)
        # The converted model's states pass the group only now, by the weights as they were written.
        for layer in layers:
            self._advance(layer, streams.converted, converted=True)
            self._keep_source(layer)

    def _open_layer(
        self,
        stack: contextlib.ExitStack,
        reader: LayerReader,
        kwargs: dict[int, list[LayerKwargs]],
        eager: list[LayerKwargs],
        index: int,
    ) -> LayerPair:
        """Load one layer until `stack` closes, and build the attention that replaces its own, if it has any."""
        tensors = reader.read(index)
        layer = stack.enter_context(self.layerwise.layer(index, tensors))
        family = self.layerwise.source.family
        name, student = family.attention, None
        if index in self.plan.shape.converted_layers:
            student = build_attention(self.mla_config, getattr(layer, name), self.layerwise.device)
        exchange = exchange_of(self.layerwise, index, self._latent_size)
        norm = () if student is None else (family.entry(layer),)
        own = {length: every[index] for length, every in kwargs.items()}
        return LayerPair(index, tensors, layer, name, student, own, eager[index], exchange, *norm)

    def _look(self, layers: Sequence[LayerPair], *streams: Activations) -> None:
        """Let layers that are about to run together find what they read beside the hidden states of some streams."""
        layout = layout_of(self.layerwise, [layer.index for layer in layers], self._latent_size)
        for layer in layers:
            layer.exchange = replace(layer.exchange, layout=layout)
        for states in streams:
            states.look(layout)

    def _latent_size(self, layer: int) -> tuple[int, int]:
        size = self.plan.layer(layer)
        return size.rank, size.rope_dim

    def _keep_source(self, layer: LayerPair) -> None:
        """Keep the weights from which the layers that attend to a layer's latent start."""
        if layer.exchange.hands_over and layer.student is not None:
            state = layer.student.state_dict()
            self.sources[layer.index] = {name: state[name].detach().cpu().clone() for name in TAKEN_OVER}

    def _convert_group(self, blocks: list[list[LayerPair]], streams: Streams) -> None:
        """Factorise and refine blocks of layers, together too if they are the last ones, and write them.

        The source's states are carried past the group; the converted model's stay before it.
        """
        layers = list(itertools.chain(*blocks))
        trained = any(layer.student is not None for layer in layers)
        joint = self.refine.output_steps > 0 and trained and layers[-1].index == self.plan.shape.layers - 1
        entry, entries = streams.calib_converted, []
        if len(blocks) > 1:
            # The joint steps start from the states before the group; the blocks advance a copy.
            streams.calib_converted = entry.clone()
        for block in blocks:
            entries += self._drafted(block, streams) or self._convert_block(block, streams)
            if joint:
                self.files.write_draft(block, entries[-len(block) :])
            for layer in block if len(blocks) > 1 else []:
                self._advance(layer, (streams.calib_converted,), converted=True)
        streams.calib_converted = entry
        if joint:
            refined = self._refine_output(layers, streams)
            entries = [layer_entry and layer_entry | refined for layer_entry in entries]
        for layer, layer_entry in zip(layers, entries, strict=True):
            if layer.student is not None:
                # Rounding may differ between cards, and all processes go on with what the first one writes.
                self.processes.make_equal(layer.student.state_dict().values())
            self.files.write(layer, layer_entry)
        # Not before every layer of the group is written: an interruption until here needs the drafts.
        self.files.drop_drafts()

    def _drafted(self, block: list[LayerPair], streams: Streams) -> list[dict[str, Any]]:
        """The report entries of a block that an interrupted run has drafted, none else; its students are loaded.

        The source's states are carried past the block.
        """
        entries = self.files.load_draft(block)
        for layer in block if entries else []:
            self._keep_source(layer)
            self._advance(layer, streams.original)
        if entries:
            self.progress.skip(sum(layer.student is not None for layer in block) * self.refine.steps_per_layer)
        return entries

    def _convert_block(self, layers: list[LayerPair], streams: Streams) -> list[dict[str, Any]]:
        """Factorise and refine the layers of a block one by one, then together; returns their report entries.

        The source's states are carried past the block; the converted model's stay before it.
        """
        # Joint steps start from the states before the block; its single layers advance a copy.
        entry = streams.calib_converted if len(layers) == 1 else streams.calib_converted.clone()
        entries = []
        for layer in layers:
            converted = layer.student is not None
            entries.append(self._convert_layer(layer, entry, streams.calib_original) if converted else {})
            self._advance(layer, streams.original)
            if len(layers) > 1:
                self._advance(layer, (entry,), converted=True)
        trained = any(layer.student is not None for layer in layers)
        if len(layers) > 1 and self.refine.block_steps and trained:
            del entry  # no longer needed: free it before the targets are allocated
            refined = self._refine_block(layers, streams)
            entries = [layer_entry and layer_entry | refined for layer_entry in entries]
            for layer in layers:
                self._keep_source(layer)
        return entries

    def _convert_layer(self, layer: LayerPair, states: Activations, original: Activations) -> dict[str, Any]:
        """Convert one layer from the hidden states before it, the converted model's and the source's; its report entry."""
        clock = StepClock(self.layerwise.device)
        self._look([layer], states, original)
        found = self._closed_form(layer, states, clock)
        teacher, student = self._branches(layer, states.length)
        # Latents and keys of one layer for the same inputs are beside the converted model's states alone.
        alike = states if layer.exchange.shares else original
        # Before refinement, which changes the student in place.
        closed_form = optimise.output_error(student, teacher, alike)
        own_error, refined = self.refine_alone(layer, *self._branches(layer, states.length, True), states, original)
        clock.record("refine")
        self._keep_source(layer)
        return {
            "kv_lora_rank": layer.student.kv_lora_rank,
            "qk_rope_head_dim": layer.student.qk_rope_head_dim,
            "qk_nope_head_dim": layer.student.qk_nope_head_dim,
            **found,
            "output_error_closed_form": closed_form,
            "output_error": optimise.output_error(student, teacher, alike),
            "own_error_closed_form": own_error,
            "residual_error_closed_form": refined.error_before,
            "residual_error": refined.error_after,
            "refine_steps": refined.steps,
            "seconds": clock.seconds,
        }

    def _branches(self, layer: LayerPair, length: int, to_stream: bool = False) -> tuple[Forward, Forward]:
        """The outputs of a layer's attention, the source's and the converted one, for windows of `length` tokens.

        With `to_stream` they lead from the hidden states to the residual stream, also where there are several streams.
        """
        family, layerwise = self.layerwise.source.family, self.layerwise
        parts = (family.entry(layer.layer), layer.kwargs[length], layerwise.autocast, family.exit(layer.layer))
        residual = family.residual(layer.layer) if family.streams and to_stream else None
        teacher, student = (
            attention_forward(attention, *parts, layer.exchange.read, residual)
            for attention in (layer.attention, layer.student)
        )
        return teacher, student

    def _closed_form(self, layer: LayerPair, states: Activations, clock: StepClock) -> dict[str, Any]:
        """Fill a layer's student before its refinement; what the report's entry says about that."""
        source = layer.exchange.source
        if layer.exchange.shares:
            family = self.layerwise.source.family
            fill_from_source(layer.student, self.sources[source], getattr(layer.stock, family.output))
            return {
                "plane_frequencies": (layer.student.rope_freq_index // family.freq_stride).tolist(),
                "latent_of": source,
            }
        statistics = self.calibrate(layer, states)
        clock.record("calibrate")
        weights = self.factorise(layer, statistics)
        clock.record("factorise")
        return {"plane_frequencies": weights.freq_index.tolist(), "energy": weights.energy}

    def calibrate(self, layer: LayerPair, states: Activations) -> Statistics:
        """Statistics of a layer's attention on the converted model's hidden states before it."""
        return layer_statistics(self.layerwise, layer.layer, states.plain(), layer.eager_kwargs, layer.student)

    def factorise(self, layer: LayerPair, statistics: Statistics) -> MlaWeights:
        """Fill a layer's student with the closed-form weights."""
        source, size = self.layerwise.source, self.plan.layer(layer.index)
        rotation = self.layerwise.rotation(layer.index, layer.eager_kwargs)
        nope_dim, planes = self.plan.most_nope_dim(layer.index), self.config.rope_selection
        weights = factorise_layer(
            source, layer.attention, statistics, size.rank, size.rope_dim, planes, rotation, nope_dim
        )
        weights = in_basis(weights, self.plan.cache.row(size))
        fill_attention(layer.student, weights, source.family.freq_stride)
        self.processes.make_equal(layer.student.state_dict().values())
        return weights

    def refine_alone(
        self, layer: LayerPair, teacher: Forward, student: Forward, states: Activations, original: Activations
    ) -> tuple[float, optimise.RefineResult]:
        """Refine one layer's student.

        Args:
            layer: its student is trained in place.
            teacher: runs the source's attention.
            student: runs the converted one.
            states: the converted model's hidden states before the layer.
            original: the source's hidden states before the layer.

        Returns:
            The layer's own error before, and what refinement came to.
        """
        targets = optimise.residual_targets(teacher, original)
        distance = self._relative_error(layer.index, targets)
        own_error = optimise.residual_error(student, states, optimise.held_out_streams(teacher, states), distance)
        settings = replace(self.refine, lr=optimise.step_size(self.refine.lr, own_error))
        return own_error, optimise.refine(
            layer.student, student, states, targets, settings, self.progress.step, distance
        )

    def _relative_error(self, index: int, targets: Activations) -> optimise.Distance:
        """Relative error of the stream behind layer `index`, with its channels weighted by what they cost."""
        weight = None if self.channels is None else optimise.channel_weights(self.channels[index], targets)
        return partial(optimise.relative_error, weight=weight)

    def _refine_block(self, layers: list[LayerPair], streams: Streams) -> dict[str, Any]:
        """Refine a block towards the source's residual stream behind it; its part of the layers' report entries."""
        clock = StepClock(self.layerwise.device)
        distance = self._relative_error(layers[-1].index, streams.calib_original)
        stage = Stage("block", self.refine.block_steps, self.refine.block_lr, distance)
        result = self._refine_jointly(stage, layers, streams, distance)
        clock.record(stage.name)
        return {
            "block": [layers[0].index, layers[-1].index],
            "block_own_error": result.own_error,
            "block_error_before": result.refined.error_before,
            "block_error": result.refined.error_after,
            "block_steps": result.refined.steps,
            "block_seconds": clock.seconds[stage.name],
        }

    def _refine_output(self, layers: list[LayerPair], streams: Streams) -> dict[str, Any]:
        """Refine the last layers towards the source's next-token distribution; its part of their report entries."""
        clock = StepClock(self.layerwise.device)
        # The whole head is in memory for these steps alone.
        with StreamedHead(self.layerwise).divergence() as divergence:
            rate = output_lr(self.refine, len(layers))
            stage = Stage("output", self.refine.output_steps, rate, divergence, OUTPUT_EVALUATIONS)
            relative = self._relative_error(layers[-1].index, streams.calib_original)
            result = self._refine_jointly(stage, layers, streams, relative)
        clock.record(stage.name)
        return {
            "output_kl_before": result.refined.error_before,
            "output_kl": result.refined.error_after,
            "output_steps": result.refined.steps,
            "output_layers": sum(layer.student is not None for layer in layers),
            "output_seconds": clock.seconds[stage.name],
        }

    def _refine_jointly(
        self, stage: Stage, layers: Sequence[LayerPair], streams: Streams, relative: optimise.Distance
    ) -> StageResult:
        self._look(layers, streams.calib_converted)
        on_step = partial(self.progress.step, sum(layer.student is not None for layer in layers))
        return refine_jointly(
            stage,
            layers,
            streams.calib_converted,
            streams.calib_original,
            relative,
            self.refine,
            self.layerwise.autocast,
            on_step,
        )

    @torch.no_grad()
    def _advance(self, layer: LayerPair, streams: tuple[Activations, ...], converted: bool = False) -> None:
        """Carry hidden states through a layer, the source's or the converted one."""
        self._look([layer], *streams)
        with layer.converted() if converted else contextlib.nullcontext():
            for states in streams:
                with self.layerwise.autocast():
                    states.advance_and_keep(layer.run_and_keep)
                name = self.layerwise.layer_prefix(layer.index)[:-1]
                states.check_finite(f"layer {name}{', converted,' if converted else ''}")


class StepClock:
    """Seconds of the steps of one conversion, by name."""

    def __init__(self, device: torch.device):
        """Start the clock; work queued on `device` counts for the step that queued it."""
        self.device, self.seconds, self._since = device, {}, time.perf_counter()

    def record(self, name: str) -> None:
        """Record the time since the last record as that of `name`."""
        if self.device.type == "cuda":
            # CUDA work is only queued when a call returns.
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = round(now - self._since, 3)
        self._since = now
