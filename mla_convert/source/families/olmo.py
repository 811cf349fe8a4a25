"""OLMo 1."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="olmo",
    checkpoints="OLMo 1B and 7B, those without clip_qkv",
    traits="norms without weights",
    requires={"clip_qkv": None},
    tested={"olmo": {}, "olmo-mha": {"num_key_value_heads": 6, "tie_word_embeddings": True}},
)
