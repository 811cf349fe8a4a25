// Attention on packed rows (rows.py): bulk copies feed a ring of 64-token tiles, two warpgroups take turns at tiles.
//
// Tokens are the rows of the first product and channels those of the second, so that codes become the left operand in
// registers, and QUERIES query rows are the columns of both: S^T = C Q^T, O^T = C^T P^T. No dequantised number is written to
// shared memory. A thread may read any channels as its share of a product's depth, as long as the queries are stored in that
// order: 16 bytes at a time here. Which token is which row of the first product is as free (TOKEN_OF): with rows an odd
// multiple of 16 bytes apart, neither product's reads have bank conflicts.
//
// A weight's reference is not the largest score so far but one within a factor of 2^LAG of it: most tiles need no maximum, and
// one barrier.
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int HALF4 = (RANK - WIDE) / 2;                        // bytes of 4-bit codes
constexpr int STEPS = RANK / 16 + ROPE / 16;                    // of 16 channels, of the first product
constexpr int Q_CHUNK = QUERIES * 128, Q_CHUNKS = (STEPS + 3) / 4;
constexpr int STAGE = 64 * STRIDE;
constexpr int P_BYTES = QUERIES * 128;                          // weights of a tile
constexpr int AT_Q = 0, AT_P = Q_CHUNKS * Q_CHUNK, AT_TILES = AT_P + 4 * P_BYTES, AT_STATE = (AT_TILES + STAGES * STAGE + 15) / 16 * 16,
              AT_BARRIERS = AT_STATE + (8 + 8 + 1 + 2) * QUERIES * 4;
constexpr int PER = QUERIES / 4;                                // columns of a thread
__device__ constexpr int rest(int blocks) { return blocks % 4 == 3 ? 4 : blocks % 4; }
constexpr int BLOCKS8 = (WIDE + 63) / 64, UNITS8 = BLOCKS8 / 4, REST8 = rest(BLOCKS8), ALL8 = UNITS8 * 4 + REST8;
constexpr int BLOCKS4 = (HALF4 + 31) / 32, UNITS4 = BLOCKS4 / 4, REST4 = rest(BLOCKS4), ALL4 = UNITS4 * 4 + REST4;
constexpr int ACC = (ALL8 + ALL4) * (QUERIES / 2);
constexpr float LAG = 6.0f;

struct Packed {
    const u8 *rows;
    const u16 *q, *qr;
    i64 stride_cb, stride_cn, stride_qb, stride_qt, stride_qh, stride_rb, stride_rt, stride_rh;
};

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) { u32 d; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d; }
__device__ __forceinline__ u32 mul2(u32 a, u32 b) { u32 d; asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 sub2(u32 a, u32 b) { u32 d; asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) { u32 d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
__device__ __forceinline__ u32 pack_half(float low, float high) { u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
__device__ __forceinline__ u32 load16(u32 at) { u16 x; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at)); return x; }
__device__ __forceinline__ u32 load8(u32 at) { u32 x; asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(at)); return x; }
__device__ __forceinline__ u32 load32(u32 at) { u32 x; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at)); return x; }
__device__ __forceinline__ float loadf(u32 at) { float x; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at)); return x; }
__device__ __forceinline__ void storef(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
// N words from shared memory, in the widest loads that N allows.
template <int N> __device__ __forceinline__ void load_words(u32 (&x)[N], u32 at) {
    if constexpr (N == 4) asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
    else if constexpr (N == 2) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at));
    else
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = load32(at + 4 * i);
}
// Two 8-bit codes in the lower or upper half of a word, as float16.
__device__ __forceinline__ u32 codes8(u32 x, int upper) {
#if FLOAT8
    u32 y;
    if (upper) asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(y) : "r"(x));
    else asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(y) : "r"(x));
    return y;
#else
    return sub2(prmt(x ^ 0x80808080, 0x64646464, upper ? 0x4342 : 0x4140), 0x64806480);  // 1024 + 128 + code
