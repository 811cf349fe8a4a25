// MLA decode for Hopper: one warp feeds a ring of tiles through the tensor memory accelerator, two or three warpgroups compute.
//
// A program serves 64 rows, a row being one head of one query token, and walks over its share of all tiles of all sequences,
// laid end to end. Every latent tile is read by the tensor cores where it lies, as keys and, transposed, as values.
//
// Up to rank 256, warpgroups take turns at tiles, each with a maximum, a sum and accumulators of its own, and put them
// together at the end. Above, accumulators do not fit one warpgroup's registers, and two attend half of the columns each
// (BY_COLUMNS): the first of them computes scores and weights, and hands the weights to the second through shared memory.
//
// The launcher defines RANK, ROPE, BLOCK_N, STAGES, BF16, PAGE, MASK, WINDOW, SOFTCAP, PDL, puts the matrix
// instructions in place of the line that says so, and shares the layout of Arguments and of shared memory.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Arguments {
    const int *lengths, *starts, *holes, *block_table;
    const unsigned char *mask;
    void *out;
    float *lse, *part, *part_lse;
    i64 stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt;
    float scale_log2, softcap;
    int window, batch, tokens, heads, workers, min_tiles, splits, c_rows, k_rows;
};

constexpr int ROWS = 64;                  // query rows of a program
constexpr int CHUNKS = (RANK + 63) / 64;  // of 64 columns, 128 bytes: what one swizzled row holds
constexpr int ROPES = (ROPE + 63) / 64;
constexpr int ALL = CHUNKS + ROPES;
constexpr bool BY_COLUMNS = RANK > 256;
constexpr int GROUPS = BY_COLUMNS ? 2 : RANK > 128 ? 2 : 3;
constexpr int LEFT_N = BY_COLUMNS ? CHUNKS / 2 * 64 : RANK, RIGHT_N = RANK - LEFT_N;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int Q_CHUNK = ROWS * 128, C_CHUNK = BLOCK_N * 128, STAGE = ALL * C_CHUNK;
// Registers of a thread, once the loading warpgroup has given up most of its own.
constexpr int COMPUTING = GROUPS == 2 ? 232 : 152, LOADING = GROUPS == 2 ? 40 : 56;
// The weights on their way to the second warpgroup, or slices of accumulators on their way to the first.
constexpr int SLICE = 32, EXCHANGE = BY_COLUMNS ? ROWS * BLOCK_N * 2 : (GROUPS - 1) * ROWS * SLICE * 4;
constexpr int AT_Q = 0, AT_TILES = ALL * Q_CHUNK, AT_EXCHANGE = AT_TILES + STAGES * STAGE, AT_STATE = AT_EXCHANGE + EXCHANGE,
              AT_BARRIERS = AT_STATE + 6 * ROWS * 4;
