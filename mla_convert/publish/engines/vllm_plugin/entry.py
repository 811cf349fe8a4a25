"""Entry point `vllm.general_plugins`: makes converted models known to vLLM."""

from __future__ import annotations

import logging

from packaging.version import Version

# Releases whose internals this plugin was run with: attention layers, cache specs and model runners are no stable interface.
SERIES = "0.26"
MODULE = "mla_convert.publish.engines.vllm_plugin.model"


def serves(version: str) -> bool:
    """Whether a version of vLLM belongs to the series that the plugin was run with."""
    return Version(version).release[:2] == Version(SERIES).release


def register() -> None:
    """Register the class of every family. vLLM calls this in each process, some of them twice; that changes nothing.

    Families that the plugin does not serve are registered, too: vLLM's fallback for unknown classes knows nothing of latents.
    """
    import vllm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from mla_convert.modeling.configuration_mla import PREFIX
    from mla_convert.source.families import FAMILIES, is_installed

    for model_type in filter(is_installed, FAMILIES):
        name = PREFIX + MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        vllm.ModelRegistry.register_model(name, f"{MODULE}:{name}")
    if not serves(vllm.__version__):
        logging.getLogger("vllm.mla_convert").warning(refusal(vllm.__version__))


def refusal(version: str) -> str:
    """The reason why another version of vLLM does not serve converted folders."""
    return (
        f"mla_convert serves converted folders with vLLM {SERIES}, and {version} is installed: install vllm=={SERIES}.*, or "
        f"write a folder for this version with `mla-convert export`"
    )
