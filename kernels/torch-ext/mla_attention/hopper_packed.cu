// Attention on packed rows (rows.py): bulk copies feed a ring of 64-token tiles, two warpgroups take turns at tiles.
//
// Tokens are the rows of the first product and channels those of the second, so that codes become the left operand in
// registers, and QUERIES query rows are the columns of both: S^T = C Q^T, O^T = C^T P^T. No dequantised number is written to
// shared memory. A thread may read any channels as its share of a product's depth, as long as the queries are stored in that
// order: 16 bytes at a time here. Which token is which row of the first product is as free (TOKEN_OF): with rows an odd
// multiple of 16 or of 32 bytes apart, neither product's reads have bank conflicts.
//
// A row's single scale (FOLD) multiplies scores and weights instead of codes. A weight's reference is not the largest score so far
// but one that keeps weights times scales below MOST: most tiles need no maximum, and one barrier.
//
// hopper_packed_rows.cu and hopper_packed_products.cu come before this file.

// What nobody sees may be anything: such rows become zeros. The warpgroup's threads meet afterwards.
__device__ __forceinline__ void clear_hidden(const Arguments &a, const Stretch &t, int b, int n0, int lowest, bool holed, u32 tile, int barrier) {
    const int thread = threadIdx.x & 127;
    for (int n = thread >> 3; n < BLOCK_N; n += 16) {
        bool hidden = n0 + n < lowest || n0 + n >= t.length;
        if (MASK)
            if (holed && !hidden) hidden = a.shown[b * a.stride_sb + n0 + n] == 0;
        if (!hidden) continue;
        for (int i = thread & 7; i < ROW_BYTES / 16; i += 8) asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile + n * STRIDE + i * 16), "r"(0) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    threads_sync(barrier, 128);
}

// The end of a stretch, unit by unit of the accumulators: the second warpgroup's numbers pass through the place of queries and
// weights to the first, which adds its own; then all threads copy rows of the sums to the output, or to a part. Loops keep the
// code short: it runs once, and the time to fetch it counts.
template <int U> __device__ __forceinline__ void finish_unit(const Arguments &a, const float (&acc)[ACC], u32 room, int b, bool whole, int slot) {
    using Me = Part<U>;
    constexpr int SIDES = Me::NIBBLES ? 2 : 1, COUNT = Me::NIBBLES ? Me::BLOCKS : 2 * Me::BLOCKS;  // channels side by side
    constexpr int WIDTH = 32 * COUNT, STEP = COUNT >= 4 ? 4 : COUNT, CHUNKS = WIDTH / 4;           // channels of a row and a side
    const int c = threadIdx.x & 3, mine = lane_first(0, COUNT);
    auto place = [&](int row, int side, int channel) {
        return room + ((row * SIDES + side) * CHUNKS + ((channel / 4) ^ (COUNT >= 4 ? row & 6 : 0))) * 16 + channel % 4 * 4;
    };
    auto pass = [&](bool add) {
#pragma unroll
        for (int i = 0; i < QUERIES / 8; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
                for (int side = 0; side < SIDES; ++side)
#pragma unroll
                    for (int k = 0; k < COUNT; k += STEP) {
                        const u32 at = place(8 * i + 2 * c + e, side, mine + k);
                        float x[STEP];
#pragma unroll
                        for (int j = 0; j < STEP; ++j) {
                            const int block = !Me::NIBBLES ? (k + j) / 2 : Me::BLOCKS == 1 ? 0 : (k + j) / 2 * 2 + side;
                            const int lower = Me::NIBBLES && Me::BLOCKS == 1 ? side : (k + j) & 1;
                            x[j] = acc[(Me::FIRST + block) * (QUERIES / 2) + 4 * i + 2 * lower + e];
                        }
                        if constexpr (STEP == 4) {
                            float y[4] = {0, 0, 0, 0};
                            if (add) asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3]) : "r"(at));
                            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x[0] + y[0]), "f"(x[1] + y[1]), "f"(x[2] + y[2]), "f"(x[3] + y[3]) : "memory");
                        } else
