"""The table of supported families: one row each."""

from mla_convert.errors import InputError
from mla_convert.families import llama, mistral, qwen2
from mla_convert.families.base import Family

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2)}


def find_family(model_type: str) -> Family:
    """The family of a configuration's model type.

    Raises:
        InputError: not supported; says which are.
    """
    if model_type.startswith("mla_"):
        raise InputError("this model is converted already: nothing to do")
    if model_type not in FAMILIES:
        raise InputError(f"architecture {model_type!r} is not supported; supported are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "find_family"]
