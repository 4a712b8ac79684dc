// Targets: compute_80
//
// Attention of one new token of each sequence over its blocks (flash-decoding, Dao et al. 2023). Bound by reading keys
// and values once: the query heads that share a KV head are the rows of one `mma` tile. A sequence is cut into `splits`
// parts whose sums `combine` joins. Keys go from memory into fragments as they are (see skinny.cu); values pass through
// shared memory to be transposed.

// Online softmax state is in units of 2^x: scores are multiplied by scale * log2(e).
template <int SIZE>
DEVICE void attend(const bf16* queries, Pool pool, u32 layer, const u32* positions, const u32* starts, const u32* tables,
                   u32 heads, u32 kv_heads, float scale, bf16* out, float* sums, float2* states) {
    const u32 CHUNKS = SIZE / 8;                      // 16 bytes each, of a row.
    const u32 AREA = 32 * SIZE * 2;                   // A warp's: 32 values, later 16 sums of f32.
    SHARED_MEMORY(shared);
    u32 split = blockIdx.x, splits = gridDim.x, row = blockIdx.z;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 position = load(positions + row);
    if (position == NOBODY) return;
    u32 group = heads / kv_heads, per_head = (group + 15) / 16;
    u32 kv_head = blockIdx.y / per_head, head0 = kv_head * group + blockIdx.y % per_head * 16;
    u32 count = (kv_head + 1) * group - head0 < 16 ? (kv_head + 1) * group - head0 : 16;
    const u32* table = tables + load(starts + row);
    u32 length = position + 1, pieces = (length + 31) / 32, each = (pieces + splits - 1) / splits;
    u32 from = split * each, to = from + each < pieces ? from + each : pieces;

    uint4 q[2][SIZE / 32];
#pragma unroll
    for (u32 half = 0; half < 2; half++)
#pragma unroll
        for (u32 c = 0; c < SIZE / 32; c++)
            q[half][c] = 8 * half + g < count
                       ? load16(queries + ((u64)row * heads + head0 + 8 * half + g) * SIZE + 32 * c + 8 * t)
                       : make_uint4(0, 0, 0, 0);
    float sum[SIZE / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    u8* area = shared + warp * AREA;
    for (u32 piece = from + warp; piece < to; piece += 4) {
        // A piece lies in one block if blocks have 32 tokens or more.
        bool together = pool.shift >= 5;
        const bf16* keys = place(pool, layer, kv_head, 0, table, piece * 32);
        const bf16* values = place(pool, layer, kv_head, 1, table, piece * 32);
#pragma unroll
        for (u32 i = 0; i < CHUNKS; i++) {
            u32 number = i * 32 + lane, token = number / CHUNKS, chunk = number % CHUNKS;
            bool inside = piece * 32 + token < length;
            const bf16* value = !inside ? values : together ? values + token * SIZE
                                                 : place(pool, layer, kv_head, 1, table, piece * 32 + token);
            copy_async(area + token * SIZE * 2 + ((chunk ^ (token & 7)) << 4), value + chunk * 8, inside);
        }
        copy_commit();
        float score[4][4] = {};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 token = 8 * j + g;
            bool inside = piece * 32 + token < length;
            const bf16* key = !inside ? keys : together ? keys + token * SIZE
                                             : place(pool, layer, kv_head, 0, table, piece * 32 + token);
            uint4 k[SIZE / 32];
#pragma unroll
            for (u32 c = 0; c < SIZE / 32; c++) k[c] = load_stream((const uint4*)(key + 32 * c + 8 * t));
#pragma unroll
            for (u32 c = 0; c < SIZE / 32; c++) {
                mma(score[j], q[0][c].x, q[1][c].x, q[0][c].y, q[1][c].y, k[c].x, k[c].y);
                mma(score[j], q[0][c].z, q[1][c].z, q[0][c].w, q[1][c].w, k[c].z, k[c].w);
            }
        }
        u32 left = length - piece * 32;
        float best[2] = {highest[0], highest[1]};
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                score[j][i] = 8 * j + 2 * t + i % 2 < left ? score[j][i] * scale : -INFINITY;
                best[i / 2] = maximum(best[i / 2], score[j][i]);
            }
        float shrink[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            best[half] = maximum(best[half], shuffle_xor(best[half], 1));
            best[half] = maximum(best[half], shuffle_xor(best[half], 2));
            shrink[half] = fast_exp2(highest[half] - best[half]);
            highest[half] = best[half];
            total[half] *= shrink[half];
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                score[j][i] = fast_exp2(score[j][i] - highest[i / 2]);
                total[i / 2] += score[j][i];
            }
#pragma unroll
        for (u32 d = 0; d < SIZE / 8; d++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[d][i] *= shrink[i / 2];
        copy_wait<0>();
        sync_warp();
#pragma unroll
        for (u32 s = 0; s < 2; s++) {
            u32 a0 = pack(score[2 * s][0], score[2 * s][1]), a1 = pack(score[2 * s][2], score[2 * s][3]);
            u32 a2 = pack(score[2 * s + 1][0], score[2 * s + 1][1]), a3 = pack(score[2 * s + 1][2], score[2 * s + 1][3]);
            u32 token = s * 16 + lane % 16;
#pragma unroll
            for (u32 d = 0; d < SIZE / 16; d++) {
                u32 v[4];
                load_matrix_transposed(v, area + token * SIZE * 2 + (((2 * d + lane / 16) ^ (token & 7)) << 4));
                mma(sum[2 * d], a0, a1, a2, a3, v[0], v[1]);
                mma(sum[2 * d + 1], a0, a1, a2, a3, v[2], v[3]);
            }
        }
        sync_warp();
    }
    // The four warps' states meet: [warp][head] highest and total, [warp][head][SIZE] sums.
    float2* meet = (float2*)(shared + 4 * AREA);
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        total[half] += shuffle_xor(total[half], 1);
        total[half] += shuffle_xor(total[half], 2);
        if (t == 0) meet[warp * 16 + 8 * half + g] = make_float2(highest[half], total[half]);
#pragma unroll
        for (u32 d = 0; d < SIZE / 8; d++)
            *(float2*)(area + ((8 * half + g) * SIZE + 8 * d + 2 * t) * 4) = make_float2(sum[d][2 * half], sum[d][2 * half + 1]);
    }
    sync_block();
    for (u32 number = threadIdx.x; number < count * SIZE; number += 128) {
        u32 head = number / SIZE, at = number % SIZE;
        float top = -INFINITY, whole = 0.0f, value = 0.0f;
        for (u32 w = 0; w < 4; w++) top = maximum(top, meet[w * 16 + head].x);
        for (u32 w = 0; w < 4 && top > -INFINITY; w++) {
            float2 state = meet[w * 16 + head];
            float share = fast_exp2(state.x - top);
            whole += share * state.y;
            value += share * ((const float*)(shared + w * AREA))[number];
        }
        u64 place = (u64)row * heads + head0 + head;
        if (splits == 1) {
            store(out + place * SIZE + at, to_bf16(value / whole));
        } else {
            store(sums + (place * splits + split) * SIZE + at, value);
            if (at == 0) store(states + place * splits + split, make_float2(top, whole));
        }
    }
}