// A wait tells phases of a barrier apart by parity alone, so whoever waits on one must see every phase: a stage whose tiles
// went to several warpgroups could let one of them in while the tile before is still on its way.
static_assert(BY_COLUMNS || STAGES % GROUPS == 0, "each stage belongs to one warpgroup");
constexpr int PIECES = PAGE && PAGE < BLOCK_N ? BLOCK_N / PAGE : 1, PIECE = BLOCK_N / PIECES;  // boxes that a tile is loaded in
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}\n" ::"r"(bar), "r"(parity)
        : "memory");
}
// A whole warp is done: barriers count warps.
__device__ __forceinline__ void warp_arrive(u32 bar) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void threads_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void load_box(u32 to, const TensorMap *map, int column, int row, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(bar), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// A matrix in shared memory. Rows of 128 bytes, swizzled by 128: groups of 8 rows lie 1024 bytes apart; `across` bytes from
// 64 columns to the next 64, where columns are the outer dimension.
__device__ __forceinline__ u64 descriptor(u32 address, u32 across) {
    return (u64)((__shfl_sync(~0u, address, 0) & 0x3ffff) >> 4) | ((u64)(across >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}
__device__ __forceinline__ u64 further(u64 descriptor, int bytes) { return descriptor + (bytes >> 4); }
// The compiler may not move uses of these registers over the asynchronous products.
template <int N> __device__ __forceinline__ void keep(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
//MATRIX INSTRUCTIONS//

// First tile that any query of a sequence may see, and one past the last.
struct Stretch { int begin, stop, first, last, length, start; };
__device__ __forceinline__ void tile_range(const Arguments &a, int b, Stretch &t) {
    t.length = __ldg(a.lengths + b);
    t.start = MASK ? __ldg(a.starts + b) : 0;
    const int from = WINDOW ? max(t.start, t.length - a.tokens - a.window + 1) : t.start;
    t.last = (t.length + BLOCK_N - 1) / BLOCK_N;
    t.first = min(from / BLOCK_N, t.last);
}
__device__ __forceinline__ int tiles_of(const Arguments &a, int b) {
    Stretch t;
    tile_range(a, b, t);
    return t.last - t.first;
}
__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
}
__device__ __forceinline__ int active_workers(const Arguments &a, int total) { return max(min(a.workers, (total + a.min_tiles - 1) / a.min_tiles), 1); }

// A worker's share of all tiles, lo .. hi, and the sequence in which it begins, with the number of its first tile. With
// `splits`, a worker has one of so many parts of one sequence. Every warp works it out for itself.
struct Share { int b, at, lo, hi; };
__device__ __forceinline__ Share share_of(const Arguments &a, int worker) {
    if (a.splits) return {worker / a.splits, 0, worker % a.splits, 0};
    const int lane = threadIdx.x & 31;
    int total = 0;
    for (int b = lane; b < a.batch; b += 32) total += tiles_of(a, b);
    total = warp_sum(total);
    const int active = active_workers(a, total), each = total / active, more = total - each * active;
    const int lo = worker * each + min(worker, more), hi = worker < active ? lo + each + (worker < more) : lo;
    int at = 0;
    for (int b0 = 0; b0 < a.batch; b0 += 32) {
        const int tiles = b0 + lane < a.batch ? tiles_of(a, b0 + lane) : 0;
        int end = tiles;
#pragma unroll
        for (int i = 1; i < 32; i <<= 1) {
            const int before = __shfl_up_sync(~0u, end, i);
            if (lane >= i) end += before;
        }
        const u32 after = __ballot_sync(~0u, at + end > lo && b0 + lane < a.batch);
        if (after) {
            const int which = __ffs(after) - 1;
            return {b0 + which, at + __shfl_sync(~0u, end - tiles, which), lo, hi};
        }
        at += __shfl_sync(~0u, end, 31);
    }
    return {a.batch, at, lo, lo};
}
// The next stretch of tiles of one sequence, with at least one tile; false at the end.
__device__ __forceinline__ bool next_stretch(const Arguments &a, Share &s, Stretch &t, int &b) {
    while (a.splits ? s.hi == 0 : s.b < a.batch && s.at < s.hi) {
        b = s.b++;
        tile_range(a, b, t);
        const int tiles = t.last - t.first;
        if (a.splits) {
            const int each = (tiles + a.splits - 1) / a.splits;
            t.begin = min(t.first + s.lo * each, t.last);
            t.stop = min(t.begin + each, t.last);
            s.hi = 1;
        } else {
            t.begin = t.first + max(s.lo - s.at, 0);
            t.stop = t.first + min(s.hi - s.at, tiles);
            s.at += tiles;
        }
        if (t.begin < t.stop) return true;
    }
    return false;
}
// Where a partial result goes: of a worker's stretches, at most the first and the last are parts.
__device__ __forceinline__ int slot_of(const Arguments &a, int worker, const Stretch &t) { return a.splits ? worker : 2 * worker + (t.begin == t.first); }

__device__ __forceinline__ void load_tiles(const TensorMap &c_map, const TensorMap &k_map, const TensorMap &q_map, const TensorMap &qr_map,
                                           const Arguments &a, Share share, u32 base, u32 full, u32 empty, u32 q_full, u32 q_empty) {
    const int lane = threadIdx.x & 31, rows = a.tokens * a.heads;
    // Row blocks of a sequence read the same tiles, out of the L2; queries are read once for every stretch.
    const u64 once = 0x12F0000000000000ull, again = 0x1000000000000000ull, policy = gridDim.x > 1 ? again : once;
    u32 count = 0, sequences = 0;
    Stretch t;
    int b;
    while (next_stretch(a, share, t, b)) {
        auto page_of = [&](int n0) { return lane < PIECES && n0 + lane * PIECE < t.length ? __ldg(a.block_table + b * a.stride_tb + n0 / max(PAGE, 1) + lane) : 0; };
        int page = PAGE ? page_of(t.begin * BLOCK_N) : 0;
        for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
            const int n0 = tile * BLOCK_N, stage = count % STAGES;
            const u32 bar = full + 8 * stage, to = base + AT_TILES + stage * STAGE;
            const int upcoming = PAGE && tile + 1 < t.stop ? page_of(n0 + BLOCK_N) : 0;  // on its way while this waits
            barrier_wait(empty + 8 * stage, ((count / STAGES) & 1) ^ 1);
            const int pieces = PIECES == 1 ? 1 : min(PIECES, (t.length - n0 + PIECE - 1) / PIECE);
            if (lane == 0) barrier_expect(bar, pieces * (STAGE / PIECES));
            __syncwarp();
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                const int outer = PAGE ? __shfl_sync(~0u, page, piece) : b, inner = PAGE ? n0 % max(PAGE, BLOCK_N) % max(PAGE, 1) : n0;
                if (piece < pieces) {
                    if (lane < CHUNKS) load_box(to + lane * C_CHUNK + piece * PIECE * 128, &c_map, lane * 64, outer * a.c_rows + inner, bar, policy);
                    else if (lane < ALL) load_box(to + lane * C_CHUNK + piece * PIECE * 128, &k_map, (lane - CHUNKS) * 64, outer * a.k_rows + inner, bar, policy);
                }
            }
            page = upcoming;
            if (tile == t.begin) {
                barrier_wait(q_empty, (sequences++ & 1) ^ 1);
                if (lane == 0) barrier_expect(q_full, ALL * Q_CHUNK);
                __syncwarp();
                const int row = b * rows + blockIdx.x * ROWS;
                if (lane < CHUNKS) load_box(base + AT_Q + lane * Q_CHUNK, &q_map, lane * 64, row, q_full, again);
                else if (lane < ALL) load_box(base + AT_Q + lane * Q_CHUNK, &qr_map, (lane - CHUNKS) * 64, row, q_full, again);
            }
        }
    }
}

// Two rows of a thread, `row` and the eighth after it: which tokens they see, and how far their softmax has come.
struct Rows {
    int row, limit0, limit1, low0, low1, bare_lo, bare_hi, t0, t1;
    bool holed;
    float m0, m1, l0, l1;
};
__device__ __forceinline__ void begin_rows(const Arguments &a, const Stretch &t, int b, Rows &r) {
    r.limit0 = t.length - a.tokens + r.t0 + 1;  // one past the last token that the row sees
    r.limit1 = t.length - a.tokens + r.t1 + 1;
    r.low0 = r.low1 = r.bare_lo = 0;
    r.bare_hi = t.length - a.tokens + 1;  // every row sees tokens bare_lo .. bare_hi
    r.holed = false;
    if (WINDOW) { r.low0 = r.limit0 - a.window; r.low1 = r.limit1 - a.window; r.bare_lo = t.length - a.window; }
    if (MASK) {
        r.low0 = max(r.low0, t.start); r.low1 = max(r.low1, t.start); r.bare_lo = max(r.bare_lo, t.start);
        r.holed = __ldg(a.holes + b) != 0;
        if (r.holed) r.limit0 = r.limit1 = t.length;  // the mask alone says what each query sees
    }
    r.m0 = r.m1 = minus_infinity();
    r.l0 = r.l1 = 0;
}

// Raw dot products of all rows with a tile's tokens, under way.
__device__ __forceinline__ void score(float (&s)[BLOCK_N / 2], u32 base, u32 at) {
    const u64 queries = descriptor(base + AT_Q, 16), keys = descriptor(at, 16);
    mma_begin();
#pragma unroll
    for (int c = 0; c < ALL; ++c)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (c < CHUNKS ? c * 64 + k * 16 < RANK : (c - CHUNKS) * 64 + k * 16 < ROPE)
                mma_scores(s, further(queries, c * Q_CHUNK + k * 32), further(keys, c * C_CHUNK + k * 32), c + k > 0);
    mma_commit();
}

// Scores to weights, packed as the left operand of a product; the factors by which what was attended before shrinks.
__device__ __forceinline__ void weigh(const Arguments &a, const Stretch &t, int b, int tile, unsigned char *values, int barrier, Rows &r,
                                      float (&s)[BLOCK_N / 2], u32 (&p)[BLOCK_N / 4], float &f0, float &f1) {
    const int lane = threadIdx.x & 31, n0 = tile * BLOCK_N;
    if (SOFTCAP) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
            const float x = s[i] * (a.scale_log2 / (LOG2E * a.softcap)), e = exp2_fast(-2.0f * LOG2E * fabsf(x));  // cannot overflow
            const float y = __fdividef(1.0f - e, 1.0f + e);
            s[i] = (x < 0 ? -y : y) * (a.softcap * LOG2E);
        }
    }
    const float scale = SOFTCAP ? 1.0f : a.scale_log2;
    if (n0 + BLOCK_N > r.bare_hi || n0 < r.bare_lo || r.holed) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
            const int n = n0 + (i / 4) * 8 + (lane & 3) * 2 + (i & 1), lower = (i >> 1) & 1;
            bool seen = n < (lower ? r.limit1 : r.limit0) && n >= (lower ? r.low1 : r.low0);
            if (MASK)
                if (r.holed && seen && r.row + 8 * lower < a.tokens * a.heads) seen = a.mask[b * a.stride_mb + (lower ? r.t1 : r.t0) * a.stride_mt + n] != 0;
            if (!seen) s[i] = minus_infinity();
        }
        if (n0 + BLOCK_N > t.length) {  // what lies past the end may be NaN, and 0 * NaN would come through
            const int thread = threadIdx.x & 127;
            for (int n = t.length - n0 + (thread >> 3); n < BLOCK_N; n += 16)
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) *(uint4 *)(values + c * C_CHUNK + n * 128 + (thread & 7) * 16) = make_uint4(0, 0, 0, 0);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            threads_sync(barrier, 128);
        }
    }
    float x0 = fmaxf(s[0], s[1]), x1 = fmaxf(s[2], s[3]), y0 = fmaxf(s[4], s[5]), y1 = fmaxf(s[6], s[7]);
