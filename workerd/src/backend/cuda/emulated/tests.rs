//! The emulator finds what a kernel may not do, and its collectives are those of the PTX manual.

use std::sync::{Arc, LazyLock};

use super::build::Source;
use super::library::Library;
use super::*;

/// Kernels that are right, and kernels that are wrong in one way each.
const PROBES: &str = r"
KERNEL(256, 1) twice(u32* to, u32 n) {
    u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at < n) store(to + at, 2 * load(to + at));
}
KERNEL(256, 1) twice_the_same(u32* to) { store(to + threadIdx.x / 2, 1u); }
KERNEL(256, 1) one_too_many(u32* to) { store(to + threadIdx.x, 1u); }
KERNEL(256, 1) unaligned(u8* to) { store((u32*)(to + threadIdx.x), 1u); }
KERNEL(256, 1) never_written(const u32* from, u32* to) { store(to + threadIdx.x, load(from + threadIdx.x)); }
KERNEL(256, 1) unchecked(u32* to) { to[threadIdx.x + 0x100000] = 1; }
KERNEL(256, 1) beyond_shared() {
    SHARED_MEMORY(shared);
    ((u32*)shared)[threadIdx.x * 64] = 1;
}
// Thread i gets what thread n - 1 - i put there.
template <bool WAITS> DEVICE void mirror(u32* to) {
    SHARED_MEMORY(shared);
    u32* words = (u32*)shared;
    words[threadIdx.x] = threadIdx.x;
    if (WAITS) sync_block();
    store(to + threadIdx.x, words[blockDim.x - 1 - threadIdx.x]);
}
KERNEL(256, 1) mirrored(u32* to) { mirror<true>(to); }
KERNEL(256, 1) mirrored_too_soon(u32* to) { mirror<false>(to); }
KERNEL(256, 1) some_do_not_come() {
    if (threadIdx.x < 40) return;
    sync_block();
}
KERNEL(256, 1) some_go_elsewhere() {
    if (threadIdx.x % 2) sync_warp();
    else sync_block();
}
KERNEL(256, 1) lanes_at_two_places(u32* to) {
    u32 value = threadIdx.x % 2
        ? shuffle_xor(1u, 1)
        : shuffle_xor(2u, 1);
    store(to + threadIdx.x, value);
}
template <bool COMMITS, int LEFT> DEVICE void fetch(const u32* from, u32* to) {
    SHARED_MEMORY(shared);
    uint4* words = (uint4*)shared;
    copy_async(words + threadIdx.x, from + threadIdx.x * 4, threadIdx.x < 24);
    if (COMMITS) copy_commit();
    copy_wait<LEFT>();
    store((uint4*)to + threadIdx.x, words[threadIdx.x]);
    copy_commit();
    copy_wait<0>();
}
KERNEL(32, 1) fetched(const u32* from, u32* to) { fetch<true, 0>(from, to); }
KERNEL(32, 1) fetched_without_commit(const u32* from, u32* to) { fetch<false, 0>(from, to); }
KERNEL(32, 1) fetched_without_wait(const u32* from, u32* to) { fetch<true, 1>(from, to); }
KERNEL(32, 1) left_on_its_way(const u32* from) {
    SHARED_MEMORY(shared);
    copy_async(shared + threadIdx.x * 16, from, true);
}
KERNEL(32, 1) shuffles(u64* to) {
    u64 lane = threadIdx.x;
    store(to + lane, shuffle_xor(lane, 5));
    store(to + 32 + lane, shuffle_up(lane, 3));
    store(to + 64 + lane, shuffle_last(lane + 7));
    store((float*)(to + 96) + lane, sum_of_warp((float)lane));
}
// Registers of each lane, as they are.
KERNEL(32, 1) matrices_loaded(const u32* from, u32* to, u32 transposed) {
    SHARED_MEMORY(shared);
    for (u32 i = threadIdx.x; i < 128; i += 32) ((u32*)shared)[i] = load(from + i);
    sync_warp();
    u32 v[4];
    if (transposed) load_matrix_transposed(v, shared + threadIdx.x * 16);
    else load_matrix(v, shared + threadIdx.x * 16);
    for (u32 i = 0; i < 4; i++) store(to + threadIdx.x * 4 + i, v[i]);
}
KERNEL(32, 1) multiplied(const u32* fragments, float* sums) {
    u32 f[6];
    float c[4];
    for (u32 i = 0; i < 6; i++) f[i] = load(fragments + threadIdx.x * 6 + i);
    for (u32 i = 0; i < 4; i++) c[i] = load(sums + threadIdx.x * 4 + i);
    mma(c, f[0], f[1], f[2], f[3], f[4], f[5]);
    for (u32 i = 0; i < 4; i++) store(sums + threadIdx.x * 4 + i, c[i]);
}
KERNEL(32, 1) rounded_to_bf16(const float* from, u32* to) {
    store(to + threadIdx.x, pack(load(from + 2 * threadIdx.x), load(from + 2 * threadIdx.x + 1)));
}
template <bool AWAITS> DEVICE void overlap(const u32* from, u32* to) {
    begin_next();
    u32 value = load(from + threadIdx.x);
    if (AWAITS) await_previous();
    store(to + threadIdx.x, value);
}
KERNEL(32, 1) overlaps(const u32* from, u32* to) { overlap<true>(from, to); }
KERNEL(32, 1) overlaps_too_long(const u32* from, u32* to) { overlap<false>(from, to); }
KERNEL(32, 1) added(u32* sum) { atomic_add(sum, threadIdx.x); }
";

