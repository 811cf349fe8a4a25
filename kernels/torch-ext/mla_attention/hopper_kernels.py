"""Gluon kernel of `mla_decode` for Hopper: one warp loads, two warpgroups compute, a ring of tiles lies between them.

Products are turned round: scores are (tokens, rows) and accumulators (rank, rows), a row being one head of one query token.
The tensor cores take 64 rows of the first operand and as few as 8 columns of the second, so it is the tokens and the rank
that should be those rows: 16 or 32 heads cost no padding, and a tile is read by them straight from where the tensor memory
accelerator put it, as keys and, transposed, as values.

The two warpgroups share every tile and exchange nothing. Up to 32 rows, both compute all scores and each one half of the
rank; with 64, each takes 32 rows whole (ROWS_SPLIT). Latents and rotary keys are held in chunks of 64 columns, so that any
rank costs at most 63 columns of padding, filled with zeros by the accelerator.
"""

import triton.language.extra.cuda as cuda
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_N = gl.constexpr(64)
CHUNK = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _tile_range(length, start, tokens, window, WINDOW: gl.constexpr):
    """First tile that any query of the sequence may see, and one past the last. Scalars or vectors."""
    last = (length + (BLOCK_N - 1)) // BLOCK_N
    if WINDOW:
        start = gl.maximum(start, length - tokens - window + 1)
    return gl.minimum(start // BLOCK_N, last), last


@gluon.jit
def _stretch(b, at, share, seen, tokens, window, MASK: gl.constexpr, WINDOW: gl.constexpr):
    """What a worker does of sequence b, whose first tile is number `at` of all: tiles begin .. stop of first .. last."""
    lengths, starts = seen
    share_lo, share_hi = share
    length = gl.load(lengths + b)
    start = 0
    if MASK:
        start = gl.load(starts + b)
    first, last = _tile_range(length, start, tokens, window, WINDOW)
    begin = first + gl.maximum(share_lo - at, 0)
    stop = first + gl.minimum(share_hi - at, last - first)
    return begin, stop, first, last, length


@gluon.jit
def _load_partition(
    maps, seen, block_table, rings, barriers, work, tokens, window, stride_tb, c_rows, k_rows,
    NC: gl.constexpr, NR: gl.constexpr, RW: gl.constexpr, N: gl.constexpr, ROWS_SPLIT: gl.constexpr, STAGES: gl.constexpr,
    PAGE: gl.constexpr, MASK: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Tiles of all stretches one after another, and the queries of each as soon as those before are done with."""
    c_map, k_map, q_map, qr_map = maps
    tiles, ropes, queries, q_ropes = rings
    full, empty, q_full, q_empty = barriers
    b_first, b_stop, at, share_lo, share_hi, rows, first_row = work
    HALVES: gl.constexpr = 2 if ROWS_SPLIT else 1
    tile_bytes: gl.constexpr = (NC * CHUNK + NR * RW) * BLOCK_N * 2
    query_bytes: gl.constexpr = (NC * CHUNK + NR * RW) * N * 2 * HALVES
    count = 0
    sequences = 0
    for b in range(b_first, b_stop):
        begin, stop, first, last, _ = _stretch(b, at, (share_lo, share_hi), seen, tokens, window, MASK, WINDOW)
        at += last - first
        for tile in range(begin, stop):
            n0 = tile * BLOCK_N
            if PAGE == 0:
                outer = b
                inner = n0
            else:
                outer = gl.load(block_table + b.to(gl.int64) * stride_tb + n0 // PAGE)
                inner = n0 % PAGE
            stage = count % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, tile_bytes)
            for c in gl.static_range(NC):
                tma.async_copy_global_to_shared(
                    c_map, [outer * c_rows + inner, c * CHUNK], ready, tiles.index(stage * NC + c)
                )
            for c in gl.static_range(NR):
                tma.async_copy_global_to_shared(
                    k_map, [outer * k_rows + inner, c * RW], ready, ropes.index(stage * NR + c)
                )
            if tile == begin:
                mbarrier.wait(q_empty, (sequences & 1) ^ 1)
                mbarrier.expect(q_full, query_bytes)
                for half in gl.static_range(HALVES):
                    row = b * rows + first_row + half * N
                    for c in gl.static_range(NC):
                        tma.async_copy_global_to_shared(
                            q_map, [row, c * CHUNK], q_full, queries.index(half * NC + c)
                        )
                    for c in gl.static_range(NR):
                        tma.async_copy_global_to_shared(qr_map, [row, c * RW], q_full, q_ropes.index(half * NR + c))
                sequences += 1
            count += 1


@gluon.jit
def _capped(scores, scale_log2, softcap):
    """Raw dot products to base-2 logits with cap * tanh(x / cap) in between."""
    x = scores * (scale_log2 / (LOG2E * softcap))
    e = gl.exp2(-2.0 * LOG2E * gl.abs(x))  # of -2|x|, so that it cannot overflow
    t = (1.0 - e) / (1.0 + e)
    return gl.where(x < 0, -t, t) * (softcap * LOG2E)


@gluon.jit
def _clean(tiles, at, n0, length, C0: gl.constexpr, C1: gl.constexpr):
    """Zeros for the rows of a tile past the end of the sequence, which may hold NaN: 0 * NaN would come through."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, L))
    for c in gl.static_range(C0, C1):
        chunk = tiles.index(at + c)
        value = chunk.load(L)
        chunk.store(gl.where((n < length)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _store_chunks(pointer, row_offset, in_range, accs, rank: gl.constexpr, L: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr):
    """Accumulators [CHUNK, N] each, to rows of `rank` numbers."""
    for c in gl.static_range(C0, C1):
        d = c * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, L))
        to = pointer + row_offset[None, :] + d[:, None]
        mask = in_range[None, :]
        if rank % CHUNK != 0:
            mask = mask & (d < rank)[:, None]
        gl.store(to, accs[c - C0].to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def _math_partition(
    outputs, seen, masking, rings, weights, barriers, work, tokens, heads, window, scale_log2, softcap, strides, worker,
    rank: gl.constexpr, NC: gl.constexpr, NR: gl.constexpr, N: gl.constexpr, WG: gl.constexpr, MATH: gl.constexpr,
    ROWS_SPLIT: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: N rows, and the chunks C0 .. C1 of the rank."""
    out, lse, part, part_lse = outputs
    mask, holes, stride_mb, stride_mt = masking
    tiles, ropes, queries, q_ropes = rings
    full, empty, q_full, q_empty = barriers
    b_first, b_stop, at, share_lo, share_hi, rows, first_row = work
    stride_ob, stride_ot, stride_oh = strides
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    SIDE: gl.constexpr = (NC + MATH - 1) // MATH
    C0: gl.constexpr = 0 if ROWS_SPLIT else WG * SIDE
    C1: gl.constexpr = NC if ROWS_SPLIT else min(NC, (WG + 1) * SIDE)
    HALF: gl.constexpr = WG if ROWS_SPLIT else 0

    row = first_row + HALF * N + gl.arange(0, N, layout=gl.SliceLayout(0, L))
    row_t = row // heads
    row_h = row % heads
    in_range = row < rows
    count = 0
    sequences = 0
    for b in range(b_first, b_stop):
        begin, stop, first, last, length = _stretch(
            b, at, (share_lo, share_hi), seen, tokens, window, MASK, WINDOW
        )
        at += last - first
        if begin < stop:
            limit = length - tokens + row_t + 1  # one past the last token that the row sees
            low = limit - limit
            bare_lo = 0
            holed = False
            if WINDOW:
                low = limit - window
                bare_lo = length - window
            if MASK:
                start = gl.load(seen[1] + b)
                low = gl.maximum(low, start)
                bare_lo = gl.maximum(bare_lo, start)
                holed = gl.load(holes + b) != 0
                if holed:  # the mask alone says what each query sees
                    limit = limit - limit + length
            bare_hi = length - tokens + 1  # every row sees tokens bare_lo .. bare_hi
            m = gl.full([N], -float("inf"), gl.float32, layout=gl.SliceLayout(0, L))
            l = gl.zeros([BLOCK_N, N], gl.float32, layout=L)
            accs = ()
            for c in gl.static_range(C0, C1):
                accs = accs + (gl.zeros([CHUNK, N], gl.float32, layout=L),)
            mbarrier.wait(q_full, sequences & 1)
            for tile in range(begin, stop):
                n0 = tile * BLOCK_N
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                s = gl.zeros([BLOCK_N, N], gl.float32, layout=L)
                for c in gl.static_range(NC):
                    s = warpgroup_mma(
                        tiles.index(stage * NC + c), queries.index(HALF * NC + c).permute([1, 0]), s, use_acc=c > 0,
                        is_async=True,
                    )  # fmt: skip
                for c in gl.static_range(NR):
                    s = warpgroup_mma(
                        ropes.index(stage * NR + c), q_ropes.index(HALF * NR + c).permute([1, 0]), s, is_async=True
                    )
                s = warpgroup_mma_wait(0, deps=[s])
                if tile == stop - 1:
                    gl.thread_barrier()
                    mbarrier.arrive(q_empty, count=1)
                if SOFTCAP:
                    s = _capped(s, scale_log2, softcap)
                if (n0 + BLOCK_N > bare_hi) | (n0 < bare_lo) | holed:
                    token = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, L))
                    visible = token[:, None] < limit[None, :]
                    if WINDOW or MASK:
                        visible = visible & (token[:, None] >= low[None, :])
                    if MASK:
                        if holed:
                            of_row = mask + b.to(gl.int64) * stride_mb + row_t * stride_mt
                            flag = gl.load(
                                of_row[None, :] + token[:, None], mask=visible & in_range[None, :], other=0
                            )
                            visible = visible & (flag != 0)
                    s = gl.where(visible, s, -float("inf"))
                    if n0 + BLOCK_N > length:
                        _clean(tiles, stage * NC, n0, length, C0, C1)
                peak = gl.max(s, 0)
                if not SOFTCAP:
                    peak = peak * scale_log2
                new = gl.maximum(m, peak)
                shift = gl.where(new == -float("inf"), 0.0, new)  # a row may have seen nothing yet: -inf - -inf is NaN
                alpha = gl.exp2(m - shift)
                if SOFTCAP:
                    p = gl.exp2(s - shift[None, :])
                else:
                    p = gl.exp2(s * scale_log2 - shift[None, :])
                m = new
                l = l * alpha[None, :] + p
                weights.store(p.to(weights.dtype))
                fence_async_shared()
                moved = ()
                for c in gl.static_range(C0, C1):
                    moved = moved + (accs[c - C0] * alpha[None, :],)
                gl.thread_barrier()
                products = ()
                for c in gl.static_range(C0, C1):
                    products = products + (
                        warpgroup_mma(
                            tiles.index(stage * NC + c).permute([1, 0]), weights, moved[c - C0], is_async=True
                        ),
                    )
                if C1 - C0 == 1:
                    accs = (warpgroup_mma_wait(0, deps=products),)
                else:
                    accs = warpgroup_mma_wait(0, deps=products)
                gl.thread_barrier()  # all four warps are done with the tile
                mbarrier.arrive(empty.index(stage), count=1)
                count += 1
            sequences += 1

            total = gl.sum(l, 0)
            inverse = 1.0 / gl.where(total > 0, total, 1.0)
            scaled = ()
            for c in gl.static_range(C0, C1):
                scaled = scaled + (accs[c - C0] * inverse[None, :],)
            lse2 = m + gl.log2(total)
            b64 = b.to(gl.int64)
            if (begin == first) & (stop == last):
                offset = row_t * stride_ot + row_h * stride_oh
                _store_chunks(out + b64 * stride_ob, offset, in_range, scaled, rank, L, C0, C1)
                if ROWS_SPLIT or WG == 0:
                    gl.store(lse + (b64 * heads + row_h) * tokens + row_t, lse2 * LN2, mask=in_range)
            else:
                slot = (2 * worker + (begin == first).to(gl.int32)).to(gl.int64)
                _store_chunks(part + slot * rows * rank, row * rank, in_range, scaled, rank, L, C0, C1)
                if ROWS_SPLIT or WG == 0:
                    gl.store(part_lse + slot * rows + row, lse2, mask=in_range)


@gluon.jit(do_not_specialize=["batch", "tokens", "window", "workers", "min_tiles"])
def mla_decode_fwd_kernel_hopper(
    c_map, k_map, q_map, qr_map, lengths, starts, holes, mask, block_table, out, lse, part, part_lse,
    scale_log2, softcap, window, batch, tokens, heads, workers, min_tiles,
    stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt, c_rows, k_rows,
    rank: gl.constexpr, BATCH: gl.constexpr, NC: gl.constexpr, NR: gl.constexpr, RW: gl.constexpr, N: gl.constexpr,
    MATH: gl.constexpr, ROWS_SPLIT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PAGE: gl.constexpr,
    MASK: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (row blocks, workers). All tiles of all sequences, laid end to end, are shared out evenly among the workers.

    A worker leaves at most two partial results, in slot 2 w (the sequence began before its share) and 2 w + 1 (it goes on
    after it); `mla_decode_fwd_kernel_combine` knows which. Row blocks come first in the grid, so that those of one sequence
    run together and share the L2.
    """
    dtype: gl.constexpr = c_map.dtype
    HALVES: gl.constexpr = 2 if ROWS_SPLIT else 1
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(RW * 2, 16, 2)
    tiles = gl.allocate_shared_memory(dtype, [STAGES * NC, BLOCK_N, CHUNK], WIDE)
    queries = gl.allocate_shared_memory(dtype, [HALVES * NC, N, CHUNK], WIDE)
    if NR > 0:
        ropes = gl.allocate_shared_memory(dtype, [STAGES * NR, BLOCK_N, RW], NARROW)
        q_ropes = gl.allocate_shared_memory(dtype, [HALVES * NR, N, RW], NARROW)
    else:
        ropes = tiles
        q_ropes = queries
    weights = gl.allocate_shared_memory(
        dtype, [MATH, BLOCK_N, N], gl.NVMMASharedLayout(N * 2 if N <= 64 else 128, 16, 2)
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=MATH)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=MATH)
    fence_async_shared()

    worker = gl.program_id(1)
    if PDL:
        cuda.gdc_wait()  # queries and cache may come from the kernel before
        cuda.gdc_launch_dependents()
    ids = gl.arange(0, BATCH, layout=gl.BlockedLayout([1], [32], [4], [0]))
    length = gl.load(lengths + ids, mask=ids < batch, other=0)
    start = length * 0
    if MASK:
        start = gl.load(starts + ids, mask=ids < batch, other=0)
    first, last = _tile_range(length, start, tokens, window, WINDOW)
    count = last - first
    ends = gl.associative_scan(count, 0, _add)
    total = gl.sum(count, 0)
    active = gl.maximum(gl.minimum(workers, (total + min_tiles - 1) // min_tiles), 1)
    each = total // active
    more = total - each * active
    share_lo = worker * each + gl.minimum(worker, more)
    share_hi = share_lo + each + (worker < more).to(gl.int32)
    b_first = gl.sum(((ends <= share_lo) & (ids < batch)).to(gl.int32), 0)
    at = gl.sum(gl.where(ids == b_first, ends - count, 0), 0)  # first tile of the sequence among all
    b_stop = gl.sum((((ends - count) < share_hi) & (ids < batch)).to(gl.int32), 0)
    b_stop = gl.where(worker < active, b_stop, b_first)

    work = (b_first, b_stop, at, share_lo, share_hi, tokens * heads, gl.program_id(0) * (N * HALVES))
    seen = (lengths, starts)
    rings = (tiles, ropes, queries, q_ropes)
    barriers = (full, empty, q_full, q_empty)
    outputs = (out, lse, part, part_lse)
    masking = (mask, holes, stride_mb, stride_mt)
    strides = (stride_ob, stride_ot, stride_oh)
    maps = (c_map, k_map, q_map, qr_map)
    if MATH == 1:
        gl.warp_specialize(
            [
                (
                    _math_partition,
                    (outputs, seen, masking, rings, weights.index(0), barriers, work, tokens, heads, window, scale_log2,
                     softcap, strides, worker, rank, NC, NR, N, 0, MATH, ROWS_SPLIT, STAGES, MASK, WINDOW, SOFTCAP),
                ),
                (
                    _load_partition,
                    (maps, seen, block_table, rings, barriers, work, tokens, window, stride_tb, c_rows, k_rows, NC, NR, RW,
                     N, ROWS_SPLIT, STAGES, PAGE, MASK, WINDOW),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _math_partition,
                    (outputs, seen, masking, rings, weights.index(0), barriers, work, tokens, heads, window, scale_log2,
                     softcap, strides, worker, rank, NC, NR, N, 0, MATH, ROWS_SPLIT, STAGES, MASK, WINDOW, SOFTCAP),
                ),
                (
                    _math_partition,
                    (outputs, seen, masking, rings, weights.index(1), barriers, work, tokens, heads, window, scale_log2,
                     softcap, strides, worker, rank, NC, NR, N, 1, MATH, ROWS_SPLIT, STAGES, MASK, WINDOW, SOFTCAP),
                ),
                (
                    _load_partition,
                    (maps, seen, block_table, rings, barriers, work, tokens, window, stride_tb, c_rows, k_rows, NC, NR, RW,
                     N, ROWS_SPLIT, STAGES, PAGE, MASK, WINDOW),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
