"""What several commands need. Imports no torch."""

from __future__ import annotations

import sys

import typer


def rank_or_full(value: str | None) -> int | str | None:
    """A rank or rope-dim as typed: a whole number or `full`."""
    if value is None or value == "full":
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a whole number nor 'full'") from None


def silence_libraries() -> None:
    """Only our own words on the terminal: libraries' advice is not for our users."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
