"""Hidden states of a set of windows at one layer boundary: on the device if they are small, else in pinned host memory.

With several processes each holds its share of the windows (`Processes.share`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy

import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.core.processes import Processes, alone
from mla_convert.method.calibrate.beside import Beside, Key, Layout
from mla_convert.source.checkpoint.reader import LARGEST

# A set of states larger than DEVICE_BYTES, and than DEVICE_FRACTION of the device's memory, is kept in pinned host memory and
# copied batch by batch. A conversion has at most five sets.
DEVICE_BYTES, DEVICE_FRACTION = 5 << 28, 1 / 24
BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}


def device_limit(device: torch.device) -> int:
    """Largest size in bytes of a set of states on a CUDA device."""
    return max(DEVICE_BYTES, int(torch.cuda.get_device_properties(device).total_memory * DEVICE_FRACTION))


class Activations:
    """Hidden states (N, L, hidden) of N windows, changed in place from layer to layer.

    `windows`: number of this process's windows; `total`: of the windows of all processes; `beside`: what layers read beside
    the states, whose columns `get`, `together` and `part` append.
    """

    def __init__(
        self,
        data: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        on_host: bool = False,
        processes: Processes | None = None,
        total: int | None = None,
        beside: Beside | None = None,
    ):
        """Copy hidden states.

        Args:
            data: (N, L, hidden) of this process's windows.
            device: that computes on them.
            dtype: that they are kept in.
            on_host: keep them in host memory, whatever their size.
            processes: that share the windows; None: this one has all.
            total: number of the windows of all processes; None: those in `data`.
            beside: of the same windows.
        """
        self.device = device
        self.processes = processes or alone(device)
        self.total = len(data) if total is None else total
        size = data.numel() * dtype.itemsize
        if device.type == "cuda" and (on_host or size > device_limit(device)):
            self.data = data.to(dtype).pin_memory()
        else:
            self.data = data.to(device, dtype, copy=True)
        self.windows, self.length, self.hidden_size = data.shape
        self.beside = beside

    def plain(self) -> Activations:
        """The same states with nothing beside them."""
        other = copy(self)
        other.beside = None
        return other

    def look(self, layout: Layout) -> None:
        """State what the layers to come read beside the states."""
        if self.beside:
            self.beside.layout = layout

    def empty_like(self, width: int | None = None) -> Activations:
        """Uninitialised states of the same shape, or width, in the same memory, with nothing beside them."""
        other = self.plain()
        like = self.data if width is None else self.data[..., :width]
        other.data = torch.empty_like(like, pin_memory=self.data.is_pinned(), memory_format=torch.contiguous_format)
        other.hidden_size = other.data.shape[-1]
        return other

    def clone(self) -> Activations:
        """A copy, in the same memory."""
        other = self.empty_like()
        other.data.copy_(self.data)
        other.beside = self.beside.clone() if self.beside else None
        return other

    def batches(self) -> Iterator[slice]:
        """Slices over the windows, in batches of a size that suits the device."""
        size = max(1, BATCH_TOKENS[self.device.type] // self.length)
        for start in range(0, self.windows, size):
            yield slice(start, min(start + size, self.windows))

    def get(self, index: slice | Tensor) -> Tensor:
        """Some of this process's windows (B, L, hidden, and what is beside) on the device, float32."""
        states, columns = self._stored(index).float(), self.beside.rows(index) if self.beside else None
        return states if columns is None else torch.cat([states, columns], dim=-1)

    def _stored(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, Tensor) and self.data.is_pinned():
            # one copy for each window: gathering them first would allocate memory that is not pinned
            return torch.stack([self.data[i].to(self.device, non_blocking=True) for i in index.tolist()])
        index = index.to(self.data.device) if isinstance(index, Tensor) else index
        return self.data[index].to(self.device, non_blocking=True)

    def together(self, index: Tensor) -> Tensor:
        """Windows (B, L, hidden) of any processes by their numbers among all, in all processes, in their stored dtype."""
        get = self.get if self.beside else self._stored
        if self.processes.alone:
            return get(index)
        count, like = self.processes.count, get(slice(0, 0))
        rows = torch.zeros(len(index), self.length, like.shape[-1], dtype=like.dtype, device=self.device)
        mine = (index % count == self.processes.index).nonzero()[:, 0]
        if len(mine):
            rows[mine.to(self.device)] = get(index[mine] // count)
        return self.processes.sum(rows)  # all but one process add zeros

    def part(self, index: Tensor) -> Tensor:
        """This process's part of the windows with these numbers among all, an even one whoever has them; float32."""
        return self.together(index)[self.processes.index :: self.processes.count].float()

    def own(self, numbers: range) -> list[int]:
        """Indices of this process's windows among those with these numbers."""
        return [number // self.processes.count for number in numbers if number in self.processes.share(self.total)]

    def put(self, index: slice, states: Tensor) -> None:
        """Store some windows (B, L, hidden)."""
        # cast on the device, so that the copy is direct and half as large
        self.data[index].copy_(states.to(self.data.dtype))

    @torch.no_grad()
    def advance(self, layer: Callable[..., Tensor]) -> None:
        """Replace every state by the layer's output for it."""
        for batch in self.batches():
            self.put(batch, layer(self.get(batch)))

    @torch.no_grad()
    def advance_and_keep(self, layer: Callable[..., tuple[Tensor, Mapping[Key, Tensor]]]) -> None:
        """`advance` with a layer that also makes what later layers read beside the states."""
        for batch in self.batches():
            states, made = layer(self.get(batch))
            self.put(batch, states)
            if self.beside:
                self.beside.put(batch, made, self.windows, self.data.dtype)

    def check_finite(self, where: str) -> None:
        """Refuse states that cannot be computed with.

        Args:
            where: name of the module that they come from, for the message.

        Raises:
            InputError: one of them is NaN, infinite, or so large that its square is.
        """
        largest = [float(torch.linalg.vector_norm(self.data[batch], math.inf)) for batch in self.batches()]
        if self.processes.any(not all(size <= LARGEST for size in largest)):
            raise InputError(
                f"{where} makes hidden states of NaN, infinity or close to it: its weights are too large to compute with, so the "
                f"checkpoint is damaged; fetch it again"
            )
