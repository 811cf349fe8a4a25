"""Gluon kernel of `mla_decode` for Hopper: one warp loads, one warpgroup weighs and half attends, one attends the rest.

A program serves 64 rows, a row being one head of one query token, and walks over its share of the tokens in tiles of 32
or 64, which the tensor memory accelerator puts into a ring in shared memory. The first warpgroup computes scores and weights, and
takes the left half of the rank into its accumulators; the second gets the weights through shared memory and takes the
right half. Every latent tile is read by the tensor cores where it lies, as keys and, transposed, as values.

The rank is held in chunks of 64 columns, so that any rank costs at most 63 columns of padding (zeros, by the accelerator).
Each half of the chunks is cut into two powers of two (5 = 4 + 1), since a tile's extent must be one.
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

from .hopper_pieces import (
    BLOCK_M,
    CHUNK,
    LN2,
    add,
    attend,
    capped,
    clean,
    part_slot,
    scaled,
    store,
    stretch,
    tile_range,
    times,
    zeros,
)


@gluon.jit
def _fetch(maps, rows, ready, rings, at, GROUPS: gl.constexpr, NR: gl.constexpr):
    """Issue the copies of one tile (or of the queries): every group of chunks of the latent, and the rotary part."""
    latent_maps, rope_map = maps
    row, rope_row = rows
    groups, ropes = rings
    first: gl.constexpr = [0, GROUPS[0], GROUPS[0] + GROUPS[1], GROUPS[0] + GROUPS[1] + GROUPS[2]]
    for g in gl.static_range(4):
        if GROUPS[g] > 0:
            tma.async_copy_global_to_shared(latent_maps[g], [row, first[g] * CHUNK], ready, groups[g].index(at))
    if NR > 0:
        RW: gl.constexpr = ropes.type.shape[2]
        for c in gl.static_range(NR):
            tma.async_copy_global_to_shared(rope_map, [rope_row, c * RW], ready, ropes.index(at * NR + c))


@gluon.jit
def _load_partition(
    tile_maps, query_maps, seen, block_table, tile_rings, query_rings, barriers, work, tokens, window, stride_tb, c_rows,
    k_rows, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, NR: gl.constexpr, RW: gl.constexpr, STAGES: gl.constexpr,
    PAGE: gl.constexpr, SPLITS: gl.constexpr, MASK: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Tiles of all stretches one after another, and the queries of each as soon as those before are done with."""
    full, empty, q_full, q_empty, p_full, p_empty = barriers
    b_first, b_stop, at, share_lo, share_hi, rows, first_row, worker = work
    columns: gl.constexpr = (GROUPS[0] + GROUPS[1] + GROUPS[2] + GROUPS[3]) * CHUNK + NR * RW
    count = 0
    sequences = 0
    for b in range(b_first, b_stop):
        begin, stop, first, last, _ = stretch(
            b, at, (share_lo, share_hi), seen, tokens, window, BLOCK_N, SPLITS, MASK, WINDOW
        )
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
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), columns * BLOCK_N * 2)
            place = (outer * c_rows + inner, outer * k_rows + inner)
            _fetch(tile_maps, place, full.index(stage), tile_rings, stage, GROUPS, NR)
            if tile == begin:
                mbarrier.wait(q_empty, (sequences & 1) ^ 1)
                mbarrier.expect(q_full, columns * BLOCK_M * 2)
                row = b * rows + first_row
                _fetch(query_maps, (row, row), q_full, query_rings, 0, GROUPS, NR)
                sequences += 1
            count += 1


