"""Sections of report.json on the conversion itself: source, cache, calibration, layers, phases, self-check, speed."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

from mla_convert.core.report_schema.base import Amount, Count, JsonObject, Measured, Number, Section
from mla_convert.core.report_schema.evaluation import (
    Comparison,
    EvaluationSection,
    Mean,
    OriginalCacheSection,
)


def _licence(value: object) -> str | list[str]:
    if all(isinstance(name, str) for name in (value if isinstance(value, list) else [value])):
        return value  # type: ignore[return-value]
    raise ValueError("should be a word or a list of words")


def _context(value: str) -> str:
    if value.isdecimal() and len(value) <= 12:
        return value
    raise ValueError("should be under a number of tokens")


Licence = Annotated[
    str | list[str],
    PlainValidator(_licence),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Context = Annotated[str, AfterValidator(_context)]
Versions = dict[str, str | None]


class SourceSection(Section):
    """The original: its name (no path), its attention's shape, and the licence that its model card states."""

    name: str
    revision: str | None = None
    model_type: str | None = None
    layers: Count | None = None
    attention_heads: Count | None = None
    key_value_heads: Count | None = None
    head_dim: Count | None = None
    license: Licence | None = None
    license_name: str | None = None
    license_link: str | None = None


class Sides(Section):
    """A size of the original (`before`) and of the converted model (`after`)."""

    before: Amount
    after: Amount


class CacheSection(Section):
    """The KV cache of one sequence: keys and values, or latents. Of a hybrid model, `fixed_bytes` come on top.

    Attributes:
        kv_lora_rank: width of the latent; the mean over layers where these differ.
        qk_rope_head_dim: width of the rotary key; the mean over layers where these differ.
        numbers_per_token_per_layer: cached numbers, mean over layers.
        bytes_per_number: bytes of one cached number; of a quantised cache the mean, with scales and padding.
        bytes_per_token: bytes of one token in all layers.
        bytes_at_context: bytes of one sequence by its length in tokens.
        share_saved: share of the original's bytes that is saved.
        latent_cache: format of a quantised cache, as config.json holds it.
        layers: in a hybrid model, the number of layers with attention, which alone are converted.
        fixed_bytes: in a hybrid model, bytes of the other layers' states, which do not grow with the context.
        growing_share_at_context: in a hybrid model, the KV cache's share of KV cache and fixed states.
    """

    kv_lora_rank: Amount
    qk_rope_head_dim: Amount
    numbers_per_token_per_layer: Sides
    bytes_per_number: Amount
    bytes_per_token: Sides
    bytes_at_context: dict[Context, Sides]
    share_saved: Number
    latent_cache: JsonObject | None = None
    layers: Count | None = None
    fixed_bytes: Amount | None = None
    growing_share_at_context: dict[Context, Sides] | None = None


class CalibrationSection(Section):
    """The calibration text.

    Attributes:
        text: label of the text.
        protocol: text and windows in words.
        noise: share of tokens that were replaced at random.
        self_written: share of windows that the original generated.
        windows: number of windows by text.
    """

    text: str | None = None
    protocol: str
    noise: Amount | None = None
    self_written: Amount | None = None
    windows: dict[str, Count] | None = None


class Energy(Section):
    """Shares that the closed form expects to keep, and its expected relative errors."""

    rope_kept: Measured = math.nan
    # Of the content logits, where heads have fewer content dims.
    nope_kept: Measured = math.nan
    rank_kept: Measured = math.nan
    # Errors of different keys are taken as independent: these compare layers and forecast nothing.
    logit_error: Measured = math.nan
    value_error: Measured = math.nan
    output_error: Measured = math.nan


