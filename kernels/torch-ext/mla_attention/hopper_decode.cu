// MLA decode for Hopper: one warp feeds a ring of tiles through the tensor memory accelerator, the first warpgroup computes
// scores, weights and the left columns of the output, the second one the right columns.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int ROWS = 64;                        // query rows of a program
constexpr int CHUNKS = (RANK + 63) / 64;        // of 64 columns, 128 bytes: what one swizzled row holds
constexpr int ROPES = (ROPE + 63) / 64;
constexpr int ALL = CHUNKS + ROPES;
constexpr int LEFT = CHUNKS > 1 ? CHUNKS / 2 : 1;
constexpr int RIGHT = CHUNKS - LEFT;
constexpr int LEFT_N = RIGHT ? LEFT * 64 : RANK;
constexpr int RIGHT_N = RANK - LEFT_N;
constexpr int Q_CHUNK = ROWS * 128, C_CHUNK = BLOCK_N * 128;
constexpr int STAGE = ALL * C_CHUNK;
constexpr int CONSUMERS = RIGHT ? 2 : 1;
constexpr int THREADS = CONSUMERS * 128 + 32;
constexpr int AT_Q = 0, AT_TILES = ALL * Q_CHUNK, AT_P = AT_TILES + STAGES * STAGE, AT_FACTOR = AT_P + ROWS * BLOCK_N * 2,
              AT_BARRIERS = AT_FACTOR + ROWS * 4;
