"""Reads the tensors of a GGUF file one by one, dequantised, under the names and in the layout of the transformers model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.gguf_file import GgufFile

# Elements that a thread dequantises at a time.
CHUNK = 1 << 20
# Tensors with a row for each token: the only ones of which a part is read, and no family's layout reorders their rows.
TABLES = ("token_embd.weight", "output.weight")


class GgufReader:
    """A reader (see `reader.Reader`) of a GGUF file.

    transformers' own converters of one tensor are used (`TENSOR_PROCESSORS`), so that a model read tensor by tensor has the same
    values as one that transformers loads as a whole.
    """

    def __init__(
        self, file: GgufFile, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], stored: dict[str, list[str]]
    ):
        """Check that every type can be dequantised; no value is read.

        Args:
            file: the opened file.
            model: the model that it describes, on the meta device.
            shapes: of the model's parameters, without a tied head.
            stored: names of the tensors in the file that each parameter is made of.

        Raises:
            InputError: a type that the package gguf does not dequantise.
        """
        self._file, self._model, self._shapes, self._stored = file, model, shapes, stored
        for kind in {file.kind(name) for names in stored.values() for name in names}:
            _check_type(kind, file)

    @cached_property
    def _processor(self) -> TensorProcessor:
        config: PreTrainedConfig = self._model.config
        return TENSOR_PROCESSORS.get(self._file.architecture, TensorProcessor)(config=config.to_dict())

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names of the parameters by those in the file, as transformers' converters take them."""
        return get_gguf_hf_weights_map(self._model, self._processor)

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """float32, to which every tensor is dequantised."""
        return torch.float32

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named parameters, dequantised.

        Raises:
            InputError: a tensor that has another shape in the model.
        """
        return {name: self._read(name) for name in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one parameter; of the tables of tokens only these are dequantised."""
        if self._stored[name][0] in TABLES:
            return self._convert(name, slice(start, stop))
        return self._read(name)[start:stop]

    def _read(self, name: str) -> Tensor:
        tensor = self._convert(name, slice(None))
        if tuple(tensor.shape) != self._shapes[name]:
            raise InputError(
                f"tensor {self._stored[name][0]} of {self._file.name} is read with shape {list(tensor.shape)}, its model has "
                f"{list(self._shapes[name])}: give the checkpoint that it was made from"
            )
        return tensor

    def _convert(self, name: str, rows: slice) -> Tensor:
        """A parameter as transformers' converter makes it of the stored tensors: experts of several, else of one."""
        parsed: dict[str, Any] = {"tensors": {}}
        for stored in self._stored[name]:
            weights = _dequantised(self._file.data(stored, rows), self._file.kind(stored))
            result = self._processor.process(
                weights=weights, name=stored, tensor_key_mapping=self._names, parsed_parameters=parsed
            )
            if result.name in self._names:
                # A copy of unquantised values, which may be a view of the mapped file, which is read-only.
                parsed["tensors"][self._names[result.name]] = torch.from_numpy(np.require(result.weights, None, "W"))
        return parsed["tensors"][name].float()


def _dequantised(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The values of stored rows, float32; several threads, as a conversion reads every layer three or four times."""
    block, size = GGML_QUANT_SIZES[kind]
    width = data.shape[-1] * data.dtype.itemsize // size * block
    step = max(1, CHUNK // (width * math.prod(data.shape[1:-1])))
    parts = [data[start : start + step] for start in range(0, len(data), step)]
    if data.ndim < 2 or len(parts) == 1:
        return gguf.dequantize(data, kind)
    values = np.empty((*data.shape[:-1], width), np.float32)

    def fill(number: int) -> None:
        values[number * step : (number + 1) * step] = gguf.dequantize(parts[number], kind)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(len(parts))):  # raises what a thread raised
            pass
    return values


def _check_type(kind: GGMLQuantizationType, file: GgufFile) -> None:
    """Refuse a type that cannot be dequantised, by an attempt on one block."""
    try:
        gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise InputError(
            f"{file.name} has tensors of type {kind.name}, which the package gguf does not dequantise: give another "
            f"quantisation of the model, or the checkpoint that it was made from"
        ) from error
