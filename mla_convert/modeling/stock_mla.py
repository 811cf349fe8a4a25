"""What the attentions of transformers' models call differently: their arguments, cache, scale, norms and RoPE tables.

Needs only torch and transformers, like the modeling code beside it.
"""

import inspect

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache

# Names of the cache in stock attentions, in all versions of transformers that were tried.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")

# Arguments that a stock attention ignores or leaves to the attention function: the model around it serves their purpose
# (positions are in `position_embeddings`, causality and packed texts in the mask).
LEFT_TO_OTHERS = frozenset(
    ["position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
     "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"]
)  # fmt: skip

# Names of the softmax scale in stock attentions; the exponent -1 where it divides the logits.
SCALES = {"scaling": 1, "inv_norm_factor": 1, "scale_attn": -1}


def softmax_scale(attention: nn.Module) -> float:
    """The factor of a stock attention's logits, which has one of several names.

    Raises:
        TypeError: it has none of them.
    """
    for name, power in SCALES.items():
        if hasattr(attention, name):
            return float(getattr(attention, name)) ** power
    raise TypeError(
        f"{type(attention).__name__} of transformers {transformers.__version__} has no softmax scale of a known name"
    )


def rope_tables(given, position_ids: Tensor | None, form: str, rotary_dim: int | None) -> tuple[Tensor, Tensor]:
    """The tables cos and sin (B or 1, T, .) of RoPE.

    Args:
        given: the stock layer's `position_embeddings`; None in the versions of GPT-J and CodeGen whose attention looks sines
            up by `position_ids`.
        position_ids: (B, T).
        form: of `given`: "cos, sin", "sin, cos" or "complex", a tensor of cos + i sin.
        rotary_dim: dims of a head that RoPE rotates, needed without `given`.
    """
    if form == "complex":
        return given.real, given.imag
    if given is None:
        exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device) / rotary_dim
        angles = position_ids.unsqueeze(-1).float() / 10000**exponents
        return angles.cos(), angles.sin()
    return tuple(given) if form == "cos, sin" else (given[1], given[0])


def query_growth(
    growth: list[float], position_ids: Tensor | None, cached: int, length: int, device: torch.device
) -> Tensor:
    """Factors (B or 1, 1, T, 1) that queries get by their position (arXiv 2501.19399): 1 + b log(1 + floor((p + f) / l)).

    Args:
        growth: b, l and f.
        position_ids: positions p (B, T); None: they are counted from the first cached token.
        cached: number of cached tokens.
        length: T.
        device: of the factors, without `position_ids`.
    """
    slope, scale, first = growth
    if position_ids is None:
        position_ids = torch.arange(cached, cached + length, device=device).unsqueeze(0)
    return (1 + slope * torch.log1p(torch.floor((position_ids + first) / scale)))[:, None, :, None]


def apply_norm(norm: nn.Module | None, rows: Tensor, head_dim: int, over: str) -> Tensor:
    """Apply a stock norm of queries or keys to rows (B, T, heads * head_dim), as the stock attention calls it.

    Args:
        norm: the norm; None: none.
        rows: (B, T, heads * head_dim).
        head_dim: width of a head.
        over: the shape that the norm takes: "head" (B, T, heads, head_dim), "all" (B, T, heads * head_dim) or "heads first"
            (B, heads, T, head_dim).
    """
    if norm is None or over == "all":
        return rows if norm is None else norm(rows)
    heads = rows.unflatten(-1, (-1, head_dim))
    normed = norm(heads.transpose(1, 2)).transpose(1, 2) if over == "heads first" else norm(heads)
    return normed.flatten(2)


def cache_names(base: type) -> frozenset[str]:
    """Names of a stock attention's cache in the installed transformers: known ones, and arguments typed as a cache."""
    parameters = inspect.signature(base.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.name in CACHE_NAMES or "Cache" in str(p.annotation))


def take_cache(given: dict, names: frozenset[str]) -> Cache | None:
    """Remove the cache from an attention's arguments and return it; None if there is none.

    Args:
        given: arguments by name.
        names: names that the cache may have.

    Raises:
        TypeError: there are two caches, or one that is no cache of transformers' layers.
    """
    caches = [value for name in names if (value := given.pop(name, None)) is not None]
    if not caches:
        return None
    if len(caches) > 1 or not (hasattr(caches[0], "update") and hasattr(caches[0], "layers")):
        kinds = " and ".join(type(cache).__name__ for cache in caches)
        raise TypeError(
            f"a converted model caches latents in a transformers Cache, and was given {kinds}: use generate(), or export "
            f"it for a serving engine (continuous batching pages keys and values, which it does not have)"
        )
    return caches[0]


def refuse_unknown(attention: type, given: dict) -> None:
    """Raise TypeError for an argument that is set and that this code does not know: it could change the result."""
    for name, value in given.items():
        if value is not None and value is not False and name not in LEFT_TO_OTHERS:
            raise TypeError(
                f"{attention.__name__} was given {name}={type(value).__name__}, which the code of this converted model does "
                f"not know (transformers {transformers.__version__}): `mla-convert refresh` renews that code"
            )
