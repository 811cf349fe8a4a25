"""Versions, device, time and memory of a run, for its report."""

from __future__ import annotations

import contextlib
import ctypes
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


def versions() -> dict[str, str]:
    """Versions of what shapes the result."""
    names = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub")
    # our own from the code that runs: metadata of an editable install may be older
    found = {"python": platform.python_version(), "mla_convert": __version__}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def newest_tried() -> str:
    """The newest transformers that code of this version was tried with, once what is written passes the self-check."""
    import transformers

    return max(TRIED_TRANSFORMERS, transformers.__version__, key=Version)


def untried() -> str | None:
    """One line if the transformers in use is newer than the newest that the tests have run with."""
    import transformers  # what only wants to know versions need not wait for it

    installed = transformers.__version__
    if Version(installed) <= Version(TRIED_TRANSFORMERS):
        return None
    return (
        f"transformers {installed} is newer than {TRIED_TRANSFORMERS}, the newest that mla_convert {__version__} was tested with: "
        f"what it writes is tried before it is called done"
    )


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one.

    Raises:
        UsageError: no such device type.
        ResourceError: a CUDA device that is not there.
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

    Host memory is the process's resident set, sampled, above what it was at the start (the interpreter and libraries).
    Device memory is what the allocator holds, cached blocks included: what the card must have free.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.results: dict[str, dict[str, float]] = {}
        self._process = psutil.Process()
        self.baseline = self._process.memory_info().rss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure one phase."""
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
            peak[0] = max(peak[0], self._process.memory_info().rss)
            result = {
                "seconds": round(time.perf_counter() - start, 2),
                "peak_host_bytes": max(0, peak[0] - self.baseline),
            }
            if self.device.type == "cuda":
                result["peak_device_bytes"] = torch.cuda.max_memory_reserved(self.device)
            self.results[name] = result


def return_freed_memory() -> None:
    """Give freed heap memory back to the system.

    glibc keeps what lies between live blocks; with one layer's tensors after another that looks like growth with depth.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Same inputs, seed and device give the same bytes."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # every element is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = fill
