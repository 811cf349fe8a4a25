"""Checks of shapes, types and strides, with messages that name the argument, what it is and what it should be."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK, MAX_ROPE, MAX_HEADS = 576, 128, 128


def expect(condition: bool, message: Callable[[], str]) -> None:
    """ValueError unless `condition`; the message is not made up before it is needed, which no compiler could trace."""
    if not condition:
        raise ValueError(message())


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """ValueError unless `tensor` has this shape; None fits any extent."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted})")


def check_rows(dtype: torch.dtype, device: torch.device, **tensors: Tensor) -> None:
    """ValueError unless all have this dtype and device, and numbers of a row that lie side by side."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")


def check_widths(rank: int, rope_dim: int, heads: int) -> None:
    """ValueError for a rank, rope dimension or head count that the kernels do not serve."""
    expect(
        rank % 16 == 0 and 16 <= rank <= MAX_RANK,
        lambda: f"rank is {rank}: a multiple of 16 from 16 to {MAX_RANK} is served",
    )
    expect(
        rope_dim % 16 == 0 and 0 <= rope_dim <= MAX_ROPE,
        lambda: f"rope dimension is {rope_dim}: a multiple of 16 from 0 to {MAX_ROPE} is served",
    )
    expect(1 <= heads <= MAX_HEADS, lambda: f"{heads} heads: 1 to {MAX_HEADS} are served")


def check_integers(name: str, tensor: Tensor, device: torch.device) -> None:
    """ValueError unless `tensor` is int32, on the device."""
    expect(tensor.dtype == torch.int32, lambda: f"{name} has dtype {tensor.dtype}, expected torch.int32")
    expect(tensor.device == device, lambda: f"{name} is on {tensor.device}, expected {device}")
