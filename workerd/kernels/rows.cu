// Targets: compute_80 compute_90a
//
// What is done row by row: embeddings and angles, norms, what happens to queries, keys and values before attention, and
// SiLU. All are bound by memory: 16 bytes a thread where rows allow it.

// sin and cos of an angle, good to 1e-10 below a million: a series after reduction to an eighth of a turn.
DEVICE void sine_and_cosine(double angle, float& sine, float& cosine) {
    // pi/2 in two pieces; the first has 33 bits, so that its product with a quarter's number is exact.
    double quarters = rint(angle * 0.6366197723675814);
    double x = (angle - quarters * 1.5707963267341256) - quarters * 6.077100506506192e-11;
    double s = x * x;
    double sin_x = x * (1 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880
                   + s * (-1.0 / 39916800 + s * (1.0 / 6227020800.0 + s * (-1.0 / 1307674368000.0))))))));
    double cos_x = 1 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320
                   + s * (-1.0 / 3628800 + s * (1.0 / 479001600.0 + s * (-1.0 / 87178291200.0)))))));
    long long quarter = (long long)quarters & 3;
    double swap_sine = (quarter & 1) ? cos_x : sin_x;
    double swap_cosine = (quarter & 1) ? sin_x : cos_x;
    sine = (float)((quarter & 2) ? -swap_sine : swap_sine);
    cosine = (float)((quarter == 1 || quarter == 2) ? -swap_cosine : swap_cosine);
}

// stream[row] = table[token of the row]; angles[row][pair] = cos, sin of its position. A block a row; hidden a multiple
// of 8.
KERNEL(256, 4) embed(const bf16* table, const u32* tokens, const u32* row_slots, const Slot* slots, const u32* positions,
                     const double* frequencies, float* stream, float2* angles, u32 hidden, u32 pairs) {
    begin_next();
    await_previous();
    u32 row = blockIdx.x;
    u32 token = load(tokens + row);
    if (token == LAST) token = load(&slots[load(row_slots + row)].last);
    const bf16* from = table + (u64)token * hidden;
    float* to = stream + (u64)row * hidden;
    for (u32 at = threadIdx.x * 8; at < hidden; at += blockDim.x * 8) {
        uint4 v = load16(from + at);
        store((float4*)(to + at), make_float4(low(v.x), high(v.x), low(v.y), high(v.y)));
        store((float4*)(to + at + 4), make_float4(low(v.z), high(v.z), low(v.w), high(v.w)));
    }
    u32 position = load(positions + row);
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        float sine, cosine;
        sine_and_cosine(position == NOBODY ? 0.0 : position * load(frequencies + pair), sine, cosine);
        store(angles + (u64)row * pairs + pair, make_float2(cosine, sine));
    }
}