#endif
}
__device__ __forceinline__ u32 floats8(u32 x, int upper) {
    u32 y;
    if (upper) asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(y) : "r"(x));
    else asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(y) : "r"(x));
    return y;
}
// Nibbles of bytes 0 and 2 of a word, minus 8, as float16: 1024 + nibble, or 1024 + 16 nibble, has them in the mantissa.
__device__ __forceinline__ u32 low_codes(u32 x) { return sub2((x & 0x000f000f) | 0x64006400, 0x64086408); }
__device__ __forceinline__ u32 high_codes(u32 x) { return fma2((x & 0x00f000f0) | 0x64006400, 0x2c002c00, 0xd480d480); }

// The token, of 16, that is row or depth k of a product.
__device__ __forceinline__ int token_of(int k) { return k & 1 ? 8 + (((k & 7) - 1 + 4 + (k >> 3)) & 7) : (k & 7) + (k >> 3); }

// Where the pair of channels `x`, x + 1 of a section of `size` is in the first product's depth: byte of a row of queries.
__device__ __forceinline__ int place(int step, int half, int c, int row) { return (step >> 2) * Q_CHUNK + row * 128 + ((((step & 3) * 2 + half) ^ (row & 7)) << 4) + c * 4; }
__device__ __forceinline__ int place_in(int size, int before, int x, int row) {
    const int full = size / 64 * 64, w = size % 64 ? size % 64 / 4 : 1, rest = x < full ? x % 16 : (x - full) % w;
    const int c = x < full ? x % 64 / 16 : (x - full) / w, step = before + (x < full ? x / 64 * 4 : full / 16) + rest / 4;
    return place(step, rest % 4 / 2, c, row);
}
__device__ __forceinline__ int place_of(int x, int row) {
    if (x < WIDE) return place_in(WIDE, 0, x, row);
    if (x < WIDE + HALF4) return place_in(HALF4, WIDE / 16, x - WIDE, row);
    if (x < RANK) return place_in(HALF4, (WIDE + HALF4) / 16, x - WIDE - HALF4, row);
    x -= RANK;
    if (ROPE8) return place_in(ROPE, RANK / 16, x, row);
    constexpr int FULL = ROPE / 32 * 32;
    const int rest = x < FULL ? x % 8 : (x - FULL) % 4, c = x < FULL ? x % 32 / 8 : (x - FULL) / 4;
    return place(RANK / 16 + (x < FULL ? x / 32 * 2 : FULL / 16) + rest / 4, rest % 4 / 2, c, row);
}

// The queries of a stretch's sequence as the right operand of the first product, in float16 (in bfloat16 where they meet rotary
// keys in bfloat16), each row times a power of two that brings its largest number to 8 .. 16.
__device__ __forceinline__ void stage_queries(const Arguments &a, const Packed &p, int b, u32 base) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rows = a.tokens * a.heads;
    threads_sync(3, 256);
    constexpr int EACH = (RANK + ROPE + 63) / 64, AT_ONCE = QUERIES / 8 < 4 ? QUERIES / 8 : 4;
#pragma unroll 1
    for (int first = 0; first < QUERIES / 8; first += AT_ONCE) {
        u32 x[AT_ONCE][EACH];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {  // all loads before their first use
            const int r = blockIdx.x * QUERIES + warp + 8 * (first + k), t = r / a.heads, h = r % a.heads;
            const u16 *q = p.q + b * p.stride_qb + t * p.stride_qt + h * p.stride_qh, *qr = p.qr + b * p.stride_rb + t * p.stride_rt + h * p.stride_rh;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int at = i * 64 + lane * 2;
                x[k][i] = r < rows && at < RANK + ROPE ? __ldg((const u32 *)(at < RANK ? q + at : qr + at - RANK)) : 0;
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int row = warp + 8 * (first + k);
            u32 peak = 0;
#pragma unroll
            for (int i = 0; i < EACH; ++i) peak = max(peak, max(x[k][i] & 0x7fff, x[k][i] >> 16 & 0x7fff));
            const u32 exponent = min(max(__reduce_max_sync(~0u, peak) >> 7, 27u), 227u);
            const float factor = __uint_as_float((257 - exponent) << 23), inverse = __uint_as_float((exponent - 3) << 23);
            if (lane == 0) storef(base + AT_STATE + (16 * QUERIES + row) * 4, blockIdx.x * QUERIES + row < rows ? a.scale_log2 * inverse : 0.0f);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int at = i * 64 + lane * 2;
                const float low = __uint_as_float(x[k][i] << 16) * factor, high = __uint_as_float(x[k][i] & 0xffff0000) * factor;
                const u32 y = ROPE8 || at < RANK ? pack_half(low, high) : pack(low, high);
                if (at < RANK + ROPE) asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + AT_Q + place_of(at, row)), "r"(y) : "memory");
            }
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    threads_sync(3, 256);
}

