"""Loss of the low rank alone, the upper reference of quality.py: one latent for keys and values, with RoPE kept.

Keys are restored from the latent before they are rotated, so RoPE is not decoupled and loses nothing. The latent has to be
expanded for every cached token: the scheme cannot be absorbed, and no checkpoint is written. The latent minimises the expected
error of the attention output under the rotations at its rank, in closed form, from the statistics of a conversion. It takes
the whole budget, because no rotary key is cached. Options of a conversion that do not apply are ignored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import Tensor, nn

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, MlaConvertError
from mla_convert.core.recipes import build_config
from mla_convert.core.report_schema import to_json
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.method.calibrate.attention_forward import attention_kwargs
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel, Rotation
from mla_convert.method.calibrate.statistics import Statistics, layer_statistics
from mla_convert.method.factorise.layer import half_split, source_weights
from mla_convert.method.factorise.sizes import Plan, make_plan
from mla_convert.method.factorise.svd import _affine, _key_cost, _latent, _logit_cost, _moments
from mla_convert.pipeline import streamed
from mla_convert.pipeline.streams import open_streams
from mla_convert.report.report import cache_section
from mla_convert.source import texts
from mla_convert.source.source import Source, open_source


def rotated_mean(cost: Tensor, statistics: Statistics) -> Tensor:
    """E[R_D cost R_D^T] over the distances D at which each head attends: (H, d_h, d_h).

    R_D rotates by D positions. A query D positions after a key sees an error e of the key as R_D^T e.
    """
    distance, total = statistics.distance.double(), torch.zeros_like(cost)
    for steps in range(distance.shape[1]):
        angle = statistics.inv_freq.double() * steps
        turn = torch.cat([torch.cat([angle.cos().diag(), -angle.sin().diag()], 1),
                          torch.cat([angle.sin().diag(), angle.cos().diag()], 1)])  # fmt: skip
        total += distance[:, steps, None, None] * (turn @ cost @ turn.mT)
    return total


@torch.no_grad()
def compress(source: Source, attention: nn.Module, statistics: Statistics, rank: int, rotation: Rotation) -> None:
    """Replace the stock attention's key and value projections by those of the best joint latent of that rank."""
    shape, family = source.shape, source.family
    weights = source_weights(attention, family, shape, 2 * rotation.num_rotary_freqs)
    q, k, v = (_affine(getattr(weights, n), getattr(weights, n + "_bias")) for n in "qkv")
    q_heads, v_heads = q.view(shape.num_heads, shape.head_dim, -1), v.view(shape.num_kv_heads, shape.head_dim, -1)
    o_heads = weights.o.double().view(-1, shape.num_heads, shape.head_dim).transpose(0, 1)
    # The closed form is a conversion's own, private parts included: the two are to differ in RoPE alone.
    moment, tokens = _moments(statistics)
    # The constant column, last, has no place in a projection without a bias.
    columns = slice(None if shape.has_kv_bias else -1)
    rows, tokens = torch.cat([k, v])[:, columns], tokens[columns, columns]
    key_cost = _key_cost(q_heads, moment, attention.scaling**2 * _logit_cost(v_heads, o_heads, moment))
    costs = [rotated_mean(key_cost, statistics), o_heads.mT @ o_heads]
    blocks = [block for cost in costs for block in cost.unflatten(0, (shape.num_kv_heads, -1)).sum(1)]
    encode, decode, *_ = _latent(rows @ tokens @ rows.T, torch.block_diag(*blocks), rank)
    k, v = (decode @ (encode @ rows)).chunk(2)
    # in the order of rows of the stock module
    order = half_split(shape.head_dim, 2 * rotation.num_rotary_freqs, family.interleaved).argsort().to(k.device)
    k = k.unflatten(0, (-1, shape.head_dim))[:, order].flatten(0, 1)
    for name, found in (("k", k), ("v", v)):
        projection = getattr(attention, family.projections[name])
        projection.weight.copy_(found[:, : projection.in_features])
        if projection.bias is not None:
            projection.bias.copy_(found[:, -1])


def evaluate(config: ConvertConfig) -> dict:
    """Pass calibration and evaluation windows through the original and the compressed model, layer by layer."""
    began, device = time.perf_counter(), environment.pick_device(config.device)
    phases = environment.Phases(device)
    with phases.phase("open"):
        source = open_source(config.source, config.revision)
        shape, layerwise = source.shape, LayerwiseModel(source, device)
        if shape.normed or source.family.fused:
            raise InputError(
                f"{source.name} has fused or normed keys: this reference needs their own linear projections"
            )
        plan = make_plan(config, shape)
        plan = Plan(plan.cache_width, 0, shape)
        model = texts.reach(source.config, learned=not source.family.rotary)
        windows = texts.load_windows(config, source.tokenizer(), device.type == "cuda", model, shape.hidden_size)
    with environment.deterministic(config.seed), phases.phase("layers"):
        streams = open_streams(layerwise, windows.calib, windows.measured)
        originals = (streams.calib_original, streams.eval_original)
        compressed = (streams.calib_converted, streams.eval_converted)
        kwargs = {states.length: layerwise.layer_kwargs(states.length) for states in originals}
        eager = attention_kwargs(layerwise, streams.calib_original.length)

        def advance(layer: nn.Module, index: int, several: tuple[Activations, ...]) -> None:
            for states in several:
                with torch.no_grad(), layerwise.autocast():
                    own = kwargs[states.length][index]
                    states.advance(lambda hidden, own=own: _first(layer(hidden, **own)))

        for index in range(shape.layers):
            with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
                advance(layer, index, originals)
                # On the compressed model's own states, as in a conversion.
                statistics = layer_statistics(layerwise, layer, streams.calib_converted, eager[index])
                rotation = layerwise.rotation(index, eager[index])
                compress(source, getattr(layer, source.family.attention), statistics, plan.rank, rotation)
                advance(layer, index, compressed)
    with phases.phase("evaluate"):
        losses = streamed.scores(layerwise, windows.measured, originals[1].data, compressed[1].data)
    return to_json({
        "cache": cache_section(plan, source.dtype.itemsize, source.sliding_windows),
        "evaluation": measure.perplexity_section(windows, losses), "calibration": {"protocol": windows.calib_protocol()},
        "phases": phases.results, "device": environment.device_name(device), "versions": environment.versions(),
        "seconds": round(time.perf_counter() - began, 2),
    })  # fmt: skip


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def main() -> None:
    """Parse the options, measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source")
    for name, kind in (("kv-ratio", float), ("calib", str), ("calib-samples", int), ("calib-length", int), ("calib-noise", float),
                       ("eval", str),
                       ("eval-windows", int), ("eval-length", int), ("seed", int), ("device", str),
                       ("revision", str)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    known, _ = parser.parse_known_args()
    try:
        print(json.dumps(evaluate(build_config(vars(known))), indent=2))
    except MlaConvertError as error:
        sys.exit(f"low_rank_reference: {error}")


if __name__ == "__main__":
    main()
