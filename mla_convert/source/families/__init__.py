"""The supported families: every file with a FAMILY in this folder describes one, and is imported by its presence."""

import importlib
import pkgutil
from collections.abc import Collection
from importlib.metadata import version

from packaging.version import Version

from mla_convert.core.errors import InputError
from mla_convert.source.families.base import Family
from mla_convert.source.families.read_as import READ_AS
from mla_convert.source.families.refused import LATENT, REASONS


def _discover() -> dict[str, Family]:
    """The FAMILY of every file in this folder, by model type."""
    modules = (importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__))
    families = (module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    return {family.model_type: family for family in families}


FAMILIES: dict[str, Family] = _discover()
# Multimodal model types that are converted in place: transformers' class holds the language model's decoder at DECODER.
WHOLES = ("gemma3", "gemma4", "gemma4_unified", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
          "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")  # fmt: skip
DECODER = "model.language_model"
# Types that cannot be converted -> the reason.
REFUSED = {name: reason for reason, names in REASONS.items() for name in names if name not in (*FAMILIES, *WHOLES)}
# Keys of a multimodal configuration, which holds a language model and other parts.
PARTS = ("text_config", "vision_config", "audio_config", "llm_config", "thinker_config")


def is_installed(model_type: str) -> bool:
    """Whether the installed transformers has a working causal language model of that type, one of FAMILIES."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    new_enough = Version(version("transformers")) >= Version(FAMILIES[model_type].needs or "0")
    return new_enough and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def family_of_part(model_type: str, part: str) -> str:
    """The family that the language model in a multimodal checkpoint is read as.

    Args:
        model_type: of the whole.
        part: the `model_type` of its language model.
    """
    return READ_AS[part].family if model_type in WHOLES and part in READ_AS else part


def find_family(model_type: str, keys: Collection[str] = (), part: str = "") -> Family:
    """The family of a model type.

    Args:
        model_type: the configuration's `model_type`.
        keys: all keys of the configuration.
        part: the `model_type` of the language model inside a multimodal one.

    Raises:
        InputError: the architecture is not supported; the message gives the reason or the supported ones.
    """
    if model_type.startswith("mla_") and model_type.removeprefix("mla_") in {*FAMILIES, *WHOLES}:
        raise InputError("this model is converted already: nothing to do")
    if model_type in LATENT or "kv_lora_rank" in keys:
        raise InputError(f"{model_type} has multi-head latent attention already: nothing to do")
    if model_type in FAMILIES and not is_installed(model_type):
        raise InputError(f"transformers {version('transformers')} has no working {model_type}: install a newer one")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    supported = f"supported are: {', '.join(sorted(FAMILIES))}"
    if any(key in keys for key in PARTS):
        reason = "it has latent attention already" if part in LATENT else REFUSED.get(part, supported)
        named = f"its language model ({part})" if part else "its language model"
        raise InputError(f"{model_type} is multimodal, and {named} is not supported: {reason}")
    raise InputError(f"architecture {model_type!r} is not supported: {REFUSED.get(model_type, supported)}")


__all__ = ["DECODER", "FAMILIES", "LATENT", "READ_AS", "REFUSED", "WHOLES", "Family", "family_of_part", "find_family",
           "is_installed"]  # fmt: skip
