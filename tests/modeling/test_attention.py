"""The attention's interface to stock models: caches by any name, unknown arguments, shapes of norms, and backends."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from mla_convert.modeling.attention_backends import GROUPED, attention_backend, sdpa_grouped_query
from mla_convert.modeling.stock_mla import CACHE_NAMES, apply_norm, refuse_unknown, take_cache


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cache_is_taken_by_every_name(name):
    cache = DynamicCache()
    given = {name: cache, "use_cache": True}
    assert take_cache(given, frozenset(CACHE_NAMES)) is cache and given == {"use_cache": True}
    assert take_cache({name: None}, frozenset(CACHE_NAMES)) is None


@pytest.mark.parametrize(
    "given", [{"cache": DynamicCache(), "layer_past": DynamicCache()}, {"past_key_values": (torch.zeros(1),)}]
)
def test_two_caches_and_other_objects_are_refused(given):
    with pytest.raises(TypeError, match="caches latents in a transformers Cache, and was given"):
        take_cache(given, frozenset(CACHE_NAMES))


def test_unknown_arguments_are_refused_if_they_are_set():
    refuse_unknown(nn.Module, {"novelty": None, "another": False, "position_ids": torch.zeros(1)})
    with pytest.raises(TypeError, match="novelty=int"):
        refuse_unknown(nn.Module, {"novelty": 1})


@pytest.mark.parametrize(
    ("over", "shape"), [("all", (2, 5, 12)), ("head", (2, 5, 3, 4)), ("heads first", (2, 3, 5, 4))]
)
def test_norm_gets_the_stock_shape(over, shape):
    rows = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    shapes = []

    def norm(x):
        shapes.append(tuple(x.shape))
        return 2 * x

    assert torch.equal(apply_norm(norm, rows, 4, over), 2 * rows)
    assert shapes == [shape]


def model(implementation):
    config = SimpleNamespace(_attn_implementation=implementation)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, _supports_attention_backend=True)


def test_backend_is_switched_within_the_context():
    first, second = model("sdpa"), model("sdpa")
    with attention_backend(GROUPED, first, second):
        assert {each.config._attn_implementation for each in (first, second)} == {GROUPED}
    assert {each.config._attn_implementation for each in (first, second)} == {"sdpa"}
    second.config._attn_implementation = "eager"
    with attention_backend(GROUPED, first, second):
        assert (first.config._attn_implementation, second.config._attn_implementation) == ("sdpa", "eager")


def test_grouped_attention_has_neither_soft_caps_nor_sinks():
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    assert sdpa_grouped_query(None, query, key, key, None)[0].shape == (1, 1, 4, 8)
    for option in ({"softcap": 5.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(TypeError, match="neither soft caps nor sinks"):
            sdpa_grouped_query(None, query, key, key, None, **option)
