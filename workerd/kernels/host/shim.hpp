// What the names of a GPU mean on the host: the first part of prelude.cuh again, on `Machine`.
#pragma once

#include <algorithm>
#include <cmath>

#include "machine.hpp"

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static thread_local host::Triple threadIdx, blockIdx, blockDim, gridDim;

#define BATON_HOST
#define DEVICE [[maybe_unused]] static inline
#define DEVICE_MEMBER inline
#define KERNEL(threads, blocks) static void
#define SHARED_MEMORY(name) std::uint8_t* const name = host::machine->shared

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T> DEVICE T load(const T* from, SITE) {
    host::machine->check_read(from, sizeof(T), alignof(T), HERE);
    return *from;
}
template <class T> DEVICE void store(T* to, T value, SITE) {
    host::machine->count_write(to, sizeof(T), alignof(T), HERE);
    *to = value;
}
DEVICE uint4 load_stream(const uint4* from, SITE) { return load(from, file, line); }
// Counted apart from stores: nothing that a block adds to is written by one thread alone.
DEVICE void atomic_add(unsigned* to, unsigned value, SITE) {
    host::machine->check_add(to, sizeof *to, HERE);
    *to += value;
}
DEVICE unsigned atomic_next(unsigned* at, SITE) {
    atomic_add(at, 1, file, line);
    return *at - 1;
}
DEVICE void atomic_or(unsigned* to, unsigned value, SITE) {
    host::machine->check_add(to, sizeof *to, HERE);
    *to |= value;
}
template <class T> DEVICE void shared_add(T* to, T value, SITE) {
    host::machine->check_shared(to, sizeof(T), alignof(T), "add", HERE);
    *to += value;
}

DEVICE void copy_async(void* to, const void* from, bool wanted, SITE) {
    host::Machine& m = *host::machine;
    m.check_shared(to, 16, 16, "copy", HERE);
    if (wanted) m.check_read(from, 16, 16, HERE);
    else if ((std::uintptr_t)from % 16) m.fail(HERE, "copy from %p, which is not aligned", from);
    // It may happen at any time from now on.
    std::memset(to, host::POISON, 16);
    m.current->copies.push_back({(std::uint8_t*)to, (const std::uint8_t*)from, wanted, m.current->groups});
}
DEVICE void copy_commit() { host::machine->current->groups++; }
template <int N> DEVICE void copy_wait() {
    host::Thread& me = *host::machine->current;
    auto is_over = [&](const host::Copy& copy) { return copy.group + N + 1 <= me.groups; };
    for (const host::Copy& copy : me.copies) {
        if (!is_over(copy)) continue;
        if (copy.wanted) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    }
    me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), is_over), me.copies.end());
}

// Blocks run one after the other: what one has stored, the next sees.
DEVICE void fence() {}
DEVICE void begin_next() { host::machine->overlaps = true; }
DEVICE void await_previous() { host::machine->await(); }

DEVICE void sync_block(SITE) {
    host::Machine& m = *host::machine;
    m.meet(m.all, host::Meeting::BARRIER, HERE, [] {});
}
DEVICE void sync_warp(SITE) {
    host::Machine& m = *host::machine;
    m.meet(m.warp(), host::Meeting::SYNC_WARP, HERE, [] {});
}

// Each lane gets the value of the lane that `source` names for it.
template <class T, class Source> DEVICE T shuffle(T value, Source source, host::Site site) {
    host::Machine& m = *host::machine;
    host::Warp& warp = m.warp();
    std::uint32_t lane = m.lane();
    warp.given[lane] = 0;
    std::memcpy(&warp.given[lane], &value, sizeof value);
    m.meet(warp, host::Meeting::SHUFFLE, site, [&] {
        if (warp.count != host::LANES) m.fail(site, "shuffle in a warp of %u lanes", warp.count);
        for (int i = 0; i < (int)host::LANES; i++) warp.taken[i] = warp.given[source(i)];
    });
    std::memcpy(&value, &warp.taken[lane], sizeof value);
    return value;
}
template <class T> DEVICE T shuffle_xor(T value, int mask, SITE) {
    return shuffle(value, [mask](int lane) { return lane ^ mask; }, HERE);
}
template <class T> DEVICE T shuffle_up(T value, int delta, SITE) {
    return shuffle(value, [delta](int lane) { return lane >= delta ? lane - delta : lane; }, HERE);
}
template <class T> DEVICE T shuffle_last(T value, SITE) {
    return shuffle(value, [](int) { return 31; }, HERE);
}

DEVICE bool any_of_warp(bool is, SITE) {
    unsigned any = is;
    for (int mask = 16; mask > 0; mask /= 2) any |= shuffle_xor(any, mask, file, line);
    return any;
}

// Rows of 8x8 matrices become fragments: register i of a lane comes from matrix i.
template <bool TRANSPOSED> DEVICE void matrices(unsigned (&v)[4], const void* row, host::Site site) {
    host::Machine& m = *host::machine;
    m.check_shared(row, 16, 16, "load_matrix", site);
    host::Warp& warp = m.warp();
    warp.at[m.lane()] = v;
    warp.rows[m.lane()] = row;
    auto meeting = TRANSPOSED ? host::Meeting::LOAD_MATRIX_TRANSPOSED : host::Meeting::LOAD_MATRIX;
    m.meet(warp, meeting, site, [&] {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                auto element = [&](int r, int c) { return (unsigned)((const std::uint16_t*)warp.rows[8 * i + r])[c]; };
                int outer = lane / 4, inner = lane % 4 * 2;
                ((unsigned*)warp.at[lane])[i] = TRANSPOSED ? element(inner, outer) | element(inner + 1, outer) << 16
                                                           : element(outer, inner) | element(outer, inner + 1) << 16;
            }
    });
}
DEVICE void load_matrix(unsigned (&v)[4], const void* row, SITE) { matrices<false>(v, row, HERE); }
DEVICE void load_matrix_transposed(unsigned (&v)[4], const void* row, SITE) { matrices<true>(v, row, HERE); }

DEVICE float as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE unsigned as_bits(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Products of bf16 are exact in f32; their sums are rounded in an order of our own.
DEVICE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, SITE) {
    host::Machine& m = *host::machine;
    host::Warp& warp = m.warp();
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.fragments[m.lane()], mine, sizeof mine);
    warp.at[m.lane()] = c;
    m.meet(warp, host::Meeting::MMA, HERE, [&] {
        float a[16][16], b[16][8], sum[16][8] = {};
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 6; i++) {
                float low = as_float(warp.fragments[lane][i] << 16), high = as_float(warp.fragments[lane][i] & 0xffff0000u);
                float* to = i < 4 ? &a[g + i % 2 * 8][2 * t + i / 2 * 8] : &b[2 * t + (i - 4) * 8][g];
                to[0] = low;
                to[i < 4 ? 1 : 8] = high;
            }
        }
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 8; j++) sum[i][j] += a[i][k] * b[k][j];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) ((float*)warp.at[lane])[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    });
}

DEVICE unsigned rounded(float value) {
    unsigned bits = as_bits(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE unsigned pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
DEVICE unsigned times(unsigned a, unsigned b) {
    auto value = [](unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; };
    return pack(value(a << 16) * value(b << 16), value(a & 0xffff0000u) * value(b & 0xffff0000u));
}
DEVICE float fast_exp2(float x) {
    float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
