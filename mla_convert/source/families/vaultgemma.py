"""VaultGemma."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="vaultgemma",
    checkpoints="VaultGemma 1B",
    traits="soft cap on the logits; its own scale; a sliding window in every other layer",
    softcap="attn_logit_softcapping",
    tested={
        "vaultgemma": {
            "head_dim": 8,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        }
    },
)
