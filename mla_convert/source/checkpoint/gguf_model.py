"""The model in a GGUF file: as transformers reads it, with the metadata that it ignores and without missing tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mla_convert.core.errors import InputError, MlaConvertError, one_line
from mla_convert.source.checkpoint.gguf_config import apply_metadata
from mla_convert.source.checkpoint.gguf_file import VOCABULARY, GgufFile, read_gguf
from mla_convert.source.checkpoint.gguf_reader import GgufReader
from mla_convert.source.checkpoint.gguf_rope import FACTORS
from mla_convert.source.checkpoint.reader import take_weights
from mla_convert.source.quiet import quietly

# GGUF stores the experts as one tensor each for gate, up and down; the model has gate and up in one.
EXPERTS = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file whose metadata describes a transformers model, and whose tensors are that model's."""

    file: GgufFile
    config: PreTrainedConfig
    reader: GgufReader
    notes: list[str]

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model with its weights, dequantised tensor by tensor, on the CPU.

        Raises:
            InputError: damaged weights.
        """

        def build() -> PreTrainedModel:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
            take_weights(model, self.reader, torch.device("cpu"), dtype)
            return model

        return _guarded(self.file, build)


def open_gguf(path: Path, check: Callable[[PreTrainedConfig], Any] = lambda config: None) -> GgufModel:
    """Read a file's headers, and compare its tensors with the model that its metadata describes.

    Args:
        path: of the file, or of the first part of a split file.
        check: may refuse the configuration by an error.

    Raises:
        InputError: damaged, incomplete, of a family or with settings that transformers does not support.
        ResourceError: no disk space to join the headers of a split file.
    """
    file = read_gguf(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{file.name} holds no model but general.type = {kind!r}: give a language model")
    if file.metadata.get(f"{file.architecture}.attention.causal") is False:
        raise InputError(f"{file.name} has {file.architecture}.attention.causal = False: give a language model")
    with file.described() as described, quietly():  # transformers warns that there is no vocabulary
        config = _guarded(file, lambda: AutoConfig.from_pretrained(described.parent, gguf_file=described.name))
    if f"{file.architecture}.vocab_size" not in file.metadata and file.metadata[VOCABULARY]:
        config.vocab_size = file.metadata[VOCABULARY]  # as transformers does, if it reads the vocabulary
    forget_packing(config)
    check(config)
    notes = _guarded(file, lambda: apply_metadata(config, file))
    return GgufModel(file, config, _matched(file, config), notes)


def forget_packing(config: PreTrainedConfig) -> None:
    """Remove `quantization_config` from a configuration: the weights are dequantised when they are read."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _guarded(file: GgufFile, make: Callable[[], Any]) -> Any:
    """The result of `make`; the errors that a damaged or unsupported file causes become bad input."""
    try:
        return make()
    except (MlaConvertError, MemoryError):
        raise
    except Exception as error:  # transformers does not check the metadata
        raise InputError(f"{file.name} cannot be read as GGUF: {one_line(error)}") from error


def _matched(file: GgufFile, config: PreTrainedConfig) -> GgufReader:
    """Check that file and model have the same tensors, of the same sizes. Returns the reader of these.

    transformers initialises tensors at random that are missing from the file, and ignores additional ones.
    """

    def build() -> PreTrainedModel:
        with init_empty_weights(include_buffers=True):
            return AutoModelForCausalLM.from_config(config)

    model = _guarded(file, build)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if name not in model.all_tied_weights_keys}
    names = _names(file, config, list(shapes))
    for name, shape in shapes.items():
        for stored in names[name]:
            if stored not in file.tensors:
                raise InputError(f"tensor {stored} ({name}) is missing from {file.name}: fetch it again")
        sizes = [file.tensors[stored] for stored in names[name]]
        # Numbers of elements, because the converter may change a tensor's layout; `GgufReader` compares shapes when it
        # reads.
        if sum(map(prod, sizes)) != prod(shape):
            raise InputError(
                f"tensor {names[name][0]} of {file.name} has shape {list(sizes[0])}, its metadata says {list(shape)}: they do not "
                f"belong together"
            )
    used = {stored for name in shapes for stored in names[name]} | set(FACTORS)
    for stored in file.tensors:
        if stored not in used:
            raise InputError(
                f"tensor {stored} of {file.name} has no place in transformers' {type(model).__name__}: give the checkpoint that "
                f"it was made from"
            )
    return GgufReader(file, model, shapes, names)


def _names(file: GgufFile, config: PreTrainedConfig, parameters: list[str]) -> dict[str, list[str]]:
    """Names of the tensors in the file that each parameter is made of."""
    known = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if known is None:
        raise InputError(f"{file.name} is of architecture {file.architecture!r}, which the package gguf does not know")
    table = get_tensor_name_map(known, config.num_hidden_layers)
    names = {}
    for name in parameters:
        base, _, kind = name.rpartition(".")
        layer = name.removeprefix("model.layers.").partition(".")[0]
        experts = next((parts for end, parts in EXPERTS.items() if name.endswith(end)), None)
        if experts:
            names[name] = [f"blk.{layer}.{part}.weight" for part in experts]
            continue
        stored = table.get_name(base)
        if stored is None:
            raise InputError(
                f"{file.name} has no tensor that transformers reads as {name}: give the checkpoint that it was made from"
            )
        names[name] = [f"{stored}.{kind}"]
    return names