static LIBRARY: LazyLock<Library> =
    LazyLock::new(|| Library::of(&[Source { name: "probes".to_owned(), text: PROBES.to_owned() }]));

fn emulator() -> Arc<Emulator> {
    Emulator::with(&LIBRARY, 1 << 20, 1, false)
}

/// Memory of `words`, written; poison if there are none.
fn memory(gpu: &Emulator, words: &[u32]) -> u64 {
    let address = gpu.allocate(size_of_val(words)).unwrap();
    // SAFETY: so many bytes on both sides, until they are copied below.
    unsafe { gpu.copy_in(address, words.as_ptr().cast(), size_of_val(words)).unwrap() };
    gpu.synchronise().unwrap();
    address
}

fn read(gpu: &Emulator, address: u64, count: usize) -> Vec<u32> {
    let mut words = vec![0; count];
    // SAFETY: so many bytes on both sides, until they are copied below.
    unsafe { gpu.copy_out(words.as_mut_ptr().cast(), address, 4 * count).unwrap() };
    gpu.synchronise().unwrap();
    words
}

fn start(
    gpu: &Emulator,
    name: &'static str,
    threads: u32,
    shared: u32,
    args: &Args,
) -> Result<(), GpuError> {
    let shape = Shape { grid: [1, 1, 1], threads, shared };
    let kernel = Kernel { name, index: 0, shared };
    // SAFETY: every call below passes what the kernel takes.
    unsafe { gpu.launch(kernel, shape, args)? };
    gpu.synchronise()
}

/// What a kernel is found to do wrong.
fn fault_of(gpu: &Emulator, name: &'static str, threads: u32, shared: u32, args: &Args) -> String {
    start(gpu, name, threads, shared, args).unwrap_err().to_string()
}

#[test]
fn a_kernel_runs_and_its_writes_are_counted() {
    let gpu = emulator();
    let words: Vec<u32> = (0..100).collect();
    let to = memory(&gpu, &words);
    let args = Args::default().u64(to).u32(99);
    start(&gpu, "twice", 256, 0, &args).unwrap();
    assert_eq!(gpu.writes(to, 99 * 4), (1, 1));
    assert_eq!(gpu.writes(to, 100 * 4), (0, 1));
    let doubled = read(&gpu, to, 100);
    assert_eq!((doubled[98], doubled[99]), (196, 99));
    start(&gpu, "twice_the_same", 200, 0, &Args::default().u64(to)).unwrap();
    assert_eq!(gpu.writes(to, 100 * 4), (2, 2));
    start(&gpu, "added", 32, 0, &Args::default().u64(to)).unwrap();
    assert_eq!((gpu.writes(to, 100 * 4), read(&gpu, to, 1)), ((0, 0), vec![1 + 496]));
}

