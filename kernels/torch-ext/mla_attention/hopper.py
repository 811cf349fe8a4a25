"""Launch of the Hopper kernel."""

from torch import Tensor

from .tuning import hopper_chunks, power_of_two

LOG2E = 1.4426950408889634


def hopper_launch(
    q_latent, q_rope, latent_cache, rope_cache, visible, block_table, softmax_scale, num_splits, softcap, window, out, lse,
    part, part_lse, workers, config,
):  # fmt: skip
    """Arguments as `decode_triton`; `workers` programs for every block of rows."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_kernels import mla_decode_fwd_kernel_hopper

    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[3]
    groups, ropes, width = hopper_chunks(rank, rope_dim, config.left)
    wide, narrow = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(width * 2, 16, 2)

    def matrix(x: Tensor, height: int, columns: tuple[int, ...], layout) -> tuple:
        """Tensor maps of (outer, inner, d) as a matrix of rows, and the rows from one outer index to the next."""
        stride = x.stride(1)
        apart = x.stride(0) // stride if x.shape[0] > 1 else x.shape[1]
        shape = [(x.shape[0] - 1) * apart + x.shape[1], x.shape[2]]
        maps = tuple(TensorDescriptor(x, shape, [stride, 1], [height, extent], layout) for extent in columns)
        return maps, apart

    extents = tuple(64 * (group or groups[0]) for group in groups)
    c_maps, c_rows = matrix(latent_cache, config.block_n, extents, wide)
    q_maps, _ = matrix(q_latent.reshape(1, -1, rank), 64, extents, wide)
    k_map, qr_map, k_rows = c_maps[0], q_maps[0], 0
    if rope_dim:
        (k_map,), k_rows = matrix(rope_cache, config.block_n, (width,), narrow)
        (qr_map,), _ = matrix(q_rope.reshape(1, -1, rope_dim), 64, (width,), narrow)
    # Registers of a thread at the start, and of those that compute once the loading warp has given up its own.
    computing = 2 if groups[2] else 1
    at_start = 65536 // (128 * (computing + 1) * config.per_sm) // 8 * 8
    registers = (at_start * (computing + 1) - 24) // computing // 8 * 8
    options = {"launch_pdl": True} if config.pdl else {}
    mla_decode_fwd_kernel_hopper[(-(-tokens * heads // 64), workers)](
        *c_maps, k_map, *q_maps, qr_map, visible.lengths, visible.starts, visible.holes, visible.mask,
        visible.lengths if block_table is None else block_table, out, lse, part, part_lse,
        softmax_scale * LOG2E, softcap, window, batch, tokens, heads, workers, config.min_tiles,
        0 if block_table is None else block_table.stride(0), *out.stride()[:3], *visible.mask.stride()[:2],
        c_rows, k_rows,
        rank=rank, BATCH=power_of_two(batch), BLOCK_N=config.block_n, GROUPS=groups, NR=ropes, RW=width,
        STAGES=config.stages, REGISTERS=min(registers, 240), PAGE=0 if block_table is None else latent_cache.shape[1],
        SPLITS=num_splits, MASK=visible.masked, WINDOW=window > 0, SOFTCAP=softcap > 0, PDL=config.pdl,
        num_warps=4, maxnreg=min(at_start, 248), **options,
    )  # fmt: skip
