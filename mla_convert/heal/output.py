"""Writes a healed model: the converted folder with the trained weights, a new report and new checksums."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.core.files import on_disk, write_file
from mla_convert.core.report_file import PAGE
from mla_convert.core.report_schema import Report
from mla_convert.modeling.shipped_code import write_code
from mla_convert.report.html.page import write_page
from mla_convert.report.model_card import write_card
from mla_convert.source.carried import carried_files, carry, check_inside, read_bytes
from mla_convert.write.writer import Writer

RECIPE = "recipe.yaml"


def merged(name: str, tensor: Tensor, trained: dict[str, Tensor]) -> Tensor:
    """A tensor of the converted checkpoint with its trained weights or adapter, in its own dtype."""
    module = name.removesuffix(".weight")
    down, up = (trained.get(f"{module}.lora_{part}.weight") for part in "AB")
    if down is not None:
        return (tensor.float() + up @ down).to(tensor.dtype)  # LoRA's alpha equals its rank, so the factor is 1
    return trained[name].to(tensor.dtype) if name in trained else tensor


def write_weights(writer: Writer, folder: Path, shards: list[str], trained: dict[str, Tensor]) -> None:
    """Write the shards with the trained weights, the files that stay as they are, and this version's code.

    Args:
        writer: writes the healed folder.
        folder: of the converted model.
        shards: names of its shards.
        trained: trained tensors and adapters by name.

    Raises:
        InputError: a trained tensor is in no shard, or a tensor is not finite in its dtype.
    """
    used: set[str] = set()
    for shard in shards:
        tensors = {name: merged(name, tensor, trained) for name, tensor in load_file(folder / shard).items()}
        for name, tensor in tensors.items():
            # Trained weights are float32, and the checkpoint's own dtype may be too narrow for what they became.
            if not torch.isfinite(tensor).all():
                raise InputError(f"tensor {name} is not finite in {tensor.dtype}: heal with --lr lower")
        writer.write_shard(shard, tensors)
        used |= tensors.keys()
    # A name that fits no tensor would drop its training in silence.
    missing = {name for name in trained if ".lora_" not in name} - used
    if missing:
        raise InputError(f"tensor {min(missing)} was trained and is in no shard of {folder.name}")
    with on_disk("the output", writer.out.parent):
        writer.write_index()
        for name in ("config.json", RECIPE):
            if (folder / name).is_file():
                write_file(writer.folder / name, read_bytes(check_inside(folder / name), name))
        for file in carried_files(folder):
            carry(file, writer.folder)
        write_code(writer.folder)


def write_report(report: Report, folder: Path) -> None:
    """Write report.json with its page and model card."""
    write_page(report, folder / PAGE)
    write_card(report, folder)
    report.write(folder)
