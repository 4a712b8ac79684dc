// Targets: compute_80 compute_90a
//
// Attention of many new tokens of a sequence over its blocks, theirs included (FlashAttention-2, Dao 2023): 128 tokens of
// one query head a block, tiles of 64 keys and values, the next on its way while one is used. Each of four warps has 32
// tokens, so that what it reads from shared memory serves two `mma`s.

// A tile: first row of queries, how many, position of the first, where the sequence's block table begins.
// Shared: (128 + 2 * 2 * 64) * SIZE * 2 bytes. Online softmax as in decode.cu.
template <int SIZE>
DEVICE void attend(const bf16* queries, Pool pool, u32 layer, const uint4* tiles, const u32* tables, u32 heads,
                   u32 kv_heads, float scale, bf16* out) {
    const u32 CHUNKS = SIZE / 8, PLANE = 64 * SIZE * 2;
    SHARED_MEMORY(shared);
    begin_next();
    await_previous();
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.x, kv_head = head / (heads / kv_heads);
    uint4 tile = load(tiles + blockIdx.y);
    u32 count = tile.y, position0 = tile.z;
    const u32* table = tables + tile.w;
    u32 length = position0 + count, pieces = (length + 63) / 64;
    u8* stages = shared + 128 * SIZE * 2;

    auto fetch = [&](u32 piece) {
        u8* stage = stages + piece % 2 * 2 * PLANE;
#pragma unroll 1
        for (u32 number = threadIdx.x; number < 64 * CHUNKS; number += 128) {
            u32 token = number / CHUNKS, chunk = number % CHUNKS, at = piece * 64 + token;
            bool inside = at < length;
            const bf16* key = place(pool, layer, kv_head, 0, table, inside ? at : 0);
            copy_async(stage + turned<SIZE>(token, chunk), key + chunk * 8, inside);
            copy_async(stage + PLANE + turned<SIZE>(token, chunk), key + pool.stride_kv / 2 + chunk * 8, inside);
        }
        copy_commit();
    };
    for (u32 number = threadIdx.x; number < 128 * CHUNKS; number += 128) {
        u32 row = number / CHUNKS, chunk = number % CHUNKS;
        bool inside = row < count;
        copy_async(shared + turned<SIZE>(row, chunk),
                   queries + ((u64)(tile.x + (inside ? row : 0)) * heads + head) * SIZE + chunk * 8, inside);
    }
    fetch(0);

    float sum[2][SIZE / 8][4] = {};
    float highest[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, total[2][2] = {};
    // Rows are 64 bytes or more, so moving on by 2 s chunks is an exclusive or.
    u32 left = turned<SIZE>(lane % 16, lane / 16), right = turned<SIZE>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    u32 first = warp * 32, last_seen = position0 + first + 31;
    for (u32 piece = 0; piece < pieces; piece++) {
        if (piece + 1 < pieces) {
            fetch(piece + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        sync_block();
        // Half a tile at a time: fewer sums to hold.
#pragma unroll 1
        for (u32 base = piece * 64; base < piece * 64 + 64 && first < count && base <= last_seen; base += 32) {
            const u8 *keys = stages + piece % 2 * 2 * PLANE + base % 64 * SIZE * 2, *values = keys + PLANE;
            float score[2][4][4] = {};
#pragma unroll 4
            for (u32 s = 0; s < SIZE / 16; s++) {
                u32 q[2][4];
#pragma unroll
                for (u32 i = 0; i < 2; i++) load_matrix(q[i], shared + (first + i * 16) * SIZE * 2 + (left ^ s << 5));
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    u32 k[4];
                    load_matrix(k, keys + j * 16 * SIZE * 2 + (right ^ s << 5));
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        mma(score[i][2 * j], q[i][0], q[i][1], q[i][2], q[i][3], k[0], k[1]);
                        mma(score[i][2 * j + 1], q[i][0], q[i][1], q[i][2], q[i][3], k[2], k[3]);
                    }
                }
            }
            if (base + 31 > position0 + first) {
#pragma unroll
                for (u32 i = 0; i < 2; i++)
#pragma unroll
                    for (u32 j = 0; j < 4; j++)
#pragma unroll
                        for (u32 e = 0; e < 4; e++)
                            if (base + 8 * j + 2 * t + e % 2 > position0 + first + i * 16 + e / 2 * 8 + g)
                                score[i][j][e] = -INFINITY;
            }
            float best[2][2];
            bool rises = false;
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    float value = highest[i][half];
#pragma unroll
                    for (u32 j = 0; j < 4; j++)
                        value = maximum(value, maximum(score[i][j][2 * half], score[i][j][2 * half + 1]));
                    value = maximum(value, shuffle_xor(value, 1));
                    value = maximum(value, shuffle_xor(value, 2));
                    best[i][half] = value;
                    rises = rises || value > highest[i][half];
                }
            if (any_of_warp(rises)) {
#pragma unroll
                for (u32 i = 0; i < 2; i++)
#pragma unroll
                    for (u32 half = 0; half < 2; half++) {
                        float shrink = fast_exp2((highest[i][half] - best[i][half]) * scale);
                        highest[i][half] = best[i][half];
                        total[i][half] *= shrink;
#pragma unroll
                        for (u32 d = 0; d < SIZE / 8; d++) {
                            sum[i][d][2 * half] *= shrink;
                            sum[i][d][2 * half + 1] *= shrink;
                        }
                    }
            }
            u32 shares[2][4][2];
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    float top = highest[i][half] * scale;
#pragma unroll
                    for (u32 j = 0; j < 4; j++) {
                        float x = fast_exp2(fmaf(score[i][j][2 * half], scale, -top));
                        float y = fast_exp2(fmaf(score[i][j][2 * half + 1], scale, -top));
                        total[i][half] += x + y;
                        shares[i][j][half] = pack(x, y);
                    }
                }
            // Results of one product are, as they lie, the left operand of the next.
#pragma unroll
            for (u32 s = 0; s < 2; s++)
#pragma unroll
                for (u32 d = 0; d < SIZE / 16; d++) {
                    u32 v[4];
                    load_matrix_transposed(v, values + s * 16 * SIZE * 2 + (left ^ d << 5));
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        const u32(&p)[2] = shares[i][2 * s], (&q)[2] = shares[i][2 * s + 1];
                        mma(sum[i][2 * d], p[0], p[1], q[0], q[1], v[0], v[1]);
                        mma(sum[i][2 * d + 1], p[0], p[1], q[0], q[1], v[2], v[3]);
                    }
                }
        }
        sync_block();
    }
    tile = load(tiles + blockIdx.y);
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float whole = total[i][half];
            whole += shuffle_xor(whole, 1);
            whole += shuffle_xor(whole, 2);
            u32 row = first + i * 16 + half * 8 + g;
            if (row >= tile.y) continue;
            bf16* to = out + ((u64)(tile.x + row) * heads + head) * SIZE + 2 * t;
#pragma unroll
            for (u32 d = 0; d < SIZE / 8; d++)
                store((u32*)(to + 8 * d), pack(sum[i][d][2 * half] / whole, sum[i][d][2 * half + 1] / whole));
        }
}

#define PREFILL(name, size)                                                                                            \
    KERNEL(128, 2) name(const bf16* queries, Pool pool, u32 layer, const uint4* tiles, const u32* tables, u32 heads,   \
                        u32 kv_heads, float scale, bf16* out) {                                                        \
        attend<size>(queries, pool, layer, tiles, tables, heads, kv_heads, scale, out);                                \
    }

PREFILL(prefill_32, 32)
PREFILL(prefill_64, 64)
PREFILL(prefill_128, 128)