// One warp loads tiles, row by row or whole.
__device__ __forceinline__ void load_rows(const Arguments &a, const Packed &p, Share share, u32 base, u32 full, u32 empty) {
    const int lane = threadIdx.x & 31;
    const u64 policy = gridDim.x > 1 ? 0x1000000000000000ull : 0x12F0000000000000ull;  // row blocks read it again, or nobody does
    u32 count = 0;
    Stretch t;
    int b;
    auto copy = [&](u32 to, const u8 *from, u32 bytes, u32 bar) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
    };
    while (next_stretch(a, share, t, b))
        for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
            const int n0 = tile * BLOCK_N, stage = count % STAGES, some = min(BLOCK_N, t.length - n0);
            const u32 bar = full + 8 * stage, to = base + AT_TILES + stage * STAGE;
            i64 at[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = n0 + lane + 32 * i;
                if (lane + 32 * i < some) at[i] = PAGE ? __ldg(a.block_table + b * a.stride_tb + n / max(PAGE, 1)) * p.stride_cb + n % max(PAGE, 1) * p.stride_cn : b * p.stride_cb + n * p.stride_cn;
            }
            barrier_wait(empty + 8 * stage, ((count / STAGES) & 1) ^ 1);
            if (lane == 0) barrier_expect(bar, some * ROW_BYTES);
            __syncwarp();
#if ROWWISE
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (lane + 32 * i < some) copy(to + (lane + 32 * i) * STRIDE, p.rows + at[i], ROW_BYTES, bar);
#else
            if (lane == 0) copy(to, p.rows + at[0], some * ROW_BYTES, bar);
#endif
        }
}

// A scale twice, of the first product's token; `index` of the row's scales.
__device__ __forceinline__ u32 scale_twice(u32 row, int index) { return load16(row + SCALES + 2 * index) * 0x10001u; }
__device__ __forceinline__ u32 scale_pair(u32 row0, u32 row1, int index) { return load16(row0 + SCALES + 2 * index) | load16(row1 + SCALES + 2 * index) << 16; }
constexpr int SHARE = GROUP ? GROUP : 1 << 20;

// Scores of a tile, under way: a step's left operand is read from the rows of the tokens ra and rb.
struct Scores {
    float s[QUERIES / 2];
    u32 ra, rb;
    u64 queries;
    int done;
};
template <bool KEYS> __device__ __forceinline__ void score_step(Scores &x, const u32 (&f)[4], int step) {
    const u64 at = further(x.queries, (step >> 2) * Q_CHUNK + (step & 3) * 32);
    if constexpr (KEYS) mma_bf16(x.s, 0, f[0], f[1], f[2], f[3], at, x.done);
    else mma_f16(x.s, 0, f[0], f[1], f[2], f[3], at, x.done);
    x.done = 1;
}
// Steps of W * 4 channels from W bytes of a lane at `at` of a row: 8-bit codes.
template <int WORDS, bool KEYS> __device__ __forceinline__ void score8(Scores &x, int at, int step, u32 sa, u32 sb) {
    u32 a[WORDS], b[WORDS], f[WORDS][4];
    const int mine = at + (threadIdx.x & 3) * WORDS * 4;
    load_words<WORDS>(a, x.ra + mine);
    load_words<WORDS>(b, x.rb + mine);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        f[i][0] = mul2(KEYS ? floats8(a[i], 0) : codes8(a[i], 0), sa); f[i][1] = mul2(KEYS ? floats8(b[i], 0) : codes8(b[i], 0), sb);
        f[i][2] = mul2(KEYS ? floats8(a[i], 1) : codes8(a[i], 1), sa); f[i][3] = mul2(KEYS ? floats8(b[i], 1) : codes8(b[i], 1), sb);
    }
    mma_begin();
