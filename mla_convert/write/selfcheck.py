"""Tries what was written: loads a folder as its users will, and has it generate with and without a KV cache.

A cache that is not found, or a mask that is read the wrong way round, shows in no perplexity; it shows here. The Python files
of the folder are run, if they are this version's own; no other code from a folder ever is.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from mla_convert.core.errors import MlaConvertError, ResourceError, one_line
from mla_convert.core.runtime import device_name, versions
from mla_convert.modeling import modeling_mla
from mla_convert.modeling.shipped_code import code_files
from mla_convert.source.load_model import is_converted, quietly
from mla_convert.source.source import load_config

# Tokens of the prompt and generated: more and fewer than the number of queries up to which attention is absorbed.
PROMPT, NEW = modeling_mla.MAX_ABSORBED_QUERIES + 4, 6
# Logits with and without a cache may differ by this share of their range: what rounding comes to, and no more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
# A model of up to this many bytes is tried in float32 on a CPU, where half precision is slow and coarse.
WIDENED = 2 << 30
# Share of the free memory that a trial may take. Of a larger model as many layers are tried as fit.
SHARE = 0.6
CACHES = ("dynamic", "static")


class SelfCheckFailed(MlaConvertError):  # noqa: N818  (a verdict)
    """What was written does not do what it should. Nothing appears under the output's name."""


def self_check(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load the model in `folder` and generate greedily: without a cache, with a dynamic and with a static one.

    Two prompts, one of them padded on the left. With a cache each step's logits must be those without, but for rounding, and
    the cache must hold every token once, in the numbers that the configuration states. A model that does not fit the
    memory that is free is tried with its first layers alone.

    Returns:
        What report.json says of it: tokens generated, layers tried of how many, the largest difference of a logit as a share of
        their range, dtype, device, seconds, versions.

    Raises:
        SelfCheckFailed: the model cannot be loaded or run, or a cache changes what it says.
        ResourceError: not even one layer fits.
    """
    began, device = time.perf_counter(), torch.device(device)
    try:
        with quietly(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model, layers, total = _load(folder, device)
            difference = _compare(model)
    except MlaConvertError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"self-check: not enough memory on {device} to try what was written") from error
    except Exception as error:  # whatever a model runs into is what its users would run into
        raise SelfCheckFailed(_failed(f"cannot be used: {type(error).__name__}: {one_line(error)}")) from error
    return {
        "passed": True,
        "caches": list(CACHES),
        "tokens": NEW,
        "layers": layers,
        "of_layers": total,
        "largest_difference": difference,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "seconds": round(time.perf_counter() - began, 2),
        "versions": versions(),
    }


def _failed(what: str) -> str:
    found = versions()
    return (
        f"self-check: the model that was written {what} (mla_convert {found.get('mla_convert')}, transformers "
        f"{found.get('transformers')}, torch {found.get('torch')})"
    )


def own_code(folder: Path) -> list[str]:
    """Names of the Python files in a folder, if they are, byte for byte, this version's for converted or exported models."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.py") if path.is_file()}
    return sorted(files) if files in (code_files(), code_files(exported=True)) else []


def _load(folder: Path, device: torch.device) -> tuple[Any, int, int]:
    """The model, with as many of its layers as fit; how many these are, and of how many."""
    config, loader = _classes(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    widen = device.type == "cpu" and size <= WIDENED
    needed = size * 4 // stored.itemsize if widen else size
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    total = config.num_hidden_layers
    layers = total if needed <= free * SHARE else int(total * free * SHARE / needed)
    if layers < 1:
        raise ResourceError(f"self-check: {free / 1e9:.1f} GB are free on {device}, and a layer needs more")
    if layers < total:
        _shorten(config, layers)
    model, info = loader.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32 if widen else stored,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,  # else transformers asks on stdin whether to run code that is not ours
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise SelfCheckFailed(_failed(f"lacks tensor {min(info['missing_keys'])}"))
    return model.eval().requires_grad_(False).to(device), layers, total


def _classes(folder: Path) -> tuple[PreTrainedConfig, Any]:
    """The configuration of a folder, and the class that loads its model: the folder's own code, where it is ours."""
    code = own_code(folder)
    if not code:
        return load_config(folder, folder.name), AutoModelForCausalLM
    modules = _import_package(folder, code)
    auto = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    file, _, name = auto["AutoModelForCausalLM"].partition(".")
    model = getattr(modules[file], name)
    return model.config_class.from_pretrained(folder), model


def _import_package(folder: Path, code: list[str]) -> dict[str, Any]:
    """The modules of a folder, as parts of a package of their own, by name: as transformers imports them."""
    name = "mla_checked"
    for known in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[known]
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    package.__path__ = [str(folder.resolve())]
    sys.modules[name] = package
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder gets no file that it is not to have
    try:
        stems = [file.removesuffix(".py") for file in code]
        return {stem: importlib.import_module(f"{name}.{stem}") for stem in stems}
    finally:
        sys.dont_write_bytecode = writes


def _shorten(config: PreTrainedConfig, layers: int) -> None:
    """Let a configuration describe the first layers alone."""
    total = config.num_hidden_layers
    config.num_hidden_layers = layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, value[:layers])


@torch.no_grad()
def _compare(model: Any) -> float:
    """The largest difference that a cache makes to a logit, as a share of the logits' range."""
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    length = max(2, min(PROMPT, room - NEW))
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = 0
    prompt = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    alone, _ = _generate(model, prompt, use_cache=False)
    if not all(logits.isfinite().all() for _, logits in alone):
        raise SelfCheckFailed(_failed("gives logits that are not finite"))
    worst = 0.0
    for kind in CACHES:
        steps, cache = _generate(
            model, prompt, use_cache=True, **({} if kind == "dynamic" else {"cache_implementation": kind})
        )
        worst = max(worst, _difference(kind, alone, steps, TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])))
        _check_held(model, cache, kind, length + len(steps) - 1)
    return worst


