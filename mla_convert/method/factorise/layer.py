"""An MLA attention module for one layer of the source, and the configuration of the converted model."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mla_convert.method.calibrate.layerwise import Rotation
from mla_convert.method.calibrate.statistics import Statistics
from mla_convert.method.factorise.readers import readers_of
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.factorise.svd import AttentionWeights, Geometry, MlaWeights, factorise
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.modeling.configuration_mla import MODEL_TYPE, MlaFields, config_class
from mla_convert.modeling.stock_mla import softmax_scale
from mla_convert.source.families import FAMILIES, READ_AS, Family
from mla_convert.source.shape import AttentionShape, kv_heads
from mla_convert.source.source import Source
from mla_convert.source.whole import Whole


def _sizes(plan: Plan) -> dict[str, int | list[int] | None]:
    """The fields of a converted model's configuration that layers may differ in: the largest, and by layer if they do."""
    layers = plan.shape.converted_layers
    shapes = [plan.shape.of(layer) for layer in layers]
    sizes = {
        "kv_lora_rank": [plan.layer(layer).rank for layer in layers],
        "qk_rope_head_dim": [plan.layer(layer).rope_dim for layer in layers],
        "qk_nope_head_dim": [plan.layer_nope_dim(layer) for layer in layers],
        "v_head_dim": [shape.head_dim for shape in shapes],
    }

    def by_layer(each: list[int]) -> list[int] | None:
        found = dict(zip(layers, each, strict=True))
        return [found.get(layer, 0) for layer in range(plan.shape.layers)] if len(set(each)) > 1 else None

    largest = {name: max(each) for name, each in sizes.items()}
    return {
        **largest,
        **{f"{name}s": by_layer(each) for name, each in sizes.items()},
        "mla_kv_heads": by_layer([shape.num_kv_heads for shape in shapes]),
        "qk_head_dim": largest["qk_nope_head_dim"] + largest["qk_rope_head_dim"],
    }


def mla_config(source: Source, plan: Plan, dtype: torch.dtype) -> PreTrainedConfig:
    """Configuration of the converted model: the source's, and the sizes of its latent attention.

    Args:
        source: of the conversion.
        plan: sizes of every layer.
        dtype: of the converted model.
    """
    family, layers = source.family, plan.shape.converted_layers
    fields = source.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype"):
        fields.pop(key, None)
    joined = [layer for layer in plan.shape.caching_layers if plan.shape.of(layer).one_projection]
    config = config_class(type(source.config))(
        **fields,
        dtype=dtype,
        **_sizes(plan),
        mla_q_bias=source.has_bias("q"),
        mla_kv_bias=plan.shape.has_kv_bias,
        mla_o_bias=source.has_bias("o"),
        mla_layers=family.layers,
        mla_attention=family.attention,
        mla_converted_layers=None if plan.shape.converted is None else list(layers),
        mla_latent_of=plan.shape.latent_of and list(plan.shape.latent_of),
        mla_gate=family.gate,
        mla_q_norm=family.q_norm if plan.shape.normed else None,
        mla_k_norm=family.k_norm if plan.shape.normed else None,
        mla_norm_over=family.qk_norm_shape,
        mla_v_norm=family.v_norm,
        mla_one_projection=joined or None,
        mla_rope_tables=family.rope_tables,
        mla_rope_weights=source.weights_after_rope,
        mla_query_growth=family.growth_of_queries(source.config),
        mla_softcap=getattr(source.config, family.softcap) if family.softcap else None,
        mla_sinks=family.sinks,
        latent_cache=plan.latent_cache,
    )
    # transformers sets it when it builds a model; here only layers are built. SDPA supports neither soft caps nor sinks, and
    # not every stock model has masks for it.
    has_sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]._supports_sdpa
    config._attn_implementation = "eager" if family.softcap or family.sinks or not has_sdpa else "sdpa"
    return config


