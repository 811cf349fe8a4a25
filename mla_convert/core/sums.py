"""SHA256SUMS: the checksum of every file of a finished folder, in the format of `sha256sum -c`. Imports no torch.

The file has one canonical form: a line `DIGEST  NAME` for each other file, in order of names, in lower case and with line feeds.
Any other form is refused, so that a flipped bit in SHA256SUMS itself is detected too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from packaging.version import InvalidVersion, Version

from mla_convert.core.errors import InputError
from mla_convert.core.files import read_regular, write_file
from mla_convert.core.report_file import look_up
from mla_convert.core.report_schema import JsonObject

SUMS = "SHA256SUMS"
# No sign that a line of SHA256SUMS would have to escape, no slash that leads out of the folder, and no hidden file.
NAME = re.compile(r"[\w+-][\w.+-]*", re.ASCII)
LINE = re.compile(rf"([0-9a-f]{{64}})  ({NAME.pattern})", re.ASCII)
# The first version whose folders have one; earlier folders have checksums of their shards alone, in report.json.
SINCE = Version("0.2.0.dev0")
# Files of the Hub, its client and git beside a model's files. They are no part of the model and are not pushed.
FOREIGN = (".gitattributes", ".cache", ".git")


class CorruptCheckpoint(InputError):  # noqa: N818  (it describes a folder)
    """The first error in a folder, with its `file` and, if it concerns one, its `tensor`."""

    def __init__(self, message: str, file: str, tensor: str | None = None):
        """Make an error with a one-line message, the name of its file and of its tensor."""
        super().__init__(message)
        self.file = file
        self.tensor = tensor


def sha256(path: Path) -> str:
    """Checksum of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text(sums: dict[str, str]) -> str:
    """The content of SHA256SUMS."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def listed(folder: Path) -> list[str]:
    """Names that SHA256SUMS must list: those of all files in the folder except itself and `FOREIGN`."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.name not in (SUMS, *FOREIGN))


def seal(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write SHA256SUMS.

    Args:
        folder: finished.
        known: digests by file name that need not be computed again.

    Raises:
        InputError: a file that no finished folder has.
    """
    sums = {}
    for name in listed(folder):
        if not NAME.fullmatch(name) or not (folder / name).is_file():
            raise InputError(f"{name!r} in {folder} is no part of a converted model: move it away")
        sums[name] = (known or {}).get(name) or sha256(folder / name)
    write_file(folder / SUMS, text(sums))


def read(folder: Path) -> dict[str, str]:
    """The digests in SHA256SUMS by file name.

    Raises:
        CorruptCheckpoint: it cannot be read, or is not in the form of `seal`.
    """
    try:
        content = read_regular(folder / SUMS)
        # Text behind the last line feed is dropped here, and the comparison with the canonical form then refuses the
        # file.
        lines = [LINE.fullmatch(line) for line in content.decode("ascii").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{SUMS} cannot be read ({error}): damaged or changed", SUMS) from error
    sums = {match[2]: match[1] for match in lines if match}
    if not sums or text(sums).encode() != content:
        raise CorruptCheckpoint(f"{SUMS} is not as mla-convert writes it: damaged or changed", SUMS)
    return sums


def check(folder: Path, accept: Iterable[str] = (), missing: Collection[str] = ()) -> dict[str, str]:
    """Compare every byte of a folder with its SHA256SUMS. Returns the computed digests by file name.

    Args:
        folder: finished.
        accept: names of files that may differ.
        missing: names of files that may be missing.

    Raises:
        CorruptCheckpoint: names the first file that is changed, missing or additional.
    """
    stated, present, digests = read(folder), listed(folder), {}
    # Names are compared before bytes: reading every byte of a large model takes long.
    for name in present:
        if name not in stated and name not in accept:
            shown = name if NAME.fullmatch(name) else ascii(name[:100])
            raise CorruptCheckpoint(f"{shown} is not listed in {SUMS}: it does not belong here", name)
    for name in stated:
        if name not in present and name not in missing:
            raise CorruptCheckpoint(f"{name} is missing: {SUMS} lists it", name)
    for name in present:
        digests[name] = _digest(folder, name)
        if name not in accept and digests[name] != stated[name]:
            raise CorruptCheckpoint(
                f"{name} has sha256 {digests[name][:12]}…, {SUMS} says {stated[name][:12]}…: damaged or changed", name
            )
    return digests


def _digest(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise CorruptCheckpoint(f"{name} is no regular file", name)
    try:
        return sha256(folder / name)
    except OSError as error:
        raise CorruptCheckpoint(f"{name} cannot be read: {error.strerror}", name) from error


def is_sealed(folder: Path, report: JsonObject, file: str) -> bool:
    """Whether a folder has a SHA256SUMS; False if an earlier version wrote it.

    Args:
        folder: finished.
        report: content of its report.
        file: name of the report.

    Raises:
        CorruptCheckpoint: it has none, although the version that wrote it writes one.
    """
    if os.path.lexists(folder / SUMS):
        return True
    by = written_by(report)
    if by is None:
        raise CorruptCheckpoint(f"{SUMS} is missing, and {file} does not say which version wrote this folder", SUMS)
    if by >= SINCE:
        raise CorruptCheckpoint(f"{SUMS} is missing: mla_convert {by} writes one", SUMS)
    return False


def written_by(report: JsonObject) -> Version | None:
    """The version that wrote or last refreshed a folder; None if its report does not state it."""
    # `versions` stays that of the conversion when `refresh` writes the Python files of a later version.
    stated = look_up(report, "refreshed.mla_convert") or look_up(report, "versions.mla_convert")
    try:
        return Version(stated) if isinstance(stated, str) else None
    except InvalidVersion:
        return None
