"""Readers of a source checkpoint's tensors: safetensors files, read lazily, or a state dict in memory (gguf_reader: GGUF)."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mla_convert.core.errors import InputError, one_line
from mla_convert.source.checkpoint.files import INDEX, WeightFiles, is_plain_name, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Elements that check_finite inspects at a time.
FINITE_CHUNK = 1 << 24
# Largest magnitude of a weight: the square of a larger one would be near float32's limit, and norms would overflow.
LARGEST = 1e18

__all__ = ["DTYPES", "INDEX", "MemoryReader", "Reader", "SafetensorsReader", "check_finite", "is_plain_name"]


class Reader(Protocol):
    """Access to a source's weights. All tensors are returned on the CPU, in their stored dtype."""

    def names(self) -> list[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one tensor."""


class MemoryReader:
    """A state dict in memory, or on the meta device."""

    def __init__(self, tensors: dict[str, Tensor]):
        """Read from `tensors`, by name; they are not copied."""
        self._tensors = tensors

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        return self._tensors[name].dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors."""
        return {name: self._tensors[name] for name in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one tensor."""
        return self._tensors[name][start:stop]


class SafetensorsReader:
    """A folder with `model.safetensors`, or shards with an index. A file is mapped only while its tensors are read.

    The rules are transformers': all tensors of a file count, also those that the index does not name; of a tensor in two
    files, the last one counts. `notes` report such a tensor.
    """

    def __init__(self, folder: Path):
        """Read the headers of all weight files in `folder`.

        Raises:
            InputError: there are none, one is damaged or missing, or a tensor of the index is in no file.
        """
        self._folder = folder
        self._file_of: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        weights = weight_files(folder)
        twice = {name for file in weights.files for name in self._read_header(file, weights)}
        self.notes = _twice_note(sorted(twice), self._file_of)

    def _read_header(self, file: str, weights: WeightFiles) -> list[str]:
        """Register the tensors of one file. Returns the names of those that an earlier file has too."""
        with self._open(file) as shard:
            # A dictionary serves as a set that keeps the file's order.
            held = dict.fromkeys(shard.keys())
            for name in (name for name, holder in weights.promised.items() if holder == file):
                if name not in held:
                    raise InputError(
                        f"tensor {name} is missing from {file}, where {weights.index} says it is: fetch it again"
                    )
            # Before the names are registered below, after which each would count as known.
            twice = [name for name in held if name in self._file_of]
            for name in held:
                view = shard.get_slice(name)
                self._headers[name] = (tuple(view.get_shape()), view.get_dtype())
                self._file_of[name] = file
        return twice

    def _open(self, file: str) -> Any:
        """The open file, a context (safetensors has no type for it)."""
        path = self._folder / file
        if not path.is_file():
            raise InputError(f"shard {file} is missing from {self._folder}: fetch the checkpoint again")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise InputError(f"shard {file} is damaged or truncated ({one_line(error)}): fetch it again") from error

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._headers[name][0]

    def stored_as(self, name: str) -> str:
        """Dtype of one tensor, by its name in safetensors, such as "BF16" or "F8_E4M3"."""
        return self._headers[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it.

        Raises:
            InputError: it is none of `DTYPES`.
        """
        stored = self.stored_as(name)
        if stored not in DTYPES:
            raise InputError(f"tensor {name} is stored as {stored}, and no scales say what that means: it is not read")
        return DTYPES[stored]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, as copies."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for file, held in by_file.items():
            with self._open(file) as shard:
                # clone: a mapped page stays resident as long as the tensor exists
                tensors.update({name: shard.get_tensor(name).clone() for name in held})
        return tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one tensor, as a copy."""
        with self._open(self._file_of[name]) as shard:
            return shard.get_slice(name)[start:stop].clone()


def take_weights(model: nn.Module, reader: Reader, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the parameters of a model by those that a reader has, one by one; tied ones follow."""
    stored = set(reader.names())
    for name in [name for name, _ in model.named_parameters() if name in stored]:
        (tensor,) = reader.read([name]).values()
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    model.tie_weights()  # type: ignore[operator]


def _twice_note(twice: list[str], file_of: dict[str, str]) -> tuple[str, ...]:
    """The note about tensors that are in two files."""
    if not twice:
        return ()
    others = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
    return (f"tensor {twice[0]}{others} stands in two shards: taken from {file_of[twice[0]]}, as transformers does",)


def check_finite(
    tensors: dict[str, Tensor], advice: str = "the checkpoint is damaged, fetch it again", most: float = LARGEST
) -> None:
    """Refuse weights that are NaN, infinite or too large to compute with.

    Args:
        tensors: by name; those of integers are skipped.
        advice: end of the error message.
        most: largest magnitude.

    Raises:
        InputError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        parts = tensor.flatten().split(FINITE_CHUNK) if tensor.is_floating_point() else ()
        # One pass finds NaN, infinity and the largest magnitude, without a mask of the tensor's size.
        for low, high in (part.aminmax() for part in parts if part.numel()):
            largest = max(-float(low), float(high))
            if not (math.isfinite(float(low)) and math.isfinite(largest)):
                raise InputError(f"tensor {name} has NaN or infinite values: {advice}")
            if largest > most:
                raise InputError(f"tensor {name} has values up to {largest:.1e}, too large to compute with: {advice}")
