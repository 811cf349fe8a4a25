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
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int HALF4 = (RANK - WIDE) / 2;                        // bytes of 4-bit codes
constexpr int STEPS = RANK / 16 + ROPE / 16;                    // of 16 channels, of the first product
constexpr int Q_CHUNK = QUERIES * 128, Q_CHUNKS = (STEPS + 3) / 4;
constexpr int STAGE = 64 * STRIDE;
constexpr int P_BYTES = QUERIES * 128;                          // weights of a tile
__device__ constexpr int rest(int blocks) { return blocks % 4 == 3 ? 4 : blocks % 4; }
constexpr int BLOCKS8 = (WIDE + 63) / 64, UNITS8 = BLOCKS8 / 4, REST8 = rest(BLOCKS8), ALL8 = UNITS8 * 4 + REST8;
constexpr int BLOCKS4 = (HALF4 + 31) / 32, UNITS4 = BLOCKS4 / 4, REST4 = rest(BLOCKS4), ALL4 = UNITS4 * 4 + REST4;
constexpr int AT_Q = 0, AT_P = Q_CHUNKS * Q_CHUNK, LARGEST = ALL8 + ALL4 < 4 ? ALL8 + ALL4 : 4;
constexpr int AT_TILES = AT_P + 4 * P_BYTES > LARGEST * QUERIES * 256 ? AT_P + 4 * P_BYTES : LARGEST * QUERIES * 256, AT_STATE = (AT_TILES + STAGES * STAGE + 15) / 16 * 16,
              AT_BARRIERS = AT_STATE + (8 + 8 + 1 + 2) * QUERIES * 4;
constexpr int PER = QUERIES / 4;                                // columns of a thread
constexpr int ACC = (ALL8 + ALL4) * (QUERIES / 2);
constexpr float MOST = 64.0f, LOWEST = -1e30f;  // of a weight; reference before the first token

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
__device__ __forceinline__ void load_floats(float &x, float &y, u32 at) { asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at)); }
__device__ __forceinline__ void storef(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
// N words from shared memory, in the widest loads that N allows.
template <int N> __device__ __forceinline__ void load_words(u32 (&x)[N], u32 at) {
    if constexpr (N == 4) asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at));
    else if constexpr (N == 2) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at));
    else
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = load32(at + 4 * i);
}
// Two e4m3 numbers in the lower or upper half of a word, as float16.
__device__ __forceinline__ u32 floats8(u32 x, int upper) {
    u32 y;
    if (upper) asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(y) : "r"(x));
    else asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.rn.f16x2.e4m3x2 %0, l;\n}" : "=r"(y) : "r"(x));
    return y;
}
// Integer codes are read from bytes 0 and 2 of a word: with the exponent of 1024 above it, an integer is a float16's mantissa.
// `magic`, 0x64006400, is in a register, or the compiler would need two instructions to mask and to set bits.
__device__ __forceinline__ u32 masked(u32 x, u32 mask, u32 magic) { u32 y; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(magic)); return y; }
__device__ __forceinline__ u32 low_codes(u32 x, u32 magic) { return sub2(masked(x, 0x000f000f, magic), 0x64086408); }
__device__ __forceinline__ u32 high_codes(u32 x, u32 magic) { return fma2(masked(x, 0x00f000f0, magic), 0x2c002c00, 0xd480d480); }
__device__ __forceinline__ u32 byte_codes(u32 x, u32 magic) { return sub2(masked(x ^ 0x00800080, 0x00ff00ff, magic), 0x64806480); }

// The token, of 16, that is row or depth k of a product.
__device__ __forceinline__ int token_of(int k) {
    if (STRIDE % 32) return k & 1 ? 8 + (((k & 7) - 1 + 4 + (k >> 3)) & 7) : (k & 7) + (k >> 3);
    return (k & 8) | (k & 1) << 2 | ((k >> 1 & 3) ^ (k & 1) << 1);
}

