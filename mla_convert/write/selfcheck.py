"""Self-check of a written folder: load it as its users do, and generate with and without a KV cache.

Perplexity does not reveal a cache that is ignored or a mask that is inverted; this check does. The Python files in the folder
are run only if they are exactly those of this version.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from mla_convert.core.errors import MlaConvertError, ResourceError, one_line
from mla_convert.core.runtime import device_name, versions
from mla_convert.modeling.attention_mla import MAX_ABSORBED_QUERIES
from mla_convert.modeling.latent_format_mla import layer_format
from mla_convert.modeling.shipped_code import code_files
from mla_convert.source.load_model import is_converted, quietly
from mla_convert.source.shape import converted_layers
from mla_convert.source.source import load_config

# Tokens of the prompt (more queries than absorbed attention takes) and tokens to generate (fewer).
PROMPT, NEW = MAX_ABSORBED_QUERIES + 4, 6
# Largest difference of logits with and without a cache, relative to their range: that of rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
# A model can carry the rounding of half precision to any size at single tokens: of 60 prompts of random tokens, eight differed by
# 17% to 45% of the range at one of six tokens, by 1.6% in the median, and by at most 0.013% in float32 (Qwen2.5-Coder-1.5B,
# converted, bfloat16). So the median decides there, and the largest difference is tried again in float32.
# A quantised cache may differ by this many times what its rounding changes, up to a limit that a wrong mask exceeds. A code at
# a tie falls either way, later layers carry the difference on, and two roundings of the same numbers are about 1.4 times as
# far from each other as from these.
ROUNDINGS, MOST_ROUNDING = 2.0, 0.25
# A model of at most this many bytes is checked in float32 on a CPU, where half precision is slow and inaccurate.
WIDENED = 2 << 30
# Fraction of the free memory that the check may use. Of a larger model, as many layers are checked as fit.
SHARE = 0.6
CACHES = ("dynamic", "static")


class SelfCheckFailed(MlaConvertError):  # noqa: N818  (a verdict)
    """The written model fails its self-check. No folder of the output's name is made."""