#pragma unroll
    for (int i = 0; i < WORDS; ++i) score_step<false>(x, f[i], step + i);
    mma_commit();
    mma_wait<1>();
}
template <int WORDS> __device__ __forceinline__ void score4(Scores &x, int at, int low_step, int high_step, u32 la, u32 lb, u32 ha, u32 hb) {
    u32 a[WORDS], b[WORDS];
    const int mine = at + (threadIdx.x & 3) * WORDS * 4;
    load_words<WORDS>(a, x.ra + mine);
    load_words<WORDS>(b, x.rb + mine);
#pragma unroll
    for (int first = 0; first < WORDS; first += 2) {  // two words at a time, for registers
        u32 f[2][4], g[2][4];
#pragma unroll
        for (int i = 0; i < 2 && first + i < WORDS; ++i) {
            const u32 y = a[first + i], z = b[first + i];
            const u32 a0 = prmt(y, 0, 0x4140), a1 = prmt(y, 0, 0x4342), b0 = prmt(z, 0, 0x4140), b1 = prmt(z, 0, 0x4342);
            f[i][0] = mul2(low_codes(a0), la); f[i][1] = mul2(low_codes(b0), lb); f[i][2] = mul2(low_codes(a1), la); f[i][3] = mul2(low_codes(b1), lb);
            g[i][0] = mul2(high_codes(a0), ha); g[i][1] = mul2(high_codes(b0), hb); g[i][2] = mul2(high_codes(a1), ha); g[i][3] = mul2(high_codes(b1), hb);
        }
        mma_begin();
#pragma unroll
        for (int i = 0; i < 2 && first + i < WORDS; ++i) { score_step<false>(x, f[i], low_step + first + i); score_step<false>(x, g[i], high_step + first + i); }
        mma_commit();
        mma_wait<1>();
    }
}
template <int WORDS> __device__ __forceinline__ void score_keys(Scores &x, int at, int step) {
    u32 a[WORDS], b[WORDS];
    const int mine = at + (threadIdx.x & 3) * WORDS * 4;
    load_words<WORDS>(a, x.ra + mine);
    load_words<WORDS>(b, x.rb + mine);
    mma_begin();
#pragma unroll
    for (int i = 0; i < WORDS / 2; ++i) {
        const u32 f[4] = {a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1]};
        score_step<true>(x, f, step + i);
    }
    mma_commit();
    mma_wait<1>();
}
__device__ __forceinline__ void score_tile(Scores &x) {
    const int c = threadIdx.x & 3;
    u32 sa = 0, sb = 0, ha = 0, hb = 0;
    x.done = 0;
    if (!GROUP && WIDE) { sa = scale_twice(x.ra, 0); sb = scale_twice(x.rb, 0); }
#pragma unroll
    for (int i = 0; i < WIDE / 64; ++i) {
        if (GROUP) { sa = scale_twice(x.ra, (64 * i + 16 * c) / SHARE); sb = scale_twice(x.rb, (64 * i + 16 * c) / SHARE); }
        score8<4, false>(x, 64 * i, 4 * i, sa, sb);
    }
    if constexpr (WIDE % 64 > 0) {
        constexpr int AT = WIDE / 64 * 64, W = WIDE % 64 / 16;
        if (GROUP) { sa = scale_twice(x.ra, (AT + 4 * W * c) / SHARE); sb = scale_twice(x.rb, (AT + 4 * W * c) / SHARE); }
        score8<W, false>(x, AT, AT / 16, sa, sb);
    }
    if (!GROUP && HALF4) { sa = ha = scale_twice(x.ra, GROUPS8); sb = hb = scale_twice(x.rb, GROUPS8); }
    constexpr int LOW = WIDE / 16, HIGH = (WIDE + HALF4) / 16;
#pragma unroll
    for (int i = 0; i < HALF4 / 64; ++i) {
        const int at = 64 * i + 16 * c;
        if (GROUP) {
            sa = scale_twice(x.ra, GROUPS8 + at / SHARE); sb = scale_twice(x.rb, GROUPS8 + at / SHARE);
            ha = scale_twice(x.ra, GROUPS8 + (HALF4 + at) / SHARE); hb = scale_twice(x.rb, GROUPS8 + (HALF4 + at) / SHARE);
        }
        score4<4>(x, CODES4 + 64 * i, LOW + 4 * i, HIGH + 4 * i, sa, sb, ha, hb);
    }
    if constexpr (HALF4 % 64 > 0) {
        constexpr int AT = HALF4 / 64 * 64, W = HALF4 % 64 / 16;
        const int at = AT + 4 * W * c;
        if (GROUP) {
            sa = scale_twice(x.ra, GROUPS8 + at / SHARE); sb = scale_twice(x.rb, GROUPS8 + at / SHARE);
            ha = scale_twice(x.ra, GROUPS8 + (HALF4 + at) / SHARE); hb = scale_twice(x.rb, GROUPS8 + (HALF4 + at) / SHARE);
        }
        score4<W>(x, CODES4 + AT, LOW + AT / 16, HIGH + AT / 16, sa, sb, ha, hb);
    }
    if constexpr (ROPE8 && ROPE > 0) {
        sa = scale_twice(x.ra, ALL_GROUPS); sb = scale_twice(x.rb, ALL_GROUPS);
#pragma unroll
        for (int i = 0; i < ROPE / 64; ++i) score8<4, true>(x, ROPE_AT + 64 * i, RANK / 16 + 4 * i, sa, sb);
        if constexpr (ROPE % 64 > 0) score8<ROPE % 64 / 16, true>(x, ROPE_AT + ROPE / 64 * 64, RANK / 16 + ROPE / 64 * 4, sa, sb);
    } else {
#pragma unroll
        for (int i = 0; i < ROPE / 32; ++i) score_keys<4>(x, ROPE_AT + 64 * i, RANK / 16 + 2 * i);
        if constexpr (ROPE % 32 > 0) score_keys<2>(x, ROPE_AT + ROPE / 32 * 64, RANK / 16 + ROPE / 32 * 2);
    }
    mma_wait<0>();
    keep(x.s);
}