@gluon.jit
def _weigh_partition(
    outputs, lses, seen, masking, tile_rings, query_rings, weights, factors, barriers, work, tokens, heads, window,
    scale_log2, softcap, strides,
    rank: gl.constexpr, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, NR: gl.constexpr, STAGES: gl.constexpr,
    SPLITS: gl.constexpr, MASK: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Scores, weights, and the left half of the rank."""
    lse, part_lse = lses
    mask, holes, stride_mb, stride_mt = masking
    groups, ropes = tile_rings
    queries, q_ropes = query_rings
    full, empty, q_full, q_empty, p_full, p_empty = barriers
    b_first, b_stop, at, share_lo, share_hi, rows, first_row, worker = work
    TWO: gl.constexpr = GROUPS[2] > 0
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, L))
    row_t = row // heads
    in_range = row < rows
    count = 0
    sequences = 0
    sent = 0
    for b in range(b_first, b_stop):
        begin, stop, first, last, length = stretch(
            b, at, (share_lo, share_hi), seen, tokens, window, BLOCK_N, SPLITS, MASK, WINDOW
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
            m = gl.full([BLOCK_M], -float("inf"), gl.float32, layout=gl.SliceLayout(1, L))
            l = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, L))
            accs = zeros(GROUPS[0], GROUPS[1])
            mbarrier.wait(q_full, sequences & 1)
            for tile in range(begin, stop):
                n0 = tile * BLOCK_N
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=L)
                for g in gl.static_range(4):
                    if GROUPS[g] > 0:
                        s = warpgroup_mma(
                            queries[g].index(0), groups[g].index(stage).permute([1, 0]), s, use_acc=g > 0, is_async=True
                        )
                if NR > 0:
                    for c in gl.static_range(NR):
                        s = warpgroup_mma(
                            q_ropes.index(c), ropes.index(stage * NR + c).permute([1, 0]), s, is_async=True
                        )
                s = warpgroup_mma_wait(0, deps=[s])
                if tile == stop - 1:
                    gl.thread_barrier()
                    mbarrier.arrive(q_empty, count=1)
                if SOFTCAP:
                    s = capped(s, scale_log2, softcap)
                if (n0 + BLOCK_N > bare_hi) | (n0 < bare_lo) | holed:
                    token = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, L))
                    visible = token[None, :] < limit[:, None]
                    if WINDOW or MASK:
                        visible = visible & (token[None, :] >= low[:, None])
                    if MASK:
                        if holed:
                            of_row = mask + b.to(gl.int64) * stride_mb + row_t * stride_mt
                            flag = gl.load(of_row[:, None] + token[None, :], mask=visible & in_range[:, None], other=0)
                            visible = visible & (flag != 0)
                    s = gl.where(visible, s, -float("inf"))
                    if n0 + BLOCK_N > length:
                        for g in gl.static_range(4):
                            if GROUPS[g] > 0:
                                clean(groups[g].index(stage), n0, length)
                peak = gl.max(s, 1)
                if not SOFTCAP:
                    peak = peak * scale_log2
                new = gl.maximum(m, peak)
                shift = gl.where(new == -float("inf"), 0.0, new)  # a row may have seen nothing yet: -inf - -inf is NaN
                alpha = gl.exp2(m - shift)
                if SOFTCAP:
                    p = gl.exp2(s - shift[:, None])
                else:
                    p = gl.exp2(s * scale_log2 - shift[:, None])
                m = new
                l = l * alpha + gl.sum(p, 1)
                half = p.to(weights.dtype)
                if TWO:
                    mbarrier.wait(p_empty, (sent & 1) ^ 1)
                    weights.store(half)
                    factors.store(alpha)
                fence_async_shared()
                gl.thread_barrier()
                if TWO:
                    mbarrier.arrive(p_full, count=1)
                    sent += 1
                accs = scaled(accs, alpha)
                operand = gl.convert_layout(half, gl.DotOperandLayout(0, accs[0].type.layout, 2))
                accs = attend(operand, groups, stage, accs, 0)
                gl.thread_barrier()  # all four warps are done with the tile
                mbarrier.arrive(empty.index(stage), count=1)
                count += 1
            sequences += 1

            inverse = 1.0 / gl.where(l > 0, l, 1.0)
            if TWO:
                mbarrier.wait(p_empty, (sent & 1) ^ 1)
                factors.store(inverse)
                gl.thread_barrier()
                mbarrier.arrive(p_full, count=1)
                sent += 1
            whole = (begin == first) & (stop == last)
            slot = part_slot(worker, begin, first, SPLITS)
            place = (b, slot, whole, first_row, rows, heads)
            store(outputs, strides, place, times(accs[0], inverse), rank, 0)
            if GROUPS[1] > 0:
                store(outputs, strides, place, times(accs[1], inverse), rank, GROUPS[0])
            lse2 = m + gl.log2(l)
            if whole:
                of_row = (b.to(gl.int64) * heads + row % heads) * tokens + row_t
                gl.store(lse + of_row, lse2 * LN2, mask=in_range)
            else:
                gl.store(part_lse + slot.to(gl.int64) * rows + row, lse2, mask=in_range)
        elif SPLITS > 0:  # a split that got no token
            nothing = gl.full([BLOCK_M], -float("inf"), gl.float32, layout=gl.SliceLayout(1, L))
            gl.store(part_lse + worker.to(gl.int64) * rows + row, nothing, mask=in_range)


@gluon.jit
def _attend_partition(
    outputs, seen, tile_rings, weights, factors, barriers, work, tokens, heads, window, strides,
    rank: gl.constexpr, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    MASK: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The right half of the rank."""
    groups, ropes = tile_rings
    full, empty, q_full, q_empty, p_full, p_empty = barriers
    b_first, b_stop, at, share_lo, share_hi, rows, first_row, worker = work
    count = 0
    got = 0
    for b in range(b_first, b_stop):
        begin, stop, first, last, length = stretch(
            b, at, (share_lo, share_hi), seen, tokens, window, BLOCK_N, SPLITS, MASK, WINDOW
        )
        at += last - first
        if begin < stop:
            accs = zeros(GROUPS[2], GROUPS[3])
            ROW: gl.constexpr = gl.SliceLayout(1, accs[0].type.layout)
            for tile in range(begin, stop):
                stage = count % STAGES
                mbarrier.wait(p_full, got & 1)
                alpha = factors.load(ROW)
                accs = attend(weights, groups, stage, scaled(accs, alpha), 2)
                gl.thread_barrier()
                mbarrier.arrive(p_empty, count=1)
                mbarrier.arrive(empty.index(stage), count=1)
                got += 1
                count += 1
            mbarrier.wait(p_full, got & 1)
            inverse = factors.load(ROW)
            gl.thread_barrier()
            mbarrier.arrive(p_empty, count=1)
            got += 1
            whole = (begin == first) & (stop == last)
            place = (b, part_slot(worker, begin, first, SPLITS), whole, first_row, rows, heads)
            store(outputs, strides, place, times(accs[0], inverse), rank, GROUPS[0] + GROUPS[1])
            if GROUPS[3] > 0:
                store(outputs, strides, place, times(accs[1], inverse), rank, GROUPS[0] + GROUPS[1] + GROUPS[2])


@gluon.jit(do_not_specialize=["batch", "tokens", "window", "workers", "min_tiles"])
def mla_decode_fwd_kernel_hopper(
    c0_map, c1_map, c2_map, c3_map, k_map, q0_map, q1_map, q2_map, q3_map, qr_map, lengths, starts, holes, mask,
    block_table, out, lse, part, part_lse,
    scale_log2, softcap, window, batch, tokens, heads, workers, min_tiles,
    stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt, c_rows, k_rows,
    rank: gl.constexpr, BATCH: gl.constexpr, BLOCK_N: gl.constexpr, GROUPS: gl.constexpr, NR: gl.constexpr, RW: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr,
    MASK: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (row blocks, workers). All tiles of all sequences, laid end to end, are shared out evenly among the workers.

    A worker leaves at most two partial results, in slot 2 w (the sequence began before its share) and 2 w + 1 (it goes on
    after it); `mla_decode_fwd_kernel_combine` knows which. With SPLITS, worker = sequence * SPLITS + split and so is the
    slot. Row blocks come first in the grid, so that those of one sequence run together and share the L2.
    """
    dtype: gl.constexpr = c0_map.dtype
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(RW * 2, 16, 2)
    TWO: gl.constexpr = GROUPS[2] > 0
    groups = ()
    queries = ()
    for g in gl.static_range(4):
        if GROUPS[g] > 0:
            groups = groups + (gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, GROUPS[g] * CHUNK], WIDE),)
            queries = queries + (gl.allocate_shared_memory(dtype, [1, BLOCK_M, GROUPS[g] * CHUNK], WIDE),)
        else:
            groups = groups + (groups[0],)
            queries = queries + (queries[0],)
    if NR > 0:
        ropes = gl.allocate_shared_memory(dtype, [STAGES * NR, BLOCK_N, RW], NARROW)
        q_ropes = gl.allocate_shared_memory(dtype, [NR, BLOCK_M, RW], NARROW)
    else:
        ropes = groups[0]
        q_ropes = queries[0]
    weights = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], gl.NVMMASharedLayout(BLOCK_N * 2, 16, 2))
    factors = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2 if TWO else 1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    fence_async_shared()

    worker = gl.program_id(1)
    if PDL:
        cuda.gdc_wait()  # queries and cache may come from the kernel before
        cuda.gdc_launch_dependents()
    if SPLITS > 0:
        b_first = worker // SPLITS
        b_stop = b_first + 1
        at = worker * 0
        share_lo = worker % SPLITS
        share_hi = share_lo
    else:
        ids = gl.arange(0, BATCH, layout=gl.BlockedLayout([1], [32], [4], [0]))
        length = gl.load(lengths + ids, mask=ids < batch, other=0)
        start = length * 0
        if MASK:
            start = gl.load(starts + ids, mask=ids < batch, other=0)
        first, last = tile_range(length, start, tokens, window, BLOCK_N, WINDOW)
        count = last - first
        ends = gl.associative_scan(count, 0, add)
        total = gl.sum(count, 0)
        active = gl.maximum(gl.minimum(workers, (total + min_tiles - 1) // min_tiles), 1)
        each = total // active  # the first few have one more
        more = total - each * active
        share_lo = worker * each + gl.minimum(worker, more)
        share_hi = share_lo + each + (worker < more).to(gl.int32)
        b_first = gl.sum(((ends <= share_lo) & (ids < batch)).to(gl.int32), 0)
        at = gl.sum(gl.where(ids == b_first, ends - count, 0), 0)  # first tile of the sequence among all
        b_stop = gl.sum((((ends - count) < share_hi) & (ids < batch)).to(gl.int32), 0)
        b_stop = gl.where(worker < active, b_stop, b_first)

    work = (b_first, b_stop, at, share_lo, share_hi, tokens * heads, gl.program_id(0) * BLOCK_M, worker)
    seen = (lengths, starts)
    tile_rings = (groups, ropes)
    query_rings = (queries, q_ropes)
    barriers = (full, empty, q_full, q_empty, p_full, p_empty)
    outputs = (out, part)
    lses = (lse, part_lse)
    masking = (mask, holes, stride_mb, stride_mt)
    strides = (stride_ob, stride_ot, stride_oh)
    tile_maps = ((c0_map, c1_map, c2_map, c3_map), k_map)
    query_maps = ((q0_map, q1_map, q2_map, q3_map), qr_map)
    if TWO:
        gl.warp_specialize(
            [
                (
                    _weigh_partition,
                    (outputs, lses, seen, masking, tile_rings, query_rings, weights, factors, barriers, work, tokens, heads,
                     window, scale_log2, softcap, strides, rank, BLOCK_N, GROUPS, NR, STAGES, SPLITS, MASK, WINDOW, SOFTCAP),
                ),
                (
                    _attend_partition,
                    (outputs, seen, tile_rings, weights, factors, barriers, work, tokens, heads, window, strides, rank,
                     BLOCK_N, GROUPS, STAGES, SPLITS, MASK, WINDOW),
                ),
                (
                    _load_partition,
                    (tile_maps, query_maps, seen, block_table, tile_rings, query_rings, barriers, work, tokens, window,
                     stride_tb, c_rows, k_rows, BLOCK_N, GROUPS, NR, RW, STAGES, PAGE, SPLITS, MASK, WINDOW),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _weigh_partition,
                    (outputs, lses, seen, masking, tile_rings, query_rings, weights, factors, barriers, work, tokens, heads,
                     window, scale_log2, softcap, strides, rank, BLOCK_N, GROUPS, NR, STAGES, SPLITS, MASK, WINDOW, SOFTCAP),
                ),
                (
                    _load_partition,
                    (tile_maps, query_maps, seen, block_table, tile_rings, query_rings, barriers, work, tokens, window,
                     stride_tb, c_rows, k_rows, BLOCK_N, GROUPS, NR, RW, STAGES, PAGE, SPLITS, MASK, WINDOW),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
