// Targets: compute_80 compute_90a
//
// Attention of one new token of each sequence over its blocks (flash-decoding, Dao et al. 2023). Bound by reading keys
// and values once: the query heads that share a KV head are the rows of one `mma` tile, and each warp has the next two
// pieces of 16 tokens on their way while it works on one. A sequence is cut into `splits` parts; the block that is
// last to end a part joins them, in order.

// Online softmax state is in units of 2^x: scores are multiplied by scale * log2(e).
template <int SIZE>
DEVICE void attend(const bf16* queries, Pool pool, u32 layer, const u32* positions, const u32* starts, const u32* tables,
                   u32 heads, u32 kv_heads, float scale, bf16* out, float* sums, float2* states, u32* ended) {
    const u32 CHUNKS = SIZE / 8, PLANE = 16 * SIZE * 2, STAGES = 3;
    const u32 AREA = STAGES * 2 * PLANE;  // A warp's: stages of keys and values, later 16 sums of f32.
    await_previous();
    SHARED_MEMORY(shared);
    u32 split = blockIdx.x, splits = gridDim.x, row = blockIdx.z;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 position = load(positions + row);
    if (position == NOBODY) return;
    u32 group = heads / kv_heads, per_head = (group + 15) / 16;
    u32 kv_head = blockIdx.y / per_head, head0 = kv_head * group + blockIdx.y % per_head * 16;
    u32 count = (kv_head + 1) * group - head0 < 16 ? (kv_head + 1) * group - head0 : 16;
    const u32* table = tables + load(starts + row);
    u32 length = position + 1, pieces = (length + 15) / 16, each = (pieces + splits - 1) / splits;
    u32 from = split * each, to = from + each < pieces ? from + each : pieces;
    u8* area = shared + warp * AREA;

    auto fetch = [&](u32 piece, u32 stage) {
        if (piece < to) {
            // A piece lies in one block if blocks have 16 tokens or more.
            bool together = pool.shift >= 4;
            const bf16* keys = place(pool, layer, kv_head, 0, table, piece * 16);
            u8* at = area + stage * 2 * PLANE;
#pragma unroll
            for (u32 i = 0; i < CHUNKS / 2; i++) {
                u32 number = i * 32 + lane, token = number / CHUNKS, chunk = number % CHUNKS;
                bool inside = piece * 16 + token < length;
                const bf16* key = !inside ? keys : together ? keys + token * SIZE
                                                 : place(pool, layer, kv_head, 0, table, piece * 16 + token);
                copy_async(at + turned<SIZE>(token, chunk), key + chunk * 8, inside);
                copy_async(at + PLANE + turned<SIZE>(token, chunk), key + pool.stride_kv / 2 + chunk * 8, inside);
            }
        }
        copy_commit();
    };
    fetch(from + warp, 0);
    fetch(from + warp + 4, 1);

    u32 q[SIZE / 16][4];
#pragma unroll
    for (u32 s = 0; s < SIZE / 16; s++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 head = i % 2 * 8 + g;
            const bf16* query = queries + ((u64)row * heads + head0 + head) * SIZE + 16 * s + i / 2 * 8 + 2 * t;
            q[s][i] = head < count ? load((const u32*)query) : 0;
        }
    float sum[SIZE / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    // Moving on by 2 s chunks in a row is an exclusive or.
    u32 left = turned<SIZE>(lane % 16, lane / 16), right = turned<SIZE>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    u32 stage = 0;
#pragma unroll 1
    for (u32 piece = from + warp; piece < to; piece += 4) {
        fetch(piece + 8, stage >= 1 ? stage - 1 : 2);
        copy_wait<2>();
        sync_warp();
        u8 *keys = area + stage * 2 * PLANE, *values = keys + PLANE;
        float score[2][4] = {};
#pragma unroll
        for (u32 s = 0; s < SIZE / 16; s++) {
            u32 k[4];
            load_matrix(k, keys + (right ^ s << 5));
            mma(score[0], q[s][0], q[s][1], q[s][2], q[s][3], k[0], k[1]);
            mma(score[1], q[s][0], q[s][1], q[s][2], q[s][3], k[2], k[3]);
        }
        u32 over = length - piece * 16;
        float best[2] = {highest[0], highest[1]};
#pragma unroll
        for (u32 j = 0; j < 2; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                score[j][i] = 8 * j + 2 * t + i % 2 < over ? score[j][i] * scale : -INFINITY;
                best[i / 2] = maximum(best[i / 2], score[j][i]);
            }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            best[half] = maximum(best[half], shuffle_xor(best[half], 1));
            best[half] = maximum(best[half], shuffle_xor(best[half], 2));
        }
        if (any_of_warp(best[0] > highest[0] || best[1] > highest[1])) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float shrink = fast_exp2(highest[half] - best[half]);
                highest[half] = best[half];
                total[half] *= shrink;
#pragma unroll
                for (u32 d = 0; d < SIZE / 8; d++) {
                    sum[d][2 * half] *= shrink;
                    sum[d][2 * half + 1] *= shrink;
                }
            }
        }
        u32 share[2][2];