// BLOCKS blocks of 64 channels of 16 tokens as left operands: a lane holds 2 * BLOCKS channels of 8 bits at `at`, of 4 tokens.
template <int BLOCKS> __device__ __forceinline__ void values8(u32 (&f)[16], const u32 (&rows)[4], int at, u32 s01, u32 s23) {
    constexpr int WORDS = (BLOCKS + 1) / 2;
    u32 x[4][WORDS];
    const int warp = threadIdx.x >> 5 & 3, g = threadIdx.x >> 2 & 7, mine = at + (warp * 8 + g) * 2 * BLOCKS;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if constexpr (BLOCKS == 1) x[i][0] = load16(rows[i] + mine);
        else load_words<WORDS>(x[i], rows[i] + mine);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const u32 sel = i & 1 ? 0x7362 : 0x5140, y = prmt(x[0][i / 2], x[1][i / 2], sel), z = prmt(x[2][i / 2], x[3][i / 2], sel);
        f[4 * i] = mul2(codes8(y, 0), s01); f[4 * i + 1] = mul2(codes8(y, 1), s01);
        f[4 * i + 2] = mul2(codes8(z, 0), s23); f[4 * i + 3] = mul2(codes8(z, 1), s23);
    }
}
// The same of BLOCKS bytes of two nibbles: low ones are rows 0 .. 7 of a warp's block, high ones rows 8 .. 15.
template <int BLOCKS> __device__ __forceinline__ void values4(u32 (&f)[16], const u32 (&rows)[4], int at, u32 l01, u32 l23, u32 h01, u32 h23) {
    u32 x[4];
    const int warp = threadIdx.x >> 5 & 3, g = threadIdx.x >> 2 & 7, mine = at + (warp * 8 + g) * BLOCKS;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = BLOCKS == 1 ? load8(rows[i] + mine) : BLOCKS == 2 ? load16(rows[i] + mine) : load32(rows[i] + mine);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const u32 sel = (4 + i) << 8 | i, y = prmt(x[0], x[1], sel), z = prmt(x[2], x[3], sel);
        f[4 * i] = mul2(low_codes(y), l01); f[4 * i + 1] = mul2(high_codes(y), h01);
        f[4 * i + 2] = mul2(low_codes(z), l23); f[4 * i + 3] = mul2(high_codes(z), h23);
    }
}
template <int BLOCKS> __device__ __forceinline__ void attend_blocks(float (&acc)[ACC], const u32 (&f)[16], int first, u64 weights) {
    mma_begin();
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) mma_f16(acc, (first + i) * (QUERIES / 2), f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3], weights, 1);
    mma_commit();
    mma_wait<1>();
}
// Channel, in its section, of a lane's part of a unit.
__device__ __forceinline__ int lane_first(int unit_first, int bytes) { return unit_first + ((threadIdx.x >> 5 & 3) * 8 + (threadIdx.x >> 2 & 7)) * bytes; }
template <int BLOCKS> __device__ __forceinline__ void attend8(float (&acc)[ACC], u32 (&f)[16], const u32 (&rows)[4], int unit, u64 weights, u32 s01, u32 s23) {
    if (GROUP) {
        const int index = lane_first(unit * 256, 2 * BLOCKS) / SHARE;
        s01 = scale_pair(rows[0], rows[1], index); s23 = scale_pair(rows[2], rows[3], index);
    }
    values8<BLOCKS>(f, rows, unit * 256, s01, s23);
    attend_blocks<BLOCKS>(acc, f, unit * 4, weights);
}
template <int BLOCKS> __device__ __forceinline__ void attend4(float (&acc)[ACC], u32 (&f)[16], const u32 (&rows)[4], int unit, u64 weights, u32 s01, u32 s23) {
    u32 h01 = s01, h23 = s23;
    if (GROUP) {
        const int at = lane_first(unit * 128, BLOCKS), low = GROUPS8 + at / SHARE, high = GROUPS8 + (HALF4 + at) / SHARE;
        s01 = scale_pair(rows[0], rows[1], low); s23 = scale_pair(rows[2], rows[3], low);
        h01 = scale_pair(rows[0], rows[1], high); h23 = scale_pair(rows[2], rows[3], high);
    }
    values4<BLOCKS>(f, rows, CODES4 + unit * 128, s01, s23, h01, h23);
    attend_blocks<BLOCKS>(acc, f, ALL8 + unit * 4, weights);
}
__device__ __forceinline__ void attend_tile(float (&acc)[ACC], u32 tile, u32 weights) {
    const int c = threadIdx.x & 3;
    const u64 matrix = descriptor(weights, 16);
    u32 f[2][16];
    constexpr int UNITS = UNITS8 + (REST8 > 0) + UNITS4 + (REST4 > 0);
    keep(acc);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const u32 at = tile + step * 16 * STRIDE;
        const u32 rows[4] = {at + token_of(2 * c) * STRIDE, at + token_of(2 * c + 1) * STRIDE, at + token_of(2 * c + 8) * STRIDE, at + token_of(2 * c + 9) * STRIDE};
        const u64 w = further(matrix, step * 32);
        u32 s01 = 0, s23 = 0;
        if (!GROUP && WIDE) { s01 = scale_pair(rows[0], rows[1], 0); s23 = scale_pair(rows[2], rows[3], 0); }
#pragma unroll
        for (int u = 0; u < UNITS8; ++u) attend8<4>(acc, f[(step * UNITS + u) & 1], rows, u, w, s01, s23);
        if constexpr (REST8 > 0) attend8<REST8>(acc, f[(step * UNITS + UNITS8) & 1], rows, UNITS8, w, s01, s23);
        if (!GROUP && HALF4) { s01 = scale_pair(rows[0], rows[1], GROUPS8); s23 = scale_pair(rows[2], rows[3], GROUPS8); }
        constexpr int BEFORE = UNITS8 + (REST8 > 0);
#pragma unroll
        for (int u = 0; u < UNITS4; ++u) attend4<4>(acc, f[(step * UNITS + BEFORE + u) & 1], rows, u, w, s01, s23);
        if constexpr (REST4 > 0) attend4<REST4>(acc, f[(step * UNITS + BEFORE + UNITS4) & 1], rows, UNITS4, w, s01, s23);
    }
    mma_wait<0>();
    keep(acc);
}

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

