"""Triton kernel of `mla_decode` on packed rows (`rows.py`): split-KV attention, dequantised in registers.

The plan is that of `decode_kernels.py`. A tile's codes become float16 and are multiplied by their scales once, then serve as
keys and as values. The channels of low and of high nibbles are operands of their own, so that nothing is interleaved.

A section is cut into two power-of-two chunks, as the rank is there: A0 + A1 channels of 8 bits, B0 + B1 bytes of two nibbles.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_kernels import LN2, _capped, _load_query, _store_rows, _tile_range


@triton.jit
def _float8(x, HARDWARE: tl.constexpr):
    """e4m3 bytes as float16."""
    if HARDWARE > 1:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    # The exponent's bias is 7 and not 15: sign, exponent and mantissa in place, times 2^8. NaN becomes 480.
    wide = x.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _int8(x, HARDWARE: tl.constexpr):
    """Two's complement bytes as float16: 1024 + code + 128 has the code in its mantissa."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, k;
            xor.b32 u, $2, 0x80808080;
            mov.b32 k, 0x64806480;
            prmt.b32 $0, u, 0x64646464, 0x4140;
            prmt.b32 $1, u, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, k;
            sub.f16x2 $1, $1, k;
            }""",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return x.to(tl.int8, bitcast=True).to(tl.float16)


@triton.jit
def _nibbles(x, HARDWARE: tl.constexpr):
    """Low and high nibbles of bytes, minus 8, as float16: 1024 + nibble, and 1024 + 16 nibble, have them in the mantissa."""
    if HARDWARE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t0, t1, m, k, f, g;
            prmt.b32 t0, $4, 0, 0x4140;
            prmt.b32 t1, $4, 0, 0x4342;
            mov.b32 m, 0x64006400;
            mov.b32 k, 0x64086408;
            mov.b32 f, 0x2c002c00;
            mov.b32 g, 0xd480d480;
            lop3.b32 $0, t0, 0x000f000f, m, 0xea;
            lop3.b32 $1, t1, 0x000f000f, m, 0xea;
            lop3.b32 $2, t0, 0x00f000f0, m, 0xea;
            lop3.b32 $3, t1, 0x00f000f0, m, 0xea;
            sub.f16x2 $0, $0, k;
            sub.f16x2 $1, $1, k;
            fma.rn.f16x2 $2, $2, f, g;
            fma.rn.f16x2 $3, $3, f, g;
            }""",
            "=&r,=&r,=&r,=&r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
        return low, high
    low = (x & 15).to(tl.int8).to(tl.float16) - 8.0
    high = (x >> 4).to(tl.int8).to(tl.float16) - 8.0
    return low, high


