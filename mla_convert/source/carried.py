"""The source's own files that a converted or exported folder contains. No other module decides this. Imports no torch.

Only regular files with exactly these names are copied, and never code: no Python file, no pickle, and no `auto_map` that makes
transformers run code. A link is followed only to a file in the same folder or in huggingface_hub's cache of the same model.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError
from mla_convert.core.files import write_file

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "tekken.json",
)  # fmt: skip
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
GENERATION = "generation_config.json"
NAMES = (*TOKENIZER, *PROCESSOR, GENERATION)
# Licences have many names; the part after the last dot must be the suffix of a text or a number (LICENSE-2.0).
LICENCE = re.compile(r"(?:LICEN[SC]E|NOTICE|ATTRIBUTION|COPYING|USE_POLICY)[\w.+-]*", re.ASCII | re.IGNORECASE)
LAST_PART = re.compile(r"txt|md|rst|\d[\w+-]*|llama\w*|apache|mit|bsd", re.ASCII | re.IGNORECASE)
# Files with settings, whose keys may name code; in a vocabulary the same word is a token.
SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json", *PROCESSOR,
)  # fmt: skip
CODE_KEYS = ("auto_map", "custom_generate")


def is_carried(name: str) -> bool:
    """Whether a file of that name is copied."""
    return name in NAMES or is_licence(name)


def is_licence(name: str) -> bool:
    """Whether a file of that name is a licence or notice."""
    last = name.rpartition(".")[2] if "." in name else "txt"
    return bool(LICENCE.fullmatch(name) and LAST_PART.fullmatch(last))


def carried_files(folder: Path) -> list[Path]:
    """The files of a folder that are copied, in order of their names.

    Raises:
        InputError: one is a link to a place outside the folder, or no regular file.
    """
    paths = [Path(entry.path) for entry in os.scandir(folder) if is_carried(entry.name)]
    for path in paths:
        check_inside(path)
    return sorted(paths)


def licence_files(folder: Path) -> list[Path]:
    """The licences and notices among `carried_files`."""
    return [path for path in carried_files(folder) if is_licence(path.name)]


def check_inside(path: Path) -> Path:
    """The real path of a file, which must be in its folder or in the Hub's cache of the same model.

    Raises:
        InputError: it is elsewhere, or no regular file.
    """
    # The folder itself may be reached by a link; only the file must not lead out of it.
    folder = Path(os.path.realpath(path.parent))
    real = Path(os.path.realpath(path))
    if not any(root in real.parents for root in (folder, *_cache_roots(folder))):
        raise InputError(
            f"{path.name} in {path.parent} is a link to a file outside that folder, which may be private: put the file itself "
            f"there, or remove the link"
        )
    try:
        regular = stat.S_ISREG(real.lstat().st_mode)
    except OSError as error:
        raise InputError(f"{path.name} in {path.parent} cannot be read ({error.strerror})") from error
    if not regular:
        raise InputError(f"{path.name} in {path.parent} is no regular file: remove it")
    return real


def _cache_roots(folder: Path) -> tuple[Path, ...]:
    """Folders with the files of a huggingface_hub snapshot `CACHE/models--OWNER--NAME/snapshots/COMMIT`."""
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return ()
    model = folder.parent.parent
    return model / "blobs", model.parent / "blobs"


def carry(path: Path, folder: Path) -> None:
    """Copy one file into `folder`, without keys that name code.

    Raises:
        InputError: as `check_inside`, or it cannot be read.
    """
    content = read_bytes(check_inside(path), path.name)
    write_file(folder / path.name, without_code(path.name, content))


def read_bytes(real: Path, name: str) -> bytes:
    """A file's content; a link that has replaced the file since it was checked is not followed.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{name} in {real.parent} cannot be read ({error.strerror})") from error


def without_code(name: str, content: bytes) -> bytes:
    """The bytes of the copy of a file: the same, except for keys of settings that name code."""
    if name not in SETTINGS:
        return content
    try:
        settings = json.loads(content)
        kept = _stripped(settings)
    except (ValueError, RecursionError):
        return content  # its reader reports the damage
    # Settings that name no code keep their bytes; written again, they would differ in spacing and escapes.
    if kept == settings:
        return content
    # A JSON string may hold half of a surrogate pair, which plain UTF-8 refuses.
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def tokenizer_code(folder: Path) -> str | None:
    """The tokenizer class in the folder's own code that its settings name, if they do."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_bytes())["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    names = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    return names[0][:80] if names else None


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items() if key not in CODE_KEYS}
    return [_stripped(item) for item in value] if isinstance(value, list) else value