// Columns of the accumulators to rows of the output, or of a part.
template <int BLOCKS, bool NIBBLES>
__device__ __forceinline__ void store_unit(const Arguments &a, const float (&acc)[ACC], const float (&f)[PER], int first, int unit, int b, bool whole, int slot) {
    const int rows = a.tokens * a.heads, c = threadIdx.x & 3;
    const int lane_at = NIBBLES ? lane_first(unit * 128, BLOCKS) : lane_first(unit * 256, 2 * BLOCKS), size = NIBBLES ? HALF4 : WIDE;
#pragma unroll
    for (int i = 0; i < QUERIES / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = blockIdx.x * QUERIES + 8 * i + 2 * c + e;
            if (r >= rows) continue;
            u16 *to = (u16 *)a.out + b * a.stride_ob + (r / a.heads) * a.stride_ot + (r % a.heads) * a.stride_oh;
            float *part = a.part + ((i64)slot * rows + r) * RANK;
            constexpr int COUNT = NIBBLES ? BLOCKS : 2 * BLOCKS;  // channels side by side
#pragma unroll
            for (int side = 0; side < (NIBBLES ? 2 : 1); ++side) {
                const int at = (NIBBLES ? WIDE + side * HALF4 : 0) + lane_at;
                float x[COUNT];
#pragma unroll
                for (int k = 0; k < COUNT; ++k) {
                    const int block = NIBBLES ? k : k / 2, lower = NIBBLES ? side : k & 1;
                    x[k] = acc[(first + block) * (QUERIES / 2) + 4 * i + 2 * lower + e] * f[2 * i + e];
                }
                constexpr int STEP = COUNT >= 4 ? 4 : COUNT;
#pragma unroll
                for (int k = 0; k < COUNT; k += STEP) {
                    if (lane_at + k >= size) continue;
                    if constexpr (STEP == 4) {
                        if (whole) *(uint2 *)(to + at + k) = make_uint2(pack(x[k], x[k + 1]), pack(x[k + 2], x[k + 3]));
                        else *(float4 *)(part + at + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
                    } else if constexpr (STEP == 2) {
                        if (whole) *(u32 *)(to + at + k) = pack(x[k], x[k + 1]);
                        else *(float2 *)(part + at + k) = make_float2(x[k], x[k + 1]);
                    } else {
                        if (whole) to[at + k] = (u16)pack(x[k], 0);
                        else part[at + k] = x[k];
                    }
                }
            }
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
        float m[PER], l[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) { m[i] = minus_infinity(); l[i] = 0; }
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
            score_tile(x);
            float (&s)[QUERIES / 2] = x.s;
#pragma unroll
            for (int i = 0; i < QUERIES / 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float scale = loadf(state + (16 * QUERIES + 8 * i + 2 * c + e) * 4);
#pragma unroll
                    for (int lower = 0; lower < 2; ++lower) {
                        float &v = s[4 * i + 2 * lower + e];
                        v *= scale;
                        if (SOFTCAP) {
                            const float y = v / (LOG2E * a.softcap), z = exp2_fast(-2.0f * LOG2E * fabsf(y)), w = __fdividef(1.0f - z, 1.0f + z);
                            v = (y < 0 ? -w : w) * (a.softcap * LOG2E);
                        }
                    }
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
            float sums[PER];
            // Weights by the present reference, to shared memory; whether a score is too far above it.
            auto weigh = [&]() {
                bool beyond = false;
                u32 y[2][QUERIES / 8];
#pragma unroll
                for (int i = 0; i < QUERIES / 8; ++i) {
                    float w[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const float from = m[2 * i + (k & 1)], v = s[4 * i + k];
                        beyond = beyond || v > from + LAG;
                        w[k] = exp2_fast(v - (from == minus_infinity() ? 0.0f : from));
                    }
                    sums[2 * i] = w[0] + w[2]; sums[2 * i + 1] = w[1] + w[3];
                    y[0][i] = pack_half(w[0], w[1]); y[1][i] = pack_half(w[2], w[3]);
                }
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
                    float v = fmaxf(s[4 * (i / 2) + (i & 1)], s[4 * (i / 2) + 2 + (i & 1)]);
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
                    f[i] = exp2_fast(m[i] - (v == minus_infinity() ? 0.0f : v));
                    m[i] = v;
                    l[i] *= f[i];
                }
#pragma unroll
                for (int i = 0; i < ACC; ++i) acc[i] *= f[2 * (i % (QUERIES / 2) / 4) + (i & 1)];
                weigh();
            }
#pragma unroll
            for (int i = 0; i < PER; ++i) l[i] += sums[i];
            attend_tile(acc, at, weights);
            warp_arrive(empty + 8 * stage);
        }
        count += t.stop - t.begin;
        // Put together: references and sums of all warps first, then the second warpgroup's accumulators.
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            l[i] += __shfl_xor_sync(~0u, l[i], 4); l[i] += __shfl_xor_sync(~0u, l[i], 8); l[i] += __shfl_xor_sync(~0u, l[i], 16);
            const int r = 8 * (i / 2) + 2 * c + (i & 1);
            if (g == 0) storef(state + ((8 + warp) * QUERIES + r) * 4, l[i]);
            if (g == 0 && (warp & 3) == 0) storef(state + ((17 + group) * QUERIES + r) * 4, m[i]);
        }
        threads_sync(3, 256);
        float f[PER];
        const bool whole = t.begin == t.first && t.stop == t.last;
        const int slot = slot_of(a, worker, t);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int r = 8 * (i / 2) + 2 * c + (i & 1), row = blockIdx.x * QUERIES + r;
            const float m0 = loadf(state + (17 * QUERIES + r) * 4), m1 = loadf(state + (18 * QUERIES + r) * 4), peak = fmaxf(m0, m1);
            const float shift = peak == minus_infinity() ? 0.0f : peak, f0 = exp2_fast(m0 - shift), f1 = exp2_fast(m1 - shift);
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) sum += loadf(state + ((8 + k) * QUERIES + r) * 4) * f0 + loadf(state + ((12 + k) * QUERIES + r) * 4) * f1;
            f[i] = (group ? f1 : f0) * (1.0f / (sum > 0 ? sum : 1.0f));
            if (group == 0 && warp == 0 && g == 0 && row < rows) {
                const float lse = peak + log2_fast(sum);
                if (whole) a.lse[((i64)b * a.heads + row % a.heads) * a.tokens + row / a.heads] = lse * LN2;
                else a.part_lse[(i64)slot * rows + row] = lse;
            }
        }
