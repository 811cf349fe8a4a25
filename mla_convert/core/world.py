"""The processes that a launcher started, by the environment that torchrun, accelerate and `--gpus` set. Imports no torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def world_rank() -> int:
    """Index of this process among them."""
    return int(os.environ.get("RANK") or 0)
