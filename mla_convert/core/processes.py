"""The processes of one run, one for each GPU: who has which windows, and the few things that they exchange.

accelerate's state starts torch.distributed: NCCL between GPUs, Gloo between processes on CPUs. `accelerate launch`, torchrun and
`--gpus` set the environment variables that it reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mla_convert.core.errors import PeerLost, ResourceError, UsageError
from mla_convert.core.runtime import pick_device
from mla_convert.core.world import world_rank, world_size

Result = TypeVar("Result")

# One process writes, or downloads, while the others wait.
TIMEOUT = timedelta(hours=3)
# Counts the processes that failed; seconds to reach the process that keeps it.
FAILED, STORE_SECONDS = "mla_convert/failed", 5


@dataclass(frozen=True)
class Processes:
    """One process among those of a run. All of them call the same methods in the same order.

    Attributes:
        device: On which this process computes.
        index: Of this process; the first one, 0, alone writes and prints.
        count: Number of processes.
    """

    device: torch.device
    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def share(self, total: int) -> range:
        """This process's part of `total` windows: every count-th one, so that any run of windows is shared evenly."""
        return range(self.index, total, self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, which replaces each of them."""
        if not self.alone:
            with _reaching_all():
                dist.all_reduce(tensor)
        return tensor

    def totals(self, *values: float) -> tuple[float, ...]:
        """The sum of all processes' values, each on its own."""
        if self.alone:
            return values
        return tuple(self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist())

    def mean(self, values: list[float]) -> float:
        """The mean over the values of all processes."""
        total, count = self.totals(sum(values), len(values))
        return total / count

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes."""
        return self.totals(float(flag))[0] > 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.totals(0.0)

    def told(self, make: Callable[[], Result]) -> Result:
        """The result of `make` in the first process, which alone calls it."""
        if self.alone:
            return make()
        content = [make() if self.first else None]
        with _reaching_all():
            dist.broadcast_object_list(content, src=0, device=self.device)
        return content[0]  # type: ignore[return-value]

    def gathered(self, part: Result) -> list[Result]:
        """The parts of all processes, in their order."""
        if self.alone:
            return [part]
        parts: list[Any] = [None] * self.count
        with _reaching_all():
            dist.all_gather_object(parts, part)
        return parts

    def make_equal(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the first process: other libraries and cards may round in another way."""
        for tensor in tensors if not self.alone else ():
            with _reaching_all():
                dist.broadcast(tensor, src=0)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process through before the others, so that it alone downloads."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def alone(device: torch.device) -> Processes:
    """The only process of a run."""
    return Processes(device)


def join(device: str) -> Processes:
    """The processes that this one was started with; where it is the only one, on the device of that name.

    Raises:
        UsageError: A single device is named for several processes.
        ResourceError: There are fewer GPUs than processes, or the processes do not find each other.
    """
    picked, count = pick_device(device), world_size()
    if count == 1:
        return alone(picked)
    if picked.index is not None:
        raise UsageError(f"--device {device} is one device, and there are {count} processes: leave it out")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count)
    if picked.type == "cuda" and here > torch.cuda.device_count():
        raise ResourceError(f"{here} processes were started and there are {torch.cuda.device_count()} GPUs here")
    from accelerate import PartialState  # slow to import, and commands without several processes do not need it

    try:
        state = PartialState(cpu=picked.type == "cpu", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(f"the {count} processes did not find each other: {error}") from error
    own = state.device if picked.type == "cuda" else picked
    return Processes(own, state.process_index, state.num_processes)


def leave() -> None:
    """End the connection to the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _reaching_all() -> Iterator[None]:
    """Convert the failure of an exchange, whose cause is that a process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(
            "another process of this run ended: run the same command again; layers that were written are kept"
        ) from error


def first_to_fail() -> bool:
    """Whether no other process of this run has failed before, so that one error is printed once."""
    if world_size() == 1:
        return True
    if not (dist.is_available() and dist.is_initialized()):  # all processes have failed in the same way
        return world_rank() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
        return store.add(FAILED, 1) == 1
    except RuntimeError:  # the first process, which keeps the store, has ended
        return False
