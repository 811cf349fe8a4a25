"""How fast a model decodes and reads prompts, what its cache takes, and how many sequences fit: measured, on this machine.

A step is the whole model for one new token of every sequence: embedding, layers, head, most likely token. The cache holds
`context` tokens of random numbers, written in place, of which the step writes the last. On CUDA a step is one CUDA graph.
Speed does not depend on the values of weights, so random ones serve.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from mla_convert.core.cuda_graph import CapturedCall
from mla_convert.core.errors import ResourceError, UsageError
from mla_convert.core.runtime import device_name, versions
from mla_convert.evaluate.speed.models import full_cache, held_bytes, read_bytes, token_bytes
from mla_convert.modeling.attention_backends import GROUPED
from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.decode_mla import kernel_refusal
from mla_convert.modeling.modeling_mla import MlaAttention
from mla_convert.source.load_model import is_converted

WARM_UPS, STEPS = 3, 64
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass
class DecodeTiming:
    """Decoding at one context and batch; times in milliseconds, rates in bytes a second."""

    context: int
    batch: int
    largest: bool
    cache_bytes: int
    tokens_per_second: float
    p50_ms: float
    p99_ms: float
    bytes_per_second: float
    share_of_copy: float
    cost_per_million: float | None = None


@dataclass
class PrefillTiming:
    """Reading one prompt; milliseconds."""

    tokens: int
    batch: int
    p50_ms: float
    tokens_per_second: float


@dataclass
class ModelTiming:
    """All that is measured of one model."""

    name: str
    converted: bool
    weight_bytes: int
    cache_bytes_per_token: int
    attention: str
    points: list[DecodeTiming] = field(default_factory=list)
    prompts: list[PrefillTiming] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@contextmanager
def _memory_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let torch take at most `limit` bytes of the card."""
    if device.type != "cuda" or not limit:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def times_ms(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls."""
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1e3)
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    size = 2 << 30 if device.type == "cuda" else 64 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(times_ms(lambda: target.copy_(source), device, 9)) * 1e3


def _fastest_backend(config: PreTrainedConfig, cache: Cache) -> SDPBackend:
    """The backend of scaled_dot_product_attention that is fastest on this cache, for the original's sake."""
    layer = cache.layers[0]
    if layer.device.type != "cuda":
        return SDPBackend.MATH
    batch, heads, _, width = layer.keys.shape
    query = torch.randn(
        batch, heads, config.num_attention_heads // heads, width, dtype=layer.dtype, device=layer.device
    )
    found = []
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                run = lambda: F.scaled_dot_product_attention(query, layer.keys, layer.values)  # noqa: E731
                times_ms(run, layer.device, 2)
                found.append((statistics.median(times_ms(run, layer.device, 5)), backend.name))
        except RuntimeError:  # does not serve the shape
            continue
    return SDPBackend.__members__[min(found)[1]] if found else SDPBackend.MATH


@torch.no_grad()
def step_times(model: nn.Module, cache: Cache, batch: int, context: int, steps: int) -> tuple[list[float], str]:
    """Milliseconds of each of `steps` steps, and what attended."""
    device = model.device
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    positions = torch.full((batch, 1), context - 1, device=device)
    converted = is_converted(model.config)
    backend = None if converted else _fastest_backend(model.config, cache)
    before, model.config._attn_implementation = model.config._attn_implementation, GROUPED

    def step() -> None:
        logits = model(input_ids=ids, position_ids=positions, **with_cache(model, cache)).logits
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

    try:
        with sdpa_kernel(backend) if backend else nullcontext():
            run = CapturedCall(step, warm_up=WARM_UPS) if device.type == "cuda" else step
            times_ms(run, device, 2)
            found = times_ms(run, device, steps)
    finally:
        model.config._attn_implementation = before
    return found, "kernels" if converted and model_kernel(model) else ("sdpa" if converted else backend.name.lower())


def model_kernel(model: nn.Module) -> bool:
    """Whether a converted model decodes on the kernels of mla_attention here."""
    layer = next(module for module in model.modules() if isinstance(module, MlaAttention))
    latent = torch.empty(1, 1, 1, layer.kv_lora_rank, dtype=model.dtype, device=model.device)
    reason = kernel_refusal(latent, layer.qk_rope_head_dim, layer.num_heads, model.dtype, False)
    return layer.kernel != "sdpa" and reason is None


@torch.no_grad()
def prompt_time(model: nn.Module, tokens: int, batch: int, repeats: int = 3) -> PrefillTiming:
    """Reading a prompt into an empty cache; the head only for its last token."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)

    def read() -> None:
        model(input_ids=ids, **with_cache(model, DynamicCache()), logits_to_keep=1)

    times_ms(read, model.device, 1)
    middle = statistics.median(times_ms(read, model.device, repeats))
    return PrefillTiming(tokens, batch, middle, batch * tokens / middle * 1e3)


def decode_point(
    model: nn.Module, context: int, batch: int, copy: float, price: float | None, steps: int, largest: bool = False
) -> tuple[DecodeTiming, str]:
    """Measure decoding at one context and batch.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    before = held_bytes(model.device)
    cache = full_cache(model.config, batch, context, model.dtype, model.device)
    cache_bytes = held_bytes(model.device, cache) - before
    found, attention = step_times(model, cache, batch, context, steps)
    middle = statistics.median(found)
    rate = batch / middle * 1e3
    moved = (read_bytes(model) + cache_bytes) / middle * 1e3
    return DecodeTiming(
        context=context,
        batch=batch,
        largest=largest,
        cache_bytes=cache_bytes,
        tokens_per_second=rate,
        p50_ms=middle,
        p99_ms=sorted(found)[min(len(found) - 1, round(0.99 * (len(found) - 1)))],
        bytes_per_second=moved,
        share_of_copy=moved / copy,
        cost_per_million=None if price is None else price / 3600 / rate * 1e6,
    ), attention


def largest_batch(model: nn.Module, context: int, limit: int) -> int:
    """Sequences of `context` tokens that fit beside the weights if nothing else needed room: where to begin trying."""
    return max((limit - held_bytes(model.device)) // (context * token_bytes(model.config, model.dtype)), 0)


@dataclass(frozen=True)
class BenchRequest:
    """What to measure: contexts in tokens, batches (None: the largest that fits), prompt lengths, bytes, a price an hour."""

    contexts: tuple[int, ...]
    batches: tuple[int | None, ...]
    prompts: tuple[int, ...] = ()
    memory: int | None = None
    price: float | None = None
    steps: int = STEPS


def measure_side(
    name: str, build: Callable[[], nn.Module], wanted: BenchRequest, copy: float, device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> ModelTiming:  # fmt: skip
    """Everything of one model, which is built here and given up at the end."""
    with _memory_limit(device, wanted.memory):
        _free(device)
        try:
            model = build()
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"the weights of {name} do not fit the memory given") from error
        weights = sum(weight.nbytes for weight in model.parameters())
        side = ModelTiming(name, is_converted(model.config), weights, token_bytes(model.config, model.dtype), "")
        for tokens in wanted.prompts:
            try:
                side.prompts.append(prompt_time(model, tokens, 1))
                note(f"{name}: prompt of {tokens} tokens, {side.prompts[-1].tokens_per_second:.0f} tokens/s")
            except torch.OutOfMemoryError:
                side.left_out.append(f"prompt of {tokens} tokens: out of memory")
            _free(device)
        for context in wanted.contexts:
            for batch in wanted.batches:
                _decode(model, side, context, batch, wanted, copy, note)
        del model
        _free(device)
    return side


def _decode(
    model: nn.Module,
    side: ModelTiming,
    context: int,
    batch: int | None,
    wanted: BenchRequest,
    copy: float,
    note: Callable[[str], None],
) -> None:
    """One point; for the largest batch, the first that fits."""
    largest = batch is None
    if largest:
        total = wanted.memory or torch.cuda.get_device_properties(model.device).total_memory
        batch = largest_batch(model, context, total)
    while batch:
        try:
            point, side.attention = decode_point(model, context, batch, copy, wanted.price, wanted.steps, largest)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            point = None
        _free(model.device)  # not before: what was raised holds on to the cache
        if point is not None:
            side.points.append(point)
            note(f"{side.name}: {context} tokens, batch {batch}: {point.tokens_per_second:.0f} tokens/s")
            return
        if not largest:
            break
        batch = min(batch - 1, int(batch * 0.97))
    side.left_out.append(f"{context} tokens, batch {batch or 'largest'}: out of memory")


def bench(
    sides: list[tuple[str, Callable[[], nn.Module]]],
    wanted: BenchRequest,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Figures of all models, measured one after another, as they go into JSON."""
    if device.type != "cuda" and (None in wanted.batches or wanted.memory):
        raise UsageError("the largest batch and --memory need a CUDA device: give --batch numbers")
    copy = copy_rate(device)
    note(f"copy: {copy / 1e9:.0f} GB/s, read and written")
    measured = [measure_side(name, build, wanted, copy, device, note) for name, build in sides]
    return {
        "device": device_name(device),
        "copy_bytes_per_second": copy,
        "memory_bytes": wanted.memory,
        "price_per_hour": wanted.price,
        "versions": versions(),
        "models": [asdict(side) for side in measured],
    }
