// Packed rows (rows.py) in shared memory: sizes, codes as numbers, the queries beside them, and the warp that loads tiles.
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
