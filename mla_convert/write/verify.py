"""Checks of a converted folder: its checksums, its index, its configuration and the values of its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.report_file import REPORT
from mla_convert.core.sums import CorruptCheckpoint
from mla_convert.source.checkpoint.reader import DTYPES, INDEX, check_finite, is_plain_name
from mla_convert.source.families import family_of_part, find_family
from mla_convert.source.load_model import PREFIX, is_converted
from mla_convert.source.source import load_config
from mla_convert.source.tokenizer import read_tokenizer
from mla_convert.write.intact import EXPORT, check_intact, describing_file

FREQUENCIES = "rope_freq_index"


@dataclass(frozen=True)
class Verified:
    """The result of `verify`. `bytes`: of all tensors; `files`: number of files with a checksum; `note`: about the others."""

    folder: Path
    shards: int
    tensors: int
    bytes: int
    files: int
    note: str | None = None


def verify(folder: Path) -> Verified:
    """Check every byte of a finished folder, without loading the model.

    In this order: no file is missing or additional, and each has the sha256 in SHA256SUMS (shards: also in report.json); the
    index agrees with the shards; names and shapes are those of the model that config.json describes (not in an exported
    folder); and every tensor has a supported dtype and finite values. One tensor at a time is in memory.

    Raises:
        CorruptCheckpoint: the first error, with its file and tensor.
        InputError: not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of a converted model")
    found = check_intact(folder)
    weight_map, total = _index(folder)
    headers = _check_index(folder, found.checksums, weight_map)
    exported = describing_file(folder) == EXPORT
    frequencies = 0 if exported else _check_model(folder, weight_map, headers)
    if not (found.sealed or exported):
        try:
            read_tokenizer(folder, folder.name)  # it has no checksum, and may be damaged or missing
        except InputError as error:
            raise CorruptCheckpoint(str(error), "tokenizer.json") from error
    size = sum(_check_tensors(folder, file, frequencies) for file in found.checksums)
    if total != size:
        raise CorruptCheckpoint(f"{INDEX} says that the tensors have {total} bytes, and they have {size}", INDEX)
    return Verified(folder, len(found.checksums), len(weight_map), size, len(found.digests), found.note(folder))


def _index(folder: Path) -> tuple[dict[str, str], Any]:
    """The index: tensor name -> file, and the stated total size."""
    if not (folder / INDEX).is_file():
        raise CorruptCheckpoint(f"{INDEX} is missing", INDEX)
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        # `items` fails for anything but an object, where `dict` alone would take a list of pairs, too.
        weight_map, total = dict(content["weight_map"].items()), content["metadata"]["total_size"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{INDEX} is not a shard index ({one_line(error)})", INDEX) from error
    return weight_map, total


def _check_index(folder: Path, checksums: dict[str, str], weight_map: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Check that index and shards name the same tensors in the same files. Returns every tensor's shape."""
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise CorruptCheckpoint(
                f"{INDEX} places tensor {name} in {file!r}, which is outside the folder", INDEX, name
            )
        if file not in checksums:
            raise CorruptCheckpoint(
                f"{INDEX} places tensor {name} in {file}, which {REPORT} does not list", INDEX, name
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checksums:
        try:
            with safe_open(folder / file, framework="pt", device="cpu") as shard:
                # Shapes are in the header: no tensor is read here.
                held = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptCheckpoint(f"{file} is not a safetensors file ({one_line(error)})", file) from error
        for name in held:
            if weight_map.get(name) != file:
                where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise CorruptCheckpoint(f"{file} holds tensor {name}, and {INDEX} {where}", INDEX, name)
        for name, place in weight_map.items():
            if place == file and name not in held:
                raise CorruptCheckpoint(f"{INDEX} places tensor {name} in {file}, which does not hold it", INDEX, name)
        shapes |= held
    return shapes


def _check_model(folder: Path, weight_map: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> int:
    """Check that names and shapes are those of the model that config.json describes. Returns its number of frequencies."""
    model = _empty_model(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    for name, shape in expected.items():
        if name not in shapes:
            # A tied weight is stored once.
            if name in tied:
                continue
            raise CorruptCheckpoint(f"tensor {name} is in no shard, and config.json asks for it", INDEX, name)
        if shapes[name] != shape:
            raise CorruptCheckpoint(
                f"{weight_map[name]}: tensor {name} has shape {list(shapes[name])}, config.json says {list(shape)}",
                weight_map[name],
                name,
            )
    for name in shapes:
        if name not in expected:
            raise CorruptCheckpoint(
                f"{weight_map[name]}: tensor {name} is no part of the model", weight_map[name], name
            )
    # `inv_freq` has one entry for `step` columns of the cos and sin tables, which the indices count.
    types = (config.model_type.removeprefix(PREFIX) for config in (model.config, model.config.get_text_config()))
    step = find_family(family_of_part(*types)).freq_stride
    own = (getattr(model.config.get_text_config(), "rotary_dim", None) or 0) // 2  # GPT-J and CodeGen look sines up
    return step * max((len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")), default=own)


def _empty_model(folder: Path) -> PreTrainedModel:
    """The model that config.json describes, on the meta device."""
    try:
        if not (folder / "config.json").is_file():
            raise InputError("config.json is missing")
        config = load_config(folder, folder.resolve().name)
        if not is_converted(config):
            raise InputError(f"config.json is of model type {config.model_type!r}, which is not a converted model's")
        if config.num_hidden_layers < 1:
            raise InputError(f"config.json says that the model has {config.num_hidden_layers} layers")
        # Nothing is allocated, whatever sizes a damaged or hostile config.json states.
        with init_empty_weights(include_buffers=True):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except InputError as error:
        raise CorruptCheckpoint(str(error), "config.json") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CorruptCheckpoint(
            f"config.json describes no model that can be built ({one_line(error)})", "config.json"
        ) from error


def _check_tensors(folder: Path, file: str, frequencies: int) -> int:
    """Check dtypes and values of one shard. Returns the bytes of its tensors."""
    total = 0
    try:
        with safe_open(folder / file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118  (a shard is no dictionary)
                stored, index = shard.get_slice(name).get_dtype(), name.endswith(f".{FREQUENCIES}")
                if stored not in (("I64",) if index else DTYPES):
                    raise CorruptCheckpoint(
                        f"{file}: tensor {name} is stored as {stored}, which is not readable here", file, name
                    )
                tensor = shard.get_tensor(name)
                total += tensor.nbytes
                _check_values(file, name, tensor, frequencies if index else None)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{file} is not a safetensors file ({one_line(error)})", file) from error
    return total


def _check_values(file: str, name: str, tensor: Tensor, frequencies: int | None) -> None:
    if frequencies is None:
        try:
            # The bound on large values is for sources, which calibration computes with.
            check_finite({name: tensor}, most=math.inf)
        except InputError as error:
            raise CorruptCheckpoint(f"{file}: tensor {name} has NaN or infinite values", file, name) from error
    elif tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < frequencies:
        outside = f"{int(tensor.min())} to {int(tensor.max())}"
        raise CorruptCheckpoint(
            f"{file}: tensor {name} holds {outside}, outside the model's frequencies 0 to {frequencies - 1}", file, name
        )
