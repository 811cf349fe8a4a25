"""Time of the parts of one call, and the number of query tokens up to which absorbed attention is faster."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from gpu_workers import Pool
from harness import Log, Shape, Slices, ceilings, decode_calls, half, make_slices, time_calls
from speed import alone
from torch import Tensor
from tune import brief

from mla_attention import decode as launcher
from mla_attention import decode_kernels, hopper, mla_decode
from mla_attention.tuning import DecodeConfig, default_config, hopper_config


class NullKernel:
    """A kernel that is not launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None

    def launch(self, *arguments: object) -> None:
        """Launch nothing."""


@contextmanager
def without_combination() -> Iterator[None]:
    """Launch the attending kernels alone."""
    triton, cuda = decode_kernels.mla_decode_fwd_kernel_combine, hopper._kernels
    decode_kernels.mla_decode_fwd_kernel_combine = NullKernel()
    hopper._kernels = lambda *arguments: (cuda(*arguments)[0], NullKernel(), NullKernel())
    yield
    decode_kernels.mla_decode_fwd_kernel_combine, hopper._kernels = triton, cuda


def host_us(slices: Slices, repeats: int = 200) -> float:
    """Microseconds that the host takes to launch one `mla_decode` outside of CUDA graphs."""
    q, qr, latent, rope, lengths, table, out, _, form = slices
    rope = None if form else rope[0]

    def launch() -> None:
        mla_decode(
            q, qr, latent[0], rope, lengths, softmax_scale=0.07, block_table=table, out=out, return_lse=True, row_format=form
        )  # fmt: skip

    launch()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        launch()
    # Taken before the device is done: the host alone is measured.
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def call_parts(shape: Shape, config: DecodeConfig, device: str) -> dict[str, float]:
    """Microseconds of a call, of its attending kernel alone, of that kernel on a cache in the L2, and of the host's launch."""
    slices, _, _ = make_slices(*shape, device)
    calls = decode_calls(slices, config, 0)
    row = {"call": time_calls(calls, device)}
    if device == "cuda":
        row["host, outside of graphs"] = host_us(slices)
    q, qr, latent, rope, *rest = slices
    # All sequences read the rows of the first one; time beyond that of the memory is computation.
    same = (q, qr, latent[:1, :1].expand(1, *latent.shape[1:]), rope[:1, :1].expand(1, *rope.shape[1:]), *rest)
    with without_combination():
        row["attending"] = time_calls(calls, device)
        # Three times, because `same` has a single slice and a graph is to hold several calls.
        row["attending, cache in the L2"] = time_calls(decode_calls(same, config, 0) * 3, device)
    return row


def absorbed_or_expanded(
    rank: int, rope_dim: int, heads: int, length: int, device: str, width: int = 128
) -> dict[int, tuple[float, float]]:
    """Microseconds of absorbed and of expanded attention for T new tokens of a sequence of `length`, by T."""
    rows: dict[int, tuple[float, float]] = {}
    latent, rope = (torch.randn(1, length, d, device=device).to(half(device)) for d in (rank, rope_dim))
    up = (torch.randn(heads, 2 * width, rank, device=device) * rank**-0.5).to(half(device))
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    for tokens in (1, 8, 16, 32, 64, 128, 256, 512):
        if tokens > length:
            break
        q_nope = torch.randn(1, heads, tokens, width, device=device).to(half(device))
        q_rope = torch.randn(1, tokens, heads, rope_dim, device=device).to(half(device))
        query_position = torch.arange(length - tokens, length, device=device)
        mask = None if tokens == 1 else torch.arange(length, device=device) <= query_position[:, None]

        def absorbed(q_nope: Tensor = q_nope, q_rope: Tensor = q_rope) -> Tensor:
            query = torch.einsum("bhtd,hdr->bthr", q_nope, up[:, :width])
            attended = mla_decode(query, q_rope, latent, rope, lengths, softmax_scale=0.07)
            return torch.einsum("bthr,hvr->bthv", attended, up[:, width:])

        def expanded(q_nope: Tensor = q_nope, q_rope: Tensor = q_rope, mask: Tensor | None = mask) -> Tensor:
            both = F.linear(latent, up.flatten(0, 1)).view(1, length, heads, -1).transpose(1, 2)
            key = torch.cat([both[..., :width], rope[:, None].expand(-1, heads, -1, -1)], -1)
            query = torch.cat([q_nope, q_rope.transpose(1, 2)], -1)
            return F.scaled_dot_product_attention(query, key, both[..., width:], attn_mask=mask)

        rows[tokens] = tuple(time_calls([way] * 3, device, 5) for way in (absorbed, expanded))
    return rows


def parts(arguments: argparse.Namespace) -> bool:
    """Measure all shapes; returns False, as no result is judged."""
    device = arguments.device
    log = Log(arguments.out, "parts")
    pool = Pool(min(arguments.processes, 1))
    (bandwidth, _, name), _ = alone(pool, ceilings, device)
    log.add(f"{name}: read {bandwidth:.0f} GB/s", kind="ceilings", device=name, gb_s=bandwidth)
    for rank, rope_dim, heads in arguments.shape:
        for batch, length in arguments.at:
            limits = launcher.device_limits(torch.device(device))
            known = [default_config(rank, rope_dim, heads, half(device), *limits[1:]), hopper_config(rank, rope_dim)]
            for config in filter(None, known if device == "cuda" else known[:1]):
                shape = (rank, rope_dim, heads, batch, length, 0, False, None)
                row, problem = alone(pool, call_parts, shape, config, device)
                log.add(
                    f"{shape} {brief(config)}: {row or problem}", kind="parts", shape=shape, row=row, problem=problem
                )
        row, problem = alone(pool, absorbed_or_expanded, rank, rope_dim, heads, arguments.at[0][1], device)
        log.add(f"absorbed, expanded: {row or problem}", kind="absorbed", row=row, problem=problem)
    pool.close()
    return False
