// Targets: compute_80 compute_90a
//
// Products for many rows: out = x w^T by tiles of 128 x 128, four slices of 32 columns on their way at a time. What is
// used where the vendor's library is not.

// Where 16 bytes of a tile's row are: turned so that 8 rows of one column meet all banks.
DEVICE u32 swizzled(u32 row, u32 chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

// A block of 256 threads: two warps by rows of x, four by rows of w, 64 x 32 each. k a multiple of 32, n of 16.
// Shared: 64 KiB.
template <int MODE>
DEVICE void multiply(const bf16* x, const bf16* w, void* out, u32 m, u32 n, u32 k, u32 stride) {
    const u32 STAGES = 4, STAGE = 16384;
    SHARED_MEMORY(shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Tiles of 16 rows of tiles are taken column by column, so that what runs at once shares its operands.
    u32 tiles_m = (m + 127) / 128, tiles_n = (n + 127) / 128;
    u32 group = blockIdx.x / (16 * tiles_n), within = blockIdx.x % (16 * tiles_n);
    u32 rows = tiles_m - group * 16 < 16 ? tiles_m - group * 16 : 16;
    u32 m0 = (group * 16 + within % rows) * 128, n0 = within / rows * 128;

    begin_next();
    await_previous();
    u32 slices = k / 32;
    auto fetch = [&](u32 slice) {
        u8* stage = shared + slice % STAGES * STAGE;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 number = threadIdx.x + i * 256, row = number / 4, chunk = number % 4;
            u64 column = slice * 32 + chunk * 8;
            bool inside = m0 + row < m;
            copy_async(stage + swizzled(row, chunk), x + (inside ? m0 + row : 0) * (u64)k + column, inside);
            inside = n0 + row < n;
            copy_async(stage + 8192 + swizzled(row, chunk), w + (inside ? n0 + row : 0) * (u64)k + column, inside);
        }
    };
    for (u32 slice = 0; slice < STAGES - 1; slice++) {
        if (slice < slices) fetch(slice);
        copy_commit();
    }
    float sums[4][4][4] = {};
    u32 wm = warp / 4 * 64, wn = warp % 4 * 32;
    for (u32 slice = 0; slice < slices; slice++) {
        copy_wait<2>();
        sync_block();
        if (slice + STAGES - 1 < slices) fetch(slice + STAGES - 1);
        copy_commit();
        u8* stage = shared + slice % STAGES * STAGE;
#pragma unroll
        for (u32 step = 0; step < 2; step++) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                load_matrix(a[i], stage + swizzled(wm + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (u32 j = 0; j < 2; j++)
                load_matrix(b[j], stage + 8192 + swizzled(wn + j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (u32 i = 0; i < 4; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    mma(sums[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 row = m0 + wm + i * 16 + half * 8 + g;
            if (row >= m) continue;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 column = n0 + wn + j * 8 + 2 * t;
                if (column >= n) continue;
                float v0 = sums[i][j][2 * half], v1 = sums[i][j][2 * half + 1];
                u64 at = (u64)row * stride + column;
                if (MODE == BF16) store((u32*)((bf16*)out + at), pack(v0, v1));
                if (MODE == F32) store((float2*)((float*)out + at), make_float2(v0, v1));
                if (MODE == ADD) {
                    float2* to = (float2*)((float*)out + at);
                    float2 old = load(to);
                    store(to, make_float2(old.x + v0, old.y + v1));
                }
                if (MODE == SWIGLU && j % 2 == 0) {
                    float u0 = sums[i][j + 1][2 * half], u1 = sums[i][j + 1][2 * half + 1];
                    bf16* to = (bf16*)out + (u64)row * stride + (n0 + wn + j * 8) / 2 + 2 * t;
                    store((u32*)to, pack(silu(v0) * u0, silu(v1) * u1));
                }
            }
        }
}

#define GEMM(name, mode)                                                                                         \
    KERNEL(256, 1) name(const bf16* x, const bf16* w, void* out, u32 m, u32 n, u32 k, u32 stride) {              \
        multiply<mode>(x, w, out, m, n, k, stride);                                                              \
    }

GEMM(gemm_bf16, BF16)
GEMM(gemm_add, ADD)
GEMM(gemm_swiglu, SWIGLU)
GEMM(gemm_f32, F32)