#pragma unroll
    for (int i = 8; i < BLOCK_N / 2; i += 8) {
        x0 = fmaxf(x0, fmaxf(s[i], s[i + 1])); x1 = fmaxf(x1, fmaxf(s[i + 2], s[i + 3]));
        y0 = fmaxf(y0, fmaxf(s[i + 4], s[i + 5])); y1 = fmaxf(y1, fmaxf(s[i + 6], s[i + 7]));
    }
    x0 = fmaxf(x0, y0); x1 = fmaxf(x1, y1);
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2));
    const float new0 = fmaxf(r.m0, x0 * scale), new1 = fmaxf(r.m1, x1 * scale);
    // a row may have seen nothing yet: -inf - -inf is NaN
    const float shift0 = new0 == minus_infinity() ? 0.0f : new0, shift1 = new1 == minus_infinity() ? 0.0f : new1;
    f0 = exp2_fast(r.m0 - shift0); f1 = exp2_fast(r.m1 - shift1);
    r.m0 = new0; r.m1 = new1;
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i += 4) {
        const float e0 = exp2_fast(s[i] * scale - shift0), e1 = exp2_fast(s[i + 1] * scale - shift0);
        const float e2 = exp2_fast(s[i + 2] * scale - shift1), e3 = exp2_fast(s[i + 3] * scale - shift1);
        sum0 += e0; sum1 += e1; sum2 += e2; sum3 += e3;
        p[i / 2] = pack(e0, e1); p[i / 2 + 1] = pack(e2, e3);
    }
    r.l0 = r.l0 * f0 + (sum0 + sum1); r.l1 = r.l1 * f1 + (sum2 + sum3);
}
__device__ __forceinline__ void sum_rows(Rows &r) {
    r.l0 += __shfl_xor_sync(~0u, r.l0, 1); r.l1 += __shfl_xor_sync(~0u, r.l1, 1);
    r.l0 += __shfl_xor_sync(~0u, r.l0, 2); r.l1 += __shfl_xor_sync(~0u, r.l1, 2);
}
__device__ __forceinline__ float inverse(float x) { return 1.0f / (x > 0 ? x : 1.0f); }