def whole_config(whole: Whole, text: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of a multimodal model with a converted language model.

    Args:
        whole: the original.
        text: configuration of its converted language model.
    """
    fields = whole.config.to_dict()
    for key in (
        "model_type",
        "architectures",
        "auto_map",
        "_name_or_path",
        "transformers_version",
        "dtype",
        "text_config",
    ):
        fields.pop(key, None)
    inner = {**text.to_dict(), "mla_layers": whole.layers}
    own = whole.config.text_config
    if own.model_type in READ_AS:  # the other fields are those of the family that it was read as
        added = ("tie_word_embeddings", "dtype", *MlaFields.__annotations__)
        inner = {**own.to_dict(), **{name: inner[name] for name in added if name in inner}}
    return config_class(type(whole.config))(**fields, text_config=inner, dtype=text.dtype)


def projection_rows(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (rows, inputs) and bias (rows,) of a linear layer, or of a `Conv1D`, which stores the transpose."""
    weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
    return weight, projection.bias


def attention_parts(attention: nn.Module, family: Family, shape: AttentionShape) -> dict[str, Tensor | None]:
    """Weights "q", "k", "v", "o" and biases "q_bias", … of a stock attention, with heads in its own layout."""
    parts: dict[str, Tensor | None] = {}
    for letter, name in family.projections.items():
        projection = getattr(attention, name)
        parts[letter], parts[f"{letter}_bias"] = (None, None) if projection is None else projection_rows(projection)
    if family.key_multiplier:
        factor = getattr(attention, family.key_multiplier)
        parts |= {name: parts[name] * factor for name in ("k", "k_bias") if parts[name] is not None}
    if family.fused:
        sizes = [shape.num_heads * shape.head_dim, *[shape.num_kv_heads * shape.head_dim] * 2]
        for suffix in ("", "_bias"):
            whole = parts[f"q{suffix}"]
            if whole is None:
                continue
            if family.fused_rows == "groups":
                groups = whole.unflatten(0, (shape.num_kv_heads, -1, shape.head_dim))
                split = [rows.flatten(0, 2) for rows in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]
            elif family.fused_rows == "shards":
                query, value, key = whole.unflatten(0, (4, 3, -1)).unbind(1)
                split = [rows.flatten(0, 1) for rows in (query, key, value)]
            else:
                split = list(whole.split(sizes))
            parts |= {f"{letter}{suffix}": rows for letter, rows in zip("qkv", split, strict=True)}
    return parts


def half_split(head_dim: int, rotary_dim: int, interleaved: bool, backwards: bool = False) -> Tensor:
    """Order (d_h,) of a head's dims in which f and f + d_h/2 are one rotary pair; pairs without rotation come last.

    Args:
        head_dim: d_h.
        rotary_dim: rotary dims, the first ones.
        interleaved: the source's pairs are neighbours; else they are half of `rotary_dim` apart.
        backwards: the source turns pairs by the negative angle, which is the positive angle for the swapped pair.
    """
    rotary, still = torch.arange(rotary_dim), torch.arange(rotary_dim, head_dim)
    real, imag = (rotary[0::2], rotary[1::2]) if interleaved else rotary.chunk(2)
    real, imag = (imag, real) if backwards else (real, imag)
    return torch.cat([real, still[: len(still) // 2], imag, still[len(still) // 2 :]])


def source_weights(attention: nn.Module, family: Family, shape: AttentionShape, rotary_dim: int) -> AttentionWeights:
    """The weights of a stock attention in the layout of `factorise`.

    With norms on queries and keys, the rows act on [normed key; value], or on values alone (`normed_key_value` of
    `MlaAttention`), and on each head's normed query.

    Args:
        attention: stock, loaded.
        family: of the source.
        shape: of the source's attention.
        rotary_dim: rotary dims of each head.
    """
    parts = attention_parts(attention, family, shape)
    order = half_split(shape.head_dim, rotary_dim, family.interleaved, family.backwards).to(parts["o"].device)
    if shape.normed:
        heads, width = shape.num_heads, shape.num_kv_heads * shape.head_dim
        pick = torch.eye(shape.head_dim, device=order.device)[order]
        keys = torch.block_diag(*[pick] * shape.num_kv_heads)
        values = torch.eye(width, device=order.device)
        if shape.one_projection:  # both norms divide by one root mean square, so that keys are weighted values
            k, v = keys * getattr(attention, family.k_norm).weight.repeat(shape.num_kv_heads), values
        else:
            k, v = (
                torch.cat([keys, torch.zeros_like(keys)], 1),
                torch.cat([torch.zeros_like(values), values], 1),
            )
        return AttentionWeights(q=pick.repeat(heads, 1), k=k, v=v, o=parts["o"], o_bias=parts["o_bias"])
    for name in ("q", "k", "q_bias", "k_bias"):
        if parts[name] is not None:
            parts[name] = parts[name].unflatten(0, (-1, shape.head_dim))[:, order].flatten(0, 1)
    return AttentionWeights(**parts)


def weights_after_rope(attention: nn.Module, family: Family, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """The weights of norms that follow RoPE, which multiply a logit's terms, as factors of queries.

    With u and w the weights of query and key, a logit is the sum over dims of u w (R q)(R k). The two dims of a plane have
    different factors, so that they are applied after RoPE; their size, equal for both dims, is applied before.

    Args:
        attention: stock, loaded.
        family: of the source.
        rotary_dim: rotary dims of a head: all of them.

    Returns:
        Factors (2, d_h/2) of mean square 1 of the real and the imaginary part of each plane, and their sizes (d_h,).
    """
    product = getattr(attention, family.q_norm).weight * getattr(attention, family.k_norm).weight
    order = half_split(len(product), rotary_dim, family.interleaved, family.backwards)
    planes = product.double()[order.to(product.device)].view(2, -1)
    size = planes.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return planes / size, size.repeat(2).to(product)


def factorise_layer(
    source: Source,
    attention: nn.Module,
    statistics: Statistics,
    rank: int | None,
    rope_dim: int,
    planes: str,
    rotation: Rotation,
    nope_dim: int | None = None,
) -> MlaWeights:
    """Closed-form MLA weights of a source layer's attention.

    Args:
        source: of the conversion.
        attention: of one of its layers, loaded.
        statistics: of the attention's inputs.
        rank: kv_lora_rank; None as in `factorise`.
        rope_dim: qk_rope_head_dim.
        planes: as in `factorise`.
        rotation: RoPE of the layer.
        nope_dim: as in `factorise`.
    """
    shape, num_rotary_freqs = source.shape.of(attention.layer_idx), rotation.num_rotary_freqs
    weights = source_weights(attention, source.family, shape, rotation.paired_dims or 2 * num_rotary_freqs)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    scaling = softmax_scale(attention)
    planes_of_heads = None
    if source.weights_after_rope and num_rotary_freqs:
        factors, size = weights_after_rope(attention, source.family, 2 * num_rotary_freqs)
        weights = replace(weights, q=weights.q * size.repeat(heads)[:, None])
        planes_of_heads = factors
    geometry = Geometry(
        heads, kv_heads, shape.head_dim, scaling, rotation.scale, num_rotary_freqs, plane_weights=planes_of_heads
    )
    readers = readers_of(source, attention.layer_idx, weights.o.device)
    if readers is None:
        return factorise(weights, geometry, statistics, rank, rope_dim, planes=planes, nope_dim=nope_dim)
    all_weights, all_statistics, all_heads = readers.join(weights, statistics)
    geometry = replace(geometry, num_heads=all_heads)
    found = factorise(all_weights, geometry, all_statistics, rank, rope_dim, planes=planes, nope_dim=nope_dim)
    return readers.part(found, weights)


def _on_meta(part: nn.Module | nn.Parameter) -> nn.Module | nn.Parameter:
    return nn.Parameter(part.to("meta")) if isinstance(part, nn.Parameter) else copy.deepcopy(part).to("meta")


def build_attention(config: PreTrainedConfig, stock: nn.Module, device: torch.device) -> MlaAttention:
    """An MLA attention module for one layer, float32, with uninitialised projections.

    Args:
        config: of the converted model.
        stock: attention of the layer, loaded; norms, sinks and projections that the module keeps are copied.
        device: of the module.
    """
    gate = None if config.mla_gate == "q_proj" else config.mla_gate
    names = (config.mla_q_norm, config.mla_k_norm, config.mla_v_norm, config.mla_sinks, gate)
    kept = {name for name in names if name and hasattr(stock, name)}
    parts = SimpleNamespace(scaling=softmax_scale(stock), **{name: _on_meta(getattr(stock, name)) for name in kept})
    with torch.device("meta"):
        module = MlaAttention(config, stock.layer_idx, parts)
    module = module.to_empty(device=device).float().eval()
    prefixes = tuple(f"{name}." for name in kept | ({"q_proj", "k_proj", "v_proj"} if module.normed else set()))
    state = {name: t for name, t in stock.state_dict().items() if name in kept or name.startswith(prefixes)}
    family = FAMILIES[config.model_type.removeprefix(MODEL_TYPE)]
    if module.normed and family.fused:
        width, heads, groups = config.v_head_dim, config.num_attention_heads, kv_heads(config)
        whole = attention_parts(
            stock, family, AttentionShape(config.num_hidden_layers, config.hidden_size, heads, groups, width)
        )
        for letter in "qkv":
            state |= {f"{letter}_proj.weight": whole[letter], f"{letter}_proj.bias": whole[f"{letter}_bias"]}
        state = {name: rows for name, rows in state.items() if rows is not None}
    if config.mla_rope_weights:  # `weights_after_rope` takes them out of the norms
        state |= {
            f"{name}.weight": torch.ones_like(state[f"{name}.weight"])
            for name in (config.mla_q_norm, config.mla_k_norm)
        }
    module.load_state_dict(state, strict=False)
    return module


# Weights of a converted attention from which those that attend to its latent start.
TAKEN_OVER = ("q_b_proj.weight", "kv_b_proj.weight", "rope_freq_index")


@torch.no_grad()
def fill_from_source(module: MlaAttention, source: dict[str, Tensor], output: nn.Module) -> None:
    """Give a module that attends to another's latent the maps of that one: both read keys and values of equal heads.

    Args:
        module: from `build_attention`.
        source: TAKEN_OVER of the module that makes the latent.
        output: output projection of the attention that `module` replaces, loaded.
    """
    module.load_state_dict(source, strict=False)
    module.o_proj.load_state_dict(output.state_dict())


@torch.no_grad()
def fill_attention(module: MlaAttention, weights: MlaWeights, freq_stride: int = 1) -> None:
    """Put factorised weights into a module.

    Args:
        module: from `build_attention`.
        weights: of the same sizes.
        freq_stride: columns of the stock model's cos table from one frequency to the next.
    """
    for projection, weight, bias in (
        (module.q_b_proj if module.normed else module.q_proj, weights.q_proj, weights.q_bias),
        (module.kv_a_proj_with_mqa, weights.kv_a, weights.kv_a_bias),
        (module.kv_b_proj, weights.kv_b, None),
        (module.o_proj, weights.o_proj, weights.o_bias),
    ):
        projection.weight.copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias)
    module.rope_freq_index.copy_(weights.freq_index * freq_stride)
    if weights.rope_weight is not None:
        module.rope_weight.copy_(weights.rope_weight)