#[test]
fn what_touches_memory_that_is_not_its_own_is_named() {
    let gpu = emulator();
    let to = memory(&gpu, &[0; 64]);
    let fault = fault_of(&gpu, "one_too_many", 96, 0, &Args::default().u64(to));
    assert!(fault.contains("one_too_many: block (0, 0, 0), thread 64, probes.cu:7:"), "{fault}");
    assert!(fault.contains("store of 4 bytes at"), "{fault}");
    assert!(fault.contains("offset 256 of an allocation of 256 bytes"), "{fault}");
    let gpu = emulator();
    gpu.run_backward(true);
    let to = memory(&gpu, &[0; 64]);
    let fault = fault_of(&gpu, "one_too_many", 96, 0, &Args::default().u64(to));
    assert!(fault.contains("thread 95"), "{fault}");
    let gpu = emulator();
    let to = memory(&gpu, &[0; 64]);
    let fault = fault_of(&gpu, "unaligned", 32, 0, &Args::default().u64(to));
    assert!(fault.contains("thread 1,") && fault.contains("not aligned"), "{fault}");
}

#[test]
fn what_reads_memory_that_nobody_wrote_is_named() {
    let gpu = emulator();
    let (from, to) = (gpu.allocate(256).unwrap(), memory(&gpu, &[0; 64]));
    let args = Args::default().u64(from).u64(to);
    let fault = fault_of(&gpu, "never_written", 64, 0, &args);
    assert!(fault.contains("nothing was ever stored there (offset 0 of 256)"), "{fault}");
}

#[test]
fn what_passes_by_the_checks_meets_a_page_that_nobody_may_touch() {
    let gpu = emulator();
    let fault = fault_of(&gpu, "beyond_shared", 32, 1024, &Args::default());
    assert!(fault.contains("thread 4: touches offset 1024 of 1024 bytes of shared"), "{fault}");
    let gpu = emulator();
    let to = memory(&gpu, &[0; 64]);
    // Another kernel's fault did no harm.
    start(&gpu, "mirrored", 64, 256, &Args::default().u64(to)).unwrap();
    let fault = fault_of(&gpu, "unchecked", 32, 0, &Args::default().u64(0));
    assert!(fault.contains("thread 0: touches 0x400000, not by `load` or `store`"), "{fault}");
}

#[test]
fn a_missing_barrier_shows_in_one_order_of_threads_or_the_other() {
    let wanted: Vec<u32> = (0..64).rev().collect();
    for backward in [false, true] {
        let gpu = emulator();
        gpu.run_backward(backward);
        let to = memory(&gpu, &[0; 64]);
        start(&gpu, "mirrored", 64, 256, &Args::default().u64(to)).unwrap();
        assert_eq!(read(&gpu, to, 64), wanted);
        start(&gpu, "mirrored_too_soon", 64, 256, &Args::default().u64(to)).unwrap();
        assert_ne!(read(&gpu, to, 64), wanted);
    }
}

#[test]
fn threads_that_do_not_meet_are_an_error_and_not_a_hang() {
    for (name, told) in [
        ("some_do_not_come", "waits at sync_block (probes.cu:27) with 24 of 64 threads; 40 ended"),
        (
            "some_go_elsewhere",
            "waits at sync_block (probes.cu:31) with 32 of 64 threads; 0 ended, 32 wait",
        ),
    ] {
        let gpu = emulator();
        let fault = fault_of(&gpu, name, 64, 0, &Args::default());
        assert!(fault.contains(told), "{fault}");
    }
    let gpu = emulator();
    let to = memory(&gpu, &[0; 32]);
    let fault = fault_of(&gpu, "lanes_at_two_places", 32, 0, &Args::default().u64(to));
    assert!(
        fault.contains(
            "probes.cu:35: shuffle, while others of the warp are at shuffle (probes.cu:36)"
        ),
        "{fault}"
    );
}

#[test]
fn a_copy_is_there_when_its_group_was_waited_for_and_not_before() {
    let words: Vec<u32> = (0..96).collect();
    let mut padded = words.clone();
    padded.resize(128, 0);
    for (name, arrives) in
        [("fetched", true), ("fetched_without_commit", false), ("fetched_without_wait", false)]
    {
        let gpu = emulator();
        let (from, to) = (memory(&gpu, &words), memory(&gpu, &[0; 128]));
        start(&gpu, name, 32, 512, &Args::default().u64(from).u64(to)).unwrap();
        let wanted = if arrives { padded.clone() } else { vec![u32::MAX; 128] };
        assert_eq!(read(&gpu, to, 128), wanted, "{name}");
    }
    let gpu = emulator();
    let from = memory(&gpu, &words);
    let fault = fault_of(&gpu, "left_on_its_way", 32, 512, &Args::default().u64(from));
    assert!(
        fault.contains("thread 0") && fault.contains("1 copies were not waited for"),
        "{fault}"
    );
}

