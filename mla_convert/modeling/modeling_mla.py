"""A transformers model whose attention is Multi-head Latent Attention (MLA).

`Mla<Base>` is the stock causal language model `<Base>` with every attention replaced by `MlaAttention`; embeddings, norms,
MLPs and heads are the stock classes with the original's weights. What is cached per token is the latent and one rotary key,
both shared by all heads, in the stock transformers caches: latent in the key slot, rotary key in the value slot.

This file needs only torch and transformers; it is also written beside the weights of a converted model, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works anywhere. Where the package mla_attention and
Triton are there as well, its kernels decode on CUDA (see `kernel_attention`).
"""

import importlib
import importlib.util
import os

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mla import PREFIX, config_class

try:
    import mla_attention
except ImportError:  # decoding then runs on the library's attention
    mla_attention = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = ("auto", "triton", "sdpa")

# Up to this many query tokens a step, the up-projections move to the query and output side (absorbed attention on the
# latents); above, keys and values are expanded and the library's attention runs on them.
MAX_ABSORBED_QUERIES = 16

_classes: dict[str, type] = {}

# Masks that have been looked at: all layers of a step are given the same one, and looking waits for the GPU.
_plain_masks = WeakIdKeyDictionary()


def rotate_planes(planes: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on complex planes: `planes` (..., 2m) holds m real then m imaginary parts, `cos` and `sin` (..., m)."""
    real, imag = planes.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def kernel_choice(config) -> str:
    """One of KERNELS: the environment's MLA_CONVERT_KERNEL, else the configuration's mla_kernel."""
    choice = os.environ.get("MLA_CONVERT_KERNEL") or config.mla_kernel
    if choice not in KERNELS:
        raise ValueError(f"MLA_CONVERT_KERNEL or mla_kernel is {choice!r}, expected one of {KERNELS}")
    return choice


def kernel_refusal(q_latent: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernels of mla_attention cannot serve this call, or None."""
    heads, rank, rope_dim = q_latent.shape[1], latent.shape[3], q_rope.shape[3]
    if mla_attention is None:
        return "the package mla_attention is not installed"
    if rank % 16 or not 16 <= rank <= 576 or rope_dim % 16 or rope_dim > 128 or heads > 128:
        return f"rank {rank}, rope dimension {rope_dim} and {heads} heads are not multiples of 16 up to 576 and 128, and up to 128"
    if q_latent.dtype not in (torch.bfloat16, torch.float16, torch.float32) or q_latent.dtype != latent.dtype:
        return f"queries are {q_latent.dtype} and the cache is {latent.dtype}"
    if torch.is_grad_enabled() and (q_latent.requires_grad or latent.requires_grad):
        return "gradients are asked for, which the kernels do not compute"
    if mask is not None and mask.dtype != torch.bool:
        return f"the mask is {mask.dtype}, not boolean"
    if latent.device.type != "cuda":
        return f"the cache is on {latent.device}, not on a CUDA device"
    return None if HAS_TRITON else "the package triton is not installed"


def visible_lengths(mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """What a boolean mask (., 1, T, S) leaves of each sequence, (B,) int32, and whether it hides only what comes later.

    That is all that the kernels can be told: the last of T tokens sees the first n, the one before it n - 1, and so on.
    """
    tokens, length = mask.shape[2:]
    seen = mask[:, 0, -1].sum(-1)
    own = seen[:, None] - torch.arange(tokens - 1, -1, -1, device=mask.device)
    plain = (mask[:, 0] == (torch.arange(length, device=mask.device) < own[..., None])).all()
    return seen.to(torch.int32).expand(batch).contiguous(), plain


def kernel_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
    choice: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """`absorbed_attention` on the kernels of mla_attention, or None where they cannot serve and `choice` is "auto".

    Masks that hide more than the future (left padding) are not served. Whether one does is not known while a graph is
    compiled or captured: "auto" then leaves every mask to the library, "triton" gives NaN should it turn out to.
    """
    batch, _, tokens, _ = q_latent.shape
    reason = kernel_refusal(q_latent, q_rope, latent, mask)
    plain = None
    if reason is None and mask is None:
        if tokens > 1:
            reason = "several query tokens need a mask"
        lengths = torch.full((batch,), latent.shape[2], dtype=torch.int32, device=latent.device)
    elif reason is None:
        lengths, plain = visible_lengths(mask, batch)
        blind = torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
        if blind and choice == "auto":
            reason = "what the mask hides is not known while compiling"
        elif not blind:
            if mask not in _plain_masks:
                _plain_masks[mask] = bool(plain)
            reason = None if _plain_masks[mask] else "the mask hides more than the future"
            plain = None
    if reason is not None:
        if choice == "triton":
            raise ValueError(f'mla_kernel "triton" cannot decode: {reason}')
        return None
    attended, lse = mla_attention.mla_decode(
        q_latent.transpose(1, 2),
        q_rope.transpose(1, 2),
        latent.squeeze(1),
        k_rope.squeeze(1),
        lengths,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        return_lse=True,
    )
    if sinks is not None:
        # A sink adds exp(sink) to the sum of exponentials, and nothing to what is attended.
        kept = torch.sigmoid(lse - sinks.float().view(1, -1, 1))
        attended = attended * kept.transpose(1, 2).unsqueeze(-1).to(attended.dtype)
    if plain is not None:
        attended = torch.where(plain, attended, torch.nan)
    return attended.transpose(1, 2)


def apply_norm(norm: nn.Module, rows: Tensor, head_dim: int, over: str) -> Tensor:
    """A stock norm of queries or keys on rows (B, T, heads * head_dim), called as the stock attention calls it.

    `over` is the shape that it takes: "head" (B, T, heads, head_dim), "all" (B, T, heads * head_dim) or "heads first"
    (B, heads, T, head_dim).
    """
    if over == "all":
        return norm(rows)
    heads = rows.unflatten(-1, (-1, head_dim))
    normed = norm(heads.transpose(1, 2)).transpose(1, 2) if over == "heads first" else norm(heads)
    return normed.flatten(2)


def weigh(logits: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights in float32 from scaled logits (B, H, T, S) and a boolean or additive mask.

    `softcap` bounds the logits; `sinks` (H,) are logits that take their part of each row and are then dropped.
    """
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if boolean else logits + mask
    if sinks is None:
        return F.softmax(logits, dim=-1, dtype=torch.float32)
    column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return F.softmax(torch.cat([logits, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
    need_weights: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads on the shared latents, which serve as keys and values. `kernel` is one of KERNELS.

    q_latent (B, H, T, r), q_rope (B, H, T, 2m), latent (B, 1, S, r), k_rope (B, 1, S, 2m), mask broadcastable to
    (B, 1, T, S), boolean or additive. Returns the attended latents (B, H, T, r) and, if asked for, the weights
    (B, H, T, S).
    """
    batch, heads, length, rank = q_latent.shape
    if kernel != "sdpa" and not need_weights:
        attended = kernel_attention(q_latent, q_rope, latent, k_rope, mask, scaling, kernel, softcap, sinks)
        if attended is not None:
            return attended, None
    # Heads share keys and values, so they are rows of one query matrix: the latents are read once, not once a head.
    query = torch.cat([q_latent, q_rope], dim=-1).reshape(batch, 1, heads * length, -1)
    key = torch.cat([latent, k_rope], dim=-1)
    if need_weights or softcap is not None or sinks is not None:
        logits = (query @ key.transpose(2, 3)).view(batch, heads, length, -1) * scaling
        weights = weigh(logits, mask, softcap, sinks).to(query.dtype)
        attended = weights.reshape(batch, 1, heads * length, -1) @ latent
        return attended.view(batch, heads, length, rank), weights
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).repeat(1, 1, heads, 1)
    attended = F.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=scaling)
    return attended.view(batch, heads, length, rank), None


class MlaAttention(nn.Module):
    """Multi-head Latent Attention as DeepSeek-V2 defines it (arXiv 2405.04434, section 2.1), without its latent norm.

    Differs from it in that the rotary key's frequencies are chosen per layer: `rope_freq_index` (m,) picks their columns
    of the original's table, so that every RoPE scaling of the original applies unchanged.

    Where the original norms its queries and keys, those norms stay, behind the original's own projections: the latent and
    the rotary key are then a map of [normed key; value], and each head's query a map of its normed query.
    """

    def __init__(self, config, layer_idx: int, stock: nn.Module):
        """`stock` is the attention that this one takes the place of: its scale, norms and sinks stay."""
        nn.Module.__init__(self)  # not the stock attention's, which attention_class() puts next in line
        self._is_hf_initialized = (
            True  # the stock classes would look for projections of theirs; each inner one is visited
        )
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = stock.scaling
        self.is_causal = True
        self.attention_dropout = getattr(config, "attention_dropout", getattr(config, "attn_pdrop", 0.0))
        self.output_dropout = getattr(config, "residual_dropout", getattr(config, "resid_pdrop", 0.0))
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        self.kv_lora_rank = config.layer_rank(layer_idx)
        self.qk_rope_head_dim = config.layer_rope_dim(layer_idx)
        self.qk_nope_head_dim = config.layer_nope_dim(layer_idx)
        self.v_head_dim = config.v_head_dim
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.kernel = kernel_choice(config)
        self.softcap = config.mla_softcap
        self.normed = config.mla_q_norm is not None
        hidden, heads, compressed = config.hidden_size, self.num_heads, self.kv_lora_rank + self.qk_rope_head_dim
        if self.normed:
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            self.q_proj = nn.Linear(hidden, heads * self.v_head_dim, bias=config.mla_q_bias)
            self.k_proj = nn.Linear(hidden, kv_heads * self.v_head_dim, bias=config.mla_kv_bias)
            self.v_proj = nn.Linear(hidden, kv_heads * self.v_head_dim, bias=config.mla_kv_bias)
            setattr(self, config.mla_q_norm, getattr(stock, config.mla_q_norm))
            setattr(self, config.mla_k_norm, getattr(stock, config.mla_k_norm))
            self.q_b_proj = nn.Linear(self.v_head_dim, heads * self.qk_head_dim, bias=False)
            self.kv_a_proj_with_mqa = nn.Linear(2 * kv_heads * self.v_head_dim, compressed, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.mla_q_bias)
            self.kv_a_proj_with_mqa = nn.Linear(hidden, compressed, bias=config.mla_kv_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.mla_o_bias)
        if config.mla_sinks:
            # under the stock name, which the stock classes initialise it by
            setattr(self, config.mla_sinks, getattr(stock, config.mla_sinks))
        self.register_buffer("rope_freq_index", torch.zeros(self.qk_rope_head_dim // 2, dtype=torch.int64))

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits (H,) of the attention sinks, if there are any."""
        return getattr(self, self.config.mla_sinks) if self.config.mla_sinks else None

    def normed_query(self, hidden_states: Tensor) -> Tensor:
        """The original's queries behind their norm: (B, T, H * d_h), heads in the original's layout."""
        norm = getattr(self, self.config.mla_q_norm)
        return apply_norm(norm, self.q_proj(hidden_states), self.v_head_dim, self.config.mla_norm_over)

    def normed_key_value(self, hidden_states: Tensor) -> Tensor:
        """The original's keys behind their norm, and its values: (B, T, 2 * G * d_h)."""
        norm = getattr(self, self.config.mla_k_norm)
        key = apply_norm(norm, self.k_proj(hidden_states), self.v_head_dim, self.config.mla_norm_over)
        return torch.cat([key, self.v_proj(hidden_states)], dim=-1)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, hidden) -> queries (B, H, T, nope + 2m) and what is cached (B, T, r + 2m)."""
        if not self.normed:
            query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2)
            return query, self.kv_a_proj_with_mqa(hidden_states)
        heads = self.normed_query(hidden_states).unflatten(-1, (self.num_heads, self.v_head_dim)).transpose(1, 2)
        maps = self.q_b_proj.weight.view(self.num_heads, self.qk_head_dim, self.v_head_dim)
        return heads @ maps.transpose(1, 2), self.kv_a_proj_with_mqa(self.normed_key_value(hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        layer_past=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, T, hidden) -> attention output (B, T, hidden) and the attention weights, if there are any.

        `layer_past` is what GPT-NeoX calls the cache.
        """
        batch, length, _ = hidden_states.shape
        past_key_values = layer_past if past_key_values is None else past_key_values
        query, compressed = self._project(hidden_states)
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rope = compressed.unsqueeze(1).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

        if self.qk_rope_head_dim:
            cos, sin = (table[..., self.rope_freq_index].unsqueeze(1).to(q_rope) for table in position_embeddings)
            q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)

        # With several queries, only an explicit mask says which keys each one sees.
        few = length == 1 or (length <= MAX_ABSORBED_QUERIES and attention_mask is not None)
        if few and past_key_values is not None and not self.training:
            output, weights = self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            output, weights = self._expanded(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        output = self.o_proj(output.reshape(batch, length, -1))
        return F.dropout(output, self.output_dropout, self.training), weights

    def _absorbed(self, q_nope, q_rope, latent, k_rope, mask) -> tuple[Tensor, Tensor | None]:
        """Decode: queries and outputs pass through the up-projections, the cache stays as it is. Output (B, T, H, v)."""
        up = self.kv_b_proj.weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        up_key, up_value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        attended, weights = absorbed_attention(
            q_nope @ up_key,
            q_rope,
            latent,
            k_rope,
            mask,
            self.scaling,
            need_weights=self.config._attn_implementation == "eager",
            softcap=self.softcap,
            sinks=self.sink_logits,
            kernel=self.kernel,
        )
        return (attended @ up_value.transpose(1, 2)).transpose(1, 2), weights

    def _expanded(self, q_nope, q_rope, latent, k_rope, mask, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Prefill and training: keys and values of every head, then the library's attention. Output (B, T, H, v)."""
        batch, _, length, _ = latent.shape
        up = self.kv_b_proj(latent.squeeze(1)).view(batch, length, self.num_heads, -1).transpose(1, 2)
        k_nope, value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1)
        query = torch.cat([q_nope, q_rope], dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        traits = {"softcap": self.softcap, "s_aux": self.sink_logits}
        kwargs |= {name: value for name, value in traits.items() if value is not None}
        return attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)


def eager_attention(
    module, query, key, value, mask, dropout=0.0, scaling=1.0, softcap=None, s_aux=None, **_
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out, with its weights. query, key (B, H, ., qk), value (B, H, S, v) -> (B, T, H, v)."""
    weights = weigh(query @ key.transpose(2, 3) * scaling, mask, softcap, s_aux).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


def attention_class(base: type) -> type:
    """MlaAttention that is also an instance of the stock attention class, as the library's output capturing expects."""
    return type(PREFIX + base.__name__, (MlaAttention, base), {"__module__": __name__})


def install(model) -> None:
    """Replace every attention of a stock causal language model (built from an Mla configuration) by MLA."""
    config = model.config
    for layer_idx, layer in enumerate(model.get_submodule(config.mla_layers)):
        stock = getattr(layer, config.mla_attention)
        setattr(layer, config.mla_attention, attention_class(type(stock))(config, layer_idx, stock))


def model_class(base: type) -> type:
    """The converted counterpart of a stock causal language model."""
    name = PREFIX + base.__name__
    if name not in _classes:

        def __init__(self, config):  # noqa: N807
            if config.mla_softcap is not None or config.mla_sinks:
                self._supports_sdpa = False  # it knows neither; not every version of the stock classes says so
            base.__init__(self, config)
            install(self)
            self.post_init()

        _classes[name] = type(
            name,
            (base,),
            {
                "__init__": __init__,
                "__module__": __name__,
                "__doc__": f"{base.__name__} with Multi-head Latent Attention.",
                "config_class": config_class(base.config_class),
                # Both need keys and values of one width per head; MLA's differ.
                "_supports_flash_attn": False,
                "_supports_flex_attn": False,
                "_tp_plan": {},
                "_auto_class": "AutoModelForCausalLM",
            },
        )
    return _classes[name]


def __getattr__(name: str) -> type:
    """`Mla<Base>` for any causal language model `<Base>` of transformers, and its configuration (PEP 562)."""
    if name.startswith(PREFIX) and name.endswith("Config"):
        return getattr(importlib.import_module(".configuration_mla", __package__), name)
    if name.startswith(PREFIX) and name.endswith(("ForCausalLM", "LMHeadModel")):
        return model_class(getattr(transformers, name[len(PREFIX) :]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
