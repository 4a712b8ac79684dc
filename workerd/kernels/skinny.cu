// Targets: compute_80 compute_90a
//
// Products for few rows (decode): out = x w^T for at most 16 rows of x. Bound by reading the weights once, so nothing
// goes through shared memory: a lane reads 16 bytes of two rows of weights and what they meet in one row of x, and these are the
// fragments of two `mma`s as they are, for which columns stand in which place of a fragment does not matter as long as
// both sides agree. The 8 warps of a block share its rows of weights by columns; their sums meet in shared memory, in
// the same order whatever the batch: a row's result does not depend on the rows beside it.

// Weights of two bytes: a lane has 8 of a row at a time, two `mma`s' worth. Of one byte (e4m3, see prelude.cuh): 16,
// four `mma`s' worth.
template <int BYTES> struct Slice {
    static const int COLUMNS = 64 / BYTES, STEPS = 4 / BYTES;
    // The left and the right half of a fragment's row for step `i`.
    static DEVICE_MEMBER uint2 of(uint4 v, int i) {
        if (BYTES == 2) return i == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w);
        return widened(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w);
    }
};

// `TILES` of 16 weight rows a block, `COLUMNS` of 8 rows of x. k a multiple of a slice; out[row of x][stride]. Sums are
// multiplied by their row's of `scales`, where weights are of one byte.
template <int BYTES, int TILES, int COLUMNS, int MODE>
DEVICE void skinny(const u8* weights, const float* scales, const bf16* x, void* out, u32 n, u32 k, u32 m, u32 stride) {
    using Of = Slice<BYTES>;
    const int AHEAD = (BYTES == 2 || COLUMNS == 1 ? 4 : 2) / TILES;  // Slices of a warp that are read before the first is used.
    const int PARTS = Of::STEPS / 2;                       // 16 bytes each, of a row of x.
    SHARED_MEMORY(shared);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 first = blockIdx.x * 16 * TILES;
    const u8* row[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 number = first + tile * 16 + half * 8 + g;
            row[tile][half] = weights + (u64)(number < n ? number : n - 1) * k * BYTES + 16 * t;
        }
    float sums[TILES][COLUMNS][4] = {};
    const u32 STRIDE = 8 * Of::COLUMNS;
    if (warp * Of::COLUMNS >= k) await_previous();
    for (u32 base = warp * Of::COLUMNS; base < k; base += STRIDE * AHEAD) {
        uint4 a[AHEAD][TILES][2], b[AHEAD][COLUMNS][PARTS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            u32 at = base + i * STRIDE;
            bool inside = at < k;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    a[i][tile][half] = inside ? load_stream((const uint4*)(row[tile][half] + at * BYTES)) : make_uint4(0, 0, 0, 0);
        }
        // Weights are constant: the first of them are on their way before the kernel before this one has ended.
        if (base == warp * Of::COLUMNS) await_previous();
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                u32 at = base + i * STRIDE, number = 8 * j + g;
                const bf16* from = x + (u64)number * k + at + 8 * PARTS * t;
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    b[i][j][part] = at < k && number < m ? load16(from + 8 * part) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int step = 0; step < Of::STEPS; step++)
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    uint2 p = Of::of(a[i][tile][0], step), q = Of::of(a[i][tile][1], step);
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) {
                        uint4 v = b[i][j][step / 2];
                        if (step % 2 == 0) mma(sums[tile][j], p.x, q.x, p.y, q.y, v.x, v.y);
                        else mma(sums[tile][j], p.x, q.x, p.y, q.y, v.z, v.w);
                    }
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
        if (BYTES == 1) {
            sum *= load(scales + feature);
            if (MODE == SWIGLU) up *= load(scales + feature + 8);
        }
        if (MODE == SWIGLU) feature = (first + tile * 16) / 2 + in_tile;
        u64 at = (u64)column * stride + feature;
        if (MODE == BF16) store((bf16*)out + at, to_bf16(sum));
        if (MODE == ADD) store((float*)out + at, load((float*)out + at) + sum);
        if (MODE == SWIGLU) store((bf16*)out + at, to_bf16(silu(sum) * up));
        if (MODE == F32) store((float*)out + at, sum);
    }
}

#define SKINNY(name, blocks, bytes, tiles, columns, mode)                                                         \
    KERNEL(256, blocks) name(const u8* weights, const float* scales, const bf16* x, void* out, u32 n, u32 k, u32 m, \
                             u32 stride) {                                                                        \
        skinny<bytes, tiles, columns, mode>(weights, scales, x, out, n, k, m, stride);                            \
    }
#define SKINNY_OF(kind, bytes, mode)                      \
    SKINNY(skinny_##kind##_1, 3, bytes, 1, 1, mode)       \
    SKINNY(skinny_##kind##_8, 2, bytes, 2, 1, mode)       \
    SKINNY(skinny_##kind##_16, 2, bytes, 2, 2, mode)

SKINNY_OF(bf16, 2, BF16)
SKINNY_OF(add, 2, ADD)
SKINNY_OF(swiglu, 2, SWIGLU)
SKINNY_OF(f32, 2, F32)
SKINNY_OF(f8_bf16, 1, BF16)
SKINNY_OF(f8_add, 1, ADD)
SKINNY_OF(f8_swiglu, 1, SWIGLU)
SKINNY_OF(f8_f32, 1, F32)

// to[row][k] = from[row][k] * scales[row], as bf16: for products of many rows. A thread 16 elements; k a multiple of 16.
KERNEL(256, 4) widen(const u8* from, const float* scales, bf16* to, u32 n, u32 k) {
    begin_next();
    await_previous();
    u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 16;
    if (at >= (u64)n * k) return;
    uint4 v = load_stream((const uint4*)(from + at));
    float scale = load(scales + at / k);
    u32 words[4] = {v.x, v.y, v.z, v.w};
    uint4 wide[2];
    u32* out = (u32*)wide;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint2 both = widened(words[i]);
        out[2 * i] = pack(low(both.x) * scale, high(both.x) * scale);
        out[2 * i + 1] = pack(low(both.y) * scale, high(both.y) * scale);
    }
    store((uint4*)(to + at), wide[0]);
    store((uint4*)(to + at + 8), wide[1]);
}
