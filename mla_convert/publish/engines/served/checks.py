"""Facts of a converted model's configuration that the plugins ask for, and models that no plugin serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mla_convert.modeling.configuration_mla import MODEL_TYPE, MlaFields

# Fields that the plugins read, and those that they may ignore.
READ = {"mla_q_bias", "mla_kv_bias", "mla_o_bias", "mla_layers", "mla_attention", "mla_q_norm", "mla_k_norm", "mla_norm_over",
        "latent_cache", "mla_softcap", "mla_sinks", "mla_kernel", "mla_transformers"}  # fmt: skip


def family(config: Any) -> str:
    """Model type of the original."""
    return config.model_type.removeprefix(MODEL_TYPE)


def foreign_fields(config: Any) -> list[str]:
    """Fields of a converted model's configuration that no plugin reads, and that are not at their default."""
    own = {name: value for name, value in config.to_dict().items() if name.startswith(("mla_", "latent_"))}
    return sorted(name for name, value in own.items() if name not in READ and value != getattr(MlaFields, name, None))


def unserved(config: Any, served: Sequence[str], devices: int) -> list[tuple[Any, str]]:
    """Properties of a model that a plugin would serve wrongly: whether it has each of them, and the reason with a remedy.

    Args:
        config: the converted model's configuration.
        served: model types of the originals that the plugin serves.
        devices: that heads are split over.
    """
    kind, foreign, heads = family(config), foreign_fields(config), config.num_attention_heads
    return [
        (
            kind not in served,
            f"the plugin serves {', '.join(served)}, not {kind}: use transformers, or `mla-convert export`",
        ),
        (foreign, f"its {', '.join(foreign)} in config.json is nothing that the plugin knows: use transformers"),
        (config.mla_sinks, "the plugin has no attention sinks: use transformers"),
        (heads % devices, f"{heads} heads cannot be split over {devices} devices"),
        (
            config.mla_q_norm and config.mla_norm_over != "head",
            "the plugin has no norm over all heads together: use transformers",
        ),
    ]


def refuse(reasons: Sequence[tuple[Any, str]]) -> None:
    """Stop at the first reason that applies.

    Raises:
        ValueError: with that reason.
    """
    for applies, reason in reasons:
        if applies:
            raise ValueError(f"converted model: {reason}")


def window_of(config: Any, index: int) -> int | None:
    """Tokens that a query of a layer sees, as transformers masks them; None for all.

    An engine's own attention is no source: vLLM's falls back to the model's window in layers that have none.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = kinds[index] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return window if window and windowed else None
