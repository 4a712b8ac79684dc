// Targets: compute_80 compute_90a
//
// Products for few rows (decode): out = x w^T for at most 16 rows of x. Bound by reading the weights once, so nothing
// goes through shared memory: a lane reads 16 bytes of two rows of weights and of one row of x, and these are the
// fragments of two `mma`s as they are, for which columns stand in which place of a fragment does not matter as long as
// both sides agree. The 8 warps of a block share its rows of weights by columns; their sums meet in shared memory, in
// the same order whatever the batch: a row's result does not depend on the rows beside it.

// `TILES` of 16 weight rows a block, `COLUMNS` of 8 rows of x. k a multiple of 32; out[row of x][stride].
template <int TILES, int COLUMNS, int MODE>
DEVICE void skinny(const bf16* weights, const bf16* x, void* out, u32 n, u32 k, u32 m, u32 stride) {
    const int AHEAD = 4 / TILES;  // Slices of 32 columns that are read before the first is used.
    SHARED_MEMORY(shared);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 first = blockIdx.x * 16 * TILES;
    const bf16* row[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 number = first + tile * 16 + half * 8 + g;
            row[tile][half] = weights + (u64)(number < n ? number : n - 1) * k + 8 * t;
        }
    float sums[TILES][COLUMNS][4] = {};
    if (warp * 32 >= k) await_previous();
    for (u32 base = warp * 32; base < k; base += 256 * AHEAD) {
        uint4 a[AHEAD][TILES][2], b[AHEAD][COLUMNS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            u32 at = base + i * 256;
            bool inside = at < k;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    a[i][tile][half] = inside ? load_stream((const uint4*)(row[tile][half] + at)) : make_uint4(0, 0, 0, 0);
        }
        // Weights are constant: the first of them are on their way before the kernel before this one has ended.
        if (base == warp * 32) await_previous();
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                u32 at = base + i * 256, number = 8 * j + g;
                b[i][j] = at < k && number < m ? load16(x + (u64)number * k + at + 8 * t) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    uint4 p = a[i][tile][0], q = a[i][tile][1], v = b[i][j];
                    mma(sums[tile][j], p.x, q.x, p.y, q.y, v.x, v.y);
                    mma(sums[tile][j], p.z, q.z, p.w, q.w, v.z, v.w);
                }
    }
    begin_next();
    const int VALUES = TILES * COLUMNS * 4;
    float* parts = (float*)shared;  // [warp][value][lane]
#pragma unroll
    for (int value = 0; value < VALUES; value++)
        parts[(warp * VALUES + value) * 32 + lane] = sums[value / (COLUMNS * 4)][value / 4 % COLUMNS][value % 4];
    sync_block();
    for (u32 number = threadIdx.x; number < VALUES * 32; number += 256) {
        u32 value = number / 32, i = value % 4, j = value / 4 % COLUMNS, tile = value / (COLUMNS * 4);
        u32 column = 8 * j + 2 * (number % 4) + i % 2, in_tile = number % 32 / 4;
        if (column >= m || (MODE == SWIGLU && i >= 2)) continue;
        float sum = 0.0f, up = 0.0f;
        for (u32 w = 0; w < 8; w++) {
            sum += parts[w * VALUES * 32 + number];
            if (MODE == SWIGLU) up += parts[w * VALUES * 32 + number + 64];
        }
        u32 feature = first + tile * 16 + in_tile + i / 2 * 8;
        if (feature >= n) continue;
        if (MODE == SWIGLU) feature = (first + tile * 16) / 2 + in_tile;
        u64 at = (u64)column * stride + feature;
        if (MODE == BF16) store((bf16*)out + at, to_bf16(sum));
        if (MODE == ADD) store((float*)out + at, load((float*)out + at) + sum);
        if (MODE == SWIGLU) store((bf16*)out + at, to_bf16(silu(sum) * up));
        if (MODE == F32) store((float*)out + at, sum);
    }
}

#define SKINNY(name, blocks, tiles, columns, mode)                                                                \
    KERNEL(256, blocks) name(const bf16* weights, const bf16* x, void* out, u32 n, u32 k, u32 m, u32 stride) {    \
        skinny<tiles, columns, mode>(weights, x, out, n, k, m, stride);                                           \
    }

SKINNY(skinny_bf16_1, 3, 1, 1, BF16)
SKINNY(skinny_add_1, 3, 1, 1, ADD)
SKINNY(skinny_swiglu_1, 3, 1, 1, SWIGLU)
SKINNY(skinny_f32_1, 3, 1, 1, F32)
SKINNY(skinny_bf16_8, 2, 2, 1, BF16)
SKINNY(skinny_add_8, 2, 2, 1, ADD)
SKINNY(skinny_swiglu_8, 2, 2, 1, SWIGLU)
SKINNY(skinny_f32_8, 2, 2, 1, F32)
SKINNY(skinny_bf16_16, 2, 2, 2, BF16)
SKINNY(skinny_add_16, 2, 2, 2, ADD)
SKINNY(skinny_swiglu_16, 2, 2, 2, SWIGLU)
SKINNY(skinny_f32_16, 2, 2, 2, F32)
