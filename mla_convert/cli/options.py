"""What several commands need. Imports no torch."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


class _Talk:
    """Whether a failure also shows where in the code it came from: of the whole process, as the parser finds it."""

    verbose = False


def _set_verbose(value: bool) -> bool:
    _Talk.verbose = value
    return value


def is_verbose() -> bool:
    """Whether -v was given."""
    return _Talk.verbose


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_set_verbose, help="Say more: libraries' own words, and where an error came from."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def rank_or_full(value: str | None) -> int | str | None:
    """A rank or rope-dim as typed: a whole number or `full`."""
    if value is None or value == "full":
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a whole number nor 'full'") from None


def tell_place(source: str, name: str, console: Console) -> None:
    """Which path a local checkpoint was read from, where a name of signs and brackets alone does not say so."""
    if name != source and not re.fullmatch(r"[\w./~-]*", source) and Path(source).exists():
        console.print(f"read from {source}", soft_wrap=True)


def silence_libraries(quiet: bool = False) -> None:
    """Only our own words on the terminal unless -v was given: libraries' advice is not for our users."""
    import logging
    import os
    import warnings

    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if is_verbose():
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns when data sets are read in other processes
    # whatever the library and its level: a failure is our own one line, and what is no failure is no news
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    warnings.showwarning = _no_warning  # libraries set filters of their own


def _no_warning(*_: object) -> None:
    return
