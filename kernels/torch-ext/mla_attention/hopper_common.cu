// What the kernels for Hopper share: sizes, the machine's instructions by name, and who works on which tiles.
//
// The launcher defines RANK, ROPE, BLOCK_N, STAGES, BF16, PAGE, MASK, WINDOW, SOFTCAP, PDL, and shares the layout of Arguments
// and of shared memory. It puts this file, the matrix instructions, hopper_decode.cu and hopper_combine.cu together.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(64) TensorMap { u64 opaque[16]; };

// `mask` says what each query sees, `shown` what some query of a sequence sees.
struct Arguments {
    const int *lengths, *starts, *holes, *block_table;
    const unsigned char *mask, *shown;
    void *out;
    float *lse, *part, *part_lse;
    i64 stride_tb, stride_ob, stride_ot, stride_oh, stride_mb, stride_mt, stride_sb;
    float scale_log2, softcap;
    int window, batch, tokens, heads, workers, min_tiles, splits, c_rows, k_rows;
};

#if !PACKED
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
#endif
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