#pragma unroll
                            for (int j = 0; j < STEP; ++j) storef(at + 4 * j, x[j] + (add ? loadf(at + 4 * j) : 0.0f));
                    }
    };
    if (threadIdx.x >= 128) pass(false);
    threads_sync(3, 256);
    if (threadIdx.x < 128) pass(true);
    threads_sync(3, 256);
    const int rows = a.tokens * a.heads, first = Me::I * (Me::NIBBLES ? 128 : 256), size = Me::NIBBLES ? HALF4 : WIDE;
#pragma unroll 1
    for (int i = threadIdx.x; i < QUERIES * SIDES * CHUNKS; i += 256) {
        const int row = i / (SIDES * CHUNKS), side = i / CHUNKS % SIDES, at = first + i % CHUNKS * 4, r = blockIdx.x * QUERIES + row;
        if (r >= rows || at >= size) continue;
        float x[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(place(row, side, i % CHUNKS * 4)));
        const int channel = (Me::NIBBLES ? WIDE + side * HALF4 : 0) + at, q = a.tokens == 1 ? 0 : r / a.heads;
        if (whole) *(uint2 *)((u16 *)a.out + b * a.stride_ob + q * a.stride_ot + (r - q * a.heads) * a.stride_oh + channel) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
        else *(float4 *)(a.part + ((i64)slot * rows + r) * RANK + channel) = make_float4(x[0], x[1], x[2], x[3]);
    }
    if constexpr (U + 1 < UNITS) {
        threads_sync(3, 256);
        finish_unit<U + 1>(a, acc, room, b, whole, slot);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla_decode_packed_hopper(const __grid_constant__ Packed p, const __grid_constant__ Arguments a) {
    extern __shared__ unsigned char raw[];
    const u32 base = ((u32)__cvta_generic_to_shared(raw) + 1023) & ~1023u;
    const u32 full = base + AT_BARRIERS, empty = full + 8 * STAGES, state = base + AT_STATE;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2, c = lane & 3, g = lane >> 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) { barrier_init(full + 8 * i, 1); barrier_init(empty + 8 * i, 4); }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int worker = blockIdx.y, rows = a.tokens * a.heads;
    Share share = share_of(a, worker);
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 8) load_rows(a, p, share, base, full, empty);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    u32 count = 0, written = 0;
    const u32 magic = __shfl_sync(~0u, 0x64006400, 0);
    Stretch t;
    int b;
    if (a.splits && group == 0) {  // a split that gets no token
        Share mine = share;
        const int r = blockIdx.x * QUERIES + threadIdx.x;
        if (!next_stretch(a, mine, t, b) && threadIdx.x < QUERIES && r < rows) a.part_lse[(i64)worker * rows + r] = minus_infinity();
    }
    float acc[ACC];
    while (next_stretch(a, share, t, b)) {
        stage_queries(a, p, b, base);
        float l[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) l[i] = 0;
#pragma unroll
        for (int i = 0; i < ACC; ++i) acc[i] = 0;
        int lowest = MASK ? t.start : 0, bare_lo = lowest;
        if (WINDOW) { lowest = max(lowest, t.length - a.tokens - a.window + 1); bare_lo = max(bare_lo, t.length - a.window); }
        const bool holed = MASK ? __ldg(a.holes + b) != 0 : false;
        for (int tile = t.begin + (group + 2 - count % 2) % 2; tile < t.stop; tile += 2, ++written) {
            const u32 number = count + (tile - t.begin), stage = number % STAGES, at = base + AT_TILES + stage * STAGE;
            const int n0 = tile * BLOCK_N;
            barrier_wait(full + 8 * stage, (number / STAGES) & 1);
            if (n0 + BLOCK_N > t.length || n0 < lowest || holed) clear_hidden(a, t, b, n0, lowest, holed, at, 1 + group);
            Scores x;
            const int ta = (warp & 3) * 16 + token_of(g), tb = (warp & 3) * 16 + token_of(8 + g);
            x.ra = at + ta * STRIDE; x.rb = at + tb * STRIDE;
            x.queries = descriptor(base + AT_Q, 16);
            float sa = 1.0f, sb = 1.0f;
            if (FOLD) {
                u32 y = load16(x.ra + SCALES), z = load16(x.rb + SCALES);
                asm("cvt.f32.f16 %0, %1;" : "=f"(sa) : "h"((u16)y));
                asm("cvt.f32.f16 %0, %1;" : "=f"(sb) : "h"((u16)z));
            }
            x.magic = magic;
            score_tile(x, sa, sb);
            Columns words;
            u32 first[8];
            read_part<0>(words, at);
            float (&s)[QUERIES / 2] = x.s;
            float times[PER];  // scores are these times s
#pragma unroll
            for (int i = 0; i < PER; i += 2) load_floats(times[i], times[i + 1], state + (16 * QUERIES + 4 * i + 2 * c) * 4);
            if (SOFTCAP) {
#pragma unroll
                for (int i = 0; i < QUERIES / 2; ++i) {
                    const float y = s[i] * times[i / 4 * 2 + (i & 1)] / (LOG2E * a.softcap), z = exp2_fast(-2.0f * LOG2E * fabsf(y)), w = __fdividef(1.0f - z, 1.0f + z);
                    s[i] = (y < 0 ? -w : w) * (a.softcap * LOG2E);
                }
#pragma unroll
                for (int i = 0; i < PER; ++i) times[i] = 1.0f;
            }
            if (n0 + BLOCK_N > t.length - a.tokens + 1 || n0 < bare_lo || holed) {
#pragma unroll
                for (int i = 0; i < QUERIES / 8; ++i)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int r = blockIdx.x * QUERIES + 8 * i + 2 * c + e, q = r / a.heads;
                        const int limit = holed ? t.length : t.length - a.tokens + q + 1;
                        int low = MASK ? t.start : 0;
                        if (WINDOW) low = max(low, t.length - a.tokens + q + 1 - a.window);
#pragma unroll
                        for (int lower = 0; lower < 2; ++lower) {
                            const int n = n0 + (lower ? tb : ta);
                            bool seen = n < limit && n >= low;
                            if (MASK)
                                if (holed && seen && r < rows) seen = a.mask[b * a.stride_mb + q * a.stride_mt + n] != 0;
                            if (!seen) s[4 * i + 2 * lower + e] = minus_infinity();
                        }
                    }
            }
            const u32 weights = base + AT_P + (group * 2 + (written & 1)) * P_BYTES;
            float sums[PER], m[PER];
            const u32 references = state + ((17 + group) * QUERIES + 2 * c) * 4;
#pragma unroll
            for (int i = 0; i < PER; i += 2) load_floats(m[i], m[i + 1], references + 4 * i * 4);
            // What a weight is multiplied by: the reference is that of their products.
            const float ta_size = FOLD ? fmaxf(fabsf(sa), 0x1p-24f) : 1.0f, tb_size = FOLD ? fmaxf(fabsf(sb), 0x1p-24f) : 1.0f;
            convert_part<0, 0>(first, words, magic);
#pragma unroll
            for (int i = 0; i < 8; ++i) asm volatile("" : "+r"(first[i]));
            // Weights by the present reference, to shared memory; whether a score is too far above it.
            auto weigh = [&]() {
                float most[2] = {0, 0};
                u32 y[2][QUERIES / 8];
#pragma unroll
                for (int i = 0; i < QUERIES / 8; ++i) {
                    float w[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        w[k] = exp2_fast(fmaf(s[4 * i + k], times[2 * i + (k & 1)], -m[2 * i + (k & 1)]));
                        most[k >> 1] = fmaxf(most[k >> 1], w[k]);
                    }
                    sums[2 * i] = w[0] + w[2]; sums[2 * i + 1] = w[1] + w[3];
                    if (FOLD) { w[0] *= sa; w[1] *= sa; w[2] *= sb; w[3] *= sb; }
                    y[0][i] = pack_half(w[0], w[1]); y[1][i] = pack_half(w[2], w[3]);
                }
                const bool beyond = fmaxf(most[0] * ta_size, most[1] * tb_size) > MOST;
#pragma unroll
                for (int i = 0; i < QUERIES / 8; i += 2) {
                    const int row = 8 * (i + (lane >> 4)) + (lane & 7), chunk = 2 * (warp & 3) + (lane >> 3 & 1);
                    const u32 to = weights + row * 128 + ((chunk ^ (lane & 7)) << 4);
                    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(y[0][i]), "r"(y[1][i]), "r"(y[0][i + 1]), "r"(y[1][i + 1]) : "memory");
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                u32 any;
                asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, %2, 128, p;\nselp.u32 %0, 1, 0, q;\n}" : "=r"(any) : "r"((u32)beyond), "r"(1 + group) : "memory");
                return any != 0;
            };
            if (weigh()) {  // a new reference: the largest score so far
#pragma unroll
                for (int i = 0; i < PER; ++i) {
                    float v = s[4 * (i / 2) + (i & 1)] * times[i], z = s[4 * (i / 2) + 2 + (i & 1)] * times[i];
                    if (FOLD) { v += log2_fast(ta_size); z += log2_fast(tb_size); }
                    v = fmaxf(v, z);
                    v = fmaxf(v, __shfl_xor_sync(~0u, v, 4)); v = fmaxf(v, __shfl_xor_sync(~0u, v, 8)); v = fmaxf(v, __shfl_xor_sync(~0u, v, 16));
                    if (g == 0) storef(state + (warp * QUERIES + 8 * (i / 2) + 2 * c + (i & 1)) * 4, v);
                }
                threads_sync(1 + group, 128);
                float f[PER];
#pragma unroll
                for (int i = 0; i < PER; ++i) {
                    float v = m[i];
#pragma unroll
                    for (int k = 0; k < 4; ++k) v = fmaxf(v, loadf(state + ((group * 4 + k) * QUERIES + 8 * (i / 2) + 2 * c + (i & 1)) * 4));
                    f[i] = exp2_fast(m[i] - v);
                    m[i] = v;
                    if (g == 0 && (warp & 3) == 0) storef(references + (4 * (i & ~1) + (i & 1)) * 4, v);
                    l[i] *= f[i];
                }
#pragma unroll
                for (int i = 0; i < ACC; ++i) acc[i] *= f[2 * (i % (QUERIES / 2) / 4) + (i & 1)];
                weigh();
            }