#define DECODE(name, size)                                                                                             \
    KERNEL(128, 2) name(const bf16* queries, Pool pool, u32 layer, const u32* positions, const u32* starts,            \
                        const u32* tables, u32 heads, u32 kv_heads, float scale, bf16* out, float* sums,               \
                        float2* states) {                                                                              \
        attend<size>(queries, pool, layer, positions, starts, tables, heads, kv_heads, scale, out, sums, states);      \
    }

DECODE(decode_32, 32)
DECODE(decode_64, 64)
DECODE(decode_128, 128)

// Joins the parts of a row's head: out[row][head][size]. A block a head and row, a thread an element.
KERNEL(256, 4) combine(const float* sums, const float2* states, const u32* positions, bf16* out, u32 splits) {
    u32 row = blockIdx.y, size = blockDim.x;
    if (load(positions + row) == NOBODY) return;
    u64 place = (u64)row * gridDim.x + blockIdx.x;
    float top = -INFINITY, whole = 0.0f, value = 0.0f;
    for (u32 split = 0; split < splits; split++) top = maximum(top, load(states + place * splits + split).x);
    for (u32 split = 0; split < splits; split++) {
        float2 state = load(states + place * splits + split);
        float share = fast_exp2(state.x - top);
        whole += share * state.y;
        value += share * load(sums + (place * splits + split) * size + threadIdx.x);
    }
    store(out + place * size + threadIdx.x, to_bf16(value / whole));
}