constexpr int REGISTERS = 65536 / THREADS / 8 * 8 > 248 ? 248 : 65536 / THREADS / 8 * 8;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float a, float b) {
    u32 y;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
#endif
    return y;
}

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}\n" ::"r"(bar), "r"(parity)
        : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void load_box(u32 to, const TensorMap *map, int column, int row, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(bar), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Rows of 128 bytes, swizzled by 128: groups of 8 rows lie 1024 bytes apart; `across` only for operands whose columns are the
// outer dimension, bytes from 64 columns to the next 64.
__device__ __forceinline__ u64 descriptor(u32 address, u32 across) {
    return (u64)((address & 0x3ffff) >> 4) | ((u64)(across >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}
// The same, so many bytes further on.
__device__ __forceinline__ u64 further(u64 descriptor, int bytes) { return descriptor + (bytes >> 4); }
template <int N> __device__ __forceinline__ void keep(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
//MMA//

struct Arguments {
    const int *lengths, *starts, *holes, *block_table;
    const unsigned char *mask;
    void *out;
    float *lse, *part, *part_lse;
    i64 stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt;
    float scale_log2, softcap;
    int window, batch, tokens, heads, workers, min_tiles, splits, c_rows, k_rows;
};

// First tile that any query of a sequence may see, and one past the last.
struct Stretch { int begin, stop, first, last, length, start; };
__device__ __forceinline__ void tile_range(const Arguments &a, int b, int &first, int &last, int &length, int &start) {
    length = __ldg(a.lengths + b);
    start = 0;
    if (MASK) start = __ldg(a.starts + b);
    int from = start;
    if (WINDOW) from = max(from, length - a.tokens - a.window + 1);
    last = (length + BLOCK_N - 1) / BLOCK_N;
    first = min(from / BLOCK_N, last);
}

// All tiles of all sequences laid end to end: a worker's share, lo .. hi, and the sequence in which it begins, with the
// number of its first tile. Every warp works it out for itself.
struct Share { int b, at, lo, hi; };
__device__ __forceinline__ Share share_of(const Arguments &a, int worker) {
    if (a.splits) return {worker / a.splits, 0, worker % a.splits, 0};
    const int lane = threadIdx.x & 31;
    int total = 0, first, last, length, start;
    for (int b = lane; b < a.batch; b += 32) {
        tile_range(a, b, first, last, length, start);
        total += last - first;
    }
#pragma unroll
    for (int i = 16; i; i >>= 1) total += __shfl_xor_sync(~0u, total, i);
    const int active = max(min(a.workers, (total + a.min_tiles - 1) / a.min_tiles), 1);
    const int each = total / active, more = total - each * active;
    const int lo = worker * each + min(worker, more), hi = worker < active ? lo + each + (worker < more) : lo;
    int at = 0;
    for (int b0 = 0; b0 < a.batch; b0 += 32) {
        int tiles = 0;
        if (b0 + lane < a.batch) {
            tile_range(a, b0 + lane, first, last, length, start);
            tiles = last - first;
        }
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
__device__ __forceinline__ bool more_work(const Arguments &a, const Share &s, bool begun) {
    return a.splits ? !begun : s.b < a.batch && s.at < s.hi;
}
__device__ __forceinline__ Stretch stretch_of(const Arguments &a, Share &s) {
    Stretch t;
    tile_range(a, s.b, t.first, t.last, t.length, t.start);
    if (a.splits) {
        const int each = (t.last - t.first + a.splits - 1) / a.splits;
        t.begin = min(t.first + s.lo * each, t.last);
        t.stop = min(t.begin + each, t.last);
    } else {
        t.begin = t.first + max(s.lo - s.at, 0);
        t.stop = t.first + min(s.hi - s.at, t.last - t.first);
    }
    s.at += t.last - t.first;
    return t;
}

template <int N> __device__ __forceinline__ void scale_rows(float (&acc)[N], float a0, float a1) {
    if (__all_sync(~0u, a0 == 1.0f && a1 == 1.0f)) return;
#pragma unroll
    for (int i = 0; i < N; i += 4) { acc[i] *= a0; acc[i + 1] *= a0; acc[i + 2] *= a1; acc[i + 3] *= a1; }
}

// Accumulators of columns `column` on, times a factor a row: to the output, or to a part.
template <int N>
__device__ __forceinline__ void store_rows(const Arguments &a, float (&acc)[N], float f0, float f1, int b, bool whole, int slot, int row, int column) {
    const int rows = a.tokens * a.heads, at = column + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = row + half * 8;
        const float f = half ? f1 : f0;
        if (r < rows) {
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
}

extern "C" __global__ void __maxnreg__(REGISTERS)
mla_decode_hopper(const __grid_constant__ TensorMap c_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap q_map,
                  const __grid_constant__ TensorMap qr_map, const __grid_constant__ Arguments a) {
    extern __shared__ unsigned char raw[];
    const u32 base = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
    unsigned char *smem = raw + (base - (u32)__cvta_generic_to_shared(raw));
    const u32 full = base + AT_BARRIERS, empty = full + 8 * STAGES, q_full = empty + 8 * STAGES, q_empty = q_full + 8, p_full = q_full + 16, p_empty = q_full + 24;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, 1); barrier_init(empty + 8 * i, 4 * CONSUMERS); }
        barrier_init(q_full, 1); barrier_init(q_empty, 4); barrier_init(p_full, 4); barrier_init(p_empty, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int worker = blockIdx.y, first_row = blockIdx.x * ROWS, rows = a.tokens * a.heads;
    Share share = share_of(a, worker);
    u32 count = 0, sequences = 0, sent = 0;
    bool begun = false;

    if (warp == CONSUMERS * 4) {  // loads
        const u64 keep_none = gridDim.x > 1 ? 0x1000000000000000ull : 0x12F0000000000000ull, keep_all = 0x14F0000000000000ull;
        for (; more_work(a, share, begun); ++share.b, begun = true) {
            const int b = share.b;
            const Stretch t = stretch_of(a, share);
            for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
                const int n0 = tile * BLOCK_N;
                int outer = b, inner = n0;
                if (PAGE) {
                    outer = __ldg(a.block_table + b * a.stride_tb + n0 / (PAGE ? PAGE : 1));
                    inner = n0 % (PAGE ? PAGE : 1);
                }
                const u32 stage = count % STAGES, bar = full + 8 * stage, to = base + AT_TILES + stage * STAGE;
                barrier_wait(empty + 8 * stage, ((count / STAGES) & 1) ^ 1);
                if (lane == 0) barrier_expect(bar, STAGE);
                __syncwarp();
                if (lane < CHUNKS) load_box(to + lane * C_CHUNK, &c_map, lane * 64, outer * a.c_rows + inner, bar, keep_none);
                else if (lane < ALL) load_box(to + lane * C_CHUNK, &k_map, (lane - CHUNKS) * 64, outer * a.k_rows + inner, bar, keep_none);
                if (tile == t.begin) {
                    barrier_wait(q_empty, (sequences & 1) ^ 1);
                    if (lane == 0) barrier_expect(q_full, ALL * Q_CHUNK);
                    __syncwarp();
                    const int row = b * rows + first_row;
                    if (lane < CHUNKS) load_box(base + AT_Q + lane * Q_CHUNK, &q_map, lane * 64, row, q_full, keep_all);
                    else if (lane < ALL) load_box(base + AT_Q + lane * Q_CHUNK, &qr_map, (lane - CHUNKS) * 64, row, q_full, keep_all);
                    ++sequences;
                }
            }
        }
        return;
    }

    const int row_in = (warp & 3) * 16 + (lane >> 2), row = first_row + row_in;
    uint4 *exchange = (uint4 *)(smem + AT_P) + (threadIdx.x & 127);
    float *factor = (float *)(smem + AT_FACTOR);
    if (warp < 4) {  // scores, weights, left columns
        float acc[LEFT_N / 2];
        const int row_t0 = row / a.heads, row_t1 = (row + 8) / a.heads;
        for (; more_work(a, share, begun); ++share.b, begun = true) {
            const int b = share.b;
            const Stretch t = stretch_of(a, share);
            if (t.begin >= t.stop) {
                if (a.splits && (lane & 3) == 0) {  // a split that got no token
                    if (row < rows) a.part_lse[(i64)worker * rows + row] = minus_infinity();
                    if (row + 8 < rows) a.part_lse[(i64)worker * rows + row + 8] = minus_infinity();
                }
                continue;
            }
            int limit0 = t.length - a.tokens + row_t0 + 1, limit1 = t.length - a.tokens + row_t1 + 1, low0 = 0, low1 = 0, bare_lo = 0;
            bool holed = false;
            if (WINDOW) { low0 = limit0 - a.window; low1 = limit1 - a.window; bare_lo = t.length - a.window; }
            if (MASK) {
                low0 = max(low0, t.start); low1 = max(low1, t.start); bare_lo = max(bare_lo, t.start);
                holed = __ldg(a.holes + b) != 0;
                if (holed) limit0 = limit1 = t.length;  // the mask alone says what each query sees
            }
            const int bare_hi = t.length - a.tokens + 1;  // every row sees tokens bare_lo .. bare_hi
            float m0 = minus_infinity(), m1 = m0, l0 = 0, l1 = 0;
#pragma unroll
            for (int i = 0; i < LEFT_N / 2; ++i) acc[i] = 0;
            barrier_wait(q_full, sequences & 1);
            for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
                const int n0 = tile * BLOCK_N;
                const u32 stage = count % STAGES, at = base + AT_TILES + stage * STAGE;
                float s[BLOCK_N / 2];
                barrier_wait(full + 8 * stage, (count / STAGES) & 1);
                const u64 queries = descriptor(__shfl_sync(~0u, base + AT_Q, 0), 16), keys = descriptor(__shfl_sync(~0u, at, 0), 16);
                mma_fence();
#pragma unroll
                for (int c = 0; c < ALL; ++c)
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        if (c < CHUNKS ? c * 64 + k * 16 < RANK : (c - CHUNKS) * 64 + k * 16 < ROPE)
                            mma_scores(s, further(queries, c * Q_CHUNK + k * 32), further(keys, c * C_CHUNK + k * 32), c + k > 0);
                mma_commit();
                mma_wait<0>();
                keep(s);
                if (tile == t.stop - 1) {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(q_empty);
                }
                if (SOFTCAP) {
#pragma unroll
                    for (int i = 0; i < BLOCK_N / 2; ++i) {
                        const float x = s[i] * (a.scale_log2 / (LOG2E * a.softcap)), e = exp2_fast(-2.0f * LOG2E * fabsf(x)), y = (1.0f - e) / (1.0f + e);
                        s[i] = (x < 0 ? -y : y) * (a.softcap * LOG2E);
                    }
                }
                const float scale = SOFTCAP ? 1.0f : a.scale_log2;
                if (n0 + BLOCK_N > bare_hi || n0 < bare_lo || holed) {
#pragma unroll
                    for (int i = 0; i < BLOCK_N / 2; ++i) {
                        const int n = n0 + (i / 4) * 8 + (lane & 3) * 2 + (i & 1), upper = (i >> 1) & 1;
                        bool seen = n < (upper ? limit1 : limit0) && n >= (upper ? low1 : low0);
                        if (MASK)
                            if (holed && seen && row + 8 * upper < rows) seen = a.mask[b * a.stride_mb + (upper ? row_t1 : row_t0) * a.stride_mt + n] != 0;
                        if (!seen) s[i] = minus_infinity();
                    }
                    if (n0 + BLOCK_N > t.length) {  // what lies past the end may be NaN, and 0 * NaN would come through
                        for (int n = t.length - n0 + (threadIdx.x >> 3); n < BLOCK_N; n += 16)
#pragma unroll
                            for (int c = 0; c < CHUNKS; ++c) *(uint4 *)(smem + (at - base) + c * C_CHUNK + n * 128 + (threadIdx.x & 7) * 16) = make_uint4(0, 0, 0, 0);
                        fence_async();
                        asm volatile("bar.sync 1, 128;" ::: "memory");
                    }
                }
                float x0 = s[0], x1 = s[2];
#pragma unroll
                for (int i = 0; i < BLOCK_N / 2; i += 4) { x0 = fmaxf(x0, fmaxf(s[i], s[i + 1])); x1 = fmaxf(x1, fmaxf(s[i + 2], s[i + 3])); }
                x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
                x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2));
                const float new0 = fmaxf(m0, x0 * scale), new1 = fmaxf(m1, x1 * scale);
                // a row may have seen nothing yet: -inf - -inf is NaN
                const float shift0 = new0 == minus_infinity() ? 0.0f : new0, shift1 = new1 == minus_infinity() ? 0.0f : new1;
                const float f0 = exp2_fast(m0 - shift0), f1 = exp2_fast(m1 - shift1);
                m0 = new0; m1 = new1;
                l0 *= f0; l1 *= f1;
                u32 p[BLOCK_N / 4];
#pragma unroll
                for (int i = 0; i < BLOCK_N / 2; i += 4) {
                    const float e0 = exp2_fast(s[i] * scale - shift0), e1 = exp2_fast(s[i + 1] * scale - shift0);
                    const float e2 = exp2_fast(s[i + 2] * scale - shift1), e3 = exp2_fast(s[i + 3] * scale - shift1);
                    l0 += e0 + e1; l1 += e2 + e3;
                    p[i / 2] = pack(e0, e1); p[i / 2 + 1] = pack(e2, e3);
                }
                if (RIGHT) {
                    barrier_wait(p_empty, (sent & 1) ^ 1);
#pragma unroll
                    for (int i = 0; i < BLOCK_N / 16; ++i) exchange[i * 128] = make_uint4(p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
                    if ((lane & 3) == 0) { factor[row_in] = f0; factor[row_in + 8] = f1; }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(p_full);
                    ++sent;
                }
                scale_rows(acc, f0, f1);
                keep(acc);
                const u64 values = descriptor(__shfl_sync(~0u, at, 0), C_CHUNK);
                mma_fence();
#pragma unroll
                for (int k = 0; k < BLOCK_N / 16; ++k)
                    mma_left(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], further(values, k * 2048));
                mma_commit();
                mma_wait<0>();
                keep(acc);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * stage);
            }
            ++sequences;
            l0 += __shfl_xor_sync(~0u, l0, 1); l1 += __shfl_xor_sync(~0u, l1, 1);
            l0 += __shfl_xor_sync(~0u, l0, 2); l1 += __shfl_xor_sync(~0u, l1, 2);
            const float i0 = 1.0f / (l0 > 0 ? l0 : 1.0f), i1 = 1.0f / (l1 > 0 ? l1 : 1.0f);
            if (RIGHT) {
                barrier_wait(p_empty, (sent & 1) ^ 1);
                if ((lane & 3) == 0) { factor[row_in] = i0; factor[row_in + 8] = i1; }
                __syncwarp();
                if (lane == 0) barrier_arrive(p_full);
                ++sent;
            }
            const bool whole = t.begin == t.first && t.stop == t.last;
            const int slot = a.splits ? worker : 2 * worker + (t.begin == t.first);
            store_rows(a, acc, i0, i1, b, whole, slot, row, 0);
            if ((lane & 3) == 0) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = row + 8 * half;
                    const float lse = (half ? m1 : m0) + log2_fast(half ? l1 : l0);
                    if (r < rows) {
                        if (whole) a.lse[((i64)b * a.heads + r % a.heads) * a.tokens + r / a.heads] = lse * LN2;
                        else a.part_lse[(i64)slot * rows + r] = lse;
                    }
                }
            }
        }
        return;
    }