template <int N> __device__ __forceinline__ void scale_rows(float (&acc)[N], float f0, float f1) {
#pragma unroll
    for (int i = 0; i < N; i += 4) { acc[i] *= f0; acc[i + 1] *= f0; acc[i + 2] *= f1; acc[i + 3] *= f1; }
}
// What was attended so far times its factors, plus weights times values, under way; `product` issues 16 tokens of it.
template <int N, typename Product> __device__ __forceinline__ void attend(float (&acc)[N], float f0, float f1, u32 values, Product product) {
    if (!__all_sync(~0u, f0 == 1.0f && f1 == 1.0f)) scale_rows(acc, f0, f1);
    keep(acc);
    const u64 matrix = descriptor(values, C_CHUNK);
    mma_begin();
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k) product(k, further(matrix, k * 2048));
    mma_commit();
}

// Accumulators of columns `column` on, times a factor a row: to the output, or to a part.
template <int N>
__device__ __forceinline__ void store_rows(const Arguments &a, const float (&acc)[N], float f0, float f1, int b, bool whole, int slot, int row, int column) {
    const int rows = a.tokens * a.heads, at = column + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = row + half * 8;
        const float f = half ? f1 : f0;
        if (r >= rows) continue;
        if (whole) {
            unsigned short *to = (unsigned short *)a.out + b * a.stride_ob + (r / a.heads) * a.stride_ot + (r % a.heads) * a.stride_oh + at;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) *(u32 *)(to + i * 8) = pack(acc[4 * i + 2 * half] * f, acc[4 * i + 2 * half + 1] * f);
        } else {
            float *to = a.part + ((i64)slot * rows + r) * RANK + at;
#pragma unroll
            for (int i = 0; i < N / 4; ++i) *(float2 *)(to + i * 8) = make_float2(acc[4 * i + 2 * half] * f, acc[4 * i + 2 * half + 1] * f);
        }
    }
}
__device__ __forceinline__ void store_lse(const Arguments &a, float m, float l, int b, bool whole, int slot, int row) {
    const int rows = a.tokens * a.heads;
    if ((threadIdx.x & 3) || row >= rows) return;
    const float lse = m + log2_fast(l);
    if (whole) a.lse[((i64)b * a.heads + row % a.heads) * a.tokens + row / a.heads] = lse * LN2;
    else a.part_lse[(i64)slot * rows + row] = lse;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode_hopper(const __grid_constant__ TensorMap c_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap q_map,
                  const __grid_constant__ TensorMap qr_map, const __grid_constant__ Arguments a) {
    extern __shared__ unsigned char raw[];
    const u32 base = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
    unsigned char *smem = raw + (base - (u32)__cvta_generic_to_shared(raw));
    const u32 full = base + AT_BARRIERS, empty = full + 8 * STAGES, q_full = empty + 8 * STAGES, q_empty = q_full + 8, p_full = q_full + 16, p_empty = q_full + 24;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, 1); barrier_init(empty + 8 * i, BY_COLUMNS ? 8 : 4); }
        barrier_init(q_full, 1); barrier_init(q_empty, BY_COLUMNS ? 4 : 4 * GROUPS);
        barrier_init(p_full, 4); barrier_init(p_empty, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x == GROUPS * 128)
        for (const TensorMap *map : {&c_map, &k_map, &q_map, &qr_map}) asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    __syncthreads();
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int worker = blockIdx.y;
    Share share = share_of(a, worker);

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADING));
        if (warp == GROUPS * 4) load_tiles(c_map, k_map, q_map, qr_map, a, share, base, full, empty, q_full, q_empty);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTING));
    const int row_in = (warp & 3) * 16 + (lane >> 2);
    uint4 *exchange = (uint4 *)(smem + AT_EXCHANGE) + (threadIdx.x & 127);
    float *state = (float *)(smem + AT_STATE);
    u32 count = 0, sequences = 0, sent = 0;
    Stretch t;
    int b;
    Rows r;
    r.row = blockIdx.x * ROWS + row_in;
    r.t0 = r.row / a.heads;
    r.t1 = (r.row + 8) / a.heads;
    if (a.splits && group == 0) {  // a split that gets no token
        Share mine = share;
        if (!next_stretch(a, mine, t, b) && (lane & 3) == 0) {
            const int rows = a.tokens * a.heads;
            if (r.row < rows) a.part_lse[(i64)worker * rows + r.row] = minus_infinity();
            if (r.row + 8 < rows) a.part_lse[(i64)worker * rows + r.row + 8] = minus_infinity();
        }
    }