#pragma unroll
        for (int i = 0; i < ACC; ++i) acc[i] *= f[2 * (i % (QUERIES / 2) / 4) + (i & 1)];
        // The second warpgroup's numbers pass through the place of the weights, 4 * P_BYTES, slice by slice.
        constexpr int SLICE = 4 * P_BYTES / 512 < ACC ? 4 * P_BYTES / 512 : ACC;
#pragma unroll
        for (int first = 0; first < ACC; first += SLICE) {
#pragma unroll
            for (int i = 0; i < SLICE; i += 4)
                if (group && first + i < ACC) asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(base + AT_P + (i * 128 + (threadIdx.x & 127) * 4) * 4), "f"(acc[first + i]), "f"(acc[first + i + 1]), "f"(acc[first + i + 2]), "f"(acc[first + i + 3]) : "memory");
            threads_sync(3, 256);
#pragma unroll
            for (int i = 0; i < SLICE; i += 4)
                if (!group && first + i < ACC) {
                    float y[4];
                    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3]) : "r"(base + AT_P + (i * 128 + (threadIdx.x & 127) * 4) * 4));
#pragma unroll
                    for (int k = 0; k < 4; ++k) acc[first + i + k] += y[k];
                }
            threads_sync(3, 256);
        }
        if (!group) {
            float one[PER];
#pragma unroll
            for (int i = 0; i < PER; ++i) one[i] = 1.0f;
#pragma unroll
            for (int u = 0; u < UNITS8; ++u) store_unit<4, false>(a, acc, one, 4 * u, u, b, whole, slot);
            if constexpr (REST8 > 0) store_unit<REST8, false>(a, acc, one, 4 * UNITS8, UNITS8, b, whole, slot);
#pragma unroll
            for (int u = 0; u < UNITS4; ++u) store_unit<4, true>(a, acc, one, ALL8 + 4 * u, u, b, whole, slot);
            if constexpr (REST4 > 0) store_unit<REST4, true>(a, acc, one, ALL8 + 4 * UNITS4, UNITS4, b, whole, slot);
        }
    }
}
