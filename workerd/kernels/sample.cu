// Targets: compute_80 compute_90a
//
// How a token is chosen, on the device: the same rules as the host's sampler (`engine/sampling.rs`), so that a step can
// be submitted before the one before it was read. Masses are whole numbers of 2^-40: sums do not depend on their order.

// A slot that begins: its state, and where its history lies (only kept where tokens are counted).
struct Open {
    Slot state;
    u32 slot, history, length, prompt_length;
};

// What is known of a chosen token.
struct Chosen {
    u32 token;
    float logprob;
    u32 rank;
    u32 padding;
};

static const u32 IN_PROMPT = 0x80000000u;  // Of a count; the lower bits say how often the token was generated.

// A block a slot. counts[slot][vocab].
KERNEL(1024, 1) open_slots(const Open* opens, const u32* history, Slot* slots, u32* counts, u32 vocab) {
    begin_next();
    await_previous();
    const Open* open = opens + blockIdx.x;
    u32 slot = load(&open->slot);
    if (threadIdx.x < sizeof(Slot) / 4) store((u32*)(slots + slot) + threadIdx.x, load((const u32*)&open->state + threadIdx.x));
    if (!load(&open->state.penalised)) return;
    u32* mine = counts + (u64)slot * vocab;
    for (u32 token = threadIdx.x; token < vocab; token += blockDim.x) store(mine + token, 0u);
    sync_block();
    u32 from = load(&open->history), length = load(&open->length), prompt = load(&open->prompt_length);
    for (u32 at = threadIdx.x; at < length; at += blockDim.x) {
        u32 token = load(history + from + at);
        if (token >= vocab) continue;
        if (at < prompt) atomic_or(mine + token, IN_PROMPT);
        else atomic_add(mine + token, 1u);
    }
}

// Philox 4x32-10 (Salmon et al. 2011), uniform in [0, 1) with 53 bits.
DEVICE double uniform(u64 seed, u64 position) {
    u32 c0 = (u32)position, c1 = (u32)(position >> 32), c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (u32 round = 0; round < 10; round++) {
        if (round > 0) { k0 += 0x9E3779B9u; k1 += 0xBB67AE85u; }
        u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
    }
    return (double)(((u64)c0 << 32 | c1) >> 11) / 9007199254740992.0;
}

// Orders by value, then by lower id; what is not a number counts as minus infinity.
DEVICE u64 key_of(float value, u32 id) {
    u32 bits = as_bits(value == value ? value : -INFINITY);
    return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (0xffffffffu - id);
}
DEVICE u32 id_of(u64 key) { return 0xffffffffu - (u32)key; }

DEVICE u64 mass_of(float weight) { return (u64)(weight * 1099511627776.0f); }

// Over the block's 32 warps; `scratch` is 32 words.
DEVICE u64 highest_of_block(u64 value, u64* scratch) {
    for (int mask = 16; mask > 0; mask /= 2) { u64 other = shuffle_xor(value, mask); value = other > value ? other : value; }
    sync_block();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    sync_block();
    u64 best = 0;
    for (u32 warp = 0; warp < 32; warp++) best = scratch[warp] > best ? scratch[warp] : best;
    return best;
}
DEVICE u64 sum_of_block(u64 value, u64* scratch) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    sync_block();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    sync_block();
    u64 sum = 0;
    for (u32 warp = 0; warp < 32; warp++) sum += scratch[warp];
    return sum;
}

