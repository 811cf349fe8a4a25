"""Mixtral: Mistral with a mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="mixtral",
    checkpoints="Mixtral 8x7B, 8x22B",
    traits="mixture of experts",
    renamed=((".block_sparse_moe.", ".mlp."),),
    experts=("w1", "w3", "w2"),
    tested={"mixtral": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 12}},
)