#if RANK > 256
    if (group == 0) {  // scores, weights, left columns
        float acc[LEFT_N / 2];
        while (next_stretch(a, share, t, b)) {
            begin_rows(a, t, b, r);
#pragma unroll
            for (int i = 0; i < LEFT_N / 2; ++i) acc[i] = 0;
            barrier_wait(q_full, sequences++ & 1);
            for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
                const u32 stage = count % STAGES, at = base + AT_TILES + stage * STAGE;
                float s[BLOCK_N / 2], f0, f1;
                u32 p[BLOCK_N / 4];
                barrier_wait(full + 8 * stage, (count / STAGES) & 1);
                score(s, base, at);
                mma_wait<0>();
                keep(s);
                if (tile == t.stop - 1) warp_arrive(q_empty);
                weigh(a, t, b, tile, smem + (at - base), 1, r, s, p, f0, f1);
                barrier_wait(p_empty, (sent++ & 1) ^ 1);
#pragma unroll
                for (int i = 0; i < BLOCK_N / 16; ++i) exchange[i * 128] = make_uint4(p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
                if ((lane & 3) == 0) { state[row_in] = f0; state[row_in + 8] = f1; }
                warp_arrive(p_full);
                attend(acc, f0, f1, at, [&](int k, u64 values) { mma_left(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], values); });
                mma_wait<0>();
                keep(acc);
                warp_arrive(empty + 8 * stage);
            }
            sum_rows(r);
            const float i0 = inverse(r.l0), i1 = inverse(r.l1);
            barrier_wait(p_empty, (sent++ & 1) ^ 1);
            if ((lane & 3) == 0) { state[row_in] = i0; state[row_in + 8] = i1; }
            warp_arrive(p_full);
            const bool whole = t.begin == t.first && t.stop == t.last;
            const int slot = slot_of(a, worker, t);
            store_rows(a, acc, i0, i1, b, whole, slot, r.row, 0);
            store_lse(a, r.m0, r.l0, b, whole, slot, r.row);
            store_lse(a, r.m1, r.l1, b, whole, slot, r.row + 8);
        }
    } else {  // right columns
        float acc[RIGHT_N / 2];
        while (next_stretch(a, share, t, b)) {
#pragma unroll
            for (int i = 0; i < RIGHT_N / 2; ++i) acc[i] = 0;
            for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
                const u32 stage = count % STAGES, at = base + AT_TILES + stage * STAGE + LEFT_N / 64 * C_CHUNK;
                uint4 p[BLOCK_N / 16];
                barrier_wait(p_full, sent++ & 1);
#pragma unroll
                for (int i = 0; i < BLOCK_N / 16; ++i) p[i] = exchange[i * 128];
                const float f0 = state[row_in], f1 = state[row_in + 8];
                warp_arrive(p_empty);
                barrier_wait(full + 8 * stage, (count / STAGES) & 1);
                attend(acc, f0, f1, at, [&](int k, u64 values) { mma_right(acc, p[k].x, p[k].y, p[k].z, p[k].w, values); });
                mma_wait<0>();
                keep(acc);
                warp_arrive(empty + 8 * stage);
            }
            barrier_wait(p_full, sent++ & 1);
            const float i0 = state[row_in], i1 = state[row_in + 8];
            warp_arrive(p_empty);
            store_rows(a, acc, i0, i1, b, t.begin == t.first && t.stop == t.last, slot_of(a, worker, t), r.row, LEFT_N);
        }
    }
