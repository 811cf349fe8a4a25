"""Writes a healed model: the converted folder again, with what was trained, its figures and its checksums in their places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_convert.beyond import to_report
from mla_convert.card import write_card
from mla_convert.checkpoint.writer import Writer
from mla_convert.errors import InputError
from mla_convert.figures import REPORT, finite
from mla_convert.page import PAGE, write_page

# Made anew, or no part of a converted folder.
OWN = (REPORT, PAGE, "README.md")


def merged(name: str, tensor: Tensor, trained: dict[str, Tensor]) -> Tensor:
    """A tensor of the converted checkpoint with what was trained of it, in its own dtype."""
    module = name.removesuffix(".weight")
    down, up = (trained.get(f"{module}.lora_{part}.weight") for part in "AB")
    if down is not None:
        return (tensor.float() + up @ down).to(tensor.dtype)  # alpha = rank: no factor
    return trained[name].to(tensor.dtype) if name in trained else tensor


def write_weights(writer: Writer, folder: Path, shards: list[str], trained: dict[str, Tensor]) -> None:
    """Shard after shard of `folder` with what was trained, and every file that stays as it is.

    Raises:
        InputError: something trained has no place in the checkpoint, or is not finite.
    """
    used: set[str] = set()
    for shard in shards:
        tensors = {name: merged(name, tensor, trained) for name, tensor in load_file(folder / shard).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"tensor {name} is not finite in {tensor.dtype}: heal with --lr lower")
        writer.write_shard(shard, tensors)
        used |= tensors.keys()
    missing = {name for name in trained if ".lora_" not in name} - used
    if missing:
        raise InputError(f"tensor {min(missing)} was trained and is in no shard of {folder.name}")
    writer.write_index()
    for file in sorted(folder.iterdir()):
        made = file.name in (*OWN, *shards) or (writer.folder / file.name).exists()
        if file.is_file() and not file.name.startswith(".") and not made:
            shutil.copyfile(file, writer.folder / file.name)


def write_report(content: dict[str, Any], folder: Path) -> None:
    """report.json with its page and model card."""
    content = finite(content)
    write_page(content, folder / PAGE)
    write_card(to_report(content), folder)
    (folder / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
