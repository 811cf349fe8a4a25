"""Verbosity, silent libraries, and interruptions as errors, for all commands. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mla_convert.core.errors import Interrupted, ResourceError

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")


class _Verbosity:
    """Whether a failure also shows its traceback: process-wide, because the parser sets it before any command runs."""

    verbose = False


def set_verbose(value: bool) -> bool:
    """Callback of the option --verbose; returns the value."""
    _Verbosity.verbose = value
    return value


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return _Verbosity.verbose


def print_location(source: str, name: str, console: Console) -> None:
    """Print the path of a local checkpoint where its printed name does not show it (names with special characters)."""
    if name != source and not re.fullmatch(r"[\w./~-]*", source) and Path(source).exists():
        console.print(f"read from {source}", soft_wrap=True)


def silence_libraries(quiet: bool = False) -> None:
    """Suppress log lines and warnings of libraries unless --verbose was given: their advice is not for our users.

    Args:
        quiet: Also suppress download progress bars.
    """
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if is_verbose():
        return
    # These are read when the libraries are imported, so this has to come before.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when data sets are read in other processes
    # A failure is reported in one line of our own; anything else that a library logs is no news to our users.
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    warnings.showwarning = _no_warning  # type: ignore[assignment]  # some libraries set filters of their own


def _no_warning(*_: object) -> None:
    return


def run_guarded(work: Callable[[], Result], out_of_memory: str) -> Result:
    """Return the result of `work`.

    Args:
        work: The work of a command.
        out_of_memory: Message of the error for too little memory: which options need less.

    Raises:
        Interrupted: The user stopped it.
        ResourceError: Memory did not suffice.
    """
    try:
        return work()
    except KeyboardInterrupt as stop:
        raise Interrupted(": ".join(["interrupted", *map(str, stop.args)])) from None
    except Exception as error:
        # compared by name: a command that only reads a report imports no torch
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise ResourceError(out_of_memory) from error
        raise