#else
    float acc[RANK / 2];
    while (next_stretch(a, share, t, b)) {
        begin_rows(a, t, b, r);
#pragma unroll
        for (int i = 0; i < RANK / 2; ++i) acc[i] = 0;
        barrier_wait(q_full, sequences++ & 1);
        // Tiles are numbered through, whatever sequence they are of: those of a worker take turns with its warpgroups.
        int tile = t.begin + (group + GROUPS - count % GROUPS) % GROUPS;
        if (tile >= t.stop) warp_arrive(q_empty);
        for (; tile < t.stop; tile += GROUPS) {
            const u32 number = count + (tile - t.begin), stage = number % STAGES, at = base + AT_TILES + stage * STAGE;
            float s[BLOCK_N / 2], f0, f1;
            u32 p[BLOCK_N / 4];
            barrier_wait(full + 8 * stage, (number / STAGES) & 1);
            score(s, base, at);
            mma_wait<0>();
            keep(s);
            if (tile + GROUPS >= t.stop) warp_arrive(q_empty);
            weigh(a, t, b, tile, smem + (at - base), 1 + group, r, s, p, f0, f1);
            attend(acc, f0, f1, at, [&](int k, u64 values) { mma_left(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], values); });
            mma_wait<0>();
            keep(acc);
            warp_arrive(empty + 8 * stage);
        }
        count += t.stop - t.begin;
        sum_rows(r);
        // Put together: maxima and sums of all warpgroups first, then the others' accumulators, slice by slice.
        if ((lane & 3) == 0) {
            float *mine = state + group * 2 * ROWS + row_in;
            mine[0] = r.m0; mine[8] = r.m1; mine[ROWS] = r.l0; mine[ROWS + 8] = r.l1;
        }
        threads_sync(GROUPS + 1, GROUPS * 128);
        float m0 = minus_infinity(), m1 = m0, l0 = 0, l1 = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) { m0 = fmaxf(m0, state[g * 2 * ROWS + row_in]); m1 = fmaxf(m1, state[g * 2 * ROWS + row_in + 8]); }
        const float shift0 = m0 == minus_infinity() ? 0.0f : m0, shift1 = m1 == minus_infinity() ? 0.0f : m1;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const float *other = state + g * 2 * ROWS + row_in;
            l0 += other[ROWS] * exp2_fast(other[0] - shift0);
            l1 += other[ROWS + 8] * exp2_fast(other[8] - shift1);
        }
        scale_rows(acc, exp2_fast(r.m0 - shift0) * inverse(l0), exp2_fast(r.m1 - shift1) * inverse(l1));
