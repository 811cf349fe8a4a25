// The two products of a tile, with codes as left operands in registers: scores of its tokens, and weights times its channels.
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
