"""Tensors of a source checkpoint, read one by one: safetensors files lazily, or a state dict already in memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mla_convert.core.errors import InputError, one_line
from mla_convert.source.checkpoint.files import INDEX, WeightFiles, is_plain_name, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Numbers looked at together by check_finite.
FINITE_CHUNK = 1 << 24
# Squares of what is larger are no numbers in float32, so that norms make nothing of them.
LARGEST = 1e18

__all__ = ["DTYPES", "INDEX", "MemoryReader", "Reader", "SafetensorsReader", "check_finite", "is_plain_name"]


class Reader(Protocol):
    """What the conversion needs of a source's weights."""

    def names(self) -> list[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU, as stored."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, on the CPU, as stored."""


class MemoryReader:
    """A state dict that is in memory already (GGUF files, which transformers dequantises as a whole)."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][start:stop]


class SafetensorsReader:
    """A folder with `model.safetensors`, or shards with an index. Files are mapped only while tensors are read.

    As transformers does: all tensors of a file count, whether or not the index names them, and of a tensor that stands in
    two files the last. `notes` say where the index has it otherwise.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        weights = weight_files(folder)
        twice = {name for file in weights.files for name in self._read_header(file, weights)}
        self.notes = _twice_note(sorted(twice), self._file_of)

    def _read_header(self, file: str, weights: WeightFiles) -> list[str]:
        """Take up the tensors of one file; names of those that an earlier file has as well."""
        with self._open(file) as shard:
            held = dict.fromkeys(shard.keys())
            for name in (name for name, holder in weights.promised.items() if holder == file):
                if name not in held:
                    raise InputError(
                        f"tensor {name} is missing from {file}, where {weights.index} says it is: fetch it again"
                    )
            twice = [name for name in held if name in self._file_of]
            for name in held:
                view = shard.get_slice(name)
                self._headers[name] = (tuple(view.get_shape()), view.get_dtype())
                self._file_of[name] = file
        return twice

    def _open(self, file: str):
        path = self._folder / file
        if not path.is_file():
            raise InputError(f"shard {file} is missing from {self._folder}: fetch the checkpoint again")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise InputError(f"shard {file} is damaged or truncated ({one_line(error)}): fetch it again") from error

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def stored_as(self, name: str) -> str:
        """Type of one tensor's numbers, by the name that safetensors has for it."""
        return self._headers[name][1]

    def dtype(self, name: str) -> torch.dtype:
        stored = self.stored_as(name)
        if stored not in DTYPES:
            raise InputError(f"tensor {name} is stored as {stored}, and no scales say what that means: it is not read")
        return DTYPES[stored]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for file, held in by_file.items():
            with self._open(file) as shard:
                # clone: a mapped page would stay resident for as long as the tensor lives
                tensors.update({name: shard.get_tensor(name).clone() for name in held})
        return tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        with self._open(self._file_of[name]) as shard:
            return shard.get_slice(name)[start:stop].clone()


def _twice_note(twice: list[str], file_of: dict[str, str]) -> tuple[str, ...]:
    """What to say of tensors that stand in two files."""
    if not twice:
        return ()
    others = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
    return (f"tensor {twice[0]}{others} stands in two shards: taken from {file_of[twice[0]]}, as transformers does",)


def check_finite(
    tensors: dict[str, Tensor], advice: str = "the checkpoint is damaged, fetch it again", most: float = LARGEST
) -> None:
    """Refuse weights with NaN, infinity, or numbers above `most`, which cannot be computed with; `advice` says what that means.

    Raises:
        InputError: names the first tensor that has one.
    """
    for name, tensor in tensors.items():
        parts = tensor.flatten().split(FINITE_CHUNK) if tensor.is_floating_point() else ()
        for low, high in (part.aminmax() for part in parts if part.numel()):
            largest = max(-float(low), float(high))
            if not (math.isfinite(float(low)) and math.isfinite(largest)):
                raise InputError(f"tensor {name} has NaN or infinite values: {advice}")
            if largest > most:
                raise InputError(f"tensor {name} has values up to {largest:.1e}, too large to compute with: {advice}")
