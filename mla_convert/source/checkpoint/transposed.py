"""Tensors that a checkpoint stores with their last two axes swapped, in the model's shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from mla_convert.source.checkpoint.reader import Reader
from mla_convert.source.families.read_as import READ_AS


class TransposedReader:
    """A reader that swaps the last two axes of some tensors."""

    def __init__(self, stored: Reader, swapped: Collection[str]):
        """Read from `stored`, and swap the axes of the tensors named in `swapped`."""
        self._stored, self._swapped = stored, frozenset(swapped)

    def names(self) -> list[str]:
        """All tensor names."""
        return self._stored.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        shape = self._stored.shape(name)
        return (*shape[:-2], shape[-1], shape[-2]) if name in self._swapped else shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""
        return self._stored.dtype(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, contiguous."""
        read = self._stored.read(names)
        return {name: tensor.mT.contiguous() if name in self._swapped else tensor for name, tensor in read.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one tensor: entries of the first axis, which is never one of the last two."""
        rows = self._stored.rows(name, start, stop)
        return rows.mT.contiguous() if name in self._swapped else rows


def in_models_shape(stored: Reader, wanted: Reader, model_type: str) -> Reader:
    """The stored tensors, with the axes swapped of those whose shape requires it, as transformers does.

    Args:
        stored: the checkpoint under the model's names.
        wanted: the model's tensors.
        model_type: of the language model, which may have such tensors (`ReadAs.transposed`).
    """
    ends = READ_AS[model_type].transposed if model_type in READ_AS else ()
    named = [name for name in wanted.names() if ends and name.endswith(ends)]
    swapped = {name for name in named if stored.shape(name) != wanted.shape(name)}
    return TransposedReader(stored, swapped) if swapped else stored
