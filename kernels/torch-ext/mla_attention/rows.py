"""A cached token as one row of bytes: 8-bit and 4-bit codes of the latent, the rotary key, and scales.

Sections of a row, each from a multiple of ALIGN bytes on; the row is padded to such a multiple:

    codes8   `wide` bytes: channels [0, wide) of the latent, e4m3 or int8
    codes4   (r - wide) / 2 bytes: byte i holds channel wide + i in its low nibble and channel wide + (r - wide) / 2 + i in its
             high nibble; the code is the nibble - 8
    rope     p numbers, bfloat16 or e4m3
    scales   float16: one for each group of channels of codes8, then of codes4, then one for the rotary key if that is e4m3

A number is its code times its scale. Groups are counted from the first channel of their section; the last may be shorter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bytes that every section and row is a multiple of: the width of a vector load.
ALIGN = 16
FP8 = torch.float8_e4m3fn
FP8_LARGEST, FP16_LARGEST = 448.0, 65504.0
# Scales of 4-bit codes that are tried, as factors of that at which the largest number is just representable.
FACTORS4 = (1.0, 0.95, 0.9)


def aligned(size: int) -> int:
    """The next multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


class RowFormat(NamedTuple):
    """Layout of a row beside the rank and the width of the rotary key, as numbers that an operator takes.

    Attributes:
        wide: channels with 8 bits, the first ones; the others, an even number, have 4.
        float8: 1 where 8-bit codes are e4m3, 0 where they are int8.
        group: channels that share a scale; 0: all channels of a section.
        rope_float8: 1 where the rotary key is e4m3 with a scale of its own, 0 where it is bfloat16.
    """

    wide: int
    float8: int
    group: int = 0
    rope_float8: int = 0

    def layout(self, rank: int, rope_dim: int) -> RowLayout:
        """Offsets in bytes of the sections of a row.

        Raises:
            ValueError: no such row exists.
        """
        narrow = rank - self.wide
        if narrow % 2 or not 0 <= self.wide <= rank or self.group < 0:
            raise ValueError(
                f"row_format: {self.wide} channels of {rank} cannot have 8 bits, in groups of {self.group}"
            )
        groups = tuple(-(-channels // (self.group or max(channels, 1))) for channels in (self.wide, narrow))
        codes4 = aligned(self.wide)
        rope = codes4 + aligned(narrow // 2)
        scales = rope + aligned(rope_dim * (1 if self.rope_float8 else 2))
        count = sum(groups) + (1 if self.rope_float8 and rope_dim else 0)
        return RowLayout(codes4, rope, scales, groups[0], sum(groups), scales + aligned(2 * count))


class RowLayout(NamedTuple):
    """Offsets of a row's sections, and numbers of its scales.

    Attributes:
        codes4: offset of the 4-bit codes in bytes; the 8-bit codes are at 0.
        rope: offset of the rotary key.
        scales: offset of the scales.
        groups8: scales of the 8-bit channels.
        groups: scales of all channels; that of the rotary key is next.
        row_bytes: bytes of a row.
    """

    codes4: int
    rope: int
    scales: int
    groups8: int
    groups: int
    row_bytes: int


def _group_slices(form: RowFormat, rank: int) -> list[tuple[int, int, int]]:
    """First and last channel of each group, and its bits: 4, 8, or 0 for e4m3."""
    slices = []
    for first, last, bits in ((0, form.wide, 0 if form.float8 else 8), (form.wide, rank, 4)):
        step = form.group or max(last - first, 1)
        slices += [(at, min(at + step, last), bits) for at in range(first, last, step)]
    return slices


def _scaled_codes(values: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of values (..., n) for a scale (..., 1) rounded to float16, and that scale; bits 0 is e4m3."""
    scale = scale.clamp(-FP16_LARGEST, FP16_LARGEST).half().float()
    steps = torch.where(scale == 0, 0.0, values / scale)
    if not bits:
        return steps.clamp(-FP8_LARGEST, FP8_LARGEST), scale
    return steps.round().clamp(-8 if bits == 4 else -127, 7 if bits == 4 else 127), scale


def _quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scale of one group (..., n), float32; bits 0 is e4m3.

    With 4 bits, the number of largest magnitude would have code -8, whatever its sign, so that all 16 codes are used; of that
    scale and the fractions of it in FACTORS4, the one with the least squared error is taken. Scales may be negative.
    """
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if bits != 4:
        return _scaled_codes(values, torch.maximum(high, -low) / (127 if bits else FP8_LARGEST), bits)
    largest = torch.where(high >= -low, high, low)
    tried = [_scaled_codes(values, largest * (factor / -8), bits) for factor in FACTORS4]
    errors = torch.stack([(codes * scale - values).square().sum(-1) for codes, scale in tried])
    best = errors.argmin(0)[None, ..., None]
    codes, scales = (torch.stack(parts) for parts in zip(*tried, strict=True))
    return torch.take_along_dim(codes, best, 0)[0], torch.take_along_dim(scales, best, 0)[0]


def naive_pack(latent: Tensor, rope: Tensor, form: RowFormat) -> Tensor:
    """Rows of tokens.

    Args:
        latent: (..., r).
        rope: (..., p), rotated.
        form: what the rows hold.

    Returns:
        (..., row_bytes), uint8.
    """
    latent, wide = latent.float(), form.wide
    form.layout(latent.shape[-1], rope.shape[-1])
    pairs = [_quantise(latent[..., first:last], bits) for first, last, bits in _group_slices(form, latent.shape[-1])]
    codes = torch.cat([pair[0] for pair in pairs], -1)
    scales = [pair[1] for pair in pairs]
    parts = [codes[..., :wide].to(FP8 if form.float8 else torch.int8).view(torch.uint8)]
    low, high = (codes[..., wide:] + 8).to(torch.uint8).chunk(2, -1)
    parts.append(low | high << 4)
    if form.rope_float8 and rope.shape[-1]:
        code, scale = _quantise(rope.float(), 0)
        parts.append(code.to(FP8).view(torch.uint8))
        scales.append(scale)
    else:
        parts.append(rope.bfloat16().contiguous().view(torch.uint8))
    parts.append(torch.cat(scales, -1).half().view(torch.uint8))
    return torch.cat([pad(part, (0, -part.shape[-1] % ALIGN)) for part in parts], -1)


def naive_unpack(rows: Tensor, rank: int, rope_dim: int, form: RowFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents (..., r) and rotary keys (..., p) of rows (..., row_bytes), in `dtype`."""
    at = form.layout(rank, rope_dim)

    def section(first: int, size: int, kind: torch.dtype) -> Tensor:
        return rows[..., first : first + size].contiguous().view(kind).to(dtype)

    count = at.groups + (1 if form.rope_float8 and rope_dim else 0)
    scales = section(at.scales, 2 * count, torch.float16)
    nibbles = rows[..., at.codes4 : at.codes4 + (rank - form.wide) // 2]
    latent = torch.cat(
        [
            section(0, form.wide, FP8 if form.float8 else torch.int8),
            (nibbles & 15).to(dtype) - 8,
            (nibbles >> 4).to(dtype) - 8,
        ],
        -1,
    )
    sizes = [last - first for first, last, _ in _group_slices(form, rank)]
    each = scales[..., : at.groups].repeat_interleave(torch.tensor(sizes, device=rows.device), dim=-1)
    if form.rope_float8 and rope_dim:
        return latent * each, section(at.rope, rope_dim, FP8) * scales[..., -1:]
    return latent * each, section(at.rope, 2 * rope_dim, torch.bfloat16)
