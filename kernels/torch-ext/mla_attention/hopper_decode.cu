// Attention on the latents: one warp feeds a ring of tiles through the tensor memory accelerator, two or three warpgroups compute.
//
// A program serves 64 rows, a row being one head of one query token, and walks over its share of all tiles of all sequences,
// laid end to end. Every latent tile is read by the tensor cores where it lies, as keys and, transposed, as values.
//
// Up to rank 256, warpgroups take turns at tiles, each with a maximum, a sum and accumulators of its own, and put them
// together at the end. Above, accumulators do not fit one warpgroup's registers, and two attend half of the columns each
// (BY_COLUMNS): the first of them computes scores and weights, and hands the weights to the second through shared memory.

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
        int lowest = MASK ? t.start : 0;  // that any query of the sequence sees
        if (WINDOW) lowest = max(lowest, t.length - a.tokens - a.window + 1);
        if (n0 + BLOCK_N > t.length || n0 < lowest || r.holed) {  // what nobody sees may be NaN, and 0 * NaN would come through
            const int thread = threadIdx.x & 127;
            for (int n = thread >> 3; n < BLOCK_N; n += 16) {
                bool hidden = n0 + n < lowest || n0 + n >= t.length;
                if (MASK)
                    if (r.holed && !hidden) hidden = a.shown[b * a.stride_sb + n0 + n] == 0;
                if (!hidden) continue;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) *(uint4 *)(values + c * C_CHUNK + n * 128 + (thread & 7) * 16) = make_uint4(0, 0, 0, 0);
            }
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

