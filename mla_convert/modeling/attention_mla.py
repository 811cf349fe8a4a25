"""Multi-head Latent Attention (MLA) in the place of a stock attention.

The cache holds, for each token, the latent and one rotary key, both shared by all heads: the latent in the key slot of the
stock transformers caches, the rotary key in the value slot. Needs only torch and transformers, like the modeling code beside
it; where the package mla_attention and Triton are installed as well, its kernels decode on CUDA (see decode_mla.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mla import kernel_choice
from .decode_mla import (
    absorbed_attention,
    eager_attention,
    kernel_attention,
    leave_out_hidden,
    linear_map,
    rotate_planes,
    update_cache,
    write_static,
)
from .latent_format_mla import kernel_format, layer_format
from .quantised_latent_mla import (
    dequantise_rows,
    finish_queries,
    pass_through,
    quantise_rows,
    update_packed,
    with_gradient,
    write_packed,
)
from .stock_mla import (
    CACHE_NAMES,
    apply_norm,
    query_growth,
    refuse_unknown,
    rope_tables,
    softmax_scale,
    take_cache,
)

# Up to this many query tokens a step, the up-projections move to the query and output side (absorbed attention on the
# latents); above, keys and values are expanded and the library's attention runs on them.
MAX_ABSORBED_QUERIES = 16

# Most bytes of one layer's expanded keys and values without gradients. Heads that do not fit are expanded and attended in
# groups, one after another, so that a long prompt's keys and values of all heads never exist at once.
EXPANDED_BYTES = 1 << 30


def shared_key(layer_idx: int) -> str:
    """The key under which a layer hands its latents over to others, among those of the stock layers."""
    return f"latent of layer {layer_idx}"


class MlaAttention(nn.Module):
    """Multi-head Latent Attention as DeepSeek-V2 defines it (arXiv 2405.04434, section 2.1), without its latent norm.

    Unlike there, the rotary key's frequencies differ between layers: `rope_freq_index` (m,) selects their columns of the
    original's table, so that every RoPE scaling of the original applies unchanged.

    Where the original normalises its queries and keys, its projections and norms stay: the latent and the rotary key are
    then a linear map of [normed key; value], and each head's query is a linear map of its normed query.
    """

    # Names of the stock attention's arguments, in order, and its names of the cache.
    stock_arguments: tuple[str, ...] = ("hidden_states",)
    cache_names: frozenset[str] = frozenset(CACHE_NAMES)

    def __init__(self, config: PreTrainedConfig, layer_idx: int, stock: nn.Module):
        """Take the place of a stock attention.

        Args:
            config: the converted model's configuration, with the fields of `MlaFields`.
            layer_idx: index of the layer.
            stock: the stock attention, whose scale, norms and sinks stay.
        """
        nn.Module.__init__(self)  # skips the stock attention's, the next class of attention_class()
        # keeps the stock classes from initialising projections that do not exist; they visit each inner module
        self._is_hf_initialized = True
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = softmax_scale(stock)
        self.growth = (config.mla_query_growth or {layer_idx: None})[layer_idx]
        self.is_causal = True
        self.attention_dropout = getattr(config, "attention_dropout", getattr(config, "attn_pdrop", 0.0))
        self.output_dropout = getattr(config, "residual_dropout", getattr(config, "resid_pdrop", 0.0))
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1
        # Layers may attend to the latent of an earlier one, which hands it over in `shared_kv_states` of the stock layers.
        self.source_idx = config.source_of(layer_idx)
        self.is_shared = self.source_idx == layer_idx and (config.mla_latent_of or []).count(layer_idx) > 1
        self.kv_lora_rank = config.layer_rank(layer_idx)
        self.qk_rope_head_dim = config.layer_rope_dim(layer_idx)
        self.qk_nope_head_dim = config.layer_nope_dim(layer_idx)
        self.v_head_dim = config.layer_v_dim(layer_idx)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.latent_format = layer_format(config, layer_idx)
        self.kernel = kernel_choice(config)
        self.rotary_dim = getattr(config, "rotary_dim", None)
        self.softcap = config.mla_softcap
        self.normed = config.mla_q_norm is not None
        self.gate = config.mla_gate
        self._add_projections(config, stock)
        weights = torch.ones(self.qk_rope_head_dim) if config.mla_rope_weights else None
        self.rope_weight = None if weights is None else nn.Parameter(weights)
        self.register_buffer("rope_freq_index", torch.zeros(self.qk_rope_head_dim // 2, dtype=torch.int64))

    def _add_projections(self, config: PreTrainedConfig, stock: nn.Module) -> None:
        """Create the projections, and take over the stock attention's norms and sinks."""
        hidden, heads, compressed = config.hidden_size, self.num_heads, self.kv_lora_rank + self.qk_rope_head_dim
        if self.normed:
            kv_width = config.layer_kv_heads(self.layer_idx) * self.v_head_dim
            joined = self.layer_idx in (config.mla_one_projection or ())
            parts = 2 if self.gate == "q_proj" else 1  # of each head's rows
            self.q_proj = nn.Linear(hidden, parts * heads * self.v_head_dim, bias=config.mla_q_bias)
            self.q_b_proj = nn.Linear(self.v_head_dim, heads * self.qk_head_dim, bias=False)
            if hasattr(stock, config.mla_q_norm):
                setattr(self, config.mla_q_norm, getattr(stock, config.mla_q_norm))
        if self.normed and self.source_idx == self.layer_idx:
            self.k_proj = nn.Linear(hidden, kv_width, bias=config.mla_kv_bias)
            self.v_proj = None if joined else nn.Linear(hidden, kv_width, bias=config.mla_kv_bias)
            # in Llama 4, layers without RoPE have no norm
            for name in (None if joined else config.mla_k_norm, config.mla_v_norm):
                if name and hasattr(stock, name):
                    setattr(self, name, getattr(stock, name))
            self.kv_a_proj_with_mqa = nn.Linear((1 if joined else 2) * kv_width, compressed, bias=False)
        elif not self.normed:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.mla_q_bias)
            self.kv_a_proj_with_mqa = nn.Linear(hidden, compressed, bias=config.mla_kv_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.mla_o_bias)
        if self.gate and self.gate != "q_proj":
            setattr(self, self.gate, getattr(stock, self.gate))
        if config.mla_sinks:
            # the stock classes initialise the parameter by this name
            setattr(self, config.mla_sinks, getattr(stock, config.mla_sinks))

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits (H,) of the attention sinks; None without sinks."""
        return getattr(self, self.config.mla_sinks) if self.config.mla_sinks else None

    def normed_query(self, hidden_states: Tensor) -> Tensor:
        """The original's normed queries: (B, T, H * d_h), heads in the original's layout."""
        return self._normed(self.query_and_gate(hidden_states)[0])

    def _normed(self, query: Tensor) -> Tensor:
        norm = getattr(self, self.config.mla_q_norm, None)
        return apply_norm(norm, query, self.v_head_dim, self.config.mla_norm_over)

    def query_and_gate(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output of the query projection, and the factors (B, T, H * d_h) of the attention's output if it has a gate."""
        query = self.q_proj(hidden_states)
        if self.gate is None:
            return query, None
        if self.gate != "q_proj":
            return query, torch.sigmoid(getattr(self, self.gate)(hidden_states))
        query, gate = query.unflatten(-1, (self.num_heads, 2, self.v_head_dim)).unbind(-2)
        return query.flatten(-2), torch.sigmoid(gate.flatten(-2))

    def normed_key_value(self, hidden_states: Tensor) -> Tensor:
        """The original's normed keys and its values: (B, T, 2 * G * d_h); its values alone where keys are a map of them."""
        config, key = self.config, self.k_proj(hidden_states)
        value = key if self.v_proj is None else self.v_proj(hidden_states)
        if config.mla_v_norm:
            value = apply_norm(getattr(self, config.mla_v_norm), value, self.v_head_dim, config.mla_norm_over)
        if self.v_proj is None:
            return value
        key = apply_norm(getattr(self, config.mla_k_norm, None), key, self.v_head_dim, config.mla_norm_over)
        return torch.cat([key, value], dim=-1)

    def _compress(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The cached part of hidden states (B, T, hidden): latents (B, 1, T, r) and rotary keys (B, 1, T, 2m), not rotated."""
        rows = self.normed_key_value(hidden_states) if self.normed else hidden_states
        compressed = self.kv_a_proj_with_mqa(rows).unsqueeze(1)
        return compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries (B, H, T, nope + 2m) of hidden states (B, T, hidden), and the gate."""
        query, gate = self.query_and_gate(hidden_states)
        if not self.normed:
            return query.unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2), gate
        heads = self._normed(query).unflatten(-1, (self.num_heads, self.v_head_dim)).transpose(1, 2)
        maps = linear_map(self.q_b_proj)
        if maps is None:
            raise TypeError("q_b_proj of a converted model has a bias (from an adapter?), which its heads cannot use")
        maps = maps.view(self.num_heads, self.qk_head_dim, self.v_head_dim)
        return heads @ maps.transpose(1, 2), gate

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, hidden).

        Args:
            *args: arguments of the stock attention, by position.
            **kwargs: arguments of the stock attention, by name; the cache by any of its names.

        Returns:
            The output (B, T, hidden), and the attention weights where the implementation computes them, else None.

        Raises:
            TypeError: an argument that this code does not know, and that could change the result.
        """
        given = dict(zip(self.stock_arguments, args, strict=False)) | kwargs
        hidden_states = given.pop("hidden_states")
        position_embeddings = given.pop("position_embeddings", None)
        attention_mask = given.pop("attention_mask", None)
        past_key_values = take_cache(given, self.cache_names)
        shared = given.pop("shared_kv_states", None)
        refuse_unknown(type(self), given)
        return self._attend(hidden_states, position_embeddings, attention_mask, past_key_values, shared, given)

    def _attend(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, attention_mask: Tensor | None,
        past_key_values: Cache | None, shared: dict | None, kwargs: dict,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Project, rotate, cache and attend; absorbed for few queries on a cache, expanded otherwise.

        `shared` holds what `_rotate_and_cache` gave in the layers whose latents others attend to, by `shared_key`.
        """
        batch, length, _ = hidden_states.shape
        query, gate = self._queries(hidden_states)
        if self.growth is not None:
            cached = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
            factors = query_growth(self.growth, kwargs.get("position_ids"), cached, length, query.device)
            query = query * factors.to(query)
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        cos = sin = None
        if self.qk_rope_head_dim:
            tables = rope_tables(
                position_embeddings, kwargs.get("position_ids"), self.config.mla_rope_tables, self.rotary_dim
            )
            cos, sin = (table[..., self.rope_freq_index] for table in tables)
        if self.source_idx != self.layer_idx:
            # It may have fewer queries than its source has keys, so that its own positions are not those of the keys.
            if cos is not None:
                q_rope, cos, sin = (
                    rotate_planes(q_rope, cos.unsqueeze(1).to(q_rope), sin.unsqueeze(1).to(q_rope)),
                    None,
                    None,
                )
            q_rope = finish_queries(self.latent_format, q_rope, self.rope_weight)
            latent, k_rope = (*shared[shared_key(self.source_idx)], None)[:2]
        else:
            rows = self._compress(hidden_states)
            q_rope, latent, k_rope, cos, sin = self._rotate_and_cache(q_rope, *rows, cos, sin, past_key_values)
        if self.is_shared and shared is not None:
            shared[shared_key(self.layer_idx)] = (latent,) if k_rope is None else (latent, k_rope)

        # With several queries, only an explicit mask defines which keys each one sees.
        few = length == 1 or (length <= MAX_ABSORBED_QUERIES and attention_mask is not None)
        up = None
        if few and past_key_values is not None and not self.training:
            up = linear_map(self.kv_b_proj)
        if up is not None:
            output, weights = self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask, up)
        else:
            if k_rope is None:
                latent, k_rope = dequantise_rows(self.latent_format, latent, q_nope.dtype)
            if past_key_values is not None and attention_mask is not None:
                latent, k_rope = leave_out_hidden(attention_mask, latent, k_rope)
            output, weights = self._expanded(q_nope, q_rope, latent, k_rope, attention_mask, cos, sin, **kwargs)
        output = output.reshape(batch, length, -1)
        output = self.o_proj(output if gate is None else output * gate)
        return F.dropout(output, self.output_dropout, self.training), weights

    def _rotate_and_cache(
        self, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cos: Tensor | None, sin: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Apply RoPE and append the new tokens to the cache.

        Returns:
            Queries as from `finish_queries`, then latents and rotary keys of all cached tokens, and the tables `cos` and `sin`
            (B or 1, 1, T, m) if RoPE is still to be applied: training rotates in `join`. Packed rows and None instead of
            latents and keys where the cache is quantised.
        """
        if self.latent_format is not None:
            return *self._rotate_and_quantise(q_rope, latent, k_rope, cos, sin, cache), None, None
        if cache is not None and self.kernel != "sdpa":
            written = write_static(cache, self.layer_idx, latent, k_rope, q_rope, cos, sin)
            if written is not None:
                latent, k_rope, q_rope = written
                return finish_queries(None, q_rope, self.rope_weight), latent, k_rope, None, None
        if cos is not None:
            cos, sin = cos.unsqueeze(1).to(q_rope), sin.unsqueeze(1).to(q_rope)
            at_once = cache is not None or not torch.is_grad_enabled()
            if at_once or self.rope_weight is not None or self.is_shared:
                q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
                cos = sin = None
        if cache is not None:
            latent, k_rope = update_cache(cache, self.layer_idx, latent, k_rope)
        return finish_queries(None, q_rope, self.rope_weight), latent, k_rope, cos, sin

    def _rotate_and_quantise(
        self, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cos: Tensor | None, sin: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """`_rotate_and_cache` of a quantised cache: attention reads what the cache holds, also where there is none."""
        differentiable = torch.is_grad_enabled() and (latent.requires_grad or k_rope.requires_grad)
        if cache is not None and not differentiable:
            with torch.no_grad():
                return write_packed(
                    self.latent_format, cache, self.layer_idx, latent, k_rope, q_rope, cos, sin, self.rope_weight,
                    self.kernel != "sdpa",
                )  # fmt: skip
        if cos is not None:
            cos, sin = cos.unsqueeze(1).to(q_rope), sin.unsqueeze(1).to(q_rope)
            q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
        q_rope = finish_queries(self.latent_format, q_rope, self.rope_weight)
        through = pass_through(self.latent_format, latent, k_rope)
        if cache is None:
            return q_rope, *through
        with torch.no_grad():
            rows = update_packed(cache, self.layer_idx, quantise_rows(self.latent_format, latent, k_rope))
            cached = dequantise_rows(self.latent_format, rows, latent.dtype)
        return q_rope, *with_gradient(cached, through)

    @staticmethod
    def join(
        q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Join the parts of queries and keys, to (B, H, T, nope + 2m) each.

        A function of tensors alone, so that training can compile it once for layers of all sizes.

        Args:
            q_nope: (B, H, T, nope).
            q_rope: (B, H, T, 2m).
            k_nope: (B, H, T, nope).
            k_rope: (B, 1, T, 2m), shared by all heads.
            cos: (B or 1, 1, T, m), to rotate `q_rope` and `k_rope`; None if they are rotated.
            sin: the same.
        """
        if cos is not None:
            q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
        k_rope = k_rope.expand(-1, k_nope.shape[1], -1, -1)
        return torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor | None, mask: Tensor | None, up: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Decode: apply the up-projections to queries and outputs, and attend on the latents. Output (B, T, H, v).

        `latent` has packed rows where `k_rope` is None; `up` (H * (nope + v), r) is the matrix of `kv_b_proj`.
        """
        up = up.view(self.num_heads, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        up_key, up_value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        # One matrix product per head over all sequences; broadcasting would copy the up-projections for each sequence.
        query = torch.einsum("bhtd,hdr->bthr", q_nope, up_key).transpose(1, 2)
        need_weights, kernel, attended = self.config._attn_implementation == "eager", self.kernel, None
        options = {"softcap": self.softcap, "sinks": self.sink_logits}
        if k_rope is None:
            form = kernel_format(self.latent_format)
            if form is None and kernel == "kernels":
                raise ValueError(
                    f'mla_kernel "kernels" cannot decode rows with a rotary key in {self.latent_format.rope}'
                )
            if form and kernel != "sdpa" and not need_weights:
                joint = self.latent_format.joint.rope_dim  # of the rows as the kernels see them
                parts = (
                    (query, q_rope) if joint == q_rope.shape[-1] else (torch.cat([query, q_rope], -1), q_rope[..., :0])
                )
                attended = kernel_attention(
                    *parts, latent, None, mask, self.scaling, kernel, row_format=form, **options
                )
                if attended is not None:
                    attended = attended[..., : self.kv_lora_rank]
            latent, k_rope = (
                (None, None) if attended is not None else dequantise_rows(self.latent_format, latent, query.dtype)
            )
            kernel = "sdpa"
        weights = None
        if attended is None:
            attended, weights = absorbed_attention(
                query, q_rope, latent, k_rope, mask, self.scaling, need_weights=need_weights, kernel=kernel, **options
            )
        return torch.einsum("bhtr,hvr->bthv", attended, up_value), weights

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None,
        cos: Tensor | None = None, sin: Tensor | None = None, **kwargs,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Prefill and training: expand keys and values of every head, then the library's attention. Output (B, T, H, v).

        `cos` and `sin` rotate queries and keys that are not rotated yet.
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
                up = F.linear(
                    latent.squeeze(1), weight.view(self.num_heads, -1, self.kv_lora_rank)[first:stop].flatten(0, 1)
                )
            up = up.view(batch, length, stop - first, -1).transpose(1, 2)
            k_nope, value = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
            query, key = self.join(q_nope[:, first:stop], q_rope[:, first:stop], k_nope, k_rope, cos, sin)
            sink = {} if sinks is None else {"s_aux": sinks[first:stop]}
            return attend(self, query, key, value, mask, **kwargs, **sink)

        group = self._heads_at_once(latent)
        weight = linear_map(self.kv_b_proj) if group < self.num_heads else None
        if weight is None:
            return of_heads(0, self.num_heads)
        parts = [of_heads(h, min(h + group, self.num_heads))[0] for h in range(0, self.num_heads, group)]
        return torch.cat(parts, dim=2), None

    def _heads_at_once(self, latent: Tensor) -> int:
        """Number of heads whose keys and values are expanded together; all for gradients, weights and the compiler."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.config._attn_implementation == "eager":
            return self.num_heads
        head_bytes = latent.shape[0] * latent.shape[2] * (self.qk_head_dim + self.v_head_dim) * latent.element_size()
        return min(max(EXPANDED_BYTES // max(head_bytes, 1), 1), self.num_heads)