class LayerEntry(Section):
    """One layer. Errors are relative to the original and measured on held-out calibration windows.

    Attributes:
        layer: index of the layer.
        latent_of: the layer whose latent it attends to, if it has none of its own.
        kv_lora_rank: width of its latent.
        qk_rope_head_dim: width of its rotary key.
        qk_nope_head_dim: width of each head's content key.
        plane_frequencies: index of the rotary frequency of each plane that stayed rotary.
        energy: what the closed form expects.
        output_error_closed_form: error of the attention output in closed form.
        output_error: error of the attention output after refinement.
        own_error_closed_form: error of the residual stream that this layer adds, in closed form.
        residual_error_closed_form: error of the residual stream behind the layer, in closed form.
        residual_error: error of the residual stream behind the layer after refinement.
        refine_steps: gradient steps of the layer.
        seconds: time of each step of the method.
        block: first and last layer of the block that was refined together.
        block_own_error: error of the residual stream that the block adds, before its refinement.
        block_error_before: error of the residual stream behind the block, before its refinement.
        block_error: error of the residual stream behind the block, after its refinement.
        block_steps: gradient steps of the block.
        block_seconds: time of the block's refinement.
        output_kl_before: KL(original ‖ converted) in nats per token, before the output steps.
        output_kl: KL(original ‖ converted) in nats per token, after the output steps.
        output_steps: gradient steps towards the original's next-token distribution.
        output_layers: number of layers that took the output steps.
        output_seconds: time of the output steps.
    """

    # All entries may be absent: which ones there are depends on the version and on the steps of the run.
    layer: Count | None = None
    latent_of: Count | None = None
    kv_lora_rank: Count | None = None
    qk_rope_head_dim: Count | None = None
    qk_nope_head_dim: Count | None = None
    plane_frequencies: list[Count] | None = None
    energy: Energy | None = None
    output_error_closed_form: Measured = math.nan
    output_error: Measured = math.nan
    # Learning rates of the refinement follow this error, and for a block `block_own_error`.
    own_error_closed_form: Measured = math.nan
    residual_error_closed_form: Measured = math.nan
    residual_error: Measured = math.nan
    refine_steps: Count | None = None
    seconds: dict[str, Amount] | None = None
    # The entries of a block are the same in each of its layers. The errors above are from before its steps, and the
    # block's are from before the output steps.
    block: list[Count] | None = None
    block_own_error: Measured = math.nan
    block_error_before: Measured = math.nan
    block_error: Measured = math.nan
    block_steps: Count | None = None
    block_seconds: Amount | None = None
    output_kl_before: Measured = math.nan
    output_kl: Measured = math.nan
    output_steps: Count | None = None
    output_layers: Count | None = None
    output_seconds: Amount | None = None


class PhaseEntry(Section):
    """Seconds of a phase, and its peak memory: of the device, and of the host above the interpreter with its libraries."""

    seconds: Amount
    peak_host_bytes: Amount | None = None
    peak_device_bytes: Amount | None = None


class SelfCheckSection(Section):
    """The trial of the written folder: greedy generation without a cache, with a dynamic and with a static one.

    Attributes:
        passed: whether the logits agree.
        caches: kinds of cache that were tried.
        tokens: tokens generated.
        layers: layers that were tried.
        of_layers: layers of the model.
        largest_difference: of a logit, as a share of the logits' range.
        float32_difference: the same in float32, which was tried if half precision differed by more than usual.
        dtype: dtype of the trial.
        device: name of the device.
        seconds: time of the trial.
        versions: of the packages that it ran with.
    """

    passed: bool | None = None
    caches: list[str] | None = None
    tokens: Count | None = None
    layers: Count
    of_layers: Count
    largest_difference: Measured = math.nan
    float32_difference: Measured | None = None
    dtype: str | None = None
    device: str | None = None
    seconds: Amount | None = None
    versions: Versions


class SweepEntry(Section):
    """One point of a sweep: numbers per token and layer, share of the original's cache, perplexity ratio, KL divergence.

    `latent_cache` is the format of a quantised cache, as config.json holds it.
    """

    numbers: Number | None = None
    share: Number
    ratio: Measured = math.nan
    stderr: Measured = math.nan
    kl: Mean | None = None
    latent_cache: JsonObject | None = None


class SweepPoint(Section):
    """One point in sweep.json: a conversion of one size, with its evaluation and the one on held-out text."""

    name: str
    seed: Count
    rank: Amount
    rope_dim: Amount
    numbers: Number
    share: Number
    ratio: Measured = math.nan
    stderr: Measured = math.nan
    evaluation: EvaluationSection
    held_out: Comparison
    calibration: CalibrationSection
    seconds: Amount
    latent_cache: JsonObject | None = None
    original_cache: OriginalCacheSection | None = None


class SweepReport(Section):
    """The content of sweep.json: its source, the limit on the perplexity ratio, the name of the chosen point, all points."""

    source: str
    max_ppl_ratio: Amount | None = None
    chosen: str | None = None
    points: list[SweepPoint]


class SpeedEntry(Section):
    """Tokens per second at one context in tokens, of both models."""

    context: Count
    before: Amount
    after: Amount


class BenchSection(Section):
    """Speed of decoding."""

    device: str | None = None
    decode: list[SpeedEntry] | None = None
