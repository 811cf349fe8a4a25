"""Hidden states of a set of windows at one layer boundary, kept on the device if they are small, else in host memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.reader import LARGEST

# A set of states that takes more than this, and more than this share of the device's memory, lives in pinned host memory and
# travels batch by batch. There are five sets at most.
DEVICE_BYTES, DEVICE_SHARE = 5 << 28, 1 / 24
BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}


def device_room(device: torch.device) -> int:
    """Bytes that one set of states may take on a CUDA device."""
    return max(DEVICE_BYTES, int(torch.cuda.get_device_properties(device).total_memory * DEVICE_SHARE))


class Activations:
    """Hidden states (N, L, hidden) of N windows, changed in place from layer to layer."""

    def __init__(self, data: Tensor, device: torch.device, dtype: torch.dtype, on_host: bool = False):
        self.device = device
        size = data.numel() * dtype.itemsize
        if device.type == "cuda" and (on_host or size > device_room(device)):
            self.data = data.to(dtype).pin_memory()
        else:
            self.data = data.to(device, dtype, copy=True)
        self.windows, self.length, self.hidden_size = data.shape

    def empty_like(self) -> Activations:
        """Room for as many states, where these ones live."""
        other = copy(self)
        other.data = torch.empty_like(self.data, pin_memory=self.data.is_pinned())
        return other

    def clone(self) -> Activations:
        """A copy of its own, where these states live."""
        other = self.empty_like()
        other.data.copy_(self.data)
        return other

    def batches(self) -> Iterator[slice]:
        """Slices over the windows that make batches of a size fit for the device."""
        size = max(1, BATCH_TOKENS[self.device.type] // self.length)
        for start in range(0, self.windows, size):
            yield slice(start, min(start + size, self.windows))

    def get(self, index: slice | Tensor) -> Tensor:
        """Some windows on the device, float32."""
        if isinstance(index, Tensor) and self.data.is_pinned():
            # one copy a window: gathering them first would take them out of pinned memory
            return torch.stack([self.data[i].to(self.device, non_blocking=True) for i in index.tolist()]).float()
        index = index.to(self.data.device) if isinstance(index, Tensor) else index
        return self.data[index].to(self.device, non_blocking=True).float()

    def put(self, index: slice, states: Tensor) -> None:
        """Store some windows."""
        # cast on the device, then straight into (pinned) place
        self.data[index].copy_(states.to(self.data.dtype))

    @torch.no_grad()
    def advance(self, layer: Callable[..., Tensor]) -> None:
        """Replace every state by the layer's output for it."""
        for batch in self.batches():
            self.put(batch, layer(self.get(batch)))

    def check_finite(self, where: str) -> None:
        """Refuse states that nothing can be made of; `where` they come from, for the message.

        Raises:
            InputError: one of them is NaN, infinite, or has no square.
        """
        largest = [float(torch.linalg.vector_norm(self.data[batch], math.inf)) for batch in self.batches()]
        if not all(size <= LARGEST for size in largest):
            raise InputError(
                f"{where} makes hidden states of NaN, infinity or close to it: its weights are too large to compute with, so the "
                f"checkpoint is damaged; fetch it again"
            )
