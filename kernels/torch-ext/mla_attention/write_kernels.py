"""Triton kernel of `mla_write`: RoPE of new keys and queries, and the append to the caches, in one launch."""

import triton
import triton.language as tl

from .rows import FACTORS4

# A group's number of largest magnitude times these are the scales that are tried for 4 bits.
FIRST4: tl.constexpr = tl.constexpr(FACTORS4[0] / -8)
SECOND4: tl.constexpr = tl.constexpr(FACTORS4[1] / -8)
THIRD4: tl.constexpr = tl.constexpr(FACTORS4[2] / -8)


@triton.jit
def _rotate_queries(
    q_rope, query, b, t, block, c, s, heads, planes, m, stride_qb, stride_qt, stride_qh, stride_yb, stride_yt, stride_yh,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate the queries of HEADS heads of one token; block 0 is not of heads."""
    h = (block - 1) * HEADS + tl.arange(0, HEADS)
    in_range = (h < heads)[:, None] & (m < planes)[None, :]
    x = q_rope + b * stride_qb + t * stride_qt + h[:, None] * stride_qh + m[None, :]
    real = tl.load(x, mask=in_range, other=0.0).to(tl.float32)
    imag = tl.load(x + planes, mask=in_range, other=0.0).to(tl.float32)
    y = query + b * stride_yb + t * stride_yt + h[:, None] * stride_yh + m[None, :]
    tl.store(y, (real * c[None, :] - imag * s[None, :]).to(query.dtype.element_ty), mask=in_range)
    tl.store(y + planes, (imag * c[None, :] + real * s[None, :]).to(query.dtype.element_ty), mask=in_range)


@triton.jit
def mla_write_fwd_kernel(
    latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table, query,
    tokens, heads, rank, planes,
    stride_lb, stride_lt, stride_kb, stride_kt, stride_qb, stride_qt, stride_qh, stride_ab, stride_at, stride_zb,
    stride_zt, stride_cb, stride_cn, stride_rb, stride_rn, stride_tb, stride_pb, stride_pt, stride_yb, stride_yt,
    stride_yh,
    RANK: tl.constexpr, PLANES: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * tokens, 1 + head blocks): program (., 0) writes the caches, every other one rotates HEADS queries."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = tl.program_id(0) % tokens
    block = tl.program_id(1)
    m = tl.arange(0, PLANES)
    in_planes = m < planes
    c = tl.load(cos + b * stride_ab + t * stride_at + m, mask=in_planes, other=0.0).to(tl.float32)
    s = tl.load(sin + b * stride_zb + t * stride_zt + m, mask=in_planes, other=0.0).to(tl.float32)
    if block == 0:
        position = tl.load(positions + b * stride_pb + t * stride_pt)
        if position >= 0:
            if PAGE == 0:
                outer = b
                inner = position.to(tl.int64)
            else:
                outer = tl.load(block_table + b * stride_tb + position // PAGE).to(tl.int64)
                inner = (position % PAGE).to(tl.int64)
            r = tl.arange(0, RANK)
            row = tl.load(latent + b * stride_lb + t * stride_lt + r, mask=r < rank, other=0.0)
            tl.store(
                latent_cache + outer * stride_cb + inner * stride_cn + r,
                row.to(latent_cache.dtype.element_ty),
                mask=r < rank,
            )
            x = k_rope + b * stride_kb + t * stride_kt + m
            real = tl.load(x, mask=in_planes, other=0.0).to(tl.float32)
            imag = tl.load(x + planes, mask=in_planes, other=0.0).to(tl.float32)
            y = rope_cache + outer * stride_rb + inner * stride_rn + m
            tl.store(y, (real * c - imag * s).to(rope_cache.dtype.element_ty), mask=in_planes)
            tl.store(y + planes, (imag * c + real * s).to(rope_cache.dtype.element_ty), mask=in_planes)
    else:
        _rotate_queries(
            q_rope, query, b, t, block, c, s, heads, planes, m, stride_qb, stride_qt, stride_qh, stride_yb, stride_yt,
            stride_yh, HEADS,
        )  # fmt: skip


@triton.jit
def _round(x):
    """Nearest whole number, ties to even, of |x| < 2^22: the sum has no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _as_stored(scale):
    return tl.minimum(tl.maximum(scale, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def _scale(x, DIVISOR: tl.constexpr, axis: tl.constexpr):
    """Scale of groups of 8-bit codes, rounded to float16."""
    largest = tl.maximum(tl.max(x, axis), -tl.min(x, axis))
    return _as_stored(tl.div_rn(largest, largest * 0.0 + DIVISOR))


@triton.jit
def _steps(x, scale):
    """x / scale, and 0 for a scale of 0."""
    scale = scale.to(tl.float32)
    return tl.where(scale == 0.0, 0.0, tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)))


@triton.jit
def _code4(x, scale):
    """Codes -8 .. 7 of numbers, as float32."""
    return tl.minimum(tl.maximum(_round(_steps(x, scale)), -8.0), 7.0)


@triton.jit
def _error4(x, scale):
    """Squared error of groups [G, J] in 4 bits, by their scales [G]."""
    scale = scale[:, None]
    error = _code4(x, scale) * scale.to(tl.float32) - x
    return tl.sum(error * error, 1)


@triton.jit
def _scale4(x):
    """Scales [G] of groups [G, J] of 4-bit codes: of least squared error among the largest and two fractions of it."""
    low = tl.min(x, 1)
    high = tl.max(x, 1)
    largest = tl.where(high >= -low, high, low)
    best = _as_stored(largest * FIRST4)
    error = _error4(x, best)
    other = _as_stored(largest * SECOND4)
    smaller = _error4(x, other)
    best = tl.where(smaller < error, other, best)
    error = tl.minimum(smaller, error)
    other = _as_stored(largest * THIRD4)
    return tl.where(_error4(x, other) < error, other, best)


@triton.jit
def _float8_code(x):
    """e4m3 byte of a number, ties to even: written out, because not every card that Triton serves converts it."""
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    step = ((exponent + 124) << 23).to(tl.float32, bitcast=True)
    whole = _round(tl.div_rn(size, step)) * step
    bits = (whole * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    code = (bits >> 7).to(tl.int32) & 0x7F
    return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def _row_offset(table, position, b, stride_cb, stride_cn, PAGE: tl.constexpr):
    """Offset of a token's row in the cache; `table` points to its sequence's pages."""
    if PAGE == 0:
        outer = b
        inner = position.to(tl.int64)
    else:
        outer = tl.load(table + position // PAGE).to(tl.int64)
        inner = (position % PAGE).to(tl.int64)
    return outer * stride_cb + inner * stride_cn


@triton.jit
def _store_wide(
    x, codes, scales, WIDE: tl.constexpr, FLOAT8: tl.constexpr, GROUP: tl.constexpr, GROUPS8: tl.constexpr,
    GROUP8_P: tl.constexpr, GROUPS8_P: tl.constexpr,
):  # fmt: skip
    """Quantise the channels with 8 bits, the first WIDE of a latent."""
    size: tl.constexpr = GROUP if GROUP > 0 else WIDE
    g = tl.arange(0, GROUPS8_P)
    j = tl.arange(0, GROUP8_P)
    channel = g[:, None] * size + j[None, :]
    there = (j < size)[None, :] & (channel < WIDE)
    value = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    # zeros past the end do not change the largest magnitude
    scale = _scale(value, 448.0 if FLOAT8 else 127.0, 1)
    steps = _steps(value, scale[:, None])
    if FLOAT8:
        code = _float8_code(steps)
    else:
        code = tl.minimum(tl.maximum(_round(steps), -127.0), 127.0).to(tl.int8).to(tl.uint8, bitcast=True)
    tl.store(codes + channel, code, mask=there)
    tl.store(scales + g, scale, mask=g < GROUPS8)


@triton.jit
def mla_write_packed_kernel(
    latent, k_rope, q_rope, cos, sin, rows, halves, keys, positions, block_table, query,
    tokens, heads, planes,
    stride_lb, stride_lt, stride_kb, stride_kt, stride_qb, stride_qt, stride_qh, stride_ab, stride_at, stride_zb,
    stride_zt, stride_cb, stride_cn, stride_tb, stride_pb, stride_pt, stride_yb, stride_yt, stride_yh,
    rank: tl.constexpr, WIDE: tl.constexpr, FLOAT8: tl.constexpr, GROUP: tl.constexpr, ROPE8: tl.constexpr,
    CODES4: tl.constexpr, ROPE_AT: tl.constexpr, SCALES: tl.constexpr, GROUPS8: tl.constexpr, GROUPS: tl.constexpr,
    GROUP8_P: tl.constexpr, GROUPS8_P: tl.constexpr, GROUP4_P: tl.constexpr, GROUPS4_P: tl.constexpr, BYTES: tl.constexpr,
    PLANES: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Grid as in `mla_write_fwd_kernel`; `rows`, `halves` and `keys` are one buffer of packed rows (`rows.py`)."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = tl.program_id(0) % tokens
    block = tl.program_id(1)
    m = tl.arange(0, PLANES)
    in_planes = m < planes
    c = tl.load(cos + b * stride_ab + t * stride_at + m, mask=in_planes, other=0.0).to(tl.float32)
    s = tl.load(sin + b * stride_zb + t * stride_zt + m, mask=in_planes, other=0.0).to(tl.float32)
    if block == 0:
        position = tl.load(positions + b * stride_pb + t * stride_pt)
        if position >= 0:
            row = _row_offset(block_table + b * stride_tb, position, b, stride_cb, stride_cn, PAGE)
            to_scales = halves + row // 2 + SCALES // 2
            x = latent + b * stride_lb + t * stride_lt
            if WIDE > 0:
                _store_wide(x, rows + row, to_scales, WIDE, FLOAT8, GROUP, GROUPS8, GROUP8_P, GROUPS8_P)
            if rank > WIDE:
                narrow: tl.constexpr = rank - WIDE
                half: tl.constexpr = narrow // 2
                size4: tl.constexpr = GROUP if GROUP > 0 else narrow
                g4 = tl.arange(0, GROUPS4_P)
                j4 = tl.arange(0, GROUP4_P)
                channel4 = g4[:, None] * size4 + j4[None, :]
                there4 = (j4 < size4)[None, :] & (channel4 < narrow)
                value4 = tl.load(x + WIDE + channel4, mask=there4, other=0.0).to(tl.float32)
                scale4 = _scale4(value4)
                tl.store(to_scales + GROUPS8 + g4, scale4, mask=g4 < GROUPS - GROUPS8)
                i = tl.arange(0, BYTES)
                inside = i < half
                low = tl.load(x + WIDE + i, mask=inside, other=0.0).to(tl.float32)
                high = tl.load(x + WIDE + half + i, mask=inside, other=0.0).to(tl.float32)
                low = _code4(low, tl.gather(scale4, tl.minimum(i, half - 1) // size4, 0)).to(tl.int32) + 8
                high = _code4(high, tl.gather(scale4, (tl.minimum(i, half - 1) + half) // size4, 0)).to(tl.int32) + 8
                tl.store(rows + row + CODES4 + i, (low | (high << 4)).to(tl.uint8), mask=inside)
            k = k_rope + b * stride_kb + t * stride_kt + m
            k_real = tl.load(k, mask=in_planes, other=0.0).to(tl.float32)
            k_imag = tl.load(k + planes, mask=in_planes, other=0.0).to(tl.float32)
            real = (k_real * c - k_imag * s).to(k_rope.dtype.element_ty)
            imag = (k_imag * c + k_real * s).to(k_rope.dtype.element_ty)
            if ROPE8:
                real = real.to(tl.float32)
                imag = imag.to(tl.float32)
                largest = tl.maximum(tl.abs(real), tl.abs(imag))
                key_scale = _scale(largest, 448.0, 0)
                tl.store(rows + row + ROPE_AT + m, _float8_code(_steps(real, key_scale)), mask=in_planes)
                tl.store(rows + row + ROPE_AT + planes + m, _float8_code(_steps(imag, key_scale)), mask=in_planes)
                if planes > 0:
                    tl.store(to_scales + GROUPS, key_scale)
            else:
                y = keys + row // 2 + ROPE_AT // 2 + m
                tl.store(y, real.to(tl.bfloat16), mask=in_planes)
                tl.store(y + planes, imag.to(tl.bfloat16), mask=in_planes)
    else:
        _rotate_queries(
            q_rope, query, b, t, block, c, s, heads, planes, m, stride_qb, stride_qt, stride_qh, stride_yb, stride_yt,
            stride_yh, HEADS,
        )  # fmt: skip


@triton.jit
def _basis(basis, first, planes, m, n):
    """Rows first .. first + planes of the matrix (2 planes, 2 planes) that rotated keys and queries are multiplied by."""
    there = (m < planes)[:, None] & (n < 2 * planes)[None, :]
    return tl.load(basis + (first + m)[:, None] * (2 * planes) + n[None, :], mask=there, other=0.0)


@triton.jit
def _spread_queries(
    q_rope, query, basis, block, c, s, heads, planes, m, n, stride_qh, stride_yh, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rotate the queries of HEADS heads of one token, and bring them to the basis of the keys; block 0 is not of heads."""
    h = (block - 1) * HEADS + tl.arange(0, HEADS)
    in_range = (h < heads)[:, None] & (m < planes)[None, :]
    x = q_rope + h[:, None] * stride_qh + m[None, :]
    real = tl.load(x, mask=in_range, other=0.0).to(tl.float32)
    imag = tl.load(x + planes, mask=in_range, other=0.0).to(tl.float32)
    kind = query.dtype.element_ty
    rotated = (real * c[None, :] - imag * s[None, :]).to(kind)
    spread = tl.dot(rotated, _basis(basis, 0, planes, m, n), input_precision=PRECISION)
    rotated = (imag * c[None, :] + real * s[None, :]).to(kind)
    spread = tl.dot(rotated, _basis(basis, planes, planes, m, n), spread, input_precision=PRECISION)
    y = query + h[:, None] * stride_yh + n[None, :]
    tl.store(y, spread.to(kind), mask=(h < heads)[:, None] & (n < 2 * planes)[None, :])


@triton.jit
def _spread_key(k, basis, c, s, planes, m, n):
    """The rotated key in the basis of the keys, as float32 with the key's own rounding after either step."""
    there = m < planes
    kind = k.dtype.element_ty
    real = tl.load(k + m, mask=there, other=0.0).to(tl.float32)
    imag = tl.load(k + planes + m, mask=there, other=0.0).to(tl.float32)
    rotated = (real * c - imag * s).to(kind).to(tl.float32)
    spread = tl.sum(rotated[:, None] * _basis(basis, 0, planes, m, n).to(tl.float32), 0)
    rotated = (imag * c + real * s).to(kind).to(tl.float32)
    spread += tl.sum(rotated[:, None] * _basis(basis, planes, planes, m, n).to(tl.float32), 0)
    return spread.to(kind).to(tl.float32)


@triton.jit
def _store_narrow(
    x, key, codes, scales, OWN: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr, GROUPS4: tl.constexpr,
    GROUP4_P: tl.constexpr, GROUPS4_P: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Quantise a section of NARROW channels with 4 bits: OWN of the latent, then those of `key`."""
    half: tl.constexpr = NARROW // 2
    size: tl.constexpr = GROUP if GROUP > 0 else NARROW
    g = tl.arange(0, GROUPS4_P)
    j = tl.arange(0, GROUP4_P)
    channel = g[:, None] * size + j[None, :]
    there = (j < size)[None, :] & (channel < NARROW)
    of_latent = tl.load(x + channel, mask=there & (channel < OWN), other=0.0).to(tl.float32)
    place = tl.where(there & (channel >= OWN), channel - OWN, 0)
    of_key = tl.gather(key, place.reshape(GROUPS4_P * GROUP4_P), 0).reshape(GROUPS4_P, GROUP4_P)
    value = tl.where(there & (channel >= OWN), of_key, of_latent)
    scale = _scale4(value)
    tl.store(scales + g, scale, mask=g < GROUPS4)
    code = _code4(value, scale[:, None]).to(tl.int32) + 8
    code = code.reshape(GROUPS4_P * GROUP4_P)
    i = tl.arange(0, BYTES)
    first = tl.minimum(i, half - 1)
    second = first + half
    low = tl.gather(code, first // size * GROUP4_P + first % size, 0)
    high = tl.gather(code, second // size * GROUP4_P + second % size, 0)
    tl.store(codes + i, (low | (high << 4)).to(tl.uint8), mask=i < half)


@triton.jit
def mla_write_joint_kernel(
    latent, k_rope, q_rope, cos, sin, rows, halves, basis, positions, block_table, query,
    tokens, heads, planes,
    stride_lb, stride_lt, stride_kb, stride_kt, stride_qb, stride_qt, stride_qh, stride_ab, stride_at, stride_zb,
    stride_zt, stride_cb, stride_cn, stride_tb, stride_pb, stride_pt, stride_yb, stride_yt, stride_yh,
    rank: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, CODES4: tl.constexpr,
    SCALES: tl.constexpr, GROUPS8: tl.constexpr, GROUPS: tl.constexpr, GROUP8_P: tl.constexpr, GROUPS8_P: tl.constexpr,
    GROUP4_P: tl.constexpr, GROUPS4_P: tl.constexpr, BYTES: tl.constexpr, PLANES: tl.constexpr, KEYS: tl.constexpr,
    HEADS: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`mla_write_packed_kernel` for rows whose last channels are the rotated key times `basis`, as are the queries."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = tl.program_id(0) % tokens
    block = tl.program_id(1)
    m = tl.arange(0, PLANES)
    n = tl.arange(0, KEYS)
    c = tl.load(cos + b * stride_ab + t * stride_at + m, mask=m < planes, other=0.0).to(tl.float32)
    s = tl.load(sin + b * stride_zb + t * stride_zt + m, mask=m < planes, other=0.0).to(tl.float32)
    if block == 0:
        position = tl.load(positions + b * stride_pb + t * stride_pt)
        if position >= 0:
            row = _row_offset(block_table + b * stride_tb, position, b, stride_cb, stride_cn, PAGE)
            to_scales = halves + row // 2 + SCALES // 2
            x = latent + b * stride_lb + t * stride_lt
            if WIDE > 0:
                _store_wide(x, rows + row, to_scales, WIDE, False, GROUP, GROUPS8, GROUP8_P, GROUPS8_P)
            key = _spread_key(k_rope + b * stride_kb + t * stride_kt, basis, c, s, planes, m, n)
            _store_narrow(
                x + WIDE, key, rows + row + CODES4, to_scales + GROUPS8, rank - WIDE, NARROW, GROUP, GROUPS - GROUPS8,
                GROUP4_P, GROUPS4_P, BYTES,
            )  # fmt: skip
    else:
        _spread_queries(
            q_rope + b * stride_qb + t * stride_qt, query + b * stride_yb + t * stride_yt, basis, block, c, s, heads,
            planes, m, n, stride_qh, stride_yh, HEADS, PRECISION,
        )  # fmt: skip
