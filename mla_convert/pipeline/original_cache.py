"""The original with quantised caches of its own beside a conversion, layer by layer, on the conversion's windows of text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch

from mla_convert.core.errors import InputError
from mla_convert.core.original_cache import OriginalCacheFormat
from mla_convert.core.report_schema import OriginalCacheEntry
from mla_convert.core.runtime import return_freed_memory
from mla_convert.evaluate.quality.original_cache import LEAVE_OUT, QuantisedCache, entry
from mla_convert.evaluate.quality.perplexity import Scores
from mla_convert.evaluate.quality.suite import Suite
from mla_convert.method.calibrate.exchange import exchange_of
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.pipeline.streamed import shared_scores
from mla_convert.pipeline.streams import embedded
from mla_convert.source.texts import Windows


def check_attention(layerwise: LayerwiseModel) -> None:
    """Refuse, before a conversion, a model whose keys cannot be quantised as attention reads them.

    Raises:
        InputError: its attention does not call a function of transformers that can be replaced.
    """
    source, first = layerwise.source, layerwise.source.shape.caching_layers[0]
    attention = getattr(layerwise.layers[first], source.family.attention)
    classes = [base for base in type(attention).__mro__ if base.__module__.startswith("transformers.models.")]
    if not any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(base) for base in classes):
        raise InputError(LEAVE_OUT.format(label=source.name))


def measure(
    names: Sequence[str],
    layerwise: LayerwiseModel,
    windows: Windows,
    suite: Suite | None,
    original: Sequence[Activations],
    itemsize: int,
) -> list[OriginalCacheEntry]:
    """Each format of the original's cache against the original, one after another, so that one set of states is in memory.

    Args:
        names: of the formats.
        layerwise: the original.
        windows: of the conversion.
        suite: the packaged suite, if it is measured.
        original: outputs of the original's last layer for the evaluation windows, then for the suite's.
        itemsize: bytes of a number of the original's cache.

    Raises:
        InputError: a layer's attention could not be intercepted.
    """
    texts, entries = [windows.measured, *([suite.windows] if suite else [])], []
    for name in names:
        cache = QuantisedCache(OriginalCacheFormat.named(name), layerwise.implementation)
        states = [embedded(layerwise, text, original[0].processes) for text in texts]
        run_original(layerwise, states, cache)
        cache.check(len(layerwise.source.shape.caching_layers), layerwise.source.name)
        first, *rest = [
            shared_scores(layerwise, text, before, after)
            for text, before, after in zip(texts, original, states, strict=True)
        ]
        # Behind the evaluation windows are those of a held-out text.
        first = _part(first, len(windows.evaluation))
        entries.append(entry(name, cache.share(itemsize), first, suite, rest[0] if rest else None))
    return entries


def run_original(layerwise: LayerwiseModel, states: Sequence[Activations], cache: QuantisedCache | None) -> None:
    """Carry hidden states through all layers of the original, of which one is in memory at a time.

    Args:
        layerwise: the original.
        states: at the input of the first layer; behind the last one at the end.
        cache: its cache; None: its own, whose numbers are not quantised.
    """
    implementation = cache.registered() if cache else layerwise.implementation
    kwargs = {length: layerwise.layer_kwargs(length) for length in {each.length for each in states}}
    for index in range(layerwise.source.shape.layers):
        exchange = exchange_of(layerwise, index)
        with (
            layerwise.layer(index, layerwise.layer_tensors(index)) as layer,
            layerwise.attention(implementation),
            layerwise.autocast(),
            torch.no_grad(),
        ):
            for each in states:
                each.look(exchange.layout)
                each.advance_and_keep(partial(exchange.run_and_keep, layer, kwargs[each.length][index]))
        return_freed_memory()


def _part(scores: Scores, count: int) -> Scores:
    """The scores of the first windows."""
    return Scores(*(getattr(scores, field.name)[:count] for field in fields(scores)))
