"""What a healing run was made from, by content: a checkpoint of other weights, or of another text, is of no use."""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path

from mla_convert.core.errors import InputError
from mla_convert.core.sums import sha256
from mla_convert.core.words import expanded
from mla_convert.source.texts import PACKAGE

# Of a model's folder what changes its answers: weights, configuration, tokenizer.
KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja")
FIGURES = ("report.json", "export.json")


def content_of(folder: Path, gguf: str | None = None) -> dict[str, str]:
    """sha256 by name of the files that a model is loaded from.

    Raises:
        InputError: one of them cannot be read.
    """
    names = (
        [gguf]
        if gguf
        else [entry.name for entry in os.scandir(folder) if entry.name.endswith(KINDS) and entry.is_file()]
    )
    found = {}
    for name in sorted(names):
        if name not in FIGURES:
            try:
                found[name] = sha256(folder / name)
            except OSError as error:
                raise InputError(f"{name} in {folder} cannot be read ({error.strerror})") from error
    return found


def text_content(spec: str | None) -> str | None:
    """sha256 of a text file; None for a data set, which is told by its name."""
    if spec is None:
        return None
    if spec.startswith(PACKAGE):
        package, _, name = spec.removeprefix(PACKAGE).partition("/")
        return hashlib.sha256(resources.files(package).joinpath(name).read_bytes()).hexdigest()
    path = expanded(spec)
    return sha256(path) if path.is_file() else None
