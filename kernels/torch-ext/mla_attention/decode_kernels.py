"""Triton kernels of `mla_decode`: split-KV attention over a latent cache, and the combination of the parts.

One program serves up to BLOCK_M query rows (a row is one head of one query token) of a sequence and walks over its cache in
tiles of BLOCK_N tokens; every latent tile is loaded once and used as keys and, transposed, as values. Softmax runs online
in base 2.

The rank is cut into two power-of-two chunks, R0 + R1, because the sides of a tile must be powers of two: 576 = 512 + 64
costs no padding, where 1024 would cost 78%.

On Hopper, the CUDA kernels of `hopper_decode.cu` replace these where they can serve.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile_range(length, start, tokens, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """First tile that any query of the sequence may see, and one past the last. For scalars and for vectors."""
    last = (length + (BLOCK_N - 1)) // BLOCK_N
    if WINDOW:
        start = tl.maximum(start, length - tokens - window + 1)
    return tl.minimum(start // BLOCK_N, last), last


@triton.jit
def _capped(scores, scale_log2, softcap, SOFTCAP: tl.constexpr):
    """Base-2 logits from raw dot products, with cap * tanh(x / cap) in between where SOFTCAP."""
    if SOFTCAP:
        x = scores * (scale_log2 / (LOG2E * softcap))
        e = tl.exp2(-2.0 * LOG2E * tl.abs(x))  # exp(-2|x|) cannot overflow
        t = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0, -t, t) * (softcap * LOG2E)
    return scores * scale_log2


@triton.jit
def _attend(
    c0, c1, kr, q0, q1, qr, m, l, acc0, acc1, n, limit, low, flags, scale_log2, softcap,
    R1: tl.constexpr, ROPE: tl.constexpr, LOW: tl.constexpr, GAPS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of tokens to the running maximum, sum and accumulators.

    c0 [N, R0], c1 [N, R1], kr [N, D]; q* [M, .]; m [M]; l [M, N] is the sum before its reduction over the tile's tokens:
    one reduction at the end saves an exchange between warps in every tile.
    """
    s = tl.dot(q0, tl.trans(c0), input_precision=PRECISION)
    if R1 > 0:
        s = tl.dot(q1, tl.trans(c1), s, input_precision=PRECISION)
    if ROPE > 0:
        s = tl.dot(qr, tl.trans(kr), s, input_precision=PRECISION)
    s = _capped(s, scale_log2, softcap, SOFTCAP)
    seen = n[None, :] < limit[:, None]
    if LOW:
        seen = seen & (n[None, :] >= low[:, None])
    if GAPS:
        flag = tl.load(flags[:, None] + n[None, :], mask=seen, other=0)
        seen = seen & (flag != 0)
    s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)  # a row may have seen nothing yet: -inf - -inf is NaN
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s - shift[:, None])
    l = l * alpha[:, None] + p
    p = p.to(c0.dtype)
    acc0 = tl.dot(p, c0, acc0 * alpha[:, None], input_precision=PRECISION)
    if R1 > 0:
        acc1 = tl.dot(p, c1, acc1 * alpha[:, None], input_precision=PRECISION)
    return new, l, acc0, acc1