// Bits of the lowest weight that is kept when the heaviest are taken until `wanted` is reached: so many tokens, or so
// much mass. Looks only at weights whose bits are at least `floor`. Tokens as heavy as the last one are kept with it.
// Three passes over ever fewer bits; `found` is 2 words, `bins` 2,048.
DEVICE u32 last_kept(const float* weights, u32 vocab, u32 floor, u64 wanted, bool by_mass, u64* found, u64* bins) {
    u32 prefix = 0;
    u64 before = 0;  // Of all above the prefix.
    const u32 shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
#pragma unroll
    for (u32 pass = 0; pass < 3; pass++) {
        u32 shift = shifts[pass], count = 1u << widths[pass];
        sync_block();
        for (u32 bin = threadIdx.x; bin < count; bin += blockDim.x) bins[bin] = 0;
        sync_block();
        for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
            float weight = load(weights + id);
            u32 bits = as_bits(weight);
            bool above = pass == 0 || bits >> (shift + widths[pass]) == prefix;
            if (above && bits >= floor && bits > 0) shared_add(bins + (bits >> shift & (count - 1)), by_mass ? mass_of(weight) : 1ull);
        }
        sync_block();
        if (threadIdx.x < 32) {
            // Lane 31 has the highest bins.
            u32 each = count / 32;
            u64 sum = 0;
            for (u32 bin = 0; bin < each; bin++) sum += bins[threadIdx.x * each + bin];
            u64 here = before;
            for (u32 lane = 31; lane > threadIdx.x; lane--) for (u32 bin = 0; bin < each; bin++) here += bins[lane * each + bin];
            bool is_last = threadIdx.x == 0;
            if (here < wanted && (here + sum >= wanted || is_last)) {
                u32 bin = each - 1;
                while (bin > 0 && here + bins[threadIdx.x * each + bin] < wanted) here += bins[threadIdx.x * each + bin--];
                found[0] = threadIdx.x * each + bin;
                found[1] = here;
            }
        }
        sync_block();
        prefix = prefix << widths[pass] | (u32)found[0];
        before = found[1];
    }
    return prefix;
}

