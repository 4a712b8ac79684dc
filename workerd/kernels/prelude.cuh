// What every kernel is written in: bf16 arithmetic, checked access to global memory, and the few operations that only
// a GPU has. Pasted in front of each kernel source, so no header of any toolkit is needed.
//
// The same kernels compile for the host: there BATON_HOST is defined, and `host/shim.hpp`, included before this file,
// gives every name of the first part another meaning. Rules that keep this possible:
//   - global memory is touched by `load`, `load_stream`, `store`, `atomic_add`, `atomic_or` and `copy_async` only;
//   - shared memory is what SHARED_MEMORY names (its size is the launch's), never a `__shared__` variable;
//   - every thread of a block reaches every `__syncthreads()`, every lane of a warp every shuffle, `mma`, `load_matrix`.

typedef unsigned char u8;
typedef unsigned short bf16;  // Bits: the upper half of an f32.
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BATON_HOST

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
// A kernel of blocks of at most `threads`, `blocks` of them on a multiprocessor.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Names the launch's shared memory, 16-byte aligned.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[]

template <class T> DEVICE T load(const T* from) { return *from; }
template <class T> DEVICE void store(T* to, T value) { *to = value; }
DEVICE void atomic_add(u32* to, u32 value) { atomicAdd(to, value); }
DEVICE void atomic_or(u32* to, u32 value) { atomicOr(to, value); }
// The same in shared memory.
DEVICE void shared_add(u32* to, u32 value) { atomicAdd(to, value); }
DEVICE void shared_add(u64* to, u64 value) { atomicAdd(to, value); }

// 16 bytes that are read once: they need not stay in the first cache.
DEVICE uint4 load_stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Copies 16 bytes from global to shared memory some time before `copy_wait`; zeros where `wanted` is false.
DEVICE void copy_async(void* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `N` groups of this thread are under way.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane 8i + r names row r of matrix i, and gets of matrix i, in v[i], elements
// 2 (lane % 4) and the next of row lane / 4.
DEVICE void load_matrix(u32 (&v)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(row)) : "memory");
}
// The same, of the matrices transposed.
DEVICE void load_matrix_transposed(u32 (&v)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(row)) : "memory");
}

// c += a b for a 16x16 a and a 16x8 b of bf16, fragments as in the PTX manual (mma.m16n8k16): with g = lane / 4 and
// t = lane % 4, a0 is row g, columns 2t and 2t + 1; a1 row g + 8; a2 and a3 the same 8 columns on; b0 is column g, rows
// 2t and 2t + 1; b1 8 rows on; c0 and c1 are row g, columns 2t and 2t + 1; c2 and c3 row g + 8.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats as bf16, rounded to nearest even: the first in the lower half.
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// Two bf16 times two.
DEVICE u32 times(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }
// 2^x and 1/sqrt(x) as the hardware has them: some 2 units in the last place.
DEVICE float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u64 shuffle_xor(u64 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// The value of the lane `delta` below; its own in the first lanes.
DEVICE u64 shuffle_up(u64 value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
// The value of the last lane.
DEVICE u64 shuffle_last(u64 value) { return __shfl_sync(0xffffffffu, value, 31); }
// Whether it is so in any lane.
DEVICE bool any_of_warp(bool is) { return __any_sync(0xffffffffu, is); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// Adds 1 and returns what was there.
DEVICE u32 atomic_next(u32* at) { return atomicAdd(at, 1u); }
// What this thread stored is seen by whoever sees what it stores afterwards.
DEVICE void fence() { __threadfence(); }

// Where a device has them (9.0), kernels overlap with the one before: it says when the next may be started, which waits
// before it touches anything that is not constant. Every kernel awaits, so order stays as if there were no overlap.
// Whoever has much to read says so late: what the next one does would only take its bandwidth.
DEVICE void begin_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

// Position of a row that fills up a batch: no sequence's.
static const u32 NOBODY = 0xffffffffu;
// Token of a row whose input is its slot's last sample.
static const u32 LAST = 0xffffffffu;

DEVICE float from_bf16(bf16 value) { return as_float((u32)value << 16); }
DEVICE float low(u32 both) { return as_float(both << 16); }
DEVICE float high(u32 both) { return as_float(both & 0xffff0000u); }
DEVICE bf16 to_bf16(float value) { return (bf16)(pack(value, 0.0f) & 0xffffu); }

// Four e4m3 (a sign, 4 bits of exponent with bias 7, 3 of mantissa) as bf16, exactly: moved to where a bf16 has these
// bits, they are 2^120 times too small.
DEVICE uint2 widened(u32 four) {
    u32 left = (four & 0xffu) | (four & 0xff00u) << 8, right = (four >> 16 & 0xffu) | (four >> 8 & 0xff0000u);
    left = (left & 0x00800080u) << 8 | (left & 0x007f007fu) << 4;
    right = (right & 0x00800080u) << 8 | (right & 0x007f007fu) << 4;
    return make_uint2(times(left, 0x7b807b80u), times(right, 0x7b807b80u));
}

DEVICE uint4 load16(const bf16* from) { return load((const uint4*)from); }

#ifndef INFINITY
#define INFINITY as_float(0x7f800000u)
#endif

DEVICE float maximum(float a, float b) { return a > b ? a : b; }
DEVICE float sum_of_warp(float value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Sum over a block of whole warps, in the same order whatever runs beside it; `scratch` is one float a warp.
DEVICE float sum_of_block(float value, float* scratch) {
    value = sum_of_warp(value);
    sync_block();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    sync_block();
    float sum = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += scratch[warp];
    return sum;
}

// x / (1 + e^-x)
DEVICE float silu(float x) { return x / (1.0f + fast_exp2(-1.4426950408889634f * x)); }

// What a product does with its sums: stores them as bf16 or f32, adds them to f32, or stores silu(gate) * up as bf16
// (8 rows of gates and 8 of ups take turns in the weights).
enum Mode { BF16, ADD, SWIGLU, F32 };

// How a pool of keys and values lies (`KvLayout`), strides in bytes; `shift` is the logarithm of a block's tokens.
struct Pool {
    u64 base, stride_block, stride_layer, stride_head, stride_kv;
    u32 shift, head_dim;
};

// Where the key (kv = 0) or value (kv = 1) of a token is.
DEVICE bf16* place(const Pool& pool, u32 layer, u32 head, u32 kv, const u32* table, u32 token) {
    u64 block = load(table + (token >> pool.shift));
    u32 within = token & ((1u << pool.shift) - 1);
    return (bf16*)(pool.base + block * pool.stride_block + layer * pool.stride_layer + head * pool.stride_head
                   + kv * pool.stride_kv + (u64)within * pool.head_dim * 2);
}

// What the sampler knows of a sequence, one a slot (`SamplingParams`; the fields of the same name).
struct Slot {
    u64 seed;
    u64 position;  // Output position of the next token.
    float temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty;
    u32 top_k;
    u32 logprobs;   // Alternatives wanted, plus 1; 0 = no log-probabilities.
    u32 penalised;  // Whether counts of tokens are kept.
    u32 last;       // Newest token of prompt and output.
    u32 padding[2];
};

// Where 16 bytes of a row of SIZE bf16 are in shared memory: turned so that 8 rows of one column meet all banks.
template <int SIZE> DEVICE u32 turned(u32 row, u32 chunk) {
    return row * SIZE * 2 + ((chunk ^ (SIZE == 32 ? row >> 1 & 3 : row & 7)) << 4);
}
