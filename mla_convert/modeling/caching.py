"""The name of a model's KV cache argument in the installed transformers: `past_key_values`, since 5.24 `cache`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import Cache

from mla_convert.modeling.stock_mla import CACHE_NAMES


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """Keyword arguments of a forward pass that reads and extends `cache`.

    Raises:
        TypeError: the model takes no cache by a known name.
    """
    names = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in names), None)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no KV cache under a known name ({', '.join(CACHE_NAMES)})")
    return {name: cache, "use_cache": True}
