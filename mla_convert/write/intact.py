"""Comparison of a finished folder with its checksums, before the folder is used as input. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core import sums
from mla_convert.core.errors import InputError
from mla_convert.core.report_file import REPORT, read_content
from mla_convert.core.report_schema import JsonObject
from mla_convert.core.sums import SUMS, CorruptCheckpoint

EXPORT = "export.json"  # report of an exported folder


@dataclass(frozen=True)
class Intact:
    """The result of the comparison.

    `report`: content of report.json or export.json; `checksums`: sha256 of each shard, as stated there; `digests`: sha256 of
    each file that was read; `sealed`: every file has a checksum, not the shards alone.
    """

    report: JsonObject
    checksums: dict[str, str]
    digests: dict[str, str]
    sealed: bool

    def note(self, folder: Path) -> str | None:
        """A note about a folder in which only the shards have checksums."""
        if self.sealed:
            return None
        by = sums.written_by(self.report)
        return (
            f"{folder} was written by mla_convert {by}: only its shards are under checksum, its code, tokenizer, configuration "
            f"and card are not; `mla-convert refresh {folder}` adds that"
        )


def check_intact(folder: Path, accept: Iterable[str] = (), missing: Collection[str] = ()) -> Intact:
    """Compare every file of a converted, healed or exported folder with its checksum (in a folder of 0.1: the shards).

    Args:
        folder: the folder.
        accept: names of files that may have changed.
        missing: names of files that may be missing.

    Raises:
        CorruptCheckpoint: names the first file that is changed, missing or additional.
    """
    file = describing_file(folder)
    # lexists: a broken link counts as a damaged file
    # All bytes first: the report, on which the rest relies, is one of these files.
    digests = sums.check(folder, accept, missing) if os.path.lexists(folder / SUMS) else {}
    report = _report(folder, file)
    sealed = sums.is_sealed(folder, report, file)
    checksums = _checksums(report, file)
    # A folder of version 0.1 has no SHA256SUMS in which an additional shard would be missing.
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if name not in checksums and name.partition("/")[0] not in sums.FOREIGN:
            raise CorruptCheckpoint(f"{name} is not among the shards that {file} lists: it does not belong here", name)
    for shard, expected in checksums.items():
        digests[shard] = _check_shard(folder, shard, expected, digests.get(shard), file)
    return Intact(report, checksums, digests, sealed)


def describing_file(folder: Path) -> str:
    """The name of a folder's report: report.json, or export.json of an export."""
    return EXPORT if (folder / EXPORT).is_file() and not (folder / REPORT).exists() else REPORT


def check_input(folder: Path) -> str | None:
    """Refuse a damaged folder before it is used. Returns a note about files that could not be checked.

    A folder that transformers saved has neither report nor checksums, and is accepted.

    Raises:
        CorruptCheckpoint: names the first file that is changed, missing or additional.
    """
    if not any(os.path.lexists(folder / file) for file in (SUMS, REPORT, EXPORT)):
        return f"{folder} has no {REPORT} and no {SUMS}: its bytes are taken as they are"
    return check_intact(folder).note(folder)


def _report(folder: Path, file: str) -> JsonObject:
    if not (folder / file).exists():
        raise CorruptCheckpoint(f"{file} is missing: not a finished conversion", file)
    try:
        return read_content(folder / file)
    except InputError as error:
        raise CorruptCheckpoint(str(error), file) from error


def _checksums(report: JsonObject, file: str) -> dict[str, str]:
    """sha256 by shard, in order of their names."""
    stated = report.get("checksums")
    if not isinstance(stated, dict) or not stated:
        raise CorruptCheckpoint(f"{file} has no checksums: not a finished conversion", file)
    for name, digest in stated.items():
        if not sums.NAME.fullmatch(name) or not name.endswith(".safetensors") or not isinstance(digest, str):
            raise CorruptCheckpoint(
                f"{file} lists {json.dumps(name)} among its checksums, which is no shard of this folder", file
            )
    return dict(sorted(stated.items()))


def _check_shard(folder: Path, shard: str, expected: str, digest: str | None, file: str) -> str:
    """Compare a shard's sha256, which is computed if `digest` is None, with the one in `file`. Returns it."""
    if not (folder / shard).is_file():
        raise CorruptCheckpoint(f"{shard} is missing: {file} lists it", shard)
    try:
        digest = digest or sums.sha256(folder / shard)
    except OSError as error:
        raise CorruptCheckpoint(f"{shard} cannot be read: {error.strerror}", shard) from error
    if digest != expected:
        raise CorruptCheckpoint(
            f"{shard} has sha256 {digest[:12]}…, {file} says {expected[:12]}…: damaged or changed", shard
        )
    return digest
