// The combination of partial results.

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