def self_check(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load the model in `folder` and generate greedily: without a cache, with a dynamic one and with a static one.

    There are two prompts, one of them padded on the left. With a cache, each step's logits must equal those without it to
    rounding, that of a quantised cache included, and the cache must hold every token once, with the widths of the
    configuration. In half precision single steps may differ by more, if the same steps are equal in float32. Of a model that
    does not fit the free memory, only the first layers are checked.

    Returns:
        The section of report.json: tokens generated, layers checked and in all, largest difference of a logit relative to their
        range, the same in float32 where that decided, dtype, device, seconds, versions.

    Raises:
        SelfCheckFailed: the model cannot be loaded or run, or a cache changes its logits.
        ResourceError: not even one layer fits.
    """
    began, device = time.perf_counter(), torch.device(device)
    try:
        with quietly(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model, layers, total = _load(folder, device)
            dtype, found = model.dtype, _compare(model)
            if found.needs_float32:
                del model
                found = replace(found, in_float32=_compare(_load(folder, device, torch.float32)[0]).largest)
    except MlaConvertError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"self-check: not enough memory on {device} to try what was written") from error
    except Exception as error:  # any error here would be its users'
        raise SelfCheckFailed(_failed(f"cannot be used: {type(error).__name__}: {one_line(error)}")) from error
    return {
        "passed": True,
        "caches": list(CACHES),
        "tokens": NEW,
        "layers": layers,
        "of_layers": total,
        "largest_difference": found.largest,
        **({} if found.in_float32 is None else {"float32_difference": found.in_float32}),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "seconds": round(time.perf_counter() - began, 2),
        "versions": versions(),
    }


def _failed(what: str) -> str:
    used = versions()
    return (
        f"self-check: the model that was written {what} (mla_convert {used.get('mla_convert')}, transformers "
        f"{used.get('transformers')}, torch {used.get('torch')})"
    )


def own_code(folder: Path) -> list[str]:
    """Names of the Python files in a folder if they are exactly this version's for converted or exported models, else none."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.py") if path.is_file()}
    return sorted(files) if files in (code_files(), code_files(exported=True)) else []


def _load(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, int, int]:
    """The model with as many of its layers as fit, the number of these layers, and the number of all layers."""
    config, loader = _classes(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype = dtype or (torch.float32 if device.type == "cpu" and size <= WIDENED else stored)
    needed = size * max(dtype.itemsize, stored.itemsize) // stored.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    total = config.num_hidden_layers
    layers = total if needed <= free * SHARE else int(total * free * SHARE / needed)
    if getattr(config.get_text_config(), "hidden_size_per_layer_input", None):
        layers = total  # one table has a part for each layer
    if layers < 1 + min(converted_layers(config)):
        raise ResourceError(f"self-check: {free / 1e9:.1f} GB are free on {device}, and a layer needs more")
    if layers < total:
        _shorten(config, layers)
    model, info = loader.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,  # else transformers asks on stdin whether to run foreign code
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise SelfCheckFailed(_failed(f"lacks tensor {min(info['missing_keys'])}"))
    return model.eval().requires_grad_(False).to(device), layers, total


def _classes(folder: Path) -> tuple[PreTrainedConfig, Any]:
    """The configuration of a folder and the class that loads its model: from the folder's code if it is this version's."""
    code = own_code(folder)
    if not code:
        return load_config(folder, folder.name), AutoModelForCausalLM
    auto = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    file, _, name = auto["AutoModelForCausalLM"].partition(".")
    model = getattr(_import_package("mla_checked", folder, code)[file], name)
    if "AutoConfig" not in auto:
        return model.config_class.from_pretrained(folder), model
    # From a local folder transformers imports the file with the configuration a second time, as another module.
    file, _, name = auto["AutoConfig"].partition(".")
    config = getattr(_import_package("mla_checked_config", folder, code)[file], name)
    return config.from_pretrained(folder), model


def _import_package(name: str, folder: Path, code: list[str]) -> dict[str, Any]:
    """Import the modules of a folder as a package of a name, as transformers does; returns them by their own names."""
    # Another folder may have been checked in this process, and a second import would give its code.
    for known in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[known]
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    package.__path__ = [str(folder.resolve())]
    sys.modules[name] = package
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ in the folder
    try:
        stems = [file.removesuffix(".py") for file in code]
        return {stem: importlib.import_module(f"{name}.{stem}") for stem in stems}
    finally:
        sys.dont_write_bytecode = writes


def _shorten(config: PreTrainedConfig, layers: int) -> None:
    """Make a configuration describe only the first layers."""
    config = config.get_text_config()
    total = config.num_hidden_layers
    config.num_hidden_layers = layers
    if shared := getattr(config, "num_kv_shared_layers", 0):  # the last ones
        config.num_kv_shared_layers = max(0, layers - (total - shared))
    for key, value in list(vars(config).items()):
        # Ranks, kinds of attention and the like have an entry for every layer.
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, value[:layers])


@dataclass(frozen=True)
class _Difference:
    """The largest difference of a logit with and without a cache, relative to the logits' range."""

    largest: float
    needs_float32: bool = False
    in_float32: float | None = None


@torch.no_grad()
def _compare(model: Any) -> _Difference:
    """Generate with and without a cache.

    Raises:
        SelfCheckFailed: rounding does not explain the difference, or the cache does not hold what it has to.
    """
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    # A model's context has to hold the prompt and the generated tokens.
    length = max(2, min(PROMPT, room - NEW))
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = 0
    prompt = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    alone, _ = _generate(model, prompt, use_cache=False)
    if not all(logits.isfinite().all() for _, logits in alone):
        raise SelfCheckFailed(_failed("gives logits that are not finite"))
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    tolerance = max(tolerance, min(ROUNDINGS * _rounding(model, prompt, alone), MOST_ROUNDING))
    found = []
    for kind in CACHES:
        steps, cache = _generate(
            model, prompt, use_cache=True, **({} if kind == "dynamic" else {"cache_implementation": kind})
        )
        found.append(_checked_difference(kind, alone, steps, tolerance, model.dtype != torch.float32))
        _check_held(model, cache, kind, length + len(steps) - 1)
    return max(found, key=lambda each: each.largest)


def _generate(model: Any, prompt: dict[str, Tensor], **options: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Tokens (2,) and float32 logits (2, vocabulary) of each greedy step, and the cache."""
    # Without an end token all steps are compared; compiling for a static cache would take longer than the check.
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0, disable_compile=True,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    # `generate` takes from the model's settings what the given ones leave open.
    before, model.generation_config = model.generation_config, settings
    try:
        output = model.generate(**prompt, generation_config=settings)
    finally:
        model.generation_config = before
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :].unbind(1)
    # Its name depends on the version of transformers.
    cache = getattr(output, "cache", None)
    return list(zip(tokens, (logits.float() for logits in output.logits), strict=True)), (
        output.past_key_values if cache is None else cache
    )


def _rounding(model: Any, prompt: dict[str, Tensor], alone: list[tuple[Tensor, Tensor]]) -> float:
    """What a quantised cache's rounding changes in `alone`, the texts that were made with it; 0 without such a cache."""
    quantised = [module for module in model.modules() if getattr(module, "latent_format", None) is not None]
    if not quantised:
        return 0.0
    formats = [module.latent_format for module in quantised]
    try:
        for module in quantised:
            module.latent_format = None
        exact, _ = _generate(model, prompt, use_cache=False)
    finally:
        for module, form in zip(quantised, formats, strict=True):
            module.latent_format = form
    return max(filter(math.isfinite, _differences(alone, exact)), default=0.0)


def _differences(alone: list[tuple[Tensor, Tensor]], steps: list[tuple[Tensor, Tensor]]) -> Iterator[float]:
    """Largest difference of a step's logits, relative to their range, step by step.

    Each text is compared until its tokens differ, which rounding can cause between equal logits.
    """
    together = torch.ones_like(alone[0][0], dtype=torch.bool)
    for (token, logits), (other, found) in zip(alone, steps, strict=True):
        if not together.any():
            return
        apart = (found - logits).abs().amax(-1) / (logits.amax(-1) - logits.amin(-1)).clamp_min(1e-30)
        yield apart[together].max().item()
        together &= token == other


def _checked_difference(
    kind: str, alone: list[tuple[Tensor, Tensor]], steps: list[tuple[Tensor, Tensor]], tolerance: float, half: bool
) -> _Difference:
    """The largest of `_differences`; in half precision it may be above the tolerance, and their median may not.

    Raises:
        SelfCheckFailed: a difference is above the tolerance.
    """
    # The first step reads the prompt alone, with a cache as without one.
    prompt, *later = _differences(alone, steps)
    typical = median(later) if half and later else math.inf
    for number, apart in enumerate([prompt, *later]):
        # Negated, so that NaN fails as well: no comparison with it holds.
        if not apart <= tolerance and not (math.isfinite(apart) and typical <= tolerance):
            raise SelfCheckFailed(
                _failed(
                    f"says something else with its {kind} cache than without one: at token {number + 1} logits differ by "
                    f"{apart:.1%} of their range, where rounding explains {tolerance:.1%}"
                )
            )
    largest = max([prompt, *later])
    return _Difference(largest, largest > tolerance)


def _check_held(model: Any, cache: Any, kind: str, tokens: int) -> None:
    """Check that the cache holds each token once and, in a converted model, has the widths of the configuration."""
    held = cache.get_seq_length()
    if int(held) != tokens:
        raise SelfCheckFailed(_failed(f"keeps {held} tokens in its {kind} cache, where {tokens} were read"))
    if not is_converted(model.config):
        return
    for index in model.config.caching_layers():
        layer = cache.layers[index]
        widths = layer.keys.shape[1] * layer.keys.shape[-1], layer.values.shape[1] * layer.values.shape[-1]
        row = layer_format(model.config, index)
        stated = (row.row_bytes, 0) if row else (model.config.layer_rank(index), model.config.layer_rope_dim(index))
        if widths != stated or (row and layer.keys.dtype != torch.uint8):
            raise SelfCheckFailed(
                _failed(f"caches {widths} elements a token in layer {index}, and its configuration states {stated}")
            )