def _generate(model: Any, prompt: dict[str, Tensor], **options: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Each greedy step's tokens (2,) and logits (2, vocabulary), float32; and the cache."""
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0, disable_compile=True,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    before, model.generation_config = model.generation_config, settings
    try:
        output = model.generate(**prompt, generation_config=settings)
    finally:
        model.generation_config = before
    tokens = output.sequences[:, prompt["input_ids"].shape[1] :].unbind(1)
    cache = getattr(output, "cache", None)
    return list(zip(tokens, (logits.float() for logits in output.logits), strict=True)), (
        output.past_key_values if cache is None else cache
    )


def _difference(
    kind: str, alone: list[tuple[Tensor, Tensor]], steps: list[tuple[Tensor, Tensor]], tolerance: float
) -> float:
    """Compare step by step, each text until its tokens part, which rounding allows where two tokens are level."""
    together, worst = torch.ones_like(alone[0][0], dtype=torch.bool), 0.0
    for number, ((token, logits), (other, found)) in enumerate(zip(alone, steps, strict=True)):
        if not together.any():
            break
        apart = (
            ((found - logits).abs().amax(-1) / (logits.amax(-1) - logits.amin(-1)).clamp_min(1e-30))[together]
            .max()
            .item()
        )
        if not apart <= tolerance:
            raise SelfCheckFailed(
                _failed(
                    f"says something else with its {kind} cache than without one: at token {number + 1} logits differ by "
                    f"{apart:.1%} of their range"
                )
            )
        worst, together = max(worst, apart), together & (token == other)
    return worst


def _check_held(model: Any, cache: Any, kind: str, tokens: int) -> None:
    """The cache must hold each token once and, in a converted model, the numbers that its configuration states."""
    held = cache.get_seq_length()
    if int(held) != tokens:
        raise SelfCheckFailed(_failed(f"keeps {held} tokens in its {kind} cache, where {tokens} were read"))
    if not is_converted(model.config):
        return
    for index, layer in enumerate(itertools.islice(cache.layers, model.config.num_hidden_layers)):
        widths = layer.keys.shape[1] * layer.keys.shape[-1], layer.values.shape[1] * layer.values.shape[-1]
        wanted = model.config.layer_rank(index), model.config.layer_rope_dim(index)
        if widths != wanted:
            raise SelfCheckFailed(_failed(f"caches {widths} numbers a token in layer {index}, where {wanted} are due"))