// A block of 1,024 threads a sampled row. logits and weights [row][vocab]; weights is scratch. alternatives
// [row][most]: token and log-probability. Shared: 34 words, then 2,048.
KERNEL(1024, 1) sample(const float* logits, float* weights, const u32* sampled, Slot* slots, u32* counts, Chosen* chosen,
                       float2* alternatives, u32 vocab, u32 most) {
    begin_next();
    await_previous();
    SHARED_MEMORY(shared);
    u64 *scratch = (u64*)shared, *found = scratch + 32, *bins = scratch + 34;
    u32 number = load(sampled + blockIdx.x);
    if (number == NOBODY) return;
    Slot slot = load(slots + number);
    const float* raw = logits + (u64)blockIdx.x * vocab;
    float* own = weights + (u64)blockIdx.x * vocab;
    u32* mine = counts + (u64)number * vocab;

    u64 best = 0;
    for (u32 id = threadIdx.x; id < vocab; id += 1024) {
        float value = load(raw + id);
        if (slot.penalised) {
            u32 count = load(mine + id);
            if (count) value = value > 0.0f ? value / slot.repetition_penalty : value * slot.repetition_penalty;
            if (count & ~IN_PROMPT) value = value - slot.frequency_penalty * (count & ~IN_PROMPT) - slot.presence_penalty;
            store(own + id, value);
        }
        u64 key = key_of(value, id);
        best = key > best ? key : best;
    }
    best = highest_of_block(best, scratch);
    u32 token = id_of(best);
    float highest = load((slot.penalised ? own : raw) + token);

    if (slot.temperature > 0.0f && highest - highest == 0.0f && slot.top_k != 1) {
        // No thread may overwrite what another still reads as the highest.
        sync_block();
        u64 sum = 0;
        for (u32 id = threadIdx.x; id < vocab; id += 1024) {
            float value = load((slot.penalised ? own : raw) + id);
            float weight = value == value ? expf((value - highest) / slot.temperature) : 0.0f;
            store(own + id, weight);
            sum += mass_of(weight);
        }
        u32 floor = as_bits(slot.min_p > 0.0f ? slot.min_p : 0.0f);
        u32 nucleus = 0;
        if (slot.top_k > 0 && slot.top_k < vocab) nucleus = last_kept(own, vocab, 0, slot.top_k, false, found, bins);
        if (slot.top_p < 1.0f) {
            if (nucleus > 0) {
                sum = 0;
                for (u32 id = threadIdx.x; id < vocab; id += 1024) {
                    float weight = load(own + id);
                    if (as_bits(weight) >= nucleus) sum += mass_of(weight);
                }
            }
            u64 wanted = (u64)(slot.top_p * (double)sum_of_block(sum, scratch));
            u32 kept = last_kept(own, vocab, nucleus, wanted > 0 ? wanted : 1, true, found, bins);
            nucleus = kept > nucleus ? kept : nucleus;
        }
        floor = nucleus > floor ? nucleus : floor;
        // Each warp has a stretch of ids: first its mass, then, where the target falls, the token.
        sync_block();
        u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, stretch = (vocab + 1023) / 1024 * 32, from = warp * stretch;
        u64 part = 0;
        for (u32 id = from + lane; id < from + stretch && id < vocab; id += 32) {
            float weight = load(own + id);
            if (as_bits(weight) >= floor) part += mass_of(weight);
        }
        for (int mask = 16; mask > 0; mask /= 2) part += shuffle_xor(part, mask);
        if (lane == 0) scratch[warp] = part;
        sync_block();
        u64 total = 0, before = 0;
        for (u32 w = 0; w < 32; w++) {
            if (w == warp) before = total;
            total += scratch[w];
        }
        u64 target = (u64)(uniform(slot.seed, slot.position) * (double)total);
        if (threadIdx.x == 0) found[0] = token;
        sync_block();
        if (before <= target && target < before + part) {
            u64 left = target - before;
            for (u32 base = from; base < from + stretch; base += 32) {
                u32 id = base + lane;
                float weight = id < vocab ? load(own + id) : 0.0f;
                u64 mass = id < vocab && as_bits(weight) >= floor ? mass_of(weight) : 0, upto = mass;
                for (int delta = 1; delta < 32; delta *= 2) {
                    u64 below = shuffle_up(upto, delta);
                    if ((int)lane >= delta) upto += below;
                }
                if (upto - mass <= left && left < upto) found[0] = id;
                u64 all = shuffle_last(upto);
                if (left < all) break;
                left -= all;
            }
        }
        sync_block();
        token = (u32)found[0];
    }

    float own_logit = load(raw + token), logprob = 0.0f;
    u32 rank = 0;
    if (slot.logprobs) {
        u64 key = 0, mine_key = key_of(own_logit, token);
        for (u32 id = threadIdx.x; id < vocab; id += 1024) { u64 k = key_of(load(raw + id), id); key = k > key ? k : key; }
        key = highest_of_block(key, scratch);
        float top = load(raw + id_of(key));
        u64 better = 0;
        float sum = 0.0f;
        for (u32 id = threadIdx.x; id < vocab; id += 1024) {
            float value = load(raw + id);
            if (value == value) sum += expf(value - top);
            if (key_of(value, id) > mine_key) better++;
        }
        rank = 1 + (u32)sum_of_block(better, scratch);
        float log_sum = top + logf(sum_of_block(sum, (float*)scratch));
        auto finite = [](float value) { return value >= -3.4028234663852886e38f ? value : -3.4028234663852886e38f; };
        logprob = finite(own_logit - log_sum);
        for (u32 i = 0; i + 1 < slot.logprobs && i < most; i++) {
            if (threadIdx.x == 0)
                store(alternatives + (u64)blockIdx.x * most + i, make_float2(as_float(id_of(key)), finite(load(raw + id_of(key)) - log_sum)));
            u64 next = 0;
            for (u32 id = threadIdx.x; id < vocab; id += 1024) {
                u64 k = key_of(load(raw + id), id);
                if (k < key && k > next) next = k;
            }
            key = highest_of_block(next, scratch);
        }
    }
    if (threadIdx.x == 0) {
        Chosen one = {token, logprob, rank, 0};
        store(chosen + blockIdx.x, one);
        store(&slots[number].position, slot.position + 1);
        store(&slots[number].last, token);
        if (slot.penalised) atomic_add(mine + token, 1u);
    }
}
