"""Data sets of the Hub, or of `datasets`' cache: opened, and read row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, ResourceError, one_line

# Seconds in which the Hub has to answer.
HUB_TIMEOUT = 10


def open_data_set(
    name: str, config: str | None, split: str, streaming: bool, label: str, revision: str | None = None
) -> tuple[Iterable[Any], list[str]]:
    """Rows of a data set, and the names of its columns.

    Args:
        name: on the Hub, or a local folder.
        config: of the data set, if it has several.
        split: of the data set.
        streaming: rows are fetched as they are read.
        label: names the data set in messages.
        revision: commit on the Hub; None is the newest.

    Raises:
        ResourceError: it cannot be fetched.
        InputError: it cannot be read.
    """
    import datasets  # the import takes a second, and local text does not need it

    datasets.disable_progress_bars()
    try:
        with _without_waiting(name):
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
        columns = rows.column_names or list(next(iter(rows)))  # a stream may have no column names before its first row
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise ResourceError(
            f"data set {label!r} cannot be fetched: give a text file, or a name that the Hub has"
        ) from error
    except Exception as error:  # foreign data sets can raise anything
        raise InputError(f"data set {label!r} cannot be read: {one_line(error)}") from error
    return _read(rows, label) if streaming else rows, list(columns)


def open_named(spec: str, streaming: bool) -> tuple[Iterable[Any], list[str]]:
    """As `open_data_set`, of a data set `NAME[:CONFIG][@SPLIT]`."""
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    return open_data_set(name, config or None, split or "train", streaming, spec)


def strings(rows: Iterable[dict[str, Any]], label: str) -> Iterator[str]:
    """The column "text" of rows.

    Raises:
        InputError: a row has no string there.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["text"], str):
            raise InputError(f'row {number} of data set {label!r} has no string in its column "text"')
        yield row["text"]


def _read(rows: Iterable[Any], label: str) -> Iterator[Any]:
    """The rows of a stream, whose errors come while it is read."""
    try:
        yield from rows
    except Exception as error:  # of the network, of the file system that hides it, or of the data set
        raise ResourceError(
            f"data set {label!r} could not be read on: {one_line(error)}; try again, or give a text file"
        ) from error


@contextlib.contextmanager
def _without_waiting(name: str) -> Iterator[None]:
    """Read data sets from the cache alone, if the Hub is out of reach: `datasets` asks six times, which takes 24 s."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    reachable = True
    if not Path(name).exists():
        try:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
        except (HfHubHTTPError, ValueError):  # an answer, which `datasets` finds words for
            pass
        except Exception:  # the class depends on the HTTP library of the Hub's client
            reachable = False
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