// Where channel `x` of a section of `size` is in the first product's depth: byte of a row of queries. Of 4 bytes that a lane reads,
// e4m3 numbers are taken as pairs 0, 1 and 2, 3, and integers as pairs 0, 2 and 1, 3 (`spread`).
__device__ __forceinline__ int place(int step, int half, int c, int row) { return (step >> 2) * Q_CHUNK + row * 128 + ((((step & 3) * 2 + half) ^ (row & 7)) << 4) + c * 4; }
__device__ __forceinline__ int place_in(int size, int before, int x, int row, bool spread) {
    const int full = size / 64 * 64, w = size % 64 ? size % 64 / 4 : 1, rest = x < full ? x % 16 : (x - full) % w;
    const int c = x < full ? x % 64 / 16 : (x - full) / w, step = before + (x < full ? x / 64 * 4 : full / 16) + rest / 4;
    return place(step, spread ? rest & 1 : rest >> 1 & 1, c, row) + (spread ? rest & 2 : rest % 2 * 2);
}
__device__ __forceinline__ int place_of(int x, int row) {
    if (x < WIDE) return place_in(WIDE, 0, x, row, !FLOAT8);
    if (x < WIDE + HALF4) return place_in(HALF4, WIDE / 16, x - WIDE, row, true);
    if (x < RANK) return place_in(HALF4, (WIDE + HALF4) / 16, x - WIDE - HALF4, row, true);
    x -= RANK;
    if (ROPE8) return place_in(ROPE, RANK / 16, x, row, false);
    constexpr int FULL = ROPE / 32 * 32;
    const int rest = x < FULL ? x % 8 : (x - FULL) % 4, c = x < FULL ? x % 32 / 8 : (x - FULL) / 4;
    return place(RANK / 16 + (x < FULL ? x / 32 * 2 : FULL / 16) + rest / 4, rest % 4 / 2, c, row) + rest % 2 * 2;
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
            if (lane == 0) storef(base + AT_STATE + (16 * QUERIES + row) * 4, a.scale_log2 * inverse);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int at = i * 64 + lane * 2;
                const float low = __uint_as_float(x[k][i] << 16) * factor, high = __uint_as_float(x[k][i] & 0xffff0000) * factor;
                const u32 y = ROPE8 || at < RANK ? pack_half(low, high) : pack(low, high);
                const bool spread = at < RANK && (at >= WIDE || !FLOAT8);
                const u32 to = base + AT_Q + place_of(at, row);
                if (at < RANK + ROPE && !spread) asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(y) : "memory");
                if (at < RANK + ROPE && spread) {
                    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"((u16)y) : "memory");
                    asm volatile("st.shared.u16 [%0], %1;" ::"r"(base + AT_Q + place_of(at + 1, row)), "h"((u16)(y >> 16)) : "memory");
                }
            }
        }
    }
    if (threadIdx.x < 2 * QUERIES) storef(base + AT_STATE + (17 * QUERIES + threadIdx.x) * 4, LOWEST);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    threads_sync(3, 256);
}

// One warp loads tiles, in pieces of rows that lie side by side.
constexpr int PIECES = 64 / PIECE;
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
#pragma unroll 1
        for (int tile = t.begin; tile < t.stop; ++tile, ++count) {
            const int n0 = tile * BLOCK_N, stage = count % STAGES, some = min(BLOCK_N, t.length - n0);
            const u32 bar = full + 8 * stage, to = base + AT_TILES + stage * STAGE;
            i64 at[PIECES > 32 ? 2 : 1];
            constexpr int MANY = PIECES > 32 ? 2 : 1;
#pragma unroll
            for (int i = 0; i < MANY; ++i) {
                const int n = n0 + (lane + 32 * i) * PIECE;
                at[i] = 0;
                if ((lane + 32 * i) * PIECE < some) at[i] = PAGE ? __ldg(a.block_table + b * a.stride_tb + n / max(PAGE, 1)) * p.stride_cb + n % max(PAGE, 1) * p.stride_cn : b * p.stride_cb + n * p.stride_cn;
            }
            barrier_wait(empty + 8 * stage, ((count / STAGES) & 1) ^ 1);
            if (lane == 0) barrier_expect(bar, some * ROW_BYTES);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < MANY; ++i) {
                const int row = (lane + 32 * i) * PIECE;
                if (row < some) copy(to + row * STRIDE, p.rows + at[i], min(PIECE, some - row) * ROW_BYTES, bar);
            }
        }
}