#pragma unroll
        for (int first = 0; first < RANK; first += SLICE) {
            const int width = RANK - first < SLICE ? RANK - first : SLICE;
            if (group) {
                float4 *to = (float4 *)(exchange + (group - 1) * (ROWS * SLICE * 4 / 16));
#pragma unroll
                for (int i = 0; i < width / 8; ++i) {
                    const int k = first / 2 + 4 * i;
                    to[i * 128] = make_float4(acc[k], acc[k + 1], acc[k + 2], acc[k + 3]);
                }
            }
            threads_sync(GROUPS + 1, GROUPS * 128);
            if (!group) {
#pragma unroll
                for (int g = 0; g < GROUPS - 1; ++g)
#pragma unroll
                    for (int i = 0; i < width / 8; ++i) {
                        const int k = first / 2 + 4 * i;
                        const float4 from = ((float4 *)exchange)[g * (ROWS * SLICE * 4 / 16) + i * 128];
                        acc[k] += from.x; acc[k + 1] += from.y; acc[k + 2] += from.z; acc[k + 3] += from.w;
                    }
            }
            threads_sync(GROUPS + 1, GROUPS * 128);
        }
        if (!group) {
            const bool whole = t.begin == t.first && t.stop == t.last;
            const int slot = slot_of(a, worker, t);
            store_rows(a, acc, 1.0f, 1.0f, b, whole, slot, r.row, 0);
            store_lse(a, m0, l0, b, whole, slot, r.row);
            store_lse(a, m1, l1, b, whole, slot, r.row + 8);
        }
    }
#endif
}

// Which worker has a tile, of all laid end to end.
__device__ __forceinline__ int holder(int tile, int total, int active) {
    const int each = total / active, more = total - each * active, longer = more * (each + 1);
    return tile < longer ? tile / (each + 1) : (tile - longer) / max(each, 1) + more;
}