@triton.jit
def _load_tile(
    cache, rope, table, b, n0, low, length, shown, stride_cb, stride_cn: tl.constexpr, stride_kb, stride_kn: tl.constexpr,
    rank: tl.constexpr, rope_dim: tl.constexpr, BLOCK_N: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """Tokens n0 .. n0 + BLOCK_N of a sequence through pointers: c0 [N, R0], c1 [N, R1], kr [N, D]; zeros for hidden ones.

    Never reads a token that no query sees (before `low`, past `length`, not `shown`), nor a block-table entry past `length`:
    either may hold anything, and a weight of zero does not remove a NaN.
    """
    i = tl.arange(0, BLOCK_N)
    n = n0 + i
    if PAGE == 0 or PAGE % BLOCK_N == 0:
        # The tile lies in one page, or in the sequence's rows of a contiguous cache.
        if PAGE == 0:
            outer = b.to(tl.int64)
            inner = n0.to(tl.int64)
        else:
            outer = tl.load(table + n0 // PAGE).to(tl.int64)
            inner = (n0 % PAGE).to(tl.int64)
        c_row = cache + outer * stride_cb + inner * stride_cn + i[:, None] * stride_cn
        k_row = rope + outer * stride_kb + inner * stride_kn + i[:, None] * stride_kn
    else:
        pages = tl.load(table + n // PAGE, mask=n < length, other=0).to(tl.int64)
        within = (n % PAGE).to(tl.int64)
        c_row = cache + (pages * stride_cb + within * stride_cn)[:, None]
        k_row = rope + (pages * stride_kb + within * stride_kn)[:, None]
    seen = (n >= low) & (n < length)
    if GAPS:
        seen = seen & (tl.load(shown + n, mask=seen, other=0) != 0)
    there = seen[:, None]
    c0 = tl.load(c_row + tl.arange(0, R0)[None, :], mask=there, other=0.0)
    c1 = c0
    if R1 > 0:
        r1 = R0 + tl.arange(0, R1)
        c1 = tl.load(c_row + r1[None, :], mask=there & (r1[None, :] < rank), other=0.0)
    kr = c0
    if ROPE > 0:
        d = tl.arange(0, ROPE)
        kr = tl.load(k_row + d[None, :], mask=there & (d[None, :] < rope_dim), other=0.0)
    return c0, c1, kr


@triton.jit
def _load_query(pointer, stride_t, stride_h, row_t, row_h, in_range, start: tl.constexpr, width, PADDED: tl.constexpr):
    """Query rows, [M, PADDED], zeros beyond the rows and beyond `width` columns in all."""
    d = start + tl.arange(0, PADDED)
    offset = row_t[:, None] * stride_t + row_h[:, None] * stride_h + d[None, :]
    return tl.load(pointer + offset, mask=in_range[:, None] & (d[None, :] < width), other=0.0)


@triton.jit
def _store_rows(pointer, row_offset, in_range, acc, start: tl.constexpr, width, PADDED: tl.constexpr):
    """Accumulator [M, PADDED] to rows of `width` numbers."""
    d = start + tl.arange(0, PADDED)
    to = pointer + row_offset[:, None] + d[None, :]
    tl.store(to, acc.to(pointer.dtype.element_ty), mask=in_range[:, None] & (d[None, :] < width))


# If Triton 3.6 knows that the rows of a mask are aligned, it chooses a layout that it cannot lower with float32 products.
@triton.jit(do_not_specialize=["tokens", "window", "stride_mb", "stride_mt", "stride_ab"])
def mla_decode_fwd_kernel_split(
    q_latent, q_rope, cache, rope, lengths, starts, has_gaps, mask, any_mask, block_table, out, lse, part, part_lse,
    scale_log2, softcap, window, tokens, heads,
    stride_qb, stride_qt, stride_qh, stride_rb, stride_rt, stride_rh, stride_cb, stride_kb,
    stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt, stride_ab,
    stride_cn: tl.constexpr, stride_kn: tl.constexpr,
    rank: tl.constexpr, rope_dim: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, sequences * SPLITS). Row blocks come first, so that those of a sequence run together and share the L2.

    Program (., sequence * SPLITS + split) writes its part to that slot, or to the output if the part is the whole sequence.
    """
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()  # queries and cache may come from the kernel before
        gdc_launch_dependents()
    b = slot // SPLITS
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_t = row // heads
    row_h = row % heads
    rows = tokens * heads
    in_range = row < rows
    length = tl.load(lengths + b)
    start = length * 0
    gaps = False
    if MASK:
        start = tl.load(starts + b)
        gaps = tl.load(has_gaps + b) != 0
    first, last = _tile_range(length, start, tokens, window, BLOCK_N, WINDOW)
    share = (last - first + SPLITS - 1) // SPLITS
    begin = tl.minimum(first + slot % SPLITS * share, last)
    stop = tl.minimum(begin + share, last)
    whole = (begin == first) & (stop == last)
    if (begin < stop) | whole:
        qb = q_latent + b.to(tl.int64) * stride_qb
        q0 = _load_query(qb, stride_qt, stride_qh, row_t, row_h, in_range, 0, rank, R0)
        q1 = q0
        if R1 > 0:
            q1 = _load_query(qb, stride_qt, stride_qh, row_t, row_h, in_range, R0, rank, R1)
        qr = q0
        if ROPE > 0:
            rb = q_rope + b.to(tl.int64) * stride_rb
            qr = _load_query(rb, stride_rt, stride_rh, row_t, row_h, in_range, 0, rope_dim, ROPE)
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc0 = tl.zeros([BLOCK_M, R0], tl.float32)
        acc1 = m
        if R1 > 0:
            acc1 = tl.zeros([BLOCK_M, R1], tl.float32)
        limit = length - tokens + row_t + 1  # one past the last token that the row sees
        low = limit - limit
        if WINDOW:
            low = limit - window
        if MASK:
            low = tl.maximum(low, start)
            if gaps:  # the mask alone defines what each query sees
                limit = limit - limit + length
        lowest = start  # of all the queries of the sequence
        if WINDOW:
            lowest = tl.maximum(start, length - tokens - window + 1)
        shown = any_mask + b.to(tl.int64) * stride_ab
        flags = mask + b.to(tl.int64) * stride_mb + tl.minimum(row_t, tokens - 1) * stride_mt
        table = block_table + b.to(tl.int64) * stride_tb
        # With gaps, the load of a tile waits for the load of the mask; tiles of sequences without gaps do not.
        last_plain = stop
        if MASK:
            if gaps:
                last_plain = begin
        for tile in tl.range(begin, last_plain, num_stages=STAGES):
            n0 = tl.cast(tile * BLOCK_N, tl.int32)
            c0, c1, kr = _load_tile(
                cache, rope, table, b, n0, lowest, length, shown, stride_cb, stride_cn, stride_kb, stride_kn, rank, rope_dim,
                BLOCK_N, R0, R1, ROPE, PAGE, False,
            )  # fmt: skip
            m, l, acc0, acc1 = _attend(
                c0, c1, kr, q0, q1, qr, m, l, acc0, acc1, n0 + tl.arange(0, BLOCK_N), limit, low, flags,
                scale_log2, softcap, R1, ROPE, WINDOW or MASK, False, SOFTCAP, PRECISION,
            )  # fmt: skip
        if MASK:
            for tile in tl.range(last_plain, stop, num_stages=STAGES):
                n0 = tl.cast(tile * BLOCK_N, tl.int32)
                c0, c1, kr = _load_tile(
                    cache, rope, table, b, n0, lowest, length, shown, stride_cb, stride_cn, stride_kb, stride_kn, rank, rope_dim,
                    BLOCK_N, R0, R1, ROPE, PAGE, True,
                )  # fmt: skip
                m, l, acc0, acc1 = _attend(
                    c0, c1, kr, q0, q1, qr, m, l, acc0, acc1, n0 + tl.arange(0, BLOCK_N), limit, low, flags,
                    scale_log2, softcap, R1, ROPE, True, True, SOFTCAP, PRECISION,
                )  # fmt: skip

        total_l = tl.sum(l, 1)
        inverse = 1.0 / tl.where(total_l > 0, total_l, 1.0)
        acc0 = acc0 * inverse[:, None]
        if R1 > 0:
            acc1 = acc1 * inverse[:, None]
        lse2 = m + tl.log2(total_l)
        if whole:
            offset = row_t * stride_ot + row_h * stride_oh
            ob = out + b.to(tl.int64) * stride_ob
            _store_rows(ob, offset, in_range, acc0, 0, rank, R0)
            if R1 > 0:
                _store_rows(ob, offset, in_range, acc1, R0, rank, R1)
            tl.store(lse + (b.to(tl.int64) * heads + row_h) * tokens + row_t, lse2 * LN2, mask=in_range)
        else:
            pb = part + slot.to(tl.int64) * rows * rank
            _store_rows(pb, row * rank, in_range, acc0, 0, rank, R0)
            if R1 > 0:
                _store_rows(pb, row * rank, in_range, acc1, R0, rank, R1)
            tl.store(part_lse + slot.to(tl.int64) * rows + row, lse2, mask=in_range)
    else:  # a split without a token
        nothing = tl.full([BLOCK_M], -float("inf"), tl.float32)
        tl.store(part_lse + slot.to(tl.int64) * rows + row, nothing, mask=in_range)


@triton.jit(do_not_specialize=["tokens", "window"])
def mla_decode_fwd_kernel_combine(
    part, part_lse, lengths, starts, out, lse, window, tokens, heads, rank, stride_ob, stride_ot, stride_oh,
    BLOCK_N: tl.constexpr, RANK_CHUNK: tl.constexpr, PARTS: tl.constexpr, PART_CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weighted mean of the parts of one row of one sequence. Grid (sequences * rows, chunks of the rank)."""
    rows = tokens * heads
    b = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    length = tl.load(lengths + b)
    start = length * 0
    if MASK:
        start = tl.load(starts + b)
    first, last = _tile_range(length, start, tokens, window, BLOCK_N, WINDOW)
    written = (last - first + SPLITS - 1) // SPLITS >= last - first  # the first split was the whole
    if PDL:
        gdc_wait()
    d = tl.program_id(1) * RANK_CHUNK + tl.arange(0, RANK_CHUNK)
    to = out + b.to(tl.int64) * stride_ob + (row // heads) * stride_ot + (row % heads) * stride_oh + d
    to_lse = lse + (b.to(tl.int64) * heads + row % heads) * tokens + row // heads
    if last == first:
        tl.store(to, tl.zeros([RANK_CHUNK], out.dtype.element_ty), mask=d < rank)
        tl.store(to_lse, -float("inf"))
    elif not written:
        j = tl.arange(0, PARTS)
        slot = b * SPLITS + j
        lse2 = tl.load(part_lse + slot.to(tl.int64) * rows + row, mask=j < SPLITS, other=-float("inf"))
        peak = tl.max(lse2, 0)
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        lse2 = shift + tl.log2(tl.sum(tl.exp2(lse2 - shift), 0))
        finite = tl.where(lse2 == -float("inf"), 0.0, lse2)
        acc = tl.zeros([RANK_CHUNK], tl.float32)
        for i0 in range(0, SPLITS, PART_CHUNK):
            i = i0 + tl.arange(0, PART_CHUNK)
            at_row = (b * SPLITS + i).to(tl.int64) * rows + row
            weight = tl.exp2(tl.load(part_lse + at_row, mask=i < SPLITS, other=-float("inf")) - finite)
            # A part of weight zero may never have been written.
            value = tl.load(
                part + at_row[:, None] * rank + d[None, :], mask=(weight > 0)[:, None] & (d < rank)[None, :], other=0.0
            )
            acc += tl.sum(value * weight[:, None], 0)
        tl.store(to, acc.to(out.dtype.element_ty), mask=d < rank)
        tl.store(to_lse, lse2 * LN2)