#pragma unroll
            for (int i = 0; i < PER; ++i) l[i] += sums[i];
            attend_tile(acc, first, words, at, weights, magic);
            warp_arrive(empty + 8 * stage);
        }
        count += t.stop - t.begin;
        // Put together: references and sums of all warps first, then the second warpgroup's accumulators.
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            l[i] += __shfl_xor_sync(~0u, l[i], 4); l[i] += __shfl_xor_sync(~0u, l[i], 8); l[i] += __shfl_xor_sync(~0u, l[i], 16);
            const int r = 8 * (i / 2) + 2 * c + (i & 1);
            if (g == 0) storef(state + ((8 + warp) * QUERIES + r) * 4, l[i]);
        }
        threads_sync(3, 256);
        const bool whole = t.begin == t.first && t.stop == t.last;
        const int slot = slot_of(a, worker, t);
        if (threadIdx.x < QUERIES) {  // one thread for each row
            const int r = threadIdx.x, row = blockIdx.x * QUERIES + r;
            const float m0 = loadf(state + (17 * QUERIES + r) * 4), m1 = loadf(state + (18 * QUERIES + r) * 4);
            const float peak = fmaxf(m0, m1), f0 = exp2_fast(m0 - peak), f1 = exp2_fast(m1 - peak);
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) sum += loadf(state + ((8 + k) * QUERIES + r) * 4) * f0 + loadf(state + ((12 + k) * QUERIES + r) * 4) * f1;
            const float inverse = __fdividef(1.0f, sum > 0 ? sum : 1.0f);
            storef(state + r * 4, f0 * inverse);
            storef(state + (QUERIES + r) * 4, f1 * inverse);
            if (row < rows) {
                const float lse = peak + log2_fast(sum);
                if (whole) a.lse[((i64)b * a.heads + row % a.heads) * a.tokens + row / a.heads] = lse * LN2;
                else a.part_lse[(i64)slot * rows + row] = lse;
            }
        }
        threads_sync(3, 256);
        float f[PER];
#pragma unroll
        for (int i = 0; i < PER; i += 2) load_floats(f[i], f[i + 1], state + (group * QUERIES + 4 * i + 2 * c) * 4);
#pragma unroll
        for (int i = 0; i < ACC; ++i) acc[i] *= f[2 * (i % (QUERIES / 2) / 4) + (i & 1)];
        finish_unit<0>(a, acc, base + AT_Q, b, whole, slot);
    }
}
