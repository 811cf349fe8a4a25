"""The alternative to a conversion: the original with its own keys and values quantised in its cache.

Keys (after RoPE) and values of all tokens are quantised and dequantised as attention reads them. A prompt that a serving engine
reads from its own fresh keys would lose a little less, and a model that generates from its cache as much.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mla_convert.core.errors import InputError
from mla_convert.core.original_cache import OriginalCacheFormat
from mla_convert.core.report_schema import OriginalCacheEntry
from mla_convert.evaluate.quality.perplexity import Readout, Scores, cached_layers, mean, perplexity, ratio, score
from mla_convert.evaluate.quality.suite import Suite, suite_section
from mla_convert.modeling.head import decoder_name
from mla_convert.modeling.latent_format_mla import spreading

# Of the attention function, as transformers looks it up.
NAME = "mla_convert_original_cache"
LEAVE_OUT = (
    "the keys of {label} cannot be quantised as attention reads them, because its attention is written out in its own code: "
    "leave out --original-cache"
)
# The largest number of float8_e4m3fn.
FP8_LARGEST = 448.0


def quantised(values: Tensor, bits: int, group: int) -> Tensor:
    """Keys or values (B, heads, T, d_h), quantised and dequantised; `group` 0 is FP8, with one scale a sequence."""
    if not group:
        scale = values.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / FP8_LARGEST
        return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale
    grouped = values.float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    # Scale and zero point are rounded as the cache stores them.
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    steps = ((grouped - low) / scale).round().clamp(0, 2**bits - 1)
    return (steps * scale + low).flatten(-2).to(values.dtype)


def restored(values: Tensor, cache: OriginalCacheFormat) -> Tensor:
    """Keys or values (B, heads, T, d_h) as they come from a cache of this format."""
    width = values.shape[-1]
    group = cache.group_of(width) if cache.group else 0
    if not cache.hadamard:
        return quantised(values, cache.bits, group)
    turn = spreading(width).to(values)
    return quantised(values @ turn, cache.bits, group) @ turn.mT


class QuantisedCache:
    """An attention function of transformers on quantised keys and values, which counts what it quantises."""

    def __init__(self, cache: OriginalCacheFormat, stock: str):
        """Quantise in format `cache`, then call the attention function named `stock`."""
        self.cache, self.stock = cache, stock
        # Ids of the attentions that have called it and whose keys and values are cached.
        self.layers: set[int] = set()
        self._bits, self._numbers = 0.0, 0

    def forward(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers calls an attention function."""
        # Layers that attend to the keys and values of an earlier one cache none of their own.
        if not getattr(module, "is_kv_shared_layer", False):
            self.layers.add(id(module))
            for part in (key, value):
                self._numbers += part.numel()
                self._bits += part.numel() * self.cache.bits_of(part.shape[-1])
        keys, values = restored(key, self.cache), restored(value, self.cache)
        return self._attention(module)(module, query, keys, values, *args, **kwargs)

    def registered(self) -> str:
        """Make this the attention function `NAME` of transformers; returns the name."""
        # Not set as an item: models look masks up among the registered functions alone, and would run without one.
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[self.stock])
        return NAME

    def share(self, itemsize: int) -> float:
        """Bytes over those of the original's cache, whose numbers have `itemsize` bytes; scales are counted."""
        return self._bits / self._numbers / 8 / itemsize

    def check(self, layers: int, label: str) -> None:
        """Refuse a model of which not all layers have called this function.

        Args:
            layers: that cache keys and values.
            label: name of the model.

        Raises:
            InputError: a layer's attention is written out in its own code.
        """
        if len(self.layers) < layers:
            raise InputError(LEAVE_OUT.format(label=label))

    def _attention(self, module: nn.Module) -> Callable[..., Any]:
        if self.stock != "eager":
            return ALL_ATTENTION_FUNCTIONS[self.stock]
        # Eager attention is a function of each family's own file, for it applies soft caps and sinks.
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]


def check_loaded(model: PreTrainedModel, ids: Tensor, label: str) -> None:
    """Refuse a model in memory whose keys cannot be quantised as attention reads them, by a run over the first of `ids` (L,).

    Raises:
        InputError: its attention is written out in its own code.
    """
    cache = QuantisedCache(OriginalCacheFormat.named("fp8"), stock_attention(model))
    with replaced(model, cache):
        layers = cached_layers(model, ids)
    cache.check(layers, label)


@contextlib.contextmanager
def replaced(model: PreTrainedModel, cache: QuantisedCache) -> Iterator[None]:
    """The model with attention on a quantised cache in its decoder; other parts, such as those of images, keep theirs."""
    # Set in the configurations, for the model's own method refuses parts that have no such attention.
    modules = model.get_submodule(decoder_name(model)).modules()
    found = (getattr(module, "config", None) for module in modules)
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    name = cache.registered()
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        # The outermost first, because it sets the ones inside it.
        for config, stock in before:
            config._attn_implementation = stock


def stock_attention(model: PreTrainedModel) -> str:
    """Name of the attention function that the model's decoder calls."""
    return str(model.get_submodule(decoder_name(model)).config._attn_implementation)


@torch.no_grad()
def measure_loaded(
    model: PreTrainedModel,
    names: Sequence[str],
    original: Readout,
    windows: Tensor,
    suite: Suite | None,
    tick: Callable[[int, int], None] | None = None,
) -> list[OriginalCacheEntry]:
    """The original in memory with each format of its cache, one after another.

    Args:
        model: the original.
        names: of the formats.
        original: its readout of `windows` and then the suite's.
        windows: evaluation windows (n, L).
        suite: the packaged suite, if it is measured.
        tick: called after each window with the number done and the number of windows.
    """
    stock, every = stock_attention(model), [*windows, *(suite.windows if suite else [])]
    entries = []
    for name in names:
        cache = QuantisedCache(OriginalCacheFormat.named(name), stock)
        with replaced(model, cache):
            readout = original.of_other_states(model, every, tick)
        scores = score(readout, windows, original)
        more = score(readout, suite.windows, original, first=len(windows)) if suite else None
        entries.append(entry(name, cache.share(model.dtype.itemsize), scores, suite, more))
    return entries


def entry(
    name: str, share: float, scores: Scores, suite: Suite | None, suite_scores: Scores | None
) -> OriginalCacheEntry:
    """The report's entry of one format, from scores against the original with its own cache.

    Args:
        name: of the format.
        share: of the bytes of the original's cache.
        scores: of the evaluation windows.
        suite: the packaged suite, if it is measured.
        suite_scores: of its windows.
    """
    assert scores.original is not None and scores.kl is not None and scores.agreement is not None
    quotient = ratio(scores.losses, scores.original)
    return OriginalCacheEntry(
        format=name,
        share=share,
        after=perplexity(scores.losses),
        ratio=quotient.value,
        ratio_log_error=quotient.error,
        kl=mean(scores.kl),
        agreement=mean(scores.agreement),
        **({"suite": suite_section(suite, suite_scores)} if suite and suite_scores else {}),
    )
