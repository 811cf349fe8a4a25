"""Measures decoding and prefill: tokens per second, latency, bytes of the cache, largest batch.

A decode step is the whole model for one new token of every sequence: embedding, layers, head, argmax. The cache is full of
random numbers and written in place: the step writes the last of `context` tokens. On CUDA a step is one CUDA graph.
Speed does not depend on the values of weights, so models with random weights can be measured.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from mla_convert.core.cuda_graph import CapturedCall
from mla_convert.core.errors import ResourceError, UsageError
from mla_convert.core.runtime import device_name, versions
from mla_convert.evaluate.speed.models import empty_cache, full_cache, held_bytes, read_bytes, token_bytes
from mla_convert.evaluate.speed.results import BenchRequest, BenchResult, DecodeTiming, ModelTiming, PrefillTiming
from mla_convert.modeling.attention_backends import GROUPED
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.decode_mla import kernel_refusal
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.source.load_model import is_converted
from mla_convert.source.shape import converted_layers

WARM_UPS = 3
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@contextmanager
def _memory_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Let torch take at most `limit` bytes of the device."""
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
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    return times


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    # Large, so that the memory is measured and not a cache.
    size = 2 << 30 if device.type == "cuda" else 64 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    # Not timed: the first copy maps the pages of the target.
    target.copy_(source)
    return 2 * size / statistics.median(times_ms(lambda: target.copy_(source), device, 9)) * 1e3


def _fastest_backend(config: PreTrainedConfig, cache: Cache) -> SDPBackend:
    """The backend of scaled_dot_product_attention that is fastest on this cache, so that the original is not held back."""
    layer = cache.layers[converted_layers(config)[0]]
    if layer.device.type != "cuda":
        return SDPBackend.MATH
    batch, heads, _, width = layer.keys.shape
    # The heads of a group are rows of one query, as in the decode step (`GROUPED`).
    query = torch.randn(
        batch, heads, config.num_attention_heads // heads, width, dtype=layer.dtype, device=layer.device
    )
    times = []
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                run = lambda: F.scaled_dot_product_attention(query, layer.keys, layer.values)  # noqa: E731
                times_ms(run, layer.device, 2)
                # By name, because backends have no order by which to choose between equal times.
                times.append((statistics.median(times_ms(run, layer.device, 5)), backend.name))
        except RuntimeError:  # the backend does not support the shape
            continue
    return SDPBackend.__members__[min(times)[1]] if times else SDPBackend.MATH


@torch.no_grad()
def step_times(model: nn.Module, cache: Cache, batch: int, context: int, steps: int) -> tuple[list[float], str]:
    """Milliseconds of each of `steps` decode steps, and the attention backend used."""
    device = model.device
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    positions = torch.full((batch, 1), context - 1, device=device)
    converted = is_converted(model.config)
    backend = None if converted else _fastest_backend(model.config, cache)
    # A new token attends to the whole cache: without a mask, no keys are copied for every head.
    before, model.config._attn_implementation = model.config._attn_implementation, GROUPED

    def step() -> None:
        logits = model(input_ids=ids, position_ids=positions, **with_cache(model, cache)).logits
        # In place, because a CUDA graph reads and writes the addresses that it was recorded with.
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

    try:
        with sdpa_kernel(backend) if backend else nullcontext():
            run = CapturedCall(step, warm_up=WARM_UPS) if device.type == "cuda" else step
            times_ms(run, device, 2)
            times = times_ms(run, device, steps)
    finally:
        model.config._attn_implementation = before
    return times, "kernels" if converted and model_kernel(model) else ("sdpa" if converted else backend.name.lower())


def model_kernel(model: nn.Module) -> bool:
    """Whether a converted model decodes on the kernels of mla_attention on this device."""
    layer = next(module for module in model.modules() if isinstance(module, MlaAttention))
    latent = torch.empty(1, 1, 1, layer.kv_lora_rank, dtype=model.dtype, device=model.device)
    packed_rank = layer.kv_lora_rank if layer.latent_format is not None else 0
    reason = kernel_refusal(latent, layer.qk_rope_head_dim, layer.num_heads, model.dtype, False, packed_rank)
    return layer.kernel != "sdpa" and reason is None


