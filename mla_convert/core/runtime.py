"""Versions, device, time and memory of a run, for its report."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import platform
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from packaging.version import Version

from mla_convert.core.errors import ResourceError, UsageError
from mla_convert.version import TRIED_TRANSFORMERS, __version__


@functools.cache
def _versions_of_packages() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that affect the result, by name."""
    # our own version comes from the code that runs: the metadata of an editable install may be older
    installed = {"python": platform.python_version(), "mla_convert": __version__, **_versions_of_packages()}
    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    return installed


def newest_tried() -> str:
    """The newest transformers that this version's code has worked with, counting the one in use once the self-check passed."""
    import transformers

    # Compared as versions: as text, 5.9 would be newer than 5.24.
    return max(TRIED_TRANSFORMERS, transformers.__version__, key=Version)


def untried() -> str | None:
    """One line if the transformers in use is newer than the newest that the tests ran with, else None."""
    import transformers  # slow to import, and `versions` does not need it

    installed = transformers.__version__
    if Version(installed) <= Version(TRIED_TRANSFORMERS):
        return None
    return (
        f"transformers {installed} is newer than {TRIED_TRANSFORMERS}, the newest that mla_convert {__version__} was tested with: "
        f"each written model is checked before its folder gets its name"
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is a GPU.

    Raises:
        UsageError: There is no such type of device.
        ResourceError: There is no such CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not known: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ResourceError(f"device {name!r} is not there: give --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


class Phases:
    """Seconds and peak memory of each phase of a run.

    Host memory is the process's resident set, sampled, less its size at the start (the interpreter and libraries). Device
    memory is the memory that the allocator reserves, cached blocks included: the card must have that much free.

    Attributes:
        results: For each phase, `seconds`, `peak_host_bytes` and on a GPU `peak_device_bytes`.
    """

    def __init__(self, device: torch.device):
        """Begin; the process's resident set is the baseline.

        Args:
            device: The device of the run.
        """
        self.device = device
        self.results: dict[str, dict[str, float]] = {}
        self._process = psutil.Process()
        self.baseline = self._process.memory_info().rss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the enclosed block as one phase."""
        # Sampled, because the peak that the system keeps is that of the whole process and does not fall between phases.
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                peak[0] = max(peak[0], self._process.memory_info().rss)

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            # A phase may be shorter than the interval between two samples.
            peak[0] = max(peak[0], self._process.memory_info().rss)
            result = {
                "seconds": round(time.perf_counter() - start, 2),
                "peak_host_bytes": max(0, peak[0] - self.baseline),
            }
            if self.device.type == "cuda":
                result["peak_device_bytes"] = torch.cuda.max_memory_reserved(self.device)
            self.results[name] = result


def return_freed_memory() -> None:
    """Return freed heap memory to the system.

    glibc keeps free memory between live blocks. Over a loop that loads one layer after another, the process would seem to
    grow with the number of layers.
    """
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Make equal inputs, seed and device give equal bytes."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its attribute has no type
    fill = memory.fill_uninitialized_memory
    torch.manual_seed(seed)
    # Some operations have no deterministic kernel on CUDA: they warn, and the run goes on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # every element is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = fill


def in_background(device: torch.device) -> bool:
    """Whether files are read and written while a layer is converted: a CPU's cores are busy with the layer."""
    return device.type == "cuda"
