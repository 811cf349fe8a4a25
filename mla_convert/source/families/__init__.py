"""The supported families: every other file in this folder describes one, and is imported by its presence."""

import importlib
import pkgutil
from collections.abc import Collection

from mla_convert.core.errors import InputError
from mla_convert.source.families import base
from mla_convert.source.families.base import Family


def _discover() -> dict[str, Family]:
    """The FAMILY of every file in this folder, by model type."""
    modules = (importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__))
    families = (module.FAMILY for module in modules if module.__name__ != base.__name__)
    return {family.model_type: family for family in families}


FAMILIES: dict[str, Family] = _discover()
# Models that have latent attention already: transformers' model types, and those of models with their own code.
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_linear", "longcat_flash", "minicpm3",
          "glm4_moe_lite", "glm_moe_dsa", "mistral4", "youtu")  # fmt: skip
# Similar architectures that cannot be converted, and the reason.
REFUSED = {
    "llama4_text": "it norms its keys after RoPE, so no latent without position can be shared by its heads",
    "bloom": "its attention has a bias by distance (ALiBi) instead of RoPE or learned positions",
    "mpt": "its attention has a bias by distance (ALiBi) instead of RoPE or learned positions",
}
# Keys of a multimodal configuration, which holds a language model and other parts.
PARTS = ("text_config", "vision_config", "audio_config", "llm_config", "thinker_config")


def find_family(model_type: str, keys: Collection[str] = ()) -> Family:
    """The family of a model type.

    Args:
        model_type: the configuration's `model_type`.
        keys: all keys of the configuration.

    Raises:
        InputError: the architecture is not supported; the message gives the reason or the supported ones.
    """
    if model_type.startswith("mla_"):
        raise InputError("this model is converted already: nothing to do")
    if model_type in LATENT or "kv_lora_rank" in keys:
        raise InputError(f"{model_type} has multi-head latent attention already: nothing to do")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if any(part in keys for part in PARTS):
        raise InputError(
            f"{model_type} is multimodal, and its language model is none of: {', '.join(sorted(FAMILIES))}"
        )
    if model_type in REFUSED:
        raise InputError(f"architecture {model_type!r} is not supported: {REFUSED[model_type]}")
    raise InputError(f"architecture {model_type!r} is not supported; supported are: {', '.join(sorted(FAMILIES))}")


__all__ = ["FAMILIES", "LATENT", "Family", "find_family"]
