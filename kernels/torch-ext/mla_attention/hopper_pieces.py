"""What the partitions of the Hopper kernel are made of: shares of the work, accumulators, and where results go."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

BLOCK_M = gl.constexpr(64)
CHUNK = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def add(a, b):
    """Sum, for a scan."""
    return a + b


@gluon.jit
def tile_range(length, start, tokens, window, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr):
    """First tile that any query of the sequence may see, and one past the last. Scalars or vectors."""
    last = (length + (BLOCK_N - 1)) // BLOCK_N
    if WINDOW:
        start = gl.maximum(start, length - tokens - window + 1)
    return gl.minimum(start // BLOCK_N, last), last


@gluon.jit
def stretch(
    b, at, share, seen, tokens, window, BLOCK_N: gl.constexpr, SPLITS: gl.constexpr, MASK: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """What a worker does of sequence b, whose first tile is number `at` of all: tiles begin .. stop of first .. last."""
    lengths, starts = seen
    share_lo, share_hi = share
    length = gl.load(lengths + b)
    start = 0
    if MASK:
        start = gl.load(starts + b)
    first, last = tile_range(length, start, tokens, window, BLOCK_N, WINDOW)
    if SPLITS > 0:
        each = (last - first + SPLITS - 1) // SPLITS
        begin = gl.minimum(first + share_lo * each, last)
        stop = gl.minimum(begin + each, last)
    else:
        begin = first + gl.maximum(share_lo - at, 0)
        stop = first + gl.minimum(share_hi - at, last - first)
    return begin, stop, first, last, length


@gluon.jit
def capped(scores, scale_log2, softcap):
    """Raw dot products to base-2 logits with cap * tanh(x / cap) in between."""
    x = scores * (scale_log2 / (LOG2E * softcap))
    e = gl.exp2(-2.0 * LOG2E * gl.abs(x))  # of -2|x|, so that it cannot overflow
    t = (1.0 - e) / (1.0 + e)
    return gl.where(x < 0, -t, t) * (softcap * LOG2E)


@gluon.jit
def clean(tile, n0, length):
    """Zeros for the rows of a tile past the end of the sequence, which may hold NaN: 0 * NaN would come through."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    COUNT: gl.constexpr = tile.type.shape[1] // CHUNK
    n = n0 + gl.arange(0, tile.type.shape[0], layout=gl.SliceLayout(1, L))
    for c in gl.static_range(COUNT):
        chunk = tile.slice(c * CHUNK, CHUNK, dim=1)
        value = chunk.load(L)
        chunk.store(gl.where((n < length)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def zero(CHUNKS: gl.constexpr):
    """Accumulator [64, 64 CHUNKS]."""
    W: gl.constexpr = CHUNKS * CHUNK
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    return gl.zeros([BLOCK_M, W], gl.float32, layout=L)


@gluon.jit
def zeros(A: gl.constexpr, B: gl.constexpr):
    """Accumulators of A chunks, and of B if there are any."""
    accs = (zero(A),)
    if B > 0:
        accs = accs + (zero(B),)
    return accs


@gluon.jit
def times(acc, factor):
    """Accumulator times a factor per row, which may be in any layout."""
    L: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.convert_layout(factor, L)[:, None]


@gluon.jit
def scaled(accs, factor):
    """Accumulators times a factor per row."""
    out = ()
    for i in gl.static_range(len(accs)):
        out = out + (times(accs[i], factor),)
    return out


@gluon.jit
def attend(weights, groups, stage, accs, G0: gl.constexpr):
    """Weights [64, tokens], in registers or in shared memory, times the values of groups G0 and G0 + 1."""
    begun = ()
    for i in gl.static_range(len(accs)):
        begun = begun + (warpgroup_mma(weights, groups[G0 + i].index(stage), accs[i], is_async=True),)
    if len(accs) == 1:
        return (warpgroup_mma_wait(0, deps=begun),)
    else:
        return warpgroup_mma_wait(0, deps=begun)


@gluon.jit
def store(outputs, strides, place, acc, rank: gl.constexpr, AT: gl.constexpr):
    """Accumulator of the chunks from AT on: to the output, if the stretch is the whole sequence, else to its part."""
    out, part = outputs
    b, slot, whole, first_row, rows, heads = place
    stride_ob, stride_ot, stride_oh = strides
    W: gl.constexpr = acc.type.shape[1]
    L: gl.constexpr = acc.type.layout
    row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, L))
    d = AT * CHUNK + gl.arange(0, W, layout=gl.SliceLayout(0, L))
    mask = (row < rows)[:, None]
    if rank % CHUNK != 0:
        mask = mask & (d < rank)[None, :]
    if whole:
        offset = (row // heads) * stride_ot + (row % heads) * stride_oh
        into = out + b.to(gl.int64) * stride_ob
        gl.store(into + offset[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        to = part + slot.to(gl.int64) * rows * rank
        gl.store(to + (row * rank)[:, None] + d[None, :], acc, mask=mask)


@gluon.jit
def part_slot(worker, begin, first, SPLITS: gl.constexpr):
    """Where a partial result goes."""
    if SPLITS > 0:
        slot = worker
    else:
        slot = 2 * worker + (begin == first).to(gl.int32)
    return slot