// A scale twice, of the first product's token; `index` of the row's scales.
__device__ __forceinline__ u32 scale_twice(u32 row, int index) { return load16(row + SCALES + 2 * index) * 0x10001u; }
constexpr int SHARE = GROUP ? GROUP : 1 << 20;
constexpr bool FOLD = GROUP == 0 && (WIDE == 0 || HALF4 == 0) && (QUERIES < 64 || ALL8 + ALL4 < 4);  // registers
__device__ __forceinline__ u32 scaled(u32 codes, u32 scale) { return FOLD ? codes : mul2(codes, scale); }

// Products are committed in twos. So many pairs may be on their way, each with its left operands in 8 registers. With accumulators
// of more than four blocks, registers for a second pair cost more time than a wait.
constexpr int IN_FLIGHT = QUERIES == 64 || ALL8 + ALL4 == 1 || ALL8 + ALL4 > 4 ? 1 : 3;

// Scores of a tile, under way: a step's left operand is read from the rows of the tokens ra and rb. With FOLD, `part` has the
// latent's share, which is still to be multiplied by the rows' scales.
struct Scores {
    float s[QUERIES / 2], part[FOLD ? QUERIES / 2 : 1];
    u32 ra, rb;
    u64 queries;
    int done, part_done;
    u32 magic;
};
template <bool KEYS, bool LATENT> __device__ __forceinline__ void score_step(Scores &x, const u32 *f, int step) {
    const u64 at = further(x.queries, (step >> 2) * Q_CHUNK + (step & 3) * 32);
    if constexpr (FOLD && LATENT) {
        mma_f16(x.part, 0, f[0], f[1], f[2], f[3], at, x.part_done);
        x.part_done = 1;
        return;
    }
    if constexpr (KEYS) mma_bf16(x.s, 0, f[0], f[1], f[2], f[3], at, x.done);
    else mma_f16(x.s, 0, f[0], f[1], f[2], f[3], at, x.done);
    x.done = 1;
}
// Units of the first product: what a lane reads at once of its two rows, at most 16 bytes of each.
constexpr int S8 = (WIDE + 63) / 64, S4 = (HALF4 + 63) / 64, SK = ROPE8 ? (ROPE + 63) / 64 : (ROPE + 31) / 32, S_UNITS = S8 + S4 + SK;
__device__ constexpr int words_of(int size, int unit) { return 64 * (unit + 1) <= size ? 4 : size % 64 / 16; }
template <int U> struct Unit {
    static constexpr bool EIGHT = U < S8, FOUR = !EIGHT && U < S8 + S4, KEY8 = U >= S8 + S4 && ROPE8, KEY = U >= S8 + S4 && !ROPE8;
    static constexpr int I = EIGHT ? U : FOUR ? U - S8 : U - S8 - S4;
    static constexpr int WORDS = KEY ? (32 * (I + 1) <= ROPE ? 4 : 2) : words_of(EIGHT ? WIDE : FOUR ? HALF4 : ROPE, I);
    static constexpr int AT = (EIGHT ? 0 : FOUR ? CODES4 : ROPE_AT) + 64 * I;
    static constexpr int STEP = EIGHT ? 4 * I : FOUR ? WIDE / 16 + 4 * I : RANK / 16 + (KEY8 ? 4 : 2) * I, HIGH = (WIDE + HALF4) / 16 + 4 * I;
};
struct Words { u32 a[4], b[4], s[4]; };
template <int U> __device__ __forceinline__ void read_unit(Words &w, const Scores &x) {
    if constexpr (U < S_UNITS) {
        using Me = Unit<U>;
        const int c = threadIdx.x & 3, mine = Me::AT + c * Me::WORDS * 4;
        u32 a[Me::WORDS], b[Me::WORDS];
        load_words<Me::WORDS>(a, x.ra + mine);
        load_words<Me::WORDS>(b, x.rb + mine);
#pragma unroll
        for (int i = 0; i < Me::WORDS; ++i) { w.a[i] = a[i]; w.b[i] = b[i]; }
        if constexpr (Me::KEY8) {
            w.s[0] = scale_twice(x.ra, ALL_GROUPS); w.s[1] = scale_twice(x.rb, ALL_GROUPS);
        } else if constexpr (!FOLD && !Me::KEY) {
            const int at = 64 * Me::I + c * Me::WORDS * 4, low = (Me::FOUR ? GROUPS8 : 0) + at / SHARE;
            if (GROUP || Me::I == 0) { w.s[0] = scale_twice(x.ra, low); w.s[1] = scale_twice(x.rb, low); }
            if constexpr (Me::FOUR) {
                if (GROUP) { w.s[2] = scale_twice(x.ra, GROUPS8 + (HALF4 + at) / SHARE); w.s[3] = scale_twice(x.rb, GROUPS8 + (HALF4 + at) / SHARE); }
                else { w.s[2] = w.s[0]; w.s[3] = w.s[1]; }
            }
        }
    }
}
// Products of a unit, while the next unit's words are on their way.
template <int U> __device__ __forceinline__ void score_unit(Scores &x, Words &w) {
    using Me = Unit<U>;
    if constexpr (U < S_UNITS) {
        if constexpr (Me::EIGHT || Me::KEY8) {
#pragma unroll
            for (int first = 0; first < Me::WORDS; first += 2) {
                u32 f[2][4];
#pragma unroll
                for (int i = 0; i < 2 && first + i < Me::WORDS; ++i)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const u32 y = k & 1 ? w.b[first + i] : w.a[first + i];
                        if (Me::KEY8) f[i][k] = mul2(floats8(y, k >> 1), w.s[k & 1]);
                        else f[i][k] = scaled(FLOAT8 ? floats8(y, k >> 1) : byte_codes(k >> 1 ? y >> 8 : y, x.magic), w.s[k & 1]);
                    }
                if (first + 2 >= Me::WORDS) read_unit<U + 1>(w, x);
                mma_begin();
#pragma unroll
                for (int i = 0; i < 2 && first + i < Me::WORDS; ++i) score_step<false, !Me::KEY8>(x, f[i], Me::STEP + first + i);
                mma_commit();
                mma_wait<IN_FLIGHT>();
            }
        } else if constexpr (Me::FOUR) {
#pragma unroll
            for (int i = 0; i < Me::WORDS; ++i) {
                u32 f[4], g[4];
                const u32 y = w.a[i], z = w.b[i], p[4] = {y, z, y >> 8, z >> 8};
#pragma unroll
                for (int k = 0; k < 4; ++k) { f[k] = scaled(low_codes(p[k], x.magic), w.s[k & 1]); g[k] = scaled(high_codes(p[k], x.magic), w.s[2 + (k & 1)]); }
                if (i + 1 == Me::WORDS) read_unit<U + 1>(w, x);
                mma_begin();
                score_step<false, true>(x, f, Me::STEP + i);
                score_step<false, true>(x, g, Me::HIGH + i);
                mma_commit();
                mma_wait<IN_FLIGHT>();
            }
        } else {
            u32 f[Me::WORDS / 2][4];
#pragma unroll
            for (int i = 0; i < Me::WORDS / 2; ++i) { f[i][0] = w.a[2 * i]; f[i][1] = w.b[2 * i]; f[i][2] = w.a[2 * i + 1]; f[i][3] = w.b[2 * i + 1]; }
            Words next;
            read_unit<U + 1>(next, x);
            mma_begin();
#pragma unroll
            for (int i = 0; i < Me::WORDS / 2; ++i) score_step<true, false>(x, f[i], Me::STEP + i);
            mma_commit();
            mma_wait<IN_FLIGHT>();
            w = next;
        }
        score_unit<U + 1>(x, w);
    }
}
// sa and sb: the scales of the rows, where each has one.
__device__ __forceinline__ void score_tile(Scores &x, float sa, float sb) {
    Words w;
    x.done = x.part_done = 0;
    if (FOLD && !ROPE)
#pragma unroll
        for (int i = 0; i < QUERIES / 2; ++i) x.s[i] = 0;
    read_unit<0>(w, x);
    score_unit<0>(x, w);
    mma_wait<0>();
    keep(x.s);
    if (FOLD) {
        keep(x.part);
#pragma unroll
        for (int i = 0; i < QUERIES / 2; ++i) x.s[i] += x.part[FOLD ? i : 0] * (i & 2 ? sb : sa);
    }
}

