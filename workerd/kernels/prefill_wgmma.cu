// Targets: compute_90a
//
// Attention of many new tokens of a sequence over its blocks, by the matrix units of a warpgroup (`wgmma`; the ideas are
// FlashAttention-3's, Shah et al. 2024): 128 tokens of one query head a block, 64 for each of two warpgroups, tiles of 64
// keys. A tile's softmax is computed while the values of the one before are multiplied, and tiles after it are on their way.
// For exactly 9.0; what it computes is what prefill.cu does.

// An operand of 64-element panels in shared memory, rows of 128 bytes whose 16-byte chunks the hardware turns by the row
// (PTX manual, "matrix descriptor", 128-byte swizzling). `leading` and `stride` in bytes.
DEVICE u64 operand(const u8* at, u32 leading, u32 stride) {
    return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
// What was copied into shared memory is seen by the matrix units.
DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FOUR(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define THIRTY_TWO(d, i) FOUR(d, i), FOUR(d, i + 1), FOUR(d, i + 2), FOUR(d, i + 3), FOUR(d, i + 4), FOUR(d, i + 5), FOUR(d, i + 6), FOUR(d, i + 7)

// d (+)= a b^T for 64 rows of a and 64 of b, 16 columns of both, from shared memory.
DEVICE void multiply_scores(float (&d)[8][4], u64 a, u64 b, u32 add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
                 : THIRTY_TWO(d, 0)
                 : "l"(a), "l"(b), "r"(add));
}
// d += a b for 64 rows of a (fragments as `mma`'s) and 16 rows of b, of 64 or 128 elements, from shared memory.
DEVICE void multiply_values(float (&d)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : THIRTY_TWO(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_values(float (&d)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : THIRTY_TWO(d, 0), THIRTY_TWO(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Where 16 bytes of a row of a panel of `ROWS` rows are.
template <int ROWS> DEVICE u32 in_panels(u32 row, u32 chunk) {
    return chunk / 8 * ROWS * 128 + row * 128 + ((chunk % 8 ^ (row & 7)) << 4);
}

// Shared: 1,024 bytes to begin at a whole one, (128 + 4 * 64) * SIZE * 2 for queries, two tiles of keys, two of values.
template <int SIZE>
DEVICE void attend(const bf16* queries, Pool pool, u32 layer, const uint4* tiles, const u32* tables, u32 heads,
                   u32 kv_heads, float scale, bf16* out) {
    const u32 CHUNKS = SIZE / 8, TILE = 64 * SIZE * 2;
    begin_next();
    await_previous();
    SHARED_MEMORY(shared);
    u8* query_tile = shared + (1024 - (shared_address(shared) & 1023)) % 1024;
    u8 *key_tiles = query_tile + 128 * SIZE * 2, *value_tiles = key_tiles + 2 * TILE;
    u32 lane = threadIdx.x % 32, group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.x, kv_head = head / (heads / kv_heads);
    uint4 tile = load(tiles + blockIdx.y);
    u32 row0 = tile.x, count = tile.y, position0 = tile.z;
    const u32* table = tables + tile.w;
    u32 length = position0 + count, pieces = (length + 63) / 64;

    auto fetch = [&](u8* to, u32 piece, u32 kv) {
        if (piece >= pieces) return;
#pragma unroll
        for (u32 i = 0; i < CHUNKS / 4; i++) {
            u32 number = threadIdx.x + i * 256, token = number / CHUNKS, chunk = number % CHUNKS, at = piece * 64 + token;
            bool inside = at < length;
            const bf16* from = place(pool, layer, kv_head, kv, table, inside ? at : 0) + chunk * 8;
            copy_async(to + in_panels<64>(token, chunk), from, inside);
        }
    };
#pragma unroll
    for (u32 i = 0; i < CHUNKS / 2; i++) {
        u32 number = threadIdx.x + i * 256, row = number / CHUNKS, chunk = number % CHUNKS;
        bool inside = row < count;
        copy_async(query_tile + in_panels<128>(row, chunk),
                   queries + ((u64)(row0 + (inside ? row : 0)) * heads + head) * SIZE + chunk * 8, inside);
    }
    fetch(key_tiles, 0, 0);
    fetch(value_tiles, 0, 1);
    fetch(key_tiles + TILE, 1, 0);
    copy_commit();
    copy_wait<0>();
    publish();
    sync_block();

    u32 first = group * 64 + warp * 16;  // Of this warp's 16 rows.
    u32 last_row = group * 64 + 63 < count ? group * 64 + 63 : count - 1;
    // Tiles that this warpgroup sees.
    u32 seen = group * 64 < count ? (position0 + last_row) / 64 + 1 : 0;
    u64 query_operand = operand(query_tile + group * 64 * 128, 16, 1024);
    auto scores = [&](float (&s)[8][4], u32 piece) {
        u64 keys = operand(key_tiles + piece % 2 * TILE, 16, 1024);
#pragma unroll
        for (u32 step = 0; step < SIZE / 16; step++) {
            // Along a panel 32 bytes a step; panels are 128 rows of queries and 64 of keys.
            u32 panel = step / 4, within = step % 4 * 2;
            multiply_scores(s, query_operand + panel * (128 * 128 / 16) + within, keys + panel * (64 * 128 / 16) + within, step > 0);
        }
        end_products();
    };

    float sum[SIZE / 8][4] = {}, score[8][4];
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    // Scores of a tile become its shares; earlier sums have to shrink by `shrink`.
    auto softmax = [&](float (&shrink)[2], u32 piece) {
        if (piece * 64 + 63 > position0 + first) {
#pragma unroll
            for (u32 j = 0; j < 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++)
                    if (piece * 64 + 8 * j + 2 * t + e % 2 > position0 + first + e / 2 * 8 + g) score[j][e] = -INFINITY;
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float best = highest[half];
#pragma unroll
            for (u32 j = 0; j < 8; j++) best = maximum(best, maximum(score[j][2 * half], score[j][2 * half + 1]));
            best = maximum(best, shuffle_xor(best, 1));
            best = maximum(best, shuffle_xor(best, 2));
            float base = best * scale;
            shrink[half] = fast_exp2((highest[half] - best) * scale);
            highest[half] = best;
            total[half] *= shrink[half];
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                score[j][2 * half] = fast_exp2(fmaf(score[j][2 * half], scale, -base));
                score[j][2 * half + 1] = fast_exp2(fmaf(score[j][2 * half + 1], scale, -base));
                total[half] += score[j][2 * half] + score[j][2 * half + 1];
            }
        }
    };
    u32 shares[4][4];
    // Only while no product has them as operand.
    auto round_shares = [&]() {
#pragma unroll
        for (u32 j = 0; j < 8; j++)
#pragma unroll
            for (u32 half = 0; half < 2; half++)
                shares[j / 2][j % 2 * 2 + half] = pack(score[j][2 * half], score[j][2 * half + 1]);
    };
    auto add_values = [&](u32 piece) {
        u64 values = operand(value_tiles + piece % 2 * TILE, 64 * 128, 1024);
#pragma unroll
        for (u32 k = 0; k < 4; k++) multiply_values(sum, shares[k], values + k * (16 * 128 / 16));
        end_products();
    };
    if (seen > 0) {
        float shrink[2];
        begin_products();
        scores(score, 0);
        await_products<0>();
        softmax(shrink, 0);
        round_shares();
    }
#pragma unroll 1
    for (u32 piece = 0; piece < pieces; piece++) {
        // Keys of this piece and values of the one before are used up.
        fetch(key_tiles + piece % 2 * TILE, piece + 2, 0);
        fetch(value_tiles + (piece + 1) % 2 * TILE, piece + 1, 1);
        copy_commit();
        if (piece + 1 < seen) {
            float shrink[2];
            begin_products();
            scores(score, piece + 1);
            add_values(piece);
            await_products<1>();
            // While the values are multiplied.
            softmax(shrink, piece + 1);
            await_products<0>();
#pragma unroll
            for (u32 half = 0; half < 2; half++)
#pragma unroll
                for (u32 d = 0; d < SIZE / 8; d++) {
                    sum[d][2 * half] *= shrink[half];
                    sum[d][2 * half + 1] *= shrink[half];
                }
            round_shares();
        } else if (piece + 1 == seen) {
            begin_products();
            add_values(piece);
            await_products<0>();
        }
        copy_wait<0>();
        publish();
        sync_block();
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float whole = total[half];
        whole += shuffle_xor(whole, 1);
        whole += shuffle_xor(whole, 2);
        u32 row = first + half * 8 + g;
        if (row >= count) continue;
        bf16* to = out + ((u64)(row0 + row) * heads + head) * SIZE + 2 * t;
#pragma unroll
        for (u32 d = 0; d < SIZE / 8; d++)
            store((u32*)(to + 8 * d), pack(sum[d][2 * half] / whole, sum[d][2 * half + 1] / whole));
    }
}

#define PREFILL(name, size)                                                                                            \
    KERNEL(256, 1) name(const bf16* queries, Pool pool, u32 layer, const uint4* tiles, const u32* tables, u32 heads,   \
                        u32 kv_heads, float scale, bf16* out) {                                                        \
        attend<size>(queries, pool, layer, tiles, tables, heads, kv_heads, scale, out);                                \
    }

PREFILL(prefill_wgmma_64, 64)
PREFILL(prefill_wgmma_128, 128)
