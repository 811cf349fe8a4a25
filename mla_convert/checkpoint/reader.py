"""Tensors of a source checkpoint, read one by one: safetensors files lazily, or a state dict already in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mla_convert.errors import InputError, one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Numbers looked at together by check_finite.
FINITE_CHUNK = 1 << 24
# Squares of what is larger are no numbers in float32, so that norms make nothing of them.
LARGEST = 1e18
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
    """A folder with `model.safetensors`, or shards with an index. Files are mapped only while tensors are read."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of = _weight_map(folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(set(self._file_of.values())):
            self._read_header(file)

    def _read_header(self, file: str) -> None:
        wanted = [name for name, holder in self._file_of.items() if holder == file]
        with self._open(file) as shard:
            held = set(shard.keys())
            for name in wanted:
                if name not in held:
                    raise InputError(f"tensor {name} is missing from {file}, where {INDEX} says it is: fetch it again")
                view = shard.get_slice(name)
                self._headers[name] = (tuple(view.get_shape()), view.get_dtype())

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


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name inside `folder`."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{INDEX} in {folder} is not a shard index ({one_line(error)}): fetch it again") from error
        for file in set(files.values()):
            if not is_plain_name(file):
                raise InputError(f"{INDEX} names {file!r}, which is outside the folder: this checkpoint is not safe")
        return files
    if (folder / SINGLE).is_file():
        try:
            with safe_open(folder / SINGLE, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{SINGLE} in {folder} is damaged or truncated ({one_line(error)}): fetch it again"
            ) from error
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code and is not read: "
            f"convert it to safetensors first"
        )
    raise InputError(f"{folder} has no {SINGLE} and no {INDEX}: give a folder with safetensors weights")


def is_plain_name(name: str) -> bool:
    """Whether a file name stays inside its folder under both POSIX and Windows rules."""
    parts = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and all(len(path.parts) == 1 and not path.anchor and name not in (".", "..") for path in parts)


def check_finite(tensors: dict[str, Tensor], advice: str = "the checkpoint is damaged, fetch it again") -> None:
    """Refuse weights with NaN, infinity, or what cannot be computed with; `advice` says what that means.

    Raises:
        InputError: names the first tensor that has one.
    """
    for name, tensor in tensors.items():
        parts = tensor.flatten().split(FINITE_CHUNK) if tensor.is_floating_point() else ()
        for low, high in (part.aminmax() for part in parts if part.numel()):
            largest = max(-float(low), float(high))
            if not (math.isfinite(float(low)) and math.isfinite(largest)):
                raise InputError(f"tensor {name} has NaN or infinite values: {advice}")
            if largest > LARGEST:
                raise InputError(f"tensor {name} has values up to {largest:.1e}, too large to compute with: {advice}")