#if RANK > 64
    {  // right columns
        float acc[RIGHT_N / 2];
        for (; more_work(a, share, begun); ++share.b, begun = true) {
            const int b = share.b;
            const Stretch t = stretch_of(a, share);
            if (t.begin >= t.stop) continue;
#pragma unroll
            for (int i = 0; i < RIGHT_N / 2; ++i) acc[i] = 0;
            for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
                const u32 stage = count % STAGES, at = base + AT_TILES + stage * STAGE + LEFT * C_CHUNK;
                barrier_wait(p_full, sent & 1);
                ++sent;
                uint4 p[BLOCK_N / 16];
#pragma unroll
                for (int i = 0; i < BLOCK_N / 16; ++i) p[i] = exchange[i * 128];
                const float f0 = factor[row_in], f1 = factor[row_in + 8];
                __syncwarp();
                if (lane == 0) barrier_arrive(p_empty);
                barrier_wait(full + 8 * stage, (count / STAGES) & 1);
                scale_rows(acc, f0, f1);
                keep(acc);
                const u64 values = descriptor(__shfl_sync(~0u, at, 0), C_CHUNK);
                mma_fence();
#pragma unroll
                for (int k = 0; k < BLOCK_N / 16; ++k) mma_right(acc, p[k].x, p[k].y, p[k].z, p[k].w, further(values, k * 2048));
                mma_commit();
                mma_wait<0>();
                keep(acc);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * stage);
            }
            barrier_wait(p_full, sent & 1);
            ++sent;
            const float i0 = factor[row_in], i1 = factor[row_in + 8];
            __syncwarp();
            if (lane == 0) barrier_arrive(p_empty);
            store_rows(a, acc, i0, i1, b, t.begin == t.first && t.stop == t.last, a.splits ? worker : 2 * worker + (t.begin == t.first), row, LEFT_N);
        }
    }
#endif
}
