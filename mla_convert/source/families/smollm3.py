"""SmolLM3: some layers without RoPE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="smollm3",
    checkpoints="SmolLM3-3B",
    traits="every fourth layer has no RoPE",
    rope_layers="no_rope_layers",
    tested={
        "smollm3": {"no_rope_layers": [1, 0, 1]},
        "smollm3-window": {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 12},
    },
)