// out[i] = norm of stream[rows ? rows[i] : i] (RMSNorm, Zhang and Sennrich 2019). A block a row; hidden a multiple of 4.
// Shared: a float a warp.
KERNEL(1024, 2) rms_norm(const float* stream, const float* weight, const u32* rows, bf16* out, u32 hidden, float epsilon) {
    begin_next();
    await_previous();
    SHARED_MEMORY(shared);
    u32 row = rows ? load(rows + blockIdx.x) : blockIdx.x;
    const float4* from = (const float4*)(stream + (u64)row * hidden);
    float sum = 0.0f;
    for (u32 at = threadIdx.x; at < hidden / 4; at += blockDim.x) {
        float4 v = load(from + at);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = rsqrtf(sum_of_block(sum, (float*)shared) / hidden + epsilon);
    uint2* to = (uint2*)(out + (u64)blockIdx.x * hidden);
    for (u32 at = threadIdx.x; at < hidden / 4; at += blockDim.x) {
        float4 v = load(from + at), w = load((const float4*)weight + at);
        store(to + at, make_uint2(pack(v.x * scale * w.x, v.y * scale * w.y), pack(v.z * scale * w.z, v.w * scale * w.w)));
    }
}

// A row of queries, keys and values: adds the bias, normalises heads of queries and keys, turns them by their position
// (RoPE, NEOX order), and puts queries into `queries`, keys and values into the pool. A warp a head, 8 heads a block;
// heads a multiple of 4 and at most 256 wide.
KERNEL(256, 4) turn_and_store(const bf16* qkv, const float* bias, const float* query_norm, const float* key_norm,
                              const float2* angles, const u32* positions, const u32* starts, const u32* tables, Pool pool,
                              u32 layer, bf16* queries, u32 heads, u32 kv_heads, float epsilon) {
    begin_next();
    await_previous();
    u32 row = blockIdx.x, head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 size = pool.head_dim, half = size / 2;
    u32 position = load(positions + row);
    if (position == NOBODY || head >= heads + 2 * kv_heads) return;
    const bf16* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * size;
    // Element 2 lane (and 64 on) of both halves, and the next.
    float2 first[2], second[2];
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 at = 2 * lane + 64 * i;
        first[i] = second[i] = make_float2(0.0f, 0.0f);
        if (at < half) {
            u32 a = load((const u32*)(from + at)), b = load((const u32*)(from + half + at));
            first[i] = make_float2(low(a), high(a));
            second[i] = make_float2(low(b), high(b));
            if (bias) {
                float2 x = load((const float2*)(bias + (u64)head * size + at));
                float2 y = load((const float2*)(bias + (u64)head * size + half + at));
                first[i].x += x.x; first[i].y += x.y; second[i].x += y.x; second[i].y += y.y;
            }
        }
        sum += first[i].x * first[i].x + first[i].y * first[i].y + second[i].x * second[i].x + second[i].y * second[i].y;
    }
    bool is_value = head >= heads + kv_heads;
    const float* norm = is_value ? (const float*)0 : head < heads ? query_norm : key_norm;
    float scale = norm ? rsqrtf(sum_of_warp(sum) / size + epsilon) : 1.0f;
    const u32* table = tables + load(starts + row);
    bf16* to = head < heads ? queries + ((u64)row * heads + head) * size
             : is_value     ? place(pool, layer, head - heads - kv_heads, 1, table, position)
                            : place(pool, layer, head - heads, 0, table, position);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 at = 2 * lane + 64 * i;
        if (at >= half) continue;
        float2 a = first[i], b = second[i];
        if (norm) {
            float2 x = load((const float2*)(norm + at)), y = load((const float2*)(norm + half + at));
            a.x *= scale * x.x; a.y *= scale * x.y; b.x *= scale * y.x; b.y *= scale * y.y;
        }
        if (!is_value) {
            float4 turn = load((const float4*)(angles + (u64)row * half + at));  // cos, sin, cos, sin
            float2 c = make_float2(a.x * turn.x - b.x * turn.y, a.y * turn.z - b.y * turn.w);
            b = make_float2(b.x * turn.x + a.x * turn.y, b.y * turn.z + a.y * turn.w);
            a = c;
        }
        store((u32*)(to + at), pack(a.x, a.y));
        store((u32*)(to + half + at), pack(b.x, b.y));
    }
}

// out[row][i] = silu(gate) * up, from rows in which 8 gates and 8 ups take turns. A thread 8 of them; ffn a multiple of 8.
KERNEL(256, 4) swiglu(const bf16* gate_up, bf16* out, u32 ffn) {
    begin_next();
    await_previous();
    u32 at = (blockIdx.x * 256 + threadIdx.x) * 8;
    if (at >= ffn) return;
    const bf16* from = gate_up + (u64)blockIdx.y * 2 * ffn + 2 * at;
    uint4 g = load16(from), u = load16(from + 8);
    uint4 v;
    v.x = pack(silu(low(g.x)) * low(u.x), silu(high(g.x)) * high(u.x));
    v.y = pack(silu(low(g.y)) * low(u.y), silu(high(g.y)) * high(u.y));
    v.z = pack(silu(low(g.z)) * low(u.z), silu(high(g.z)) * high(u.z));
    v.w = pack(silu(low(g.w)) * low(u.w), silu(high(g.w)) * high(u.w));
    store((uint4*)(out + (u64)blockIdx.y * ffn + at), v);
}
