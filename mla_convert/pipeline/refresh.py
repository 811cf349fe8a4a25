"""Rewrites the files beside the weights of a folder as this version writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mla_convert.core import sums
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.files import write_file
from mla_convert.core.report_file import PAGE, REPORT
from mla_convert.core.report_schema import JsonObject, parse_report, to_json
from mla_convert.core.runtime import versions
from mla_convert.core.sums import CorruptCheckpoint
from mla_convert.modeling.shipped_code import CODE
from mla_convert.report.html.page import write_page
from mla_convert.report.model_card import CARD, write_card
from mla_convert.source import carried
from mla_convert.source.checkpoint.files import weight_files
from mla_convert.source.config_file import read_config
from mla_convert.source.tokenizer import read_tokenizer
from mla_convert.write.intact import check_intact, describing_file
from mla_convert.write.known_files import check_unknown, outdated
from mla_convert.write.revise import check_exchange, revised, tidy
from mla_convert.write.selfcheck import self_check


@dataclass(frozen=True)
class Refreshed:
    """The names of the files that a refresh wrote; none if the folder was current."""

    folder: Path
    written: list[str]

    def as_dict(self) -> JsonObject:
        """For `refresh --json`."""
        return {"folder": str(self.folder), "written": self.written}


def refresh(folder: Path, accept: Iterable[str] = ()) -> Refreshed:
    """Write this version's Python files into a converted, healed or exported folder, and checksums of all its files.

    Python files that are missing are written, too. Weights, tokenizer and configuration stay the same, except for keys that
    name foreign code and for the tested version of transformers. Report, page and card are made again; unknown entries of the
    report are kept. The new folder is checked (`self_check`) before it replaces the old one in one step.

    Args:
        folder: converted, healed or exported, by this or an earlier version.
        accept: names of files that were changed. They are kept; Python files are replaced by this version's.

    Raises:
        InputError: damaged, no finished conversion, or files in it that are no part of one.
        UsageError: an accepted file is missing or is a weight.
        ResourceError: the disk does not suffice.
        SelfCheckFailed: the model fails with the new files; the folder is not changed.
    """
    # A killed run may have left the folder under another name; it is restored before anything is read.
    tidy(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of a converted model")
    accept = check_accepted(folder, accept)
    # Checked first, because new checksums would make a damaged file valid.
    try:
        intact = check_intact(folder, accept, missing=CODE)
    except CorruptCheckpoint as error:
        if error.file not in CODE:
            raise
        raise InputError(f"{error}; --accept {error.file} replaces it by this version's") from error
    check_unknown(folder, intact.checksums)
    weight_files(folder)  # refuses a missing or damaged index, which has no checksum in older folders
    if not intact.sealed and describing_file(folder) == REPORT:
        read_config(folder, folder.name)
        read_tokenizer(folder, folder.name)  # it has no checksum, and may be damaged or missing
    changed = outdated(folder)
    if (
        not changed
        and intact.sealed
        and not any(intact.digests[name] != stated for name, stated in sums.read(folder).items())
    ):
        return Refreshed(folder, [])
    check_exchange(folder)
    kind = describing_file(folder)
    with revised(folder) as staging:
        for name, content in changed.items():
            write_file(staging / name, content)
        _describe(staging, kind, intact.report, accept)
        # The weights were hashed by `check_intact` and stay as they are, so that they are not read again.
        kept = {name: digest for name, digest in intact.digests.items() if name in intact.checksums}
        sums.seal(staging, kept)
        before, after = _digests(folder, intact.digests), sums.read(staging)
    written = sorted(name for name, digest in after.items() if before.get(name) != digest)
    return Refreshed(folder, [*written, sums.SUMS])


def check_accepted(folder: Path, accept: Iterable[str]) -> tuple[str, ...]:
    """Names of files that may have changed.

    Raises:
        UsageError: a file that is missing or must not be changed.
    """
    names = tuple(accept)
    for name in names:
        if name not in (CARD, *CODE) and not carried.is_carried(name):
            raise UsageError(
                f"--accept {name}: only {CARD}, tokenizer, generation and licence files may be changed by hand, and Python "
                f"files be replaced"
            )
        if not (folder / name).is_file():
            raise UsageError(f"--accept {name}: there is no such file in {folder}")
    return names


def _digests(folder: Path, known: dict[str, str]) -> dict[str, str]:
    return {name: known.get(name) or sums.sha256(folder / name) for name in sums.listed(folder)}


def _describe(staging: Path, kind: str, report: JsonObject, accept: tuple[str, ...]) -> None:
    """Write report, page and card of the staged folder, after its self-check."""
    content = {**report, "refreshed": versions()}
    # transformers would misread that profile.
    if report.get("profile") != "engine":
        content["self_check"] = self_check(staging)
    if kind == REPORT:
        parsed = parse_report(content)
        write_page(parsed, staging / PAGE)
        if CARD not in accept:
            write_card(parsed, staging)
        parsed.write(staging)
        return
    if CARD not in accept:
        from mla_convert.publish.engines.readme import write_readme

        write_readme(staging, str(report.get("source")), content)
    write_file(staging / kind, json.dumps(to_json(content), indent=2) + "\n")