// The second product: 4 steps of 16 tokens, each in units of BLOCKS blocks of 64 channels as left operands.
constexpr int UNITS = UNITS8 + (REST8 > 0) + UNITS4 + (REST4 > 0);
template <int K> struct Part {  // the K-th unit
    static constexpr int STEP = K / UNITS, U = K % UNITS, I = U < UNITS8 + (REST8 > 0) ? U : U - UNITS8 - (REST8 > 0);
    static constexpr bool NIBBLES = U >= UNITS8 + (REST8 > 0);
    static constexpr int BLOCKS = NIBBLES ? (I < UNITS4 ? 4 : REST4) : I < UNITS8 ? 4 : REST8;
    static constexpr int FIRST = (NIBBLES ? ALL8 : 0) + 4 * I, BYTES = NIBBLES ? BLOCKS : 2 * BLOCKS, WORDS = NIBBLES ? 1 : (BLOCKS + 1) / 2;
    static constexpr int PIECES = (BLOCKS + 1) / 2, PIECE_BYTES = NIBBLES ? 2 : 4;  // two blocks
};
// Channel, in its section, of a lane's part of a unit.
__device__ __forceinline__ int lane_first(int unit_first, int bytes) { return unit_first + ((threadIdx.x >> 5 & 3) * 8 + (threadIdx.x >> 2 & 7)) * bytes; }
struct Columns { u32 x[4][2], s[8]; };
__device__ __forceinline__ u32 row_of(u32 tile, int step, int i) { return tile + (step * 16 + token_of(2 * (threadIdx.x & 3) + (i & 1) + (i >> 1) * 8)) * STRIDE; }
template <int K> __device__ __forceinline__ void read_part(Columns &w, u32 tile) {
    if constexpr (K < 4 * UNITS) {
        using Me = Part<K>;
        const int lane_at = lane_first(Me::I * (Me::NIBBLES ? 128 : 256), Me::BYTES), at = (Me::NIBBLES ? CODES4 : 0) + lane_at;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 from = row_of(tile, Me::STEP, i) + at;
            if constexpr (Me::BYTES == 8) { u32 x[2]; load_words<2>(x, from); w.x[i][0] = x[0]; w.x[i][1] = x[1]; }
            else w.x[i][0] = Me::BYTES == 1 ? load8(from) : Me::BYTES == 2 ? load16(from) : load32(from);
        }
        if constexpr (!FOLD) {
            if (GROUP || Me::I == 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 scales = row_of(tile, Me::STEP, i) + SCALES + (Me::NIBBLES ? 2 * GROUPS8 : 0);
                    w.s[i] = load16(scales + lane_at / SHARE * 2);
                    if (GROUP && Me::NIBBLES) w.s[4 + i] = load16(scales + (HALF4 + lane_at) / SHARE * 2);
                }
            }
        }
    }
}
// Blocks 2 H and 2 H + 1 of a unit as left operands.
template <int K, int H> __device__ __forceinline__ void convert_part(u32 (&f)[8], Columns &w, u32 magic) {
    using Me = Part<K>;
    u32 l01 = 0, l23 = 0, h01 = 0, h23 = 0;
    if (!FOLD) {
        if (H == 0 && (GROUP || Me::I == 0)) { w.s[0] |= w.s[1] << 16; w.s[2] |= w.s[3] << 16; }
        if (H == 0 && GROUP && Me::NIBBLES) { w.s[4] |= w.s[5] << 16; w.s[6] |= w.s[7] << 16; }
        l01 = w.s[0]; l23 = w.s[2];
        h01 = GROUP ? w.s[4] : l01; h23 = GROUP ? w.s[6] : l23;
    }
    // Of each byte of a lane's row, two tokens side by side: y of the first two tokens, z of the others.
#pragma unroll
    for (int i = Me::PIECE_BYTES * H; i < Me::PIECE_BYTES * (H + 1) && i < Me::BYTES; ++i) {
        u32 y, z;
        if (Me::NIBBLES || !FLOAT8) {
            const u32 sel = i & 2 ? 0x7632 : 0x5410;
            y = prmt(w.x[0][i / 4], w.x[1][i / 4], sel); z = prmt(w.x[2][i / 4], w.x[3][i / 4], sel);
            if (i & 1) { y >>= 8; z >>= 8; }
        } else {
            const u32 sel = i & 2 ? 0x7362 : 0x5140;
            y = prmt(w.x[0][i / 4], w.x[1][i / 4], sel); z = prmt(w.x[2][i / 4], w.x[3][i / 4], sel);
        }
        if constexpr (!Me::NIBBLES) {  // channels 2 j and 2 j + 1 are rows 0 .. 7 and 8 .. 15 of a warp's block j
            const int at = i / 2 % 2 * 4 + (i & 1);
            f[at] = scaled(FLOAT8 ? floats8(y, i & 1) : byte_codes(y, magic), l01);
            f[at + 2] = scaled(FLOAT8 ? floats8(z, i & 1) : byte_codes(z, magic), l23);
        } else {  // the same of low nibbles in even blocks and of high ones in odd blocks; of a single byte, they share a block
            const int low = Me::BLOCKS == 1 ? 0 : i & 1, high = Me::BLOCKS == 1 ? 1 : low + 4;
            f[low] = scaled(low_codes(y, magic), l01); f[low + 2] = scaled(low_codes(z, magic), l23);
            f[high] = scaled(high_codes(y, magic), h01); f[high + 2] = scaled(high_codes(z, magic), h23);
        }
    }
}
template <int K, int H> __device__ __forceinline__ void attend_part(float (&acc)[ACC], const u32 (&f)[8], Columns &w, u32 tile, u64 matrix, u32 magic) {
    using Me = Part<K>;
    constexpr bool LAST = H + 1 == Me::PIECES;
    if constexpr (LAST) read_part<K + 1>(w, tile);
    mma_begin();
#pragma unroll
    for (int i = 2 * H; i < 2 * H + 2 && i < Me::BLOCKS; ++i) {
        const u32 *y = f + i % 2 * 4;
        mma_f16(acc, (Me::FIRST + i) * (QUERIES / 2), y[0], y[1], y[2], y[3], further(matrix, Me::STEP * 32), 1);
    }
    mma_commit();
    if constexpr (!LAST || K + 1 < 4 * UNITS) {
        mma_wait<IN_FLIGHT>();
        u32 g[8];
        constexpr int NEXT = LAST ? K + 1 : K, NEXT_H = LAST ? 0 : H + 1;
        convert_part<NEXT, NEXT_H>(g, w, magic);
        attend_part<NEXT, NEXT_H>(acc, g, w, tile, matrix, magic);
    }
}
// `w` has the words of the first unit, `f` its first blocks.
__device__ __forceinline__ void attend_tile(float (&acc)[ACC], const u32 (&f)[8], Columns &w, u32 tile, u32 weights, u32 magic) {
    keep(acc);
    attend_part<0, 0>(acc, f, w, tile, descriptor(weights, 16), magic);
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