// Weighted mean of the parts of each row: WARPS warps share the parts of one row, 128 columns at a time, grid (sequences,
// blocks of 8 / WARPS rows, blocks of columns).
template <int WARPS> __device__ __forceinline__ void combine(const Arguments &a) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, b = blockIdx.x, rows = a.tokens * a.heads;
    const int row = blockIdx.y * (8 / WARPS) + warp / WARPS, mine = warp % WARPS;
    Stretch t;
    tile_range(a, b, t);
    int slot, count, step;
    bool written;
    if (a.splits) {
        slot = b * a.splits; count = a.splits; step = 1;
        written = (t.last - t.first + a.splits - 1) / a.splits >= t.last - t.first;  // the first split had it all
    } else {
        int before = 0, total = 0;
        for (int i = lane; i < a.batch; i += 32) {
            const int tiles = tiles_of(a, i);
            total += tiles;
            before += i < b ? tiles : 0;
        }
        total = warp_sum(total); before = warp_sum(before);
        const int active = active_workers(a, total), w0 = holder(before, total, active), w1 = holder(before + t.last - t.first - 1, total, active);
        slot = 2 * w0; count = w1 - w0 + 1; step = 2;
        written = w0 == w1;
    }
    const bool empty = t.last == t.first;
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    if (row >= rows || (written && !empty)) return;  // with several warps to a row, the whole program has that row
    unsigned short *to = (unsigned short *)a.out + b * a.stride_ob + (row / a.heads) * a.stride_ot + (row % a.heads) * a.stride_oh;
    float *to_lse = a.lse + ((i64)b * a.heads + row % a.heads) * a.tokens + row / a.heads;
    auto slot_at = [&](int i) { return (i64)(slot + i * step + (step == 2 && i == 0)) * rows + row; };
    float peak = minus_infinity(), sum = 0;
    if (!empty) {
        for (int i = lane; i < count; i += 32) peak = fmaxf(peak, a.part_lse[slot_at(i)]);
        peak = warp_max(peak);
        if (peak != minus_infinity()) {
            for (int i = lane; i < count; i += 32) sum += exp2_fast(a.part_lse[slot_at(i)] - peak);
            sum = warp_sum(sum);
        }
    }
    const float lse = peak == minus_infinity() ? peak : peak + log2_fast(sum), shift = peak == minus_infinity() ? 0.0f : lse;
    constexpr int COLUMNS = WARPS > 1 ? 1 : (RANK + 127) / 128;  // of 128, at a time
    float4 acc[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) acc[c] = make_float4(0, 0, 0, 0);
    const int column = (WARPS > 1 ? blockIdx.z * 128 : 0) + lane * 4;
    if (peak != minus_infinity()) {
#pragma unroll 4
        for (int i = mine; i < count; i += WARPS) {
            const float weight = exp2_fast(a.part_lse[slot_at(i)] - shift);
            const float *from = a.part + slot_at(i) * RANK + column;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                if (column + c * 128 < RANK) {
                    float4 x = *(const float4 *)(from + c * 128);
                    if (weight == 0) x = make_float4(0, 0, 0, 0);  // such a part may never have been written
                    acc[c].x += weight * x.x; acc[c].y += weight * x.y; acc[c].z += weight * x.z; acc[c].w += weight * x.w;
                }
        }
    }
    if (WARPS > 1) {
        __shared__ float4 sums[WARPS][32];
        sums[mine][lane] = acc[0];
        __syncthreads();
        if (mine) return;
#pragma unroll
        for (int i = 1; i < WARPS; ++i) {
            const float4 x = sums[i][lane];
            acc[0].x += x.x; acc[0].y += x.y; acc[0].z += x.z; acc[0].w += x.w;
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        if (column + c * 128 < RANK) *(uint2 *)(to + column + c * 128) = make_uint2(pack(acc[c].x, acc[c].y), pack(acc[c].z, acc[c].w));
    if (lane == 0 && (WARPS == 1 || blockIdx.z == 0)) *to_lse = lse * LN2;
}
extern "C" __global__ void __launch_bounds__(256) mla_combine_rows(const __grid_constant__ Arguments a) { combine<1>(a); }
extern "C" __global__ void __launch_bounds__(256) mla_combine_parts(const __grid_constant__ Arguments a) { combine<8>(a); }
