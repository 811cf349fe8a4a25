"""nanochat."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="nanochat",
    checkpoints="nanochat d32",
    traits="per-head norm of query and key after RoPE, which it commutes with because it has no weights; RoPE turns backwards",
    q_norm="q_norm",
    k_norm="k_norm",
    norm_after_rope=True,
    backwards=True,
    tested={"nanochat": {}, "nanochat-bias": {"attention_bias": True, "num_key_value_heads": 6}},
)
