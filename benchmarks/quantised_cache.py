"""The alternative to a conversion: the original with quantised keys and values in its cache.

    python benchmarks/quantised_cache.py MODEL --bits 4 --group 32 --hadamard --eval test.txt.gz

Keys (after RoPE) and values of all tokens are quantised and dequantised as attention reads them, on the same windows and the
same packaged suite as a conversion: INT with a scale and a zero point in float16 for every group of numbers of a head, or
FP8 (e4m3) with one scale for the keys, and one for the values, of a sequence and layer. `--hadamard` multiplies every head by an
orthonormal Hadamard matrix before quantisation and after dequantisation, which spreads outliers. The share of the cache counts
scales and zero points. quality.py runs this script; its output has the form of a report. `mla-convert eval --original-cache`
measures usual formats in the same way, this script any number of bits and any group.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, MlaConvertError
from mla_convert.core.original_cache import OriginalCacheFormat
from mla_convert.core.processes import alone
from mla_convert.core.recipes import build_config
from mla_convert.core.report_schema import to_json
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.evaluate.quality import suite
from mla_convert.evaluate.quality.original_cache import QuantisedCache
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.pipeline import original_cache, streamed
from mla_convert.pipeline.streams import embedded
from mla_convert.source import texts
from mla_convert.source.source import open_source


def evaluate(config: ConvertConfig, cache: OriginalCacheFormat) -> dict:
    """Pass evaluation windows and suite through the original twice, once with a quantised cache."""
    began, device = time.perf_counter(), environment.pick_device(config.device)
    phases = environment.Phases(device)
    with phases.phase("open"):
        source = open_source(config.source, config.revision)
        layerwise, tokenizer, shape = LayerwiseModel(source, device), source.tokenizer(), source.shape
        if cache.group and cache.group_of(shape.head_dim) != cache.group:
            raise InputError(f"heads of {shape.head_dim} numbers do not come in groups of {cache.group}")
        original_cache.check_attention(layerwise)
        reach = texts.reach(source.config, learned=not source.family.rotary)
        windows = texts.load_windows(config, tokenizer, device.type == "cuda", reach, shape.hidden_size)
        kinds = suite.suite_of(tokenizer, config.suite_windows, device.type == "cuda", windows.evaluation)
    function = QuantisedCache(cache, layerwise.implementation)
    every = [windows.measured, *([kinds.windows] if kinds else [])]
    with environment.deterministic(config.seed), phases.phase("layers"):
        before, after = ([embedded(layerwise, each, alone(device)) for each in every] for _ in range(2))
        original_cache.run_original(layerwise, before, None)
        original_cache.run_original(layerwise, after, function)
        function.check(len(shape.caching_layers), source.name)
    with phases.phase("evaluate"):
        first, *rest = [
            streamed.scores(layerwise, text, one.data, other.data)
            for text, one, other in zip(every, before, after, strict=True)
        ]
        found = measure.perplexity_section(windows, first)
        if kinds:
            found.suite = suite.suite_section(kinds, rest[0])
    share = function.share(2)  # of a bfloat16 cache
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
        config = build_config({**known, "calib_samples": 1, "calib_length": 32})
        print(json.dumps(evaluate(config, OriginalCacheFormat(bits, group, turned)), indent=2))
    except MlaConvertError as error:
        sys.exit(f"quantised_cache: {error}")


if __name__ == "__main__":
    main()
