"""Sizes of latent attention that serving engines support, and zero padding to these sizes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mla_convert.core.errors import InputError, UsageError
from mla_convert.method.factorise.sizes import TABLE

# vLLM allocates latent and rotary key together and supports 320, 512 and 576 elements in all (MLACommonMetadata; 0.30 and
# newer). Its prefill kernels support 64 rotary dims only, and these widths of a head's (content key, rotary key, value).
ROPE_DIM = 2 * TABLE
RANKS = (256, 448, 512)
HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
KNOWN = ", ".join(str(rank) for rank in RANKS[:-1]) + f" and {RANKS[-1]}"

# Zero padding: to the smallest sizes that vLLM supports, to one of its ranks, or none.
Pad = int | Literal["auto", "none"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of every layer: kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim and v_head_dim."""

    rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int

    @property
    def cache_width(self) -> int:
        """Elements cached per token and layer."""
        return self.rank + self.rope_dim


def parse_pad(value: str) -> Pad:
    """The value of `--pad`.

    Raises:
        UsageError: an unknown value.
    """
    names: dict[str, Pad] = {"auto": "auto", "none": "none"}
    if value in names:
        return names[value]
    if value.isdigit() and int(value) in RANKS:
        return int(value)
    raise UsageError(f"pad {value!r} is none of auto, none, {', '.join(map(str, RANKS))}")


def padded(ranks: list[int], rope_dim: int, nope_dim: int, v_dim: int, pad: Pad) -> Sizes:
    """The sizes in which the layers are stored.

    Args:
        ranks: of each layer.
        rope_dim: largest of all layers.
        nope_dim: largest of all layers.
        v_dim: of all layers.
        pad: "auto": the smallest sizes that vLLM supports; a rank: that one; "none": the layers' own, which must be equal.

    Raises:
        InputError: sizes above those that vLLM supports, or layers of different ranks without a rank to pad to.
    """
    largest = max(ranks)
    if len(set(ranks)) > 1 and pad not in RANKS:
        raise InputError(
            f"layers have ranks from {min(ranks)} to {largest}, and engines store one for all: convert with --for vllm or "
            f"--uniform, or have the smaller ones padded by --pad RANK ({KNOWN} are possible)"
        )
    if pad == "none":
        return Sizes(largest, max(rope_dim, 2), max(nope_dim, 1), v_dim)
    # Ascending, as the heads below: the first that fits wastes least.
    rank = next((rank for rank in RANKS if rank >= largest and pad in ("auto", rank)), None)
    if rank is None:
        limit = RANKS[-1] if pad == "auto" else pad
        raise InputError(
            f"rank {largest} is above {limit}: vLLM takes {KNOWN}; convert to at most that, or give --pad none for engines "
            f"without such a list (transformers, llama.cpp, SGLang with Triton)"
        )
    if rope_dim > ROPE_DIM:
        raise InputError(
            f"{rope_dim} rotary dims are above the {ROPE_DIM} that vLLM's kernels take: convert with --rope-dim {ROPE_DIM}, or "
            f"give --pad none for engines without such a limit (transformers, llama.cpp, SGLang with Triton)"
        )
    heads = next((sizes for sizes in HEADS if sizes[0] >= nope_dim and sizes[2] >= v_dim), None)
    if heads is None:
        raise InputError(
            f"heads of {v_dim} are above the {HEADS[-1][0]} that vLLM's prefill kernels take beside {ROPE_DIM} rotary dims: give "
            f"--pad none for engines without such a limit (transformers, llama.cpp, SGLang with Triton)"
        )
    return Sizes(rank, ROPE_DIM, heads[0], heads[2])