@triton.jit
def _scaled(
    codes, scales, there, start: tl.constexpr, channels: tl.constexpr, first: tl.constexpr, GROUP: tl.constexpr,
    PADDED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Codes [N, PADDED] of channels start .. of a section of `channels`, times their scales, whose first is number `first`.

    scales: pointers [N, 1] to the scales of the rows.
    """
    rows: tl.constexpr = codes.shape[0]
    if GROUP == 0 or (start // GROUP == (start + PADDED - 1) // GROUP) or channels <= GROUP:
        at: tl.constexpr = 0 if GROUP == 0 else start // GROUP
        scale = tl.load(scales + first + at, mask=there, other=0.0)
    elif start % GROUP == 0 and PADDED % GROUP == 0 and (GROUP & (GROUP - 1)) == 0:
        group = start // GROUP + tl.arange(0, PADDED // GROUP)
        some = there & (group * GROUP < channels)[None, :]
        few = tl.load(scales + first + group[None, :], mask=some, other=0.0)
        scale = tl.broadcast_to(few[:, :, None], (rows, PADDED // GROUP, GROUP)).reshape(rows, PADDED)
    else:
        channel = start + tl.arange(0, PADDED)
        scale = tl.load(
            scales + first + (channel // GROUP)[None, :], mask=there & (channel < channels)[None, :], other=0.0
        )
    return codes.to(DOT) * scale.to(DOT)


@triton.jit
def _bytes(row, there, at: tl.constexpr, start: tl.constexpr, width: tl.constexpr, PADDED: tl.constexpr):
    """Bytes start .. of a section of `width` bytes at offset `at`: [N, PADDED], zeros past its end and in hidden rows."""
    d = start + tl.arange(0, PADDED)
    return tl.load(row + at + d[None, :], mask=there & (d < width)[None, :], other=0)


@triton.jit
def _eight(x, FLOAT8: tl.constexpr, HARDWARE: tl.constexpr):
    if FLOAT8:
        return _float8(x, HARDWARE)
    return _int8(x, HARDWARE)


@triton.jit
def _offsets(
    table, b, n0, low, length, shown, stride_b, stride_n: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    GAPS: tl.constexpr,
):  # fmt: skip
    """Offsets [N, 1] in bytes of the rows of tokens n0 .., and which of them some query sees; hidden ones are never read."""
    i = tl.arange(0, BLOCK_N)
    n = n0 + i
    if PAGE == 0 or PAGE % BLOCK_N == 0:
        if PAGE == 0:
            outer = b.to(tl.int64)
            inner = n0.to(tl.int64)
        else:
            outer = tl.load(table + n0 // PAGE).to(tl.int64)
            inner = (n0 % PAGE).to(tl.int64)
        offset = outer * stride_b + inner * stride_n + i[:, None] * stride_n
    else:
        pages = tl.load(table + n // PAGE, mask=n < length, other=0).to(tl.int64)
        offset = (pages * stride_b + (n % PAGE).to(tl.int64) * stride_n)[:, None]
    seen = (n >= low) & (n < length)
    if GAPS:
        seen = seen & (tl.load(shown + n, mask=seen, other=0) != 0)
    return offset, seen[:, None]


@triton.jit
def _packed_tile(
    rows, halves, keys, offset, there, qa0, qa1, ql0, ql1, qh0, qh1, qr, m, l, a0, a1, l0, l1, h0, h1, n, limit, low, flags,
    scale_log2, softcap, rank: tl.constexpr, rope_dim: tl.constexpr, WIDE: tl.constexpr, FLOAT8: tl.constexpr,
    GROUP: tl.constexpr, ROPE8: tl.constexpr, CODES4: tl.constexpr, ROPE_AT: tl.constexpr, SCALES: tl.constexpr,
    GROUPS8: tl.constexpr, GROUPS: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    ROPE: tl.constexpr, LOW: tl.constexpr, GAPS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add one tile of tokens to the running maximum, sum and accumulators. `rows`, `halves` and `keys` are one buffer."""
    row = rows + offset
    scales = halves + offset // 2 + SCALES // 2
    narrow: tl.constexpr = rank - WIDE
    half: tl.constexpr = narrow // 2
    s = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
    if A0 > 0:
        c0 = _eight(_bytes(row, there, 0, 0, WIDE, A0), FLOAT8, HARDWARE)
        c0 = _scaled(c0, scales, there, 0, WIDE, 0, GROUP, A0, DOT)
        s = tl.dot(qa0, tl.trans(c0), s, input_precision=PRECISION)
    if A1 > 0:
        c1 = _eight(_bytes(row, there, 0, A0, WIDE, A1), FLOAT8, HARDWARE)
        c1 = _scaled(c1, scales, there, A0, WIDE, 0, GROUP, A1, DOT)
        s = tl.dot(qa1, tl.trans(c1), s, input_precision=PRECISION)
    if B0 > 0:
        u0, v0 = _nibbles(_bytes(row, there, CODES4, 0, half, B0), HARDWARE)
        u0 = _scaled(u0, scales, there, 0, narrow, GROUPS8, GROUP, B0, DOT)
        v0 = _scaled(v0, scales, there, half, narrow, GROUPS8, GROUP, B0, DOT)
        s = tl.dot(ql0, tl.trans(u0), s, input_precision=PRECISION)
        s = tl.dot(qh0, tl.trans(v0), s, input_precision=PRECISION)
    if B1 > 0:
        u1, v1 = _nibbles(_bytes(row, there, CODES4, B0, half, B1), HARDWARE)
        u1 = _scaled(u1, scales, there, B0, narrow, GROUPS8, GROUP, B1, DOT)
        v1 = _scaled(v1, scales, there, half + B0, narrow, GROUPS8, GROUP, B1, DOT)
        s = tl.dot(ql1, tl.trans(u1), s, input_precision=PRECISION)
        s = tl.dot(qh1, tl.trans(v1), s, input_precision=PRECISION)
    if ROPE > 0:
        if ROPE8:
            key = _float8(_bytes(row, there, ROPE_AT, 0, rope_dim, ROPE), HARDWARE)
            scale = tl.load(scales + GROUPS, mask=there, other=0.0)
            key = (key.to(DOT) * scale.to(DOT)).to(qr.dtype)
        else:
            d = tl.arange(0, ROPE)
            key = tl.load(
                keys + offset // 2 + ROPE_AT // 2 + d[None, :], mask=there & (d < rope_dim)[None, :], other=0.0
            ).to(qr.dtype)
        s = tl.dot(qr, tl.trans(key), s, input_precision=PRECISION)
    s = _capped(s, scale_log2[:, None], softcap, SOFTCAP)
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
    p = p.to(DOT)
    if A0 > 0:
        a0 = tl.dot(p, c0, a0 * alpha[:, None], input_precision=PRECISION)
    if A1 > 0:
        a1 = tl.dot(p, c1, a1 * alpha[:, None], input_precision=PRECISION)
    if B0 > 0:
        l0 = tl.dot(p, u0, l0 * alpha[:, None], input_precision=PRECISION)
        h0 = tl.dot(p, v0, h0 * alpha[:, None], input_precision=PRECISION)
    if B1 > 0:
        l1 = tl.dot(p, u1, l1 * alpha[:, None], input_precision=PRECISION)
        h1 = tl.dot(p, v1, h1 * alpha[:, None], input_precision=PRECISION)
    return new, l, a0, a1, l0, l1, h0, h1


@triton.jit
def _store_pieces(
    pointer, offset, in_range, a0, a1, l0, l1, h0, h1, inverse, rank: tl.constexpr, WIDE: tl.constexpr, A0: tl.constexpr,
    A1: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """All accumulators, times a factor a row, to rows of `rank` numbers."""
    half: tl.constexpr = (rank - WIDE) // 2
    if A0 > 0:
        _store_rows(pointer, offset, in_range, a0 * inverse, 0, WIDE, A0)
    if A1 > 0:
        _store_rows(pointer, offset, in_range, a1 * inverse, A0, WIDE, A1)
    if B0 > 0:
        _store_rows(pointer + WIDE, offset, in_range, l0 * inverse, 0, half, B0)
        _store_rows(pointer + WIDE + half, offset, in_range, h0 * inverse, 0, half, B0)
    if B1 > 0:
        _store_rows(pointer + WIDE, offset, in_range, l1 * inverse, B0, half, B1)
        _store_rows(pointer + WIDE + half, offset, in_range, h1 * inverse, B0, half, B1)


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x.to(tl.float32)), 1)


