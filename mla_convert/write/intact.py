"""Whether the bytes of a finished folder are those that were written, asked before anything is made of it. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core import sums
from mla_convert.core.errors import InputError
from mla_convert.core.report_file import REPORT, read_content
from mla_convert.core.report_schema import JsonObject
from mla_convert.core.sums import SUMS, CorruptCheckpoint

EXPORT = "export.json"  # of an exported folder, what report.json is of a converted one


@dataclass(frozen=True)
class Intact:
    """What was found in order. `sealed`: every file of the folder is under checksum, not its shards alone."""

    report: JsonObject
    checksums: dict[str, str]
    digests: dict[str, str]
    sealed: bool

    def note(self, folder: Path) -> str | None:
        """What to say of a folder whose other files could not be checked."""
        if self.sealed:
            return None
        by = sums.written_by(self.report)
        return (
            f"{folder} was written by mla_convert {by}: only its shards are under checksum, its code, tokenizer, configuration "
            f"and card are not; `mla-convert refresh {folder}` adds that"
        )


def check_intact(folder: Path, accept: Iterable[str] = ()) -> Intact:
    """Compare every file of a finished folder with its checksum: converted, healed or exported.

    `accept` names files that may have changed. Of a folder that an earlier version wrote, the shards are compared.

    Raises:
        CorruptCheckpoint: the first file that is changed, missing or more.
    """
    file = describing_file(folder)
    # a link that leads nowhere is there, and read as damaged
    digests = sums.check(folder, accept) if os.path.lexists(folder / SUMS) else {}
    report = _report(folder, file)
    sealed = sums.is_sealed(folder, report, file)
    checksums = _checksums(report, file)
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if name not in checksums and name.partition("/")[0] not in sums.FOREIGN:
            raise CorruptCheckpoint(f"{name} is not among the shards that {file} lists: it does not belong here", name)
    for shard, expected in checksums.items():
        digests[shard] = _check_shard(folder, shard, expected, digests.get(shard), file)
    return Intact(report, checksums, digests, sealed)


def describing_file(folder: Path) -> str:
    """report.json, or export.json where a folder is an export."""
    return EXPORT if (folder / EXPORT).is_file() and not (folder / REPORT).exists() else REPORT


def check_input(folder: Path) -> str | None:
    """Refuse a damaged folder before anything is made of it. Returns what there is to note about what could not be checked.

    A folder that transformers saved has neither report nor checksums, and is taken as it is.

    Raises:
        CorruptCheckpoint: the first file that is changed, missing or more.
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
    """sha256 by shard, in order."""
    found = report.get("checksums")
    if not isinstance(found, dict) or not found:
        raise CorruptCheckpoint(f"{file} has no checksums: not a finished conversion", file)
    for name, digest in found.items():
        if not sums.NAME.fullmatch(name) or not name.endswith(".safetensors") or not isinstance(digest, str):
            raise CorruptCheckpoint(
                f"{file} lists {json.dumps(name)} among its checksums, which is no shard of this folder", file
            )
    return dict(sorted(found.items()))


def _check_shard(folder: Path, shard: str, expected: str, found: str | None, file: str) -> str:
    if not (folder / shard).is_file():
        raise CorruptCheckpoint(f"{shard} is missing: {file} lists it", shard)
    try:
        found = found or sums.sha256(folder / shard)
    except OSError as error:
        raise CorruptCheckpoint(f"{shard} cannot be read: {error.strerror}", shard) from error
    if found != expected:
        raise CorruptCheckpoint(
            f"{shard} has sha256 {found[:12]}…, {file} says {expected[:12]}…: damaged or changed", shard
        )
    return found
