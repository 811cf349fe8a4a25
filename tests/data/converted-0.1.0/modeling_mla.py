"""A transformers model whose attention is Multi-head Latent Attention (MLA).

`Mla<Base>` is the stock causal language model `<Base>` with every attention replaced by `MlaAttention`; embeddings, norms,
MLPs and heads are the stock classes with the original's weights. What is cached per token is the latent and one rotary key,
both shared by all heads, in the stock transformers caches: latent in the key slot, rotary key in the value slot.

This file and the two beside it need only torch and transformers; they are also written beside the weights of a converted
model, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works anywhere. Where the package
mla_attention and Triton are there as well, its kernels decode on CUDA (see decode_mla.py).
"""

import importlib

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mla import PREFIX, config_class
from .decode_mla import absorbed_attention, kernel_choice, rotate_planes, weigh, write_static

# Up to this many query tokens a step, the up-projections move to the query and output side (absorbed attention on the
# latents); above, keys and values are expanded and the library's attention runs on them.
MAX_ABSORBED_QUERIES = 16

# Expanded keys and values of one layer take at most this many bytes where no gradients are asked for: more heads than that
# allows are expanded and attended in groups, one after another, so that those of a long prompt never exist whole.
EXPANDED_BYTES = 1 << 30

_classes: dict[str, type] = {}


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

        cos = sin = None
        if self.qk_rope_head_dim:
            cos, sin = (table[..., self.rope_freq_index] for table in position_embeddings)
        written = None
        if past_key_values is not None and self.kernel != "sdpa":
            written = write_static(past_key_values, self.layer_idx, latent, k_rope, q_rope, cos, sin)
        if written is not None:
            latent, k_rope, q_rope = written  # rotated
            cos = sin = None
        else:
            if cos is not None:
                cos, sin = cos.unsqueeze(1).to(q_rope), sin.unsqueeze(1).to(q_rope)
                if past_key_values is not None or not torch.is_grad_enabled():
                    q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
                    cos = sin = None
            if past_key_values is not None:
                latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)

        # With several queries, only an explicit mask says which keys each one sees.
        few = length == 1 or (length <= MAX_ABSORBED_QUERIES and attention_mask is not None)
        if few and past_key_values is not None and not self.training:
            output, weights = self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            output, weights = self._expanded(q_nope, q_rope, latent, k_rope, attention_mask, cos, sin, **kwargs)
        output = self.o_proj(output.reshape(batch, length, -1))
        return F.dropout(output, self.output_dropout, self.training), weights

    @staticmethod
    def join(q_nope, q_rope, k_nope, k_rope, cos=None, sin=None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, nope + 2m) of their parts, of which the keys' rotary one (B, 1, T, 2m) is one for all heads.

        `cos` and `sin` (B or 1, 1, T, m) rotate on the way. A function of tensors alone, so that training can compile it once
        for layers of all sizes.
        """
        if cos is not None:
            q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
        k_rope = k_rope.expand(-1, k_nope.shape[1], -1, -1)
        return torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)

    def _absorbed(self, q_nope, q_rope, latent, k_rope, mask) -> tuple[Tensor, Tensor | None]:
        """Decode: queries and outputs pass through the up-projections, the cache stays as it is. Output (B, T, H, v)."""
        up = self.kv_b_proj.weight.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        up_key, up_value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        # One matrix product per head over all sequences: broadcasting would copy the up-projections for each sequence.
        attended, weights = absorbed_attention(
            torch.einsum("bhtd,hdr->bthr", q_nope, up_key).transpose(1, 2),
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
        return torch.einsum("bhtr,hvr->bthv", attended, up_value), weights

    def _expanded(
        self, q_nope, q_rope, latent, k_rope, mask, cos=None, sin=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Prefill and training: keys and values of every head, then the library's attention. Output (B, T, H, v).

        With `cos` and `sin` the rotary parts are not rotated yet.
        """
        batch, _, length, _ = latent.shape
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        sinks = self.sink_logits

        def of_heads(first: int, stop: int) -> tuple[Tensor, Tensor | None]:
            if stop - first == self.num_heads:
                up = self.kv_b_proj(latent.squeeze(1))
            else:
                weight = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
                up = F.linear(latent.squeeze(1), weight[first:stop].flatten(0, 1))
            up = up.view(batch, length, stop - first, -1).transpose(1, 2)
            k_nope, value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
            query, key = self.join(q_nope[:, first:stop], q_rope[:, first:stop], k_nope, k_rope, cos, sin)
            sink = {} if sinks is None else {"s_aux": sinks[first:stop]}
            return attend(self, query, key, value, mask, **kwargs, **sink)

        group = self._heads_at_once(latent)
        if group == self.num_heads:
            return of_heads(0, self.num_heads)
        parts = [of_heads(h, min(h + group, self.num_heads))[0] for h in range(0, self.num_heads, group)]
        return torch.cat(parts, dim=2), None

    def _heads_at_once(self, latent: Tensor) -> int:
        """Heads whose keys and values are expanded together; all where gradients or weights are asked for."""
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.config._attn_implementation == "eager"
        if whole:
            return self.num_heads
        a_head = latent.shape[0] * latent.shape[2] * (self.qk_head_dim + self.v_head_dim) * latent.element_size()
        return min(max(EXPANDED_BYTES // max(a_head, 1), 1), self.num_heads)


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
