"""A cached token as a row of bytes: codes of 8 and 4 bits for the latent, a rotary key, and scales for groups of channels.

Sections of a row (one token of one layer), each from a multiple of ALIGN bytes on; the row is padded to such a multiple:

    codes8   n8 bytes: channels [0, n8) of the latent, as int8 or e4m3
    codes4   (r - n8) / 2 bytes: byte i holds channel n8 + i in its low nibble and channel n8 + (r - n8) / 2 + i in its high
             nibble; the code is the nibble - 8
    rope     the rotated key: 2m numbers as bfloat16 (2 bytes each), e4m3 or int8
    scales   float16, little-endian: one for each group of channels, then one for the rotary key unless that is bfloat16

A rotary key in 4 bits has no section of its own: its numbers, multiplied by `spreading`, are the last channels of codes4. The row
is then that of a latent of r + 2m channels without a rotary key.

A dequantised number is its code times its group's scale. Groups have `group` channels, the last of a section maybe fewer, and
none holds channels of both widths. Needs only torch, like the modeling code beside it.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KINDS = ("fp8", "int8", "int4", "mixed")
ROPE_KINDS = ("bf16", "fp8", "int8", "int4")
# Version of the rows, in the configuration's `latent_cache`; and the fields that all formats have there.
VERSION, FIELDS = 1, {"version", "kind", "group", "rope"}
# Bytes that every section and row is a multiple of: the width of a vector load.
ALIGN = 16
# Least and most channels of a group; a group may also be the whole section.
LEAST_GROUP, MOST_GROUP = 32, 128
FP8 = torch.float8_e4m3fn
CODES = {"fp8": FP8, "int8": torch.int8}


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@functools.cache
def spreading(size: int) -> Tensor:
    """An orthonormal matrix (size, size) that spreads each number over many, float64 on the CPU.

    It has a Hadamard matrix of Sylvester's construction for each power of two in `size`. Numbers are dealt out to these blocks
    in turn, so that each block gets a like part of numbers that are in the order of their magnitudes.
    """
    place: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # engines build models with defaults of their own
    blocks: list[Tensor] = []
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            block = torch.ones(1, 1, **place)
            for _ in range(bit):
                block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) * 0.5**0.5
            blocks.append(block)
    if not blocks:
        return torch.zeros(0, 0, **place)
    places = torch.cat([(torch.arange(len(block), **place) + 0.5) / len(block) for block in blocks])
    return torch.block_diag(*blocks)[:, places.argsort(stable=True)]


@dataclass(frozen=True)
class LatentFormat:
    """Layout of a packed row.

    Attributes:
        kind: one of KINDS. "mixed" has int8 for the first channels and int4 for the others.
        rank: channels r of the latent.
        rope_dim: numbers 2m of the rotary key.
        group: channels that share a scale; 0: all channels of a section.
        wide: channels n8 with 8 bits, the first ones; follows from the kind except for "mixed".
        rope: "bf16", "fp8" (e4m3), "int8", or "int4" for kinds with codes of 4 bits.
    """

    kind: str
    rank: int
    rope_dim: int
    group: int = 0
    wide: int = -1
    rope: str = "bf16"

    def __post_init__(self) -> None:
        """Check the fields, and fill in `wide`.

        Raises:
            ValueError: no such row exists.
        """
        if self.kind not in KINDS or self.rope not in ROPE_KINDS:
            raise ValueError(
                f"latent cache of kind {self.kind!r} with rotary key {self.rope!r}: expected {KINDS}, {ROPE_KINDS}"
            )
        if self.rope == "int4" and self.kind not in ("int4", "mixed"):
            raise ValueError(f"latent cache of kind {self.kind!r}: it has no codes of 4 bits for a rotary key in int4")
        if self.group and not LEAST_GROUP <= self.group <= MOST_GROUP:
            raise ValueError(f"latent cache: group {self.group} is not 0 or {LEAST_GROUP} to {MOST_GROUP}")
        follows = {"int4": 0, "mixed": self.wide}.get(self.kind, self.rank)
        if self.wide not in (-1, follows) or not 0 <= follows <= self.rank or (self.rank - follows) % 2:
            raise ValueError(
                f"latent cache of kind {self.kind}: {self.wide} of {self.rank} channels cannot have 8 bits"
            )
        object.__setattr__(self, "wide", follows)

    @property
    def joint(self) -> "LatentFormat":
        """The format of the same row without a rotary key: where that has 4 bits, its numbers are channels of the latent."""
        if self.rope != "int4":
            return self
        wide = self.wide if self.kind == "mixed" else -1
        return replace(self, rank=self.rank + self.rope_dim, rope_dim=0, wide=wide, rope="bf16")

    @property
    def spreads(self) -> bool:
        """Whether the rotary key's numbers are channels of the latent, in another basis."""
        return self.rope == "int4" and self.rope_dim > 0

    def spread(self, rope: Tensor) -> Tensor:
        """Rotated keys or queries (..., 2m) in the basis in which keys are cached."""
        if not self.spreads:
            return rope
        return rope @ _constant_spreading(self.rope_dim, rope.device, rope.dtype)

    @property
    def narrow(self) -> int:
        """Channels with 4 bits, those of a rotary key included."""
        return self.rank - self.wide + (self.rope_dim if self.rope == "int4" else 0)

    @property
    def codes4_at(self) -> int:
        """Offset of the 4-bit codes in bytes."""
        return _aligned(self.wide)

    @property
    def rope_at(self) -> int:
        """Offset of the rotary key in bytes."""
        return self.codes4_at + _aligned(self.narrow // 2)

    @property
    def rope_bytes(self) -> int:
        """Bytes of the rotary key without padding."""
        return self.rope_dim * {"bf16": 2, "int4": 0}.get(self.rope, 1)

    @property
    def scales_at(self) -> int:
        """Offset of the scales in bytes."""
        return self.rope_at + _aligned(self.rope_bytes)

    @property
    def groups(self) -> tuple[int, ...]:
        """Channels of each group, those with 8 bits first."""
        sizes: list[int] = []
        for channels in (self.wide, self.narrow):
            size = self.group or channels
            sizes += [min(size, channels - first) for first in range(0, channels, size or 1)]
        return tuple(sizes)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return len(self.groups) + (self.rope in CODES and self.rope_dim > 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.scales_at + _aligned(2 * self.scales)


def layer_format(config: Any, layer_idx: int) -> LatentFormat | None:
    """Format of one layer's cached rows, from a converted model's configuration; None where the cache is not quantised.

    Raises:
        ValueError: this code does not know the format.
    """
    given = getattr(config, "latent_cache", None)
    if given is None:
        return None
    known = isinstance(given, dict) and given.get("version") == VERSION and given.keys() - {"wide"} == FIELDS
    if not known or [type(given[key]) for key in ("version", "kind", "group", "rope")] != [int, str, int, str]:
        raise ValueError(
            f"config.json has latent_cache {given!r}, which this code of version {VERSION} does not know: it is damaged, or a "
            f"newer mla_convert wrote it, which has to be installed"
        )
    wide = given.get("wide")
    several = isinstance(wide, list) and [type(each) for each in wide] == [int] * config.num_hidden_layers
    if several != (given["kind"] == "mixed") or not (several or wide is None):
        raise ValueError(
            f"config.json has latent_cache {given!r}: a mixed cache, and no other, states a number wide for every layer"
        )
    return LatentFormat(
        kind=given["kind"],
        rank=config.layer_rank(layer_idx),
        rope_dim=config.layer_rope_dim(layer_idx),
        group=given["group"],
        wide=wide[layer_idx] if wide else -1,
        rope=given["rope"],
    )


@functools.cache
def _spreading_on(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return spreading(size).mT.to(device, dtype).contiguous()


@torch.compiler.assume_constant_result
def _constant_spreading(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A compiler would trace through the cache, and make the matrix at every step.
    return _spreading_on(size, device, dtype)


def kernel_format(fmt: LatentFormat) -> tuple[int, ...] | None:
    """The numbers of the `mla_attention.RowFormat` of a row, of its `joint` form; None where the kernels have no such row."""
    if fmt.rope == "int8" and fmt.rope_dim:
        return None
    return fmt.wide, int(fmt.kind == "fp8"), fmt.group, int(fmt.rope == "fp8")


def key_basis(fmt: LatentFormat, like: Tensor) -> Tensor | None:
    """The matrix of `LatentFormat.spread` beside a tensor, in its dtype; None where keys are cached as they are."""
    if not fmt.spreads:
        return None
    return _constant_spreading(fmt.rope_dim, like.device, like.dtype)
