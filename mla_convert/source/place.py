"""The location of a model's files: a packaged checkpoint, a local folder, a GGUF file, or a Hub id, which is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mla_convert.core.errors import InputError, ResourceError, one_line
from mla_convert.core.recipes import unknown_source
from mla_convert.core.settings import PACKAGE, packaged
from mla_convert.core.words import check_name, expanded, plain
from mla_convert.source.checkpoint.gguf_file import is_gguf

# Neither Python files nor pickles are fetched, because neither is read.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICEN[SC]E*", "NOTICE*", "ATTRIBUTION*",
             "COPYING*", "USE_POLICY*"]  # fmt: skip


@dataclass(frozen=True)
class SourceLocation:
    """A model's files on this machine. `label`: its name in reports; `gguf`: name of the GGUF file, if it is one."""

    folder: Path
    label: str
    revision: str | None = None
    gguf: str | None = None


def locate(name: str, revision: str | None = None, files: list[str] = HUB_FILES) -> SourceLocation:
    """Find a model's files, and download them if it is on the Hub.

    Args:
        name: a packaged checkpoint, a local folder, a `.gguf` file, or a Hub id.
        revision: branch, tag or commit on the Hub.
        files: patterns of the files to download.

    Raises:
        InputError: there is no model of that name.
        ResourceError: the Hub cannot be reached.
    """
    if name.startswith(PACKAGE):
        return SourceLocation(packaged(name, "checkpoint"), name.removeprefix(PACKAGE).partition("/")[0])
    path = expanded(name)
    if is_gguf(path) and not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} not found: give an existing .gguf file")
        return SourceLocation(path.parent, plain(path.name), gguf=path.name)
    if path.is_dir():
        check_name(path)
        return SourceLocation(path, plain(path.resolve().name))
    if path.exists():
        raise InputError(f"{path} is neither a folder nor a .gguf file: give the folder that holds the checkpoint")
    # The Hub is asked for OWNER/NAME alone, so that a mistyped path or recipe gets its hint without a request.
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown_source(name)
    folder = _download(name, revision, files)
    # A snapshot's folder is named after its commit, so that a branch or a tag becomes a fixed revision.
    return SourceLocation(folder, name, folder.name)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the Hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        where = f" at revision {revision}" if revision else ""
        raise InputError(f"{name}{where} is neither a local folder nor on the Hub (or it is private)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"the Hub cannot be reached for {name}, which is no local folder: {one_line(error)}"
        ) from error
