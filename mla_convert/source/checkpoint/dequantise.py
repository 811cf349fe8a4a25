"""Reading of quantised checkpoints as bfloat16, by tensor: FP8 with scales by block, row or tensor, and MXFP4 experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint.reader import SafetensorsReader

DTYPE = torch.bfloat16
# Suffixes of the names of a weight's scales: DeepSeek's FP8 (by block), compressed-tensors' (by row or tensor).
FP8_SCALES = ("_scale_inv", "_scale")
PACKED, PACKED_SCALES = "_blocks", "_scales"
# MXFP4: elements in a byte, and elements that share a scale.
PER_BYTE, PER_SCALE = 2, 32


def can_dequantise(quantization: dict[str, Any]) -> bool:
    """Whether checkpoints with this `quantization_config` are supported."""
    method = quantization.get("quant_method")
    return method in ("fp8", "mxfp4") or (
        method == "compressed-tensors" and quantization.get("format") == "float-quantized"
    )


def take_quantization(config: PreTrainedConfig, label: str) -> dict[str, Any] | None:
    """Remove `quantization_config` from a configuration and return it; None if the checkpoint is not quantised.

    Raises:
        InputError: the quantisation is not supported.
    """
    how = getattr(config, "quantization_config", None)
    if not how:
        return None
    how = dict(how if isinstance(how, dict) else how.to_dict())
    method = how.get("quant_method")
    # transformers gives some methods as an enum, others by name.
    how["quant_method"] = getattr(method, "value", method)
    if not can_dequantise(how):
        raise InputError(
            f"{label} is quantised ({how['quant_method'] or 'its configuration says how'}): of quantised checkpoints FP8, MXFP4 "
            f"and GGUF are read; give one of these, or the checkpoint that it was made from"
        )
    del config.quantization_config
    return how


class DequantisedReader:
    """Reads quantised tensors as bfloat16, and the others in their stored dtype.

    FP8: a float8 weight (n, c) with scales for blocks, (ceil(n / b), ceil(c / b')), for rows, (n, 1), or for the tensor; the
    block size is the configuration's (DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2). MXFP4: experts (E, n, c / 32, 16)
    of packed 4-bit elements with exponents (E, n, c / 32), read in the layout of transformers' gpt-oss, (E, c, n) (OCP
    Microscaling Formats specification).
    """

    def __init__(self, stored: SafetensorsReader, quantization: dict[str, Any]):
        """Read from `stored`; `quantization` is the checkpoint's `quantization_config`."""
        self._stored = stored
        # Without a statement, the blocks are those of the DeepSeek-V3 report, section 3.3.2.
        self._block = tuple(quantization.get("weight_block_size") or (128, 128))
        names = set(stored.names())
        self._scale_of = {
            name: name + end
            for name in names
            for end in FP8_SCALES
            if stored.stored_as(name).startswith("F8_") and name + end in names
        }
        self._packed = {
            name.removesuffix(PACKED): name
            for name in names
            if name.endswith(PACKED) and name.removesuffix(PACKED) + PACKED_SCALES in names
        }
        used = (
            set(self._scale_of.values()) | set(self._packed.values()) | {name + PACKED_SCALES for name in self._packed}
        )
        # scales of activations do not belong to the weights
        self._names = [n for n in stored.names() if n not in used and not n.endswith(".input_scale")] + list(
            self._packed
        )

    def names(self) -> list[str]:
        """Names of the dequantised tensors and of the others."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one dequantised tensor, without reading it."""
        if name not in self._packed:
            return self._stored.shape(name)
        experts, rows, groups, width = self._stored.shape(self._packed[name])
        return experts, groups * width * PER_BYTE, rows

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which one tensor is read."""
        return DTYPE if name in self._scale_of or name in self._packed else self._stored.dtype(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, dequantised."""
        names = list(names)
        plain = self._stored.read(name for name in names if name not in self._packed and name not in self._scale_of)
        return {name: plain[name] if name in plain else self._dequantised(name) for name in names}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of one dequantised tensor."""
        # Rows in general do not begin at a block's first row, so that the whole tensor is dequantised.
        if name in self._packed or name in self._scale_of:
            return self._dequantised(name)[start:stop]
        return self._stored.rows(name, start, stop)

    def _dequantised(self, name: str) -> Tensor:
        if name in self._packed:
            parts = self._packed[name], name + PACKED_SCALES
            blocks, scales = (self._stored.read([part])[part] for part in parts)
            if blocks.shape[:-1] != scales.shape or blocks.shape[-1] * PER_BYTE != PER_SCALE:
                raise InputError(f"{parts[0]} and {parts[1]} do not belong together: fetch the checkpoint again")
            return convert_moe_packed_tensors(blocks, scales, dtype=DTYPE)
        # In float32, so that only the product is rounded to bfloat16.
        weight = self._stored.read([name])[name].float()
        scale = self._stored.read([self._scale_of[name]])[self._scale_of[name]].float()
        return (weight * self._spread(scale, weight.shape, name)).to(DTYPE)

    def _spread(self, scale: Tensor, shape: torch.Size, name: str) -> Tensor:
        """Scales expanded so that they broadcast to a weight of `shape`."""
        if scale.numel() == 1 or tuple(scale.shape) == (shape[0], 1):
            return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
        blocks = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if tuple(scale.shape) != blocks:
            raise InputError(
                f"{self._scale_of[name]} has shape {list(scale.shape)}, blocks of {list(self._block)} make {list(blocks)}: "
                f"fetch the checkpoint again"
            )
        rows, columns = self._block
        return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
