"""The weight files of a folder: those that transformers reads, and only of formats that cannot run code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from mla_convert.core.errors import InputError, one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAFE = ".safetensors"
# Written by torch's distributed checkpoints; newer versions of transformers read them before any other file.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files in the order in which transformers reads them: of a tensor in two files, the last one counts."""

    files: tuple[str, ...]
    promised: dict[str, str] = field(default_factory=dict)
    """Tensor name -> file, by the index; empty without an index."""
    index: str | None = None
    """Name of the index, if there is one."""


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a folder: the one in config.json, else the single file, else those of the index.

    Raises:
        InputError: there are none, or there is a pickle, a file outside the folder or an adapter.
    """
    refuse_adapter(folder, folder.name)
    shards = sorted(path.name for path in folder.iterdir() if DISTRIBUTED.fullmatch(path.name))
    if shards:
        raise InputError(f"{folder} holds a distributed checkpoint ({shards[0]}): save the model with save_pretrained")
    named = _named(folder)
    if named is None and (folder / SINGLE).is_file():
        return WeightFiles((SINGLE,))
    if named and not named.endswith(".index.json"):
        return WeightFiles((named,))
    index = named or INDEX
    if (folder / index).is_file():
        promised = _promised(folder, index)
        return WeightFiles(tuple(sorted(set(promised.values()))), promised, index)
    # Only where there are no safetensors files: transformers prefers these, and ignores pickles beside them.
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code and is not read: "
            f"convert it to safetensors first"
        )
    raise InputError(f"{folder} has no {SINGLE} and no {INDEX}: give a folder with safetensors weights")


def refuse_adapter(folder: Path, label: str) -> None:
    """Refuse a folder with a PEFT adapter: transformers adds it to the weights, and reads it even if it is a pickle.

    Raises:
        InputError: there is one, with or without a model.
    """
    if not (folder / ADAPTER).exists():
        return
    if (folder / "config.json").exists():
        raise InputError(
            f"{label} holds an adapter ({ADAPTER}) beside its weights: merge it into them (merge_and_unload), or take it out "
            f"of the folder"
        )
    raise InputError(
        f"{label} holds a PEFT adapter ({ADAPTER}) and no model: merge it into its base model (merge_and_unload), and give that"
    )


def _named(folder: Path) -> str | None:
    """The file that config.json names under `transformers_weights`, if it does."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # the reader of the configuration reports it
    if named is None:
        return None
    if not isinstance(named, str):
        raise InputError(f"transformers_weights in config.json of {folder} is no file name: take it out")
    _check_name(named, "transformers_weights in config.json", (SAFE, f"{SAFE}.index.json"))
    return named


def _promised(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file name inside `folder`."""
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        promised = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} in {folder} is not a shard index ({one_line(error)}): fetch it again") from error
    if not promised:
        raise InputError(f"{index} in {folder} names no tensor: fetch it again")
    for file in sorted(set(promised.values())):
        _check_name(file, index, (SAFE,))
    return promised


def _check_name(file: str, where: str, ends: tuple[str, ...]) -> None:
    if not is_plain_name(file):
        raise InputError(f"{where} names {file!r}, which is outside the folder: this checkpoint is not safe")
    if not file.endswith(ends):
        raise InputError(
            f"{where} names {file!r}, which is no safetensors file and is not read (a pickle can run code): convert it to "
            f"safetensors first"
        )


def is_plain_name(name: str) -> bool:
    """Whether a file name stays inside its folder under both POSIX and Windows rules."""
    parts = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and all(len(path.parts) == 1 and not path.anchor and name not in (".", "..") for path in parts)
