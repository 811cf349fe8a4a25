"""Registers the converted models with transformers' Auto classes, so that they load without remote code."""

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mla_convert.modeling.configuration_mla import config_class
from mla_convert.modeling.modeling_mla import model_class
from mla_convert.source.families import FAMILIES, WHOLES, is_installed


def register() -> None:
    """Register every family that the installed transformers has. A second call changes nothing."""
    for model_type in filter(is_installed, FAMILIES):
        config = config_class(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]))
        model = model_class(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    for model_type in WHOLES:
        config = config_class(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]))
        model = model_class(getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):  # the first is how every model here is loaded
            auto.register(config, model, exist_ok=True)
