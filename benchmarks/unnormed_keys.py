"""Latents of un-normed keys beside a factor for each head, against latents of normed keys, at equal bytes and in one run.

A model with a norm on its keys caches a latent of [normed key; value], because the normed key is no linear function of the
input. The alternative caches a latent of [un-normed key; value], which is one, and beside it the reciprocal root mean square
that the norm would have divided each KV head's key by: each logit of the head is multiplied by it, the rotary part included.
`FORMS` are the forms of that factor; its bytes are taken from the rank, at two bytes an element. Both latents are found in
closed form on their own calibration states, from layer to layer, as in a conversion without refinement. Errors of un-normed
keys count equally for all tokens there, whatever their factor. With --refine-steps, each layer is refined alone behind it, as
in a conversion on a CPU. Options of a conversion that do not apply are ignored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, MlaConvertError
from mla_convert.core.recipes import build_config
from mla_convert.core.report_schema import to_json
from mla_convert.core.report_schema.evaluation import EvaluationSection, NotEvaluated
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.evaluate.quality.perplexity import Scores
from mla_convert.method.calibrate.attention_forward import attention_forward, attention_kwargs
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerKwargs, LayerwiseModel
from mla_convert.method.calibrate.statistics import layer_statistics
from mla_convert.method.factorise.layer import build_attention, factorise_layer, fill_attention, mla_config
from mla_convert.method.factorise.sensitivity import TOKENS, WINDOW, sensitivities
from mla_convert.method.factorise.sizes import Plan, make_plan
from mla_convert.method.refine import optimise
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.method.refine.schedule import refine_settings
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.modeling.stock_mla import apply_norm
from mla_convert.pipeline.streamed import scores
from mla_convert.pipeline.streams import open_streams
from mla_convert.source import texts
from mla_convert.source.source import Source, open_source

NORMED = "normed"
# Form of a head's factor -> its bytes. "float32" counts as none: it shows the latent's loss alone.
FORMS = {"float32": 0, "bf16": 2, "e4m3": 1, "log8": 1, "fitted8": 1}
# Steps an octave of "log8", whose byte covers 16 octaves around the mean.
STEPS = 16
ELEMENT = 2


def rounded(factor: Tensor, form: str, bounds: Tensor) -> Tensor:
    """Factors as the cache would hold them.

    Args:
        factor: (B, T, G), relative to the mean of its head on the calibration text.
        form: one of `FORMS`: "log8" has steps of 1/16 octave; "fitted8" has 255 steps between the head's least and largest
            factor on the calibration text.
        bounds: (2, G) binary logarithms of those two.
    """
    if form == "bf16":
        return factor.bfloat16().float()
    if form == "e4m3":
        return factor.clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    if form == "log8":
        return ((factor.log2() * STEPS).round().clamp(-128, 127) / STEPS).exp2()
    if form == "fitted8":
        step = ((bounds[1] - bounds[0]) / 255).clamp_min(1e-6)
        return (((factor.log2() - bounds[0]) / step).round().clamp(0, 255) * step + bounds[0]).exp2()
    return factor


class UnnormedKeys(MlaAttention):
    """A converted attention whose latent is a map of un-normed keys, and whose logits are multiplied by a cached factor.

    `form`: of the factor; `mean` (G,): geometric mean of a head's factor on the calibration text, which the un-normed keys
    are multiplied by, so that they have about the normed keys' size; `bounds`: see `rounded`.
    """

    form: str
    mean: Tensor
    bounds: Tensor

    def raw_factor(self, hidden_states: Tensor) -> Tensor:
        """Reciprocal root mean square (B, T, G) of each head's key; G is 1 for a norm over all heads."""
        rows = self.k_proj(hidden_states)
        rows = rows.unflatten(-1, (1, -1) if self.config.mla_norm_over == "all" else (-1, self.v_head_dim))
        norm = getattr(self, self.config.mla_k_norm)
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        return (rows.float().square().mean(-1) + epsilon).rsqrt()

    def normed_key_value(self, hidden_states: Tensor) -> Tensor:
        """Un-normed keys times the norm's weight, and values: (B, T, 2 * G * d_h), linear in the input."""
        norm, rows = getattr(self, self.config.mla_k_norm), self.k_proj(hidden_states)
        # of equal elements, the norm returns its weight
        weight = apply_norm(norm, torch.full_like(rows[:1, :1], 1e3), self.v_head_dim, self.config.mla_norm_over)
        parts = len(self.mean)
        rows = (rows * weight).unflatten(-1, (parts, -1)) * self.mean[:, None]
        self.factor = rounded(self.raw_factor(hidden_states) / self.mean, self.form, self.bounds)
        return torch.cat([rows.flatten(-2), self.v_proj(hidden_states)], dim=-1)

    def join(self, q_nope, q_rope, k_nope, k_rope, cos=None, sin=None) -> tuple[Tensor, Tensor]:
        """Queries and keys, the keys multiplied by their factor: each logit is, its rotary part included."""
        query, key = MlaAttention.join(q_nope, q_rope, k_nope, k_rope, cos, sin)
        factor = self.factor.transpose(1, 2).repeat_interleave(self.num_heads // self.factor.shape[-1], 1)
        return query, key * factor[..., None]

    def _expanded(self, *arguments, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention; the factors' graph does not outlive it, because a later step could then not be recorded on CUDA."""
        result = super()._expanded(*arguments, **kwargs)
        self.factor = None
        return result


@torch.no_grad()
def prepare(student: MlaAttention, form: str, states: Activations, norm: nn.Module) -> None:
    """Make a converted attention one of `UnnormedKeys`, with the mean and the bounds of its factors on calibration states."""
    student.__class__ = UnnormedKeys
    student.form = form
    factors = torch.cat([student.raw_factor(norm(states.get(batch))).flatten(0, 1) for batch in states.batches()])
    student.mean = factors.log().mean(0).exp()
    relative = (factors / student.mean).log2()
    student.bounds = torch.stack([relative.amin(0), relative.amax(0)])


@dataclass
class Scheme:
    """One way to cache, and its own hidden states at the current layer."""

    form: str  # `NORMED`, or one of `FORMS`
    plan: Plan
    calib: Activations
    measured: Activations
    spread: list[float]  # standard deviation of the factors' binary logarithm, layer by layer
    errors: list[tuple[float, float]]  # of each layer's residual stream, before and after refinement


def convert(
    scheme: Scheme, source: Source, layerwise: LayerwiseModel, layer: nn.Module, eager: LayerKwargs
) -> MlaAttention:
    """The closed-form attention of a scheme in the place of a layer's own."""
    family = source.family
    stock = getattr(layer, family.attention)
    student = build_attention(mla_config(source, scheme.plan, torch.float32), stock, layerwise.device)
    if scheme.form != NORMED:
        prepare(student, scheme.form, scheme.calib, family.entry(layer))
        logs = torch.cat([
            (student.raw_factor(family.entry(layer)(scheme.calib.get(batch))) / student.mean).log2().flatten(0, 1)
            for batch in scheme.calib.batches()
        ])  # fmt: skip
        scheme.spread.append(float(logs.std(0).mean()))
    statistics = layer_statistics(layerwise, layer, scheme.calib, eager, student)
    rotation = layerwise.rotation(stock.layer_idx, eager)
    weights = factorise_layer(source, stock, statistics, scheme.plan.rank, scheme.plan.rope_dim, "by_loss", rotation)
    fill_attention(student, weights, family.freq_stride)
    return student


class _Memory:
    """Keeps the inputs of layers between the two passes of `sensitivities`."""

    def __init__(self):
        self.held: dict[str, Tensor] = {}

    def spill(self, file: str, tensor: Tensor) -> None:
        self.held[file] = tensor.clone()

    def load_spilled(self, file: str) -> Tensor:
        return self.held.pop(file)


def channel_costs(layerwise: LayerwiseModel, states: Activations, plan: Plan, seed: int) -> list[Tensor]:
    """E[g^2] (d,) of the loss's gradient at each layer's output, on a few of the embedded calibration windows."""
    length = min(states.length, WINDOW)
    count = max(1, TOKENS[layerwise.device.type] // length)
    few = Activations(states.data[:count, :length], layerwise.device, states.data.dtype)
    with torch.enable_grad():
        return sensitivities(layerwise, few, plan, seed, _Memory(), by_size=False).channels


def refine(
    student: MlaAttention, scheme: Scheme, layerwise: LayerwiseModel, layer: nn.Module, original: Activations,
    kwargs: LayerKwargs, curvature: Tensor, settings: RefineSettings,
) -> optimise.RefineResult:  # fmt: skip
    """Train one layer's attention towards the original's residual stream, as a conversion does with a layer alone.

    Args:
        student: trained in place.
        scheme: whose states before the layer it reads.
        layerwise: the source model.
        layer: of the source, with its own attention.
        original: the source's hidden states before the layer.
        kwargs: the layer's keyword arguments.
        curvature: E[g^2] (d,) at the layer's output.
        settings: of the refinement.
    """
    family = layerwise.source.family
    norm, after = family.entry(layer), family.exit(layer)
    teacher, own = (
        attention_forward(attention, norm, kwargs, layerwise.autocast, after)
        for attention in (getattr(layer, family.attention), student)
    )
    targets = optimise.residual_targets(teacher, original)
    distance = partial(optimise.relative_error, weight=optimise.channel_weights(curvature, targets))
    error = optimise.residual_error(own, scheme.calib, optimise.held_out_streams(teacher, scheme.calib), distance)
    with torch.enable_grad():
        settings = replace(settings, lr=optimise.step_size(settings.lr, error))
        return optimise.refine(student, own, scheme.calib, targets, settings, distance=distance)


def plans(config: ConvertConfig, source: Source, forms: list[str]) -> dict[str, Plan]:
    """Sizes of each scheme: those of a conversion, less the bytes of the factors."""
    shape, plan = source.shape, make_plan(config, source.shape)
    groups = 1 if source.family.qk_norm_shape == "all" else shape.num_kv_heads
    least = {form: -(-FORMS[form] * groups // ELEMENT) for form in forms if form != NORMED}
    full = plan.rank == shape.full_rank(plan.rope_dim)
    return {form: Plan(plan.rank if full else plan.rank - least.get(form, 0), plan.rope_dim, shape) for form in forms}


def evaluate(config: ConvertConfig, forms: list[str]) -> dict:
    """Pass the windows through the original and all schemes, layer by layer."""
    began, device = time.perf_counter(), environment.pick_device(config.device)
    source = open_source(config.source, config.revision)
    if not source.shape.normed or source.family.norm_after_rope:
        raise InputError(f"{source.name} has no norm on its keys before RoPE: there is nothing to compare")
    layerwise = LayerwiseModel(source, device)
    reach = texts.reach(source.config, learned=not source.family.rotary)
    windows = texts.load_windows(config, source.tokenizer(), device.type == "cuda", reach, source.shape.hidden_size)
    with environment.deterministic(config.seed):
        streams = open_streams(layerwise, windows.calib, windows.measured)
        own = {form: (streams.calib_original.clone(), streams.eval_original.clone()) for form in forms}
        schemes = [Scheme(form, plan, *own[form], [], []) for form, plan in plans(config, source, forms).items()]
        kwargs = {s.length: layerwise.layer_kwargs(s.length) for s in (streams.calib_original, streams.eval_original)}
        eager = attention_kwargs(layerwise, streams.calib_original.length)
        calib = streams.calib_original
        settings = refine_settings(config, device, (calib.total, calib.length), calib.hidden_size)
        costs = channel_costs(layerwise, calib, schemes[0].plan, config.seed) if settings.steps else None
        for index in range(source.shape.layers):
            with torch.no_grad(), layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
                advance = partial(_advance, layer, index, kwargs)
                stock = getattr(layer, source.family.attention)
                for scheme in schemes:
                    student = convert(scheme, source, layerwise, layer, eager[index])
                    if costs:
                        own = kwargs[calib.length][index]
                        errors = refine(student, scheme, layerwise, layer, calib, own, costs[index], settings)
                        scheme.errors.append((errors.error_before, errors.error_after))
                    setattr(layer, source.family.attention, student)
                    advance(scheme.calib)
                    advance(scheme.measured)
                    setattr(layer, source.family.attention, stock)
                advance(streams.eval_original)
                advance(calib)
            errors = {scheme.form: scheme.errors[-1] for scheme in schemes if scheme.errors}
            print(f"layer {index} {errors or ''}", file=sys.stderr, flush=True)
        last = streams.eval_original.data
        losses = [scores(layerwise, windows.measured, last, scheme.measured.data) for scheme in schemes]
        sections = [measure.perplexity_section(windows, each) for each in losses]
        found = {
            scheme.form: _result(scheme, section, each, losses[0])
            for scheme, section, each in zip(schemes, sections, losses, strict=True)
        }
    return to_json({
        "source": source.name, "schemes": found, "calibration": windows.calib_protocol(),
        "device": environment.device_name(device), "versions": environment.versions(),
        "seconds": round(time.perf_counter() - began, 2),
    })  # fmt: skip


def _result(scheme: Scheme, evaluation: EvaluationSection | NotEvaluated, own: Scores, first: Scores) -> dict:
    """Figures of a scheme; its perplexity over the first scheme's, and the difference of their KL, are of equal windows."""
    return {
        "rank": scheme.plan.rank, "rope_dim": scheme.plan.rope_dim,
        "octaves": sum(scheme.spread) / len(scheme.spread) if scheme.spread else None,
        "residual_errors": scheme.errors, "evaluation": evaluation,
        "perplexity_against_first": measure.ratio(own.losses, first.losses),
        "kl_less_first": measure.mean(own.kl - first.kl),
    }  # fmt: skip


def _advance(layer: nn.Module, index: int, kwargs: dict[int, list[LayerKwargs]], states: Activations) -> None:
    def forward(hidden: Tensor) -> Tensor:
        output = layer(hidden, **kwargs[states.length][index])
        return output[0] if isinstance(output, tuple) else output

    states.advance(forward)


def main() -> None:
    """Parse the options, measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source")
    for name, kind in (("kv-ratio", float), ("rope-dim", str), ("calib", str), ("calib-samples", int), ("calib-length", int),
                       ("calib-noise", float), ("eval", str), ("eval-windows", int), ("eval-length", int), ("seed", int),
                       ("device", str), ("revision", str), ("refine-batch", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--refine-steps", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=[NORMED, *FORMS], default=[NORMED, *FORMS])
    known, _ = parser.parse_known_args()
    forms = vars(known).pop("forms")
    try:
        print(json.dumps(evaluate(build_config(vars(known)), forms), indent=2))
    except MlaConvertError as error:
        sys.exit(f"unnormed_keys: {error}")


if __name__ == "__main__":
    main()