#[test]
fn a_kernel_that_overlaps_with_the_one_before_touches_only_constants_until_that_has_ended() {
    let gpu = emulator();
    let (constant, to) = (memory(&gpu, &[7; 32]), memory(&gpu, &[0; 32]));
    start(&gpu, "overlaps", 32, 0, &Args::default().u64(constant).u64(to)).unwrap();
    assert_eq!(read(&gpu, to, 32), [7; 32]);
    let fault = fault_of(&gpu, "overlaps", 32, 0, &Args::default().u64(to).u64(constant));
    assert!(fault.contains("thread 0, probes.cu:") && fault.contains("before `await"), "{fault}");
    let gpu = emulator();
    let (constant, to) = (memory(&gpu, &[7; 32]), memory(&gpu, &[0; 32]));
    let args = Args::default().u64(constant).u64(to);
    let fault = fault_of(&gpu, "overlaps_too_long", 32, 0, &args);
    assert!(fault.contains("ends without `await_previous`"), "{fault}");
}

#[test]
fn shuffles_bring_the_values_of_other_lanes() {
    let gpu = emulator();
    let to = memory(&gpu, &[0; 224]);
    start(&gpu, "shuffles", 32, 0, &Args::default().u64(to)).unwrap();
    let words = read(&gpu, to, 224);
    for lane in 0..32_usize {
        assert_eq!(words[2 * lane], lane as u32 ^ 5);
        assert_eq!(words[64 + 2 * lane], if lane < 3 { lane } else { lane - 3 } as u32);
        assert_eq!(words[128 + 2 * lane], 38);
        assert_eq!(f32::from_bits(words[192 + lane]), 496.0);
    }
}

/// The PTX manual, "ldmatrix": four 8x8 matrices, rows at the addresses of lanes 8i to 8i + 7; thread 4r + c gets elements
/// 2c and 2c + 1 of row r, of the transposed matrix if asked so.
#[test]
fn matrices_become_fragments_as_in_the_ptx_manual() {
    // Element (row, column) of matrix i is 64 i + 8 row + column.
    let words: Vec<u32> = (0..128).map(|word| (2 * word) | ((2 * word + 1) << 16)).collect();
    for transposed in [0, 1] {
        let gpu = emulator();
        let (from, to) = (memory(&gpu, &words), memory(&gpu, &[0; 128]));
        let args = Args::default().u64(from).u64(to).u32(transposed);
        start(&gpu, "matrices_loaded", 32, 512, &args).unwrap();
        let got = read(&gpu, to, 128);
        for lane in 0..32_u32 {
            for matrix in 0..4_u32 {
                let element = |column: u32| {
                    let (row, column) = (lane / 4, 2 * (lane % 4) + column);
                    let (row, column) = if transposed == 1 { (column, row) } else { (row, column) };
                    64 * matrix + 8 * row + column
                };
                assert_eq!(got[(4 * lane + matrix) as usize], element(0) | (element(1) << 16));
            }
        }
    }
}

