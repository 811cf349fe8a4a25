"""What layers read beside the hidden states: an input of their own for each token, and keys and values of earlier layers.

A layer that attends to the keys and values of another one needs them for every window long after that layer's weights have
left the memory. They are kept with the hidden states, and travel as further columns of these: steps that pick, gather or
capture windows see one tensor, and the layers take the columns apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

# ("input", a layer), ("keys", a layer): its keys and values, ("latent", a layer): its latents and rotary keys
Key = tuple[str, int]


@dataclass(frozen=True)
class Part:
    """Columns that hold tensors (B, heads, T, width), one after another.

    Attributes:
        key: of the tensors.
        widths: of the tensors.
        heads: of each tensor.
    """

    key: Key
    widths: tuple[int, ...]
    heads: int = 1

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.heads * sum(self.widths)

    def join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Columns (B, T, .) of tensors (B, heads, T, width)."""
        return torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in tensors], dim=-1)

    def take(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Inverse of `join`."""
        parts = columns.split([self.heads * width for width in self.widths], dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)


@dataclass(frozen=True)
class Layout:
    """Columns beside hidden states of a width; the source's states end before the latents, which they do not have."""

    hidden_size: int | None = None
    parts: tuple[Part, ...] = ()

    def take(self, rows: Tensor) -> tuple[Tensor, dict[Key, tuple[Tensor, ...]]]:
        """Hidden states (B, T, hidden), and the tensors beside them, of rows (B, T, hidden + columns)."""
        found, start = {}, self.hidden_size or 0
        for part in self.parts:
            if start + part.columns <= rows.shape[-1]:
                found[part.key] = part.take(rows[..., start : start + part.columns])
                start += part.columns
        return rows[..., : self.hidden_size], found


class Beside:
    """What is beside the hidden states of a set of windows.

    `layout` states which of it the current layers read.
    """

    def __init__(self, device: torch.device, tokens: Tensor | None = None, inputs: Tensor | None = None):
        """Take the layers' own inputs, if they have such.

        Args:
            device: that computes on them.
            tokens: (N, L) row of `inputs` of each token.
            inputs: (U, layers, n) inputs of each layer by distinct token, in host memory.
        """
        self.device, self.tokens, self.inputs = device, tokens, inputs
        self.kept: dict[Key, Tensor] = {}
        self.layout = Layout()

    def clone(self) -> Beside:
        """A copy that is changed by itself."""
        other = copy(self)
        other.kept = dict(self.kept)
        return other

    def rows(self, index: slice | Tensor) -> Tensor | None:
        """Columns (B, L, .) for some windows, float32, on the device; None if there are none."""
        index = index.cpu() if isinstance(index, Tensor) else index
        found = [self._columns(part.key, index) for part in self.layout.parts]
        columns = [each.to(self.device).float() for each in found if each is not None]
        return torch.cat(columns, dim=-1) if columns else None

    def _columns(self, key: Key, index: slice | Tensor) -> Tensor | None:
        kind, layer = key
        if kind == "input" and self.inputs is not None and self.tokens is not None:
            return self.inputs[self.tokens[index], layer]
        return self.kept[key][index] if key in self.kept else None

    def put(self, index: slice, made: Mapping[Key, Tensor], windows: int, dtype: torch.dtype) -> None:
        """Keep columns (B, L, .) of some of the windows, in host memory on a device with memory of its own.

        Args:
            index: of the windows.
            made: columns by key.
            windows: all of them.
            dtype: that they are kept in.
        """
        for key, columns in made.items():
            if index.start == 0:  # batches come in order
                self.kept[key] = torch.empty(windows, *columns.shape[1:], dtype=dtype)
            self.kept[key][index] = columns.detach().to("cpu", dtype)