@triton.jit
def _times(x, factor, DTYPE: tl.constexpr):
    return (x.to(tl.float32) * factor[:, None]).to(DTYPE)


@triton.jit(do_not_specialize=["tokens", "window", "stride_mb", "stride_mt", "stride_ab"])
def mla_decode_packed_kernel_split(
    q_latent, q_rope, rows, halves, keys, lengths, starts, has_gaps, mask, any_mask, block_table, out, lse, part, part_lse,
    scale_log2, softcap, window, tokens, heads,
    stride_qb, stride_qt, stride_qh, stride_rb, stride_rt, stride_rh, stride_cb,
    stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt, stride_ab,
    stride_cn: tl.constexpr, rank: tl.constexpr, rope_dim: tl.constexpr, WIDE: tl.constexpr, FLOAT8: tl.constexpr,
    GROUP: tl.constexpr, ROPE8: tl.constexpr, CODES4: tl.constexpr, ROPE_AT: tl.constexpr, SCALES: tl.constexpr,
    GROUPS8: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HARDWARE: tl.constexpr, DOT: tl.constexpr, NORMALISE: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid and slots as in `mla_decode_fwd_kernel_split`.

    HARDWARE: 2, the card converts e4m3 and is programmed in PTX; 1, it is programmed in PTX; 0, neither.
    NORMALISE: queries are bfloat16 and products float16: a power of two a row brings its largest number to 8 .. 16.
    """
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b = slot // SPLITS
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_t = row // heads
    row_h = row % heads
    count = tokens * heads
    in_range = row < count
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
        half: tl.constexpr = (rank - WIDE) // 2
        qb = q_latent + b.to(tl.int64) * stride_qb
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        largest = m
        qa0 = m
        qa1 = m
        ql0 = m
        ql1 = m
        qh0 = m
        qh1 = m
        qr = m
        a0 = m
        a1 = m
        l0 = m
        l1 = m
        h0 = m
        h1 = m
        if A0 > 0:
            qa0 = _load_query(qb, stride_qt, stride_qh, row_t, row_h, in_range, 0, WIDE, A0)
            a0 = tl.zeros([BLOCK_M, A0], tl.float32)
            largest = tl.maximum(largest, _largest(qa0))
        if A1 > 0:
            qa1 = _load_query(qb, stride_qt, stride_qh, row_t, row_h, in_range, A0, WIDE, A1)
            a1 = tl.zeros([BLOCK_M, A1], tl.float32)
            largest = tl.maximum(largest, _largest(qa1))
        if B0 > 0:
            ql0 = _load_query(qb + WIDE, stride_qt, stride_qh, row_t, row_h, in_range, 0, half, B0)
            qh0 = _load_query(qb + WIDE + half, stride_qt, stride_qh, row_t, row_h, in_range, 0, half, B0)
            l0 = tl.zeros([BLOCK_M, B0], tl.float32)
            h0 = tl.zeros([BLOCK_M, B0], tl.float32)
            largest = tl.maximum(largest, tl.maximum(_largest(ql0), _largest(qh0)))
        if B1 > 0:
            ql1 = _load_query(qb + WIDE, stride_qt, stride_qh, row_t, row_h, in_range, B0, half, B1)
            qh1 = _load_query(qb + WIDE + half, stride_qt, stride_qh, row_t, row_h, in_range, B0, half, B1)
            l1 = tl.zeros([BLOCK_M, B1], tl.float32)
            h1 = tl.zeros([BLOCK_M, B1], tl.float32)
            largest = tl.maximum(largest, tl.maximum(_largest(ql1), _largest(qh1)))
        if ROPE > 0:
            rb = q_rope + b.to(tl.int64) * stride_rb
            qr = _load_query(rb, stride_rt, stride_rh, row_t, row_h, in_range, 0, rope_dim, ROPE)
            largest = tl.maximum(largest, _largest(qr))
        row_scale = tl.zeros([BLOCK_M], tl.float32) + scale_log2
        if NORMALISE:
            exponent = tl.where(largest > 0, tl.floor(tl.log2(tl.where(largest > 0, largest, 1.0))), 3.0)
            exponent = tl.minimum(tl.maximum(exponent, -100.0), 100.0)
            factor = tl.exp2(3.0 - exponent)
            row_scale = row_scale / factor
            if A0 > 0:
                qa0 = _times(qa0, factor, DOT)
            if A1 > 0:
                qa1 = _times(qa1, factor, DOT)
            if B0 > 0:
                ql0 = _times(ql0, factor, DOT)
                qh0 = _times(qh0, factor, DOT)
            if B1 > 0:
                ql1 = _times(ql1, factor, DOT)
                qh1 = _times(qh1, factor, DOT)
            if ROPE > 0:
                # keys in bfloat16 meet queries in bfloat16, which a power of two does not round
                qr = _times(qr, factor, DOT if ROPE8 else tl.bfloat16)
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
        last_plain = stop
        if MASK:
            if gaps:
                last_plain = begin
        for tile in tl.range(begin, last_plain, num_stages=STAGES):
            n0 = tl.cast(tile * BLOCK_N, tl.int32)
            offset, there = _offsets(table, b, n0, lowest, length, shown, stride_cb, stride_cn, BLOCK_N, PAGE, False)
            m, l, a0, a1, l0, l1, h0, h1 = _packed_tile(
                rows, halves, keys, offset, there, qa0, qa1, ql0, ql1, qh0, qh1, qr, m, l, a0, a1, l0, l1, h0, h1,
                n0 + tl.arange(0, BLOCK_N), limit, low, flags, row_scale, softcap, rank, rope_dim, WIDE, FLOAT8, GROUP,
                ROPE8, CODES4, ROPE_AT, SCALES, GROUPS8, GROUPS, A0, A1, B0, B1, ROPE, WINDOW or MASK, False, SOFTCAP,
                PRECISION, HARDWARE, DOT,
            )  # fmt: skip
        if MASK:
            for tile in tl.range(last_plain, stop, num_stages=STAGES):
                n0 = tl.cast(tile * BLOCK_N, tl.int32)
                offset, there = _offsets(table, b, n0, lowest, length, shown, stride_cb, stride_cn, BLOCK_N, PAGE, True)
                m, l, a0, a1, l0, l1, h0, h1 = _packed_tile(
                    rows, halves, keys, offset, there, qa0, qa1, ql0, ql1, qh0, qh1, qr, m, l, a0, a1, l0, l1, h0, h1,
                    n0 + tl.arange(0, BLOCK_N), limit, low, flags, row_scale, softcap, rank, rope_dim, WIDE, FLOAT8, GROUP,
                    ROPE8, CODES4, ROPE_AT, SCALES, GROUPS8, GROUPS, A0, A1, B0, B1, ROPE, True, True, SOFTCAP,
                    PRECISION, HARDWARE, DOT,
                )  # fmt: skip

        total_l = tl.sum(l, 1)
        inverse = (1.0 / tl.where(total_l > 0, total_l, 1.0))[:, None]
        lse2 = m + tl.log2(total_l)
        if whole:
            ob = out + b.to(tl.int64) * stride_ob
            _store_pieces(ob, row_t * stride_ot + row_h * stride_oh, in_range, a0, a1, l0, l1, h0, h1, inverse, rank, WIDE,
                          A0, A1, B0, B1)  # fmt: skip
            tl.store(lse + (b.to(tl.int64) * heads + row_h) * tokens + row_t, lse2 * LN2, mask=in_range)
        else:
            pb = part + slot.to(tl.int64) * count * rank
            _store_pieces(pb, row * rank, in_range, a0, a1, l0, l1, h0, h1, inverse, rank, WIDE, A0, A1, B0, B1)
            tl.store(part_lse + slot.to(tl.int64) * count + row, lse2, mask=in_range)
    else:  # a split without a token
        nothing = tl.full([BLOCK_M], -float("inf"), tl.float32)
        tl.store(part_lse + slot.to(tl.int64) * count + row, nothing, mask=in_range)