/// The PTX manual, "mma.m16n8k16" for .bf16: with group = lane / 4 and t = lane % 4, element i of a (two a register) is
/// in row group, or group + 8 for i in 2..4 and 6..8, and column 2t + i % 2, and 8 more for i >= 4; element i of b in row
/// 2t + i % 2, and 8 more for i >= 2, and column group; element i of c in row group, or group + 8 for i >= 2, and column
/// 2t + i % 2.
#[test]
fn products_of_fragments_are_those_of_the_ptx_manual() {
    let bf16 = |value: f32| value.to_bits() >> 16;
    // Small whole numbers: every sum is exact.
    let a = |row: usize, k: usize| ((row * 7 + k * 3) % 11) as f32 - 5.0;
    let b = |k: usize, column: usize| ((k * 5 + column * 2) % 9) as f32 - 4.0;
    let mut fragments = Vec::new();
    let mut sums = Vec::new();
    for lane in 0..32_usize {
        let (group, t) = (lane / 4, lane % 4);
        let of_a = |i: usize| {
            let row = if (2..4).contains(&i) || i >= 6 { group + 8 } else { group };
            a(row, 2 * t + i % 2 + if i >= 4 { 8 } else { 0 })
        };
        let of_b = |i: usize| b(2 * t + i % 2 + if i >= 2 { 8 } else { 0 }, group);
        fragments.extend((0..4).map(|r| bf16(of_a(2 * r)) | (bf16(of_a(2 * r + 1)) << 16)));
        fragments.extend((0..2).map(|r| bf16(of_b(2 * r)) | (bf16(of_b(2 * r + 1)) << 16)));
        sums.extend((0..4).map(|i| (lane * 4 + i) as f32));
    }
    let gpu = emulator();
    let bits: Vec<u32> = sums.iter().map(|sum| sum.to_bits()).collect();
    let (fragments, to) = (memory(&gpu, &fragments), memory(&gpu, &bits));
    start(&gpu, "multiplied", 32, 0, &Args::default().u64(fragments).u64(to)).unwrap();
    let got = read(&gpu, to, 128);
    for lane in 0..32_usize {
        for i in 0..4 {
            let row = lane / 4 + if i >= 2 { 8 } else { 0 };
            let column = 2 * (lane % 4) + i % 2;
            let product: f32 = (0..16).map(|k| a(row, k) * b(k, column)).sum();
            let at = lane * 4 + i;
            assert_eq!(f32::from_bits(got[at]), sums[at] + product, "lane {lane}, element {i}");
        }
    }
}

#[test]
fn floats_are_rounded_to_the_nearest_bf16_and_even_when_two_are() {
    let mut floats: Vec<f32> = vec![1.0, -1.0, 0.0, -0.0, f32::INFINITY, f32::MAX, 1e-40, 3.0e38];
    floats.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff].map(f32::from_bits));
    floats.extend((0..52).map(|i| (i as f32 * 0.37).exp() * if i % 2 == 0 { 1.0 } else { -1.0 }));
    let gpu = emulator();
    let bits: Vec<u32> = floats.iter().map(|float| float.to_bits()).collect();
    let (from, to) = (memory(&gpu, &bits), memory(&gpu, &[0; 32]));
    start(&gpu, "rounded_to_bf16", 32, 0, &Args::default().u64(from).u64(to)).unwrap();
    let half = |float: f32| u32::from(half::bf16::from_f32(float).to_bits());
    for (pair, got) in floats.chunks(2).zip(read(&gpu, to, 32)) {
        assert_eq!(got, half(pair[0]) | (half(pair[1]) << 16), "{pair:?}");
    }
}

#[test]
fn launches_that_a_device_refuses_are_refused() {
    let gpu = emulator();
    let to = memory(&gpu, &[0; 64]);
    let args = Args::default().u64(to).u32(64);
    let launch = |name, grid, threads, shared, allowed, args: &Args| {
        let kernel = Kernel { name, index: 0, shared: allowed };
        // SAFETY: what is launched takes an address and a number.
        unsafe { gpu.launch(kernel, Shape { grid, threads, shared }, args) }
    };
    launch("twice", [1, 1, 1], 256, 48 << 10, 0, &args).unwrap();
    launch("twice", [1, 1, 1], 256, 227 << 10, 227 << 10, &args).unwrap();
    gpu.synchronise().unwrap();
    for (name, grid, threads, shared, allowed, args, told) in [
        ("twice", [1, 1, 1], 257, 0, 0, args.clone(), "257 threads a block, of at most 256"),
        ("twice", [1, 1, 1], 0, 0, 0, args.clone(), "0 threads"),
        ("twice", [1, 0, 1], 32, 0, 0, args.clone(), "1 x 0 x 1 blocks"),
        ("twice", [1, 65_536, 1], 32, 0, 0, args.clone(), "1 x 65536 x 1 blocks"),
        ("twice", [1, 1, 1], 32, 49_153, 0, args.clone(), "49153 bytes of shared memory"),
        ("twice", [1, 1, 1], 32, 228 << 10, 228 << 10, args.clone(), "233472 bytes of shared"),
        ("twice", [1, 1, 1], 32, 0, 0, Args::default().u64(to), "1 arguments, it takes 2"),
        ("thrice", [1, 1, 1], 32, 0, 0, args.clone(), "no such kernel"),
    ] {
        let error = launch(name, grid, threads, shared, allowed, &args).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}