@torch.no_grad()
def prompt_time(model: nn.Module, tokens: int, batch: int, repeats: int = 3) -> PrefillTiming:
    """Prefill of an empty cache; the head runs for the last token only."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)

    def read() -> None:
        model(input_ids=ids, **with_cache(model, empty_cache(model.config)), logits_to_keep=1)

    times_ms(read, model.device, 1)
    middle = statistics.median(times_ms(read, model.device, repeats))
    return PrefillTiming(tokens, batch, middle, batch * tokens / middle * 1e3)


def decode_point(
    model: nn.Module, context: int, batch: int, copy: float, price: float | None, steps: int, largest: bool = False
) -> tuple[DecodeTiming, str]:
    """Measure decoding at one context and batch; returns also the attention backend.

    Args:
        model: the model, on its device.
        context: tokens in the cache, with the new one.
        batch: sequences.
        copy: rate of a large copy in bytes per second.
        price: of the device per hour.
        steps: number of steps to time.
        largest: whether this batch is the largest that fits.

    Raises:
        torch.OutOfMemoryError: the cache does not fit.
    """
    before = held_bytes(model.device)
    cache = full_cache(model.config, batch, context, model.dtype, model.device)
    cache_bytes = held_bytes(model.device, cache) - before
    times, attention = step_times(model, cache, batch, context, steps)
    middle = statistics.median(times)
    rate = batch / middle * 1e3
    # A step reads every weight and the whole cache once.
    moved = (read_bytes(model) + cache_bytes) / middle * 1e3
    return DecodeTiming(
        context=context,
        batch=batch,
        largest=largest,
        cache_bytes=cache_bytes,
        tokens_per_second=rate,
        p50_ms=middle,
        p99_ms=sorted(times)[round(0.99 * (len(times) - 1))],
        bytes_per_second=moved,
        share_of_copy=moved / copy,
        cost_per_million=None if price is None else price / 3600 / rate * 1e6,
    ), attention


def largest_batch(model: nn.Module, context: int, limit: int) -> int:
    """Upper bound of the batch: sequences of `context` tokens whose cache fits beside the weights into `limit` bytes."""
    return max((limit - held_bytes(model.device)) // (context * token_bytes(model.config, model.dtype)), 0)


def measure_side(
    name: str, build: Callable[[], nn.Module], request: BenchRequest, copy: float, device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> ModelTiming:  # fmt: skip
    """Build one model, measure it and free it.

    Args:
        name: of the model.
        build: makes the model.
        request: the measurements to make.
        copy: rate of a large copy in bytes per second.
        device: where to measure.
        note: takes progress notes.

    Raises:
        ResourceError: the weights do not fit into the memory.
    """
    with _memory_limit(device, request.memory):
        _free(device)
        try:
            model = build()
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"the weights of {name} do not fit the memory given") from error
        weights = sum(weight.nbytes for weight in model.parameters())
        side = ModelTiming(
            name,
            is_converted(model.config),
            weights,
            token_bytes(model.config, model.dtype),
            fixed_state_bytes(model.config, model.dtype),
            "",
        )
        for tokens in request.prompts:
            try:
                side.prompts.append(prompt_time(model, tokens, 1))
                note(f"{name}: prompt of {tokens} tokens, {side.prompts[-1].tokens_per_second:.0f} tokens/s")
            except torch.OutOfMemoryError:
                side.left_out.append(f"prompt of {tokens} tokens: out of memory")
            _free(device)
        for context in request.contexts:
            for batch in request.batches:
                _decode(model, side, context, batch, request, copy, note)
        del model
        _free(device)
    return side


def _decode(
    model: nn.Module,
    side: ModelTiming,
    context: int,
    batch: int | None,
    request: BenchRequest,
    copy: float,
    note: Callable[[str], None],
) -> None:
    """Measure one point and add it to `side`; for the largest batch, try smaller ones until one fits."""
    largest = batch is None
    if largest:
        total = request.memory or torch.cuda.get_device_properties(model.device).total_memory
        batch = largest_batch(model, context, total)
    while batch:
        try:
            point, side.attention = decode_point(model, context, batch, copy, request.price, request.steps, largest)
        except RuntimeError as error:
            # Libraries raise errors of their own for it, not only torch.OutOfMemoryError.
            if "out of memory" not in str(error).lower():
                raise
            point = None
        _free(model.device)  # outside of `except`, where the exception's traceback still holds the cache
        if point is not None:
            side.points.append(point)
            note(f"{side.name}: {context} tokens, batch {batch}: {point.tokens_per_second:.0f} tokens/s")
            return
        if not largest:
            break
        # `largest_batch` counts weights and cache alone; activations and the libraries take some of the memory, too.
        batch = min(batch - 1, int(batch * 0.97))
    side.left_out.append(f"{context} tokens, batch {batch or 'largest'}: out of memory")


def bench(
    sides: list[tuple[str, Callable[[], nn.Module]]],
    request: BenchRequest,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure all models one after another.

    Args:
        sides: name of each model, and a function that makes it.
        request: the measurements to make.
        device: where to measure.
        note: takes progress notes.

    Raises:
        UsageError: the largest batch or a memory limit without a CUDA device.
        ResourceError: the weights of a model do not fit into the memory.
    """
    if device.type != "cuda" and (None in request.batches or request.memory):
        raise UsageError("the largest batch and --memory need a CUDA device: give --batch numbers")
    copy = copy_rate(device)
    note(f"copy: {copy / 1e9:.0f} GB/s, read and written")
    return BenchResult(
        device=device_name(device),
        copy_bytes_per_second=copy,
        memory_bytes=request.memory,
        price_per_hour=request.price,
        models=[measure_side(name, build, request, copy, device, note) for name, build in sides],
        versions=versions(),
    )
