"""The alternative to a conversion: the original with quantised keys and values in its cache.

    python benchmarks/quantised_cache.py MODEL --bits 4 --group 32 --hadamard --eval test.txt.gz

Keys (after RoPE) and values of all tokens are quantised and dequantised as attention reads them, on the same windows and the
same packaged suite as a conversion: INT with a scale and a zero point in float16 for every group of numbers of a head, or
FP8 (e4m3) with one scale for all keys, and one for all values, of a layer. `--hadamard` multiplies every head by an orthonormal
Hadamard matrix before quantisation and after dequantisation, which spreads outliers. The share of the cache counts scales and
zero points. quality.py runs this script; its output has the form of a report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, MlaConvertError
from mla_convert.core.recipes import build_config
from mla_convert.core.report_schema import to_json
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.evaluate.quality import suite
from mla_convert.method.calibrate.layerwise import LayerwiseModel, first_output
from mla_convert.modeling.quantised_latent_mla import spreading
from mla_convert.pipeline import streamed
from mla_convert.pipeline.streams import open_streams
from mla_convert.source import texts
from mla_convert.source.source import open_source

NAME = "quantised_cache"
# The largest number of float8_e4m3fn.
FP8_LARGEST = 448.0


def bytes_share(bits: int, group: int) -> float:
    """Share of a bfloat16 cache; FP8's two scales per layer are not counted."""
    return bits / 16 if bits == 8 and not group else (bits + 2 * 16 / group) / 16


def quantised(values: Tensor, bits: int, group: int) -> Tensor:
    """Keys or values (B, heads, T, d_h), quantised and dequantised; `group` 0 is FP8."""
    if not group:
        scale = values.abs().amax().clamp_min(1e-12) / FP8_LARGEST
        return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale
    grouped = values.float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    # Scale and zero point are rounded as the cache stores them.
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    steps = ((grouped - low) / scale).round().clamp(0, 2**bits - 1)
    return (steps * scale + low).flatten(-2).to(values.dtype)


def attention(bits: int, group: int, turned: bool, stock: str):
    """An attention function as transformers calls it: the one named `stock`, on quantised keys and values."""

    def restored(values: Tensor) -> Tensor:
        if not turned:
            return quantised(values, bits, group)
        turn = spreading(values.shape[-1]).to(values)  # of a power of two: a Hadamard matrix, which is symmetric
        return quantised(values @ turn, bits, group) @ turn

    def forward(module, query, key, value, attention_mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS[stock](module, query, restored(key), restored(value), attention_mask, **kwargs)

    return forward


def evaluate(config: ConvertConfig, bits: int, group: int, turned: bool) -> dict:
    """Pass evaluation windows and suite through the original twice, once with a quantised cache."""
    began, device = time.perf_counter(), environment.pick_device(config.device)
    phases = environment.Phases(device)
    with phases.phase("open"):
        source = open_source(config.source, config.revision)
        layerwise, tokenizer, shape = LayerwiseModel(source, device), source.tokenizer(), source.shape
        width = shape.head_dim
        if (group and width % group) or (turned and width & (width - 1)):
            raise InputError(f"heads of {width} numbers do not come in groups of {group}, or have no Hadamard matrix")
        if layerwise.implementation != "sdpa":
            raise InputError(f"{source.name} has its attention written out: its keys cannot be intercepted")
        reach = texts.reach(source.config, learned=not source.family.rotary)
        windows = texts.load_windows(config, tokenizer, device.type == "cuda", reach, shape.hidden_size)
        kinds = suite.suite_of(tokenizer, config.suite_windows, device.type == "cuda", windows.evaluation)
    ALL_ATTENTION_FUNCTIONS[NAME] = attention(bits, group, turned, layerwise.implementation)
    with environment.deterministic(config.seed), phases.phase("layers"):
        # Nothing is calibrated: one window stands in for the calibration windows.
        streams = open_streams(layerwise, windows.calib[:1], windows.measured, kinds and kinds.windows)
        pairs = list(zip(streams.measured_original, streams.measured_converted, strict=True))
        kwargs = {states.length: layerwise.layer_kwargs(states.length) for states, _ in pairs}
        for index in range(shape.layers):
            with layerwise.layer(index, layerwise.layer_tensors(index)) as layer, torch.no_grad(), layerwise.autocast():
                for original, compressed in pairs:
                    own = kwargs[original.length][index]
                    original.advance(lambda hidden, own=own, layer=layer: first_output(layer(hidden, **own)))
                    with layerwise.attention(NAME):
                        compressed.advance(lambda hidden, own=own, layer=layer: first_output(layer(hidden, **own)))
    with phases.phase("evaluate"):
        found = measure.perplexity_section(
            windows,
            streamed.scores(layerwise, windows.measured, streams.eval_original.data, streams.eval_converted.data),
        )
        if kinds:
            states = streams.suite_original.data, streams.suite_converted.data
            found.suite = suite.suite_section(kinds, streamed.scores(layerwise, kinds.windows, *states))
    share = bytes_share(bits, group)
    return to_json({
        "cache": {"numbers_per_token_per_layer": {"after": share * shape.cache_width}, "kv_lora_rank": 0, "qk_rope_head_dim": 0,
                  "share_saved": 1 - share},
        "evaluation": found, "calibration": {"protocol": "nothing"},
        "phases": phases.results, "device": environment.device_name(device), "versions": environment.versions(),
        "seconds": round(time.perf_counter() - began, 2),
    })  # fmt: skip


def main() -> None:
    """Parse the options, measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source")
    parser.add_argument("--bits", type=int, required=True, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=0, help="numbers with one scale; 0: FP8")
    parser.add_argument("--hadamard", action="store_true")
    for name, kind in (("eval", str), ("eval-windows", int), ("eval-length", int), ("suite-windows", int), ("device", str),
                       ("revision", str), ("seed", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    known = vars(parser.parse_known_args()[0])
    bits, group, turned = (known.pop(name) for name in ("bits", "group", "hadamard"))
    try:
        if not group and bits != 8:
            raise InputError("FP8 has 8 bits: give --group for another number of bits")
        print(
            json.dumps(
                evaluate(build_config({**known, "calib_samples": 1, "calib_length": 32}), bits, group, turned), indent=2
            )
        )
    except MlaConvertError as error:
        sys.exit(f"quantised_cache: {error}")


if __name__ == "__main__":
    main()
