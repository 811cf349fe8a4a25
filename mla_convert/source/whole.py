"""The multimodal model that a source's language model is part of: its other parts are carried over as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.reader import Reader, check_finite
from mla_convert.source.families import DECODER, READ_AS, WHOLES, Family
from mla_convert.source.families.read_as import AXES


@dataclass(frozen=True)
class Whole:
    """A multimodal model.

    `stock_class`: name of its transformers class; `stored`: stored name of each tensor outside the language model, by its
    name in the model; `base`: name of the decoder in the language model's own class.
    """

    config: PreTrainedConfig
    stock_class: str
    reader: Reader
    stored: dict[str, str]
    base: str

    @property
    def layers(self) -> str:
        """Path of the list of decoder layers."""
        return f"{DECODER}.layers"

    def name(self, inner: str) -> str:
        """Name of a tensor of the language model in the whole model."""
        head = f"{self.base}."
        return f"{DECODER}.{inner.removeprefix(head)}" if inner.startswith(head) else inner

    def inner(self, name: str) -> str:
        """Name of a tensor in the language model by itself; the reverse of `name`."""
        head = f"{DECODER}."
        return f"{self.base}.{name.removeprefix(head)}" if name.startswith(head) else name

    def other_bytes(self, itemsize: int | None = None) -> int:
        """Bytes of all tensors outside the language model, with `itemsize` bytes an element (None: as stored)."""
        sizes = (
            (self.reader.shape(name), itemsize or self.reader.dtype(name).itemsize) for name in self.stored.values()
        )
        return sum(math.prod(shape) * size for shape, size in sizes)

    def other_tensors(self) -> dict[str, Tensor]:
        """All tensors outside the language model, as stored.

        Raises:
            InputError: one is not finite.
        """
        read = self.reader.read(self.stored.values())
        tensors = {name: read[stored] for name, stored in self.stored.items()}
        check_finite(tensors)
        return tensors


def part_type(content: dict[str, Any]) -> str:
    """The `model_type` of the language model in a multimodal config.json; empty if it has none.

    Older checkpoints of some types (Qwen2-VL, Qwen2.5-VL) have the language model's settings beside those of the whole.
    """
    text, model_type = content.get("text_config"), content.get("model_type")
    if isinstance(text, dict) and "model_type" in text:
        return str(text["model_type"])
    if model_type in WHOLES and "vision_config" in content:
        # AutoConfig, where the type has no language model of its own
        return getattr(CONFIG_MAPPING[str(model_type)].sub_configs["text_config"], "model_type", "")
    return ""


def part_config(whole: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the language model in a multimodal one, of the class that it is read as."""
    own = whole.text_config
    if whole.model_type not in WHOLES or own.model_type not in READ_AS:
        return own
    read_as = READ_AS[own.model_type]
    fields = {**own.to_dict(), **read_as.settings}
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        fields.pop(key, None)
    rope = fields.get("rope_parameters") or {}
    fields["rope_parameters"] = {key: value for key, value in rope.items() if key not in (*AXES, "type")}
    return CONFIG_MAPPING[read_as.family](**fields)


def open_whole(config: PreTrainedConfig, reader: Reader, family: Family, label: str) -> Whole:
    """The multimodal model of a configuration, and the places of its tensors in a checkpoint.

    transformers' own renamings map stored names to those of its class; only headers are read.

    Args:
        config: of the whole model.
        reader: of its checkpoint.
        family: of its language model.
        label: of the source, for messages.

    Raises:
        InputError: a tensor outside the language model is missing, or stored in another form.
    """
    with init_empty_weights(include_buffers=True):
        model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32)
    if not hasattr(model.get_submodule(DECODER), "layers"):
        raise InputError(
            f"{label}: {type(model).__name__} holds no decoder at {DECODER}: its language model is not found"
        )
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not _in_language_model(name)}
    found = _places(model, reader, set(wanted))
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(
                f"tensor {name} of {label} is missing, or stored in a form that is not read: save the checkpoint again with "
                f"transformers, or fetch it again"
            )
        if reader.shape(found[name]) != tuple(shape):
            raise InputError(
                f"tensor {found[name]} of {label} has shape {list(reader.shape(found[name]))}, its configuration says "
                f"{list(shape)}: config.json and weights do not belong together"
            )
    return Whole(config, type(model).__name__, reader, found, family.layers.partition(".")[0])


def _in_language_model(name: str) -> bool:
    return name.startswith((f"{DECODER}.", "lm_head."))


def _places(model: PreTrainedModel, reader: Reader, wanted: set[str]) -> dict[str, str]:
    """Stored name of each wanted tensor that is stored whole, by its name in the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state, found = model.state_dict(), {}
    for stored in reader.names():
        name, merged = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name in wanted and merged is None:
            found[name] = stored
    return found
