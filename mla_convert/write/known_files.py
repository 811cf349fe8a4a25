"""The files that a converted folder may contain, and those that this version writes with other content."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mla_convert.core import sums
from mla_convert.core.errors import InputError
from mla_convert.core.report_file import PAGE, REPORT
from mla_convert.core.runtime import newest_tried
from mla_convert.modeling.shipped_code import code_files
from mla_convert.source import carried
from mla_convert.source.config_file import language_model, read_config
from mla_convert.source.licence import CARD
from mla_convert.write.intact import EXPORT, describing_file

# Files that some version of mla_convert writes; other files, except those that it copies, are the owner's.
CONFIG = "config.json"
BESIDE = (CARD, REPORT, PAGE, EXPORT, "model.safetensors.index.json", CONFIG, "recipe.yaml", sums.SUMS)


def check_unknown(folder: Path, shards: Iterable[str]) -> None:
    """Refuse a folder with files that are no part of a conversion: they would be lost, or get a checksum.

    Raises:
        InputError: names the first.
    """
    known = {*BESIDE, *code_files(), *code_files(exported=True), *shards}
    for name in sums.listed(folder):
        if name not in known and not carried.is_carried(name):
            raise InputError(f"{name} in {folder} is no part of a converted model: move it away first")
        carried.check_inside(folder / name)


def outdated(folder: Path) -> dict[str, bytes]:
    """The files that this version writes with other content: name -> that content."""
    exported = describing_file(folder) == EXPORT
    current = code_files(exported)
    if exported:
        current = {name: content for name, content in current.items() if (folder / name).exists()}
    elif (folder / CONFIG).is_file():
        config = read_config(folder, folder.name)
        if language_model(config).get("mla_transformers") != newest_tried():
            language_model(config)["mla_transformers"] = newest_tried()
            current[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for name in carried.SETTINGS:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            current[name] = carried.without_code(name, content)
    return {name: content for name, content in current.items() if _bytes(folder / name) != content}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