#pragma unroll
        for (u32 j = 0; j < 2; j++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                float x = fast_exp2(score[j][2 * half] - highest[half]);
                float y = fast_exp2(score[j][2 * half + 1] - highest[half]);
                total[half] += x + y;
                share[j][half] = pack(x, y);
            }
#pragma unroll
        for (u32 d = 0; d < SIZE / 16; d++) {
            u32 v[4];
            load_matrix_transposed(v, values + (left ^ d << 5));
            mma(sum[2 * d], share[0][0], share[0][1], share[1][0], share[1][1], v[0], v[1]);
            mma(sum[2 * d + 1], share[0][0], share[0][1], share[1][0], share[1][1], v[2], v[3]);
        }
        sync_warp();
        stage = stage < 2 ? stage + 1 : 0;
    }
    begin_next();
    copy_wait<0>();
    sync_warp();
    // The four warps' states meet: [warp][head] highest and total, [warp][head][SIZE] sums.
    float2* meet = (float2*)(shared + 4 * AREA);
    u32* last = (u32*)(meet + 64);
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
    u64 first = (u64)row * heads + head0;
    for (u32 number = threadIdx.x; number < count * SIZE; number += 128) {
        u32 head = number / SIZE, at = number % SIZE;
        float top = -INFINITY, whole = 0.0f, value = 0.0f;
        for (u32 w = 0; w < 4; w++) top = maximum(top, meet[w * 16 + head].x);
        for (u32 w = 0; w < 4 && top > -INFINITY; w++) {
            float2 state = meet[w * 16 + head];
            float part = fast_exp2(state.x - top);
            whole += part * state.y;
            value += part * ((const float*)(shared + w * AREA))[number];
        }
        if (splits == 1) {
            store(out + (first + head) * SIZE + at, to_bf16(value / whole));
        } else {
            store(sums + ((first + head) * splits + split) * SIZE + at, value);
            if (at == 0) store(states + (first + head) * splits + split, make_float2(top, whole));
        }
    }
    if (splits == 1) return;
    fence();
    sync_block();
    u32* number_ended = ended + row * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) *last = atomic_next(number_ended) == splits - 1;
    sync_block();
    if (!*last) return;
    fence();
    if (threadIdx.x == 0) store(number_ended, 0u);
    // Four elements a thread; parts are read four at a time.
    for (u32 number = threadIdx.x; number < count * SIZE / 4; number += 128) {
        u64 head = first + number / (SIZE / 4);
        const float2* state = states + head * splits;
        const float4* part = (const float4*)(sums + head * splits * SIZE) + number % (SIZE / 4);
        float top = -INFINITY, whole = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (u32 i = 0; i < splits; i++) top = maximum(top, load(state + i).x);
#pragma unroll 4
        for (u32 i = 0; i < splits; i++) {
            float2 own = load(state + i);
            float4 add = load(part + i * (SIZE / 4));
            float weight = fast_exp2(own.x - top);
            whole += weight * own.y;
            value.x += weight * add.x; value.y += weight * add.y; value.z += weight * add.z; value.w += weight * add.w;
        }
        uint2 both = make_uint2(pack(value.x / whole, value.y / whole), pack(value.z / whole, value.w / whole));
        store((uint2*)(out + first * SIZE) + number, both);
    }
}

#define DECODE(name, size)                                                                                             \
    KERNEL(128, 2) name(const bf16* queries, Pool pool, u32 layer, const u32* positions, const u32* starts,            \
                        const u32* tables, u32 heads, u32 kv_heads, float scale, bf16* out, float* sums,               \
                        float2* states, u32* ended) {                                                                  \
        attend<size>(queries, pool, layer, positions, starts, tables, heads, kv_heads, scale, out, sums, states,       \
                     ended);                                                                                           \
    }

DECODE(decode_32, 32)
DECODE(decode_64, 64)
DECODE(decode_128, 128)
