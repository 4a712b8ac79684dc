//! How fast the device is, and how much of that the kernels use with the shapes of an 8B model.

use std::sync::Arc;

use anyhow::Result;
use baton_shared::kv::layout::{KvDtype, KvLayout};
use baton_workerd::backend::cuda::forward::splits;
use baton_workerd::backend::cuda::sys::Gpu;
use baton_workerd::backend::cuda::sys::buffer::Buffer;
use baton_workerd::backend::cuda::sys::launch::{Dims, Kernels, PoolLayer, Rows};
use baton_workerd::backend::cuda::sys::products::{Format, Matrix, Mode, Spare};
use baton_workerd::backend::cuda::sys::queue::{Event, Graph};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The numbers of Llama-3.1-8B.
pub const DIMS: Dims = Dims {
    hidden: 4096,
    ffn: 14336,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    vocab: 128_256,
    epsilon: 1e-5,
};

/// What the device does at best.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes a second, read and written, of a copy.
    pub copy: f64,
    /// Operations a second of the vendor's library, 8,192 cubed; 0 without it.
    pub matrix: f64,
}

/// Seconds of `work` by the device's clock: median of `repeats` after two that do not count.
pub fn time(
    gpu: &Arc<dyn Gpu>,
    repeats: usize,
    mut work: impl FnMut(usize) -> Result<()>,
) -> Result<f64> {
    let mut times = Vec::new();
    for repeat in 0..repeats + 2 {
        let (from, to) = (Event::new(gpu)?, Event::new(gpu)?);
        from.record()?;
        work(repeat)?;
        to.record()?;
        to.wait()?;
        if repeat >= 2 {
            times.push(f64::from(to.since(&from)?) / 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A buffer of random bf16 of moderate size.
pub fn random(gpu: &Arc<dyn Gpu>, elements: usize) -> Result<Buffer> {
    let buffer = Buffer::new(gpu, "random numbers", elements * 2)?;
    let piece = (elements * 2).min(8 << 20);
    let mut random = StdRng::seed_from_u64(elements as u64);
    let mut bytes = vec![0_u8; piece];
    for pair in bytes.chunks_exact_mut(2) {
        // Signs and mantissas at random, exponents of 2^-3 to 2^0.
        let bits: u16 = random.random();
        pair.copy_from_slice(&((bits & 0x807f) | ((124 + (bits >> 8 & 3)) << 7)).to_le_bytes());
    }
    for at in (0..elements * 2).step_by(piece) {
        buffer.write(at, &bytes[..piece.min(elements * 2 - at)])?;
    }
    Ok(buffer)
}

/// As the device has them.
fn words(values: Vec<u32>) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Measures them.
pub fn ceilings(gpu: &Arc<dyn Gpu>, kernels: &Kernels) -> Result<Ceilings> {
    let bytes = 2_usize << 30;
    let copy = {
        let both = Buffer::new(gpu, "a copy", 2 * bytes)?;
        both.fill(1)?;
        time(gpu, 10, |_| Ok(both.copy_within(0, bytes, bytes)?))?
    };
    let matrix = if gpu.has_blas() {
        let n = 8192_usize;
        let weights =
            Matrix { buffer: random(gpu, n * n)?, format: Format::Bf16, n: n as u32, k: n as u32 };
        let (x, out) = (random(gpu, n * n)?, Buffer::new(gpu, "products", n * n * 2)?);
        let seconds = time(gpu, 10, |_| {
            let (x, out) = (x.view(), out.view());
            Ok(kernels.multiply(
                Mode::Bf16,
                &weights,
                x,
                n as u32,
                out,
                Spare { gate_up: out, wide: out },
            )?)
        })?;
        2.0 * (n as f64).powi(3) / seconds
    } else {
        0.0
    };
    Ok(Ceilings { copy: 2.0 * bytes as f64 / copy, matrix })
}

/// Times products of the model's shapes for `m` rows: with the launches of a graph, over weights that no cache holds.
pub fn products(gpu: &Arc<dyn Gpu>, kernels: &Kernels, m: u32) -> Result<Vec<String>> {
    let shapes = [
        ("qkv", Mode::Bf16, 6144_u32, 4096_u32),
        ("output", Mode::Add, 4096, 4096),
        ("gate, up", Mode::Swiglu, 28672, 4096),
        ("down", Mode::Add, 4096, 14336),
        ("head", Mode::F32, 128_256, 4096),
    ];
    let mut lines = Vec::new();
    for (name, mode, n, k) in shapes {
        if name == "head" && m > 512 {
            continue;
        }
        let bytes = n as usize * k as usize * 2;
        let copies = (512_usize << 20).div_ceil(bytes).max(1);
        let weights: Vec<Matrix> = (0..copies)
            .map(|_| Ok(Matrix { buffer: random(gpu, bytes / 2)?, format: Format::Bf16, n, k }))
            .collect::<Result<_>>()?;
        let x = random(gpu, (m * k) as usize)?;
        let out = Buffer::new(gpu, "products", m as usize * n as usize * 4)?;
        let spare = Buffer::new(gpu, "products", m as usize * n as usize * 2)?;
        out.fill(0)?;
        let all = || {
            for weights in &weights {
                let spare = Spare { gate_up: spare.view(), wide: spare.view() };
                kernels.multiply(mode, weights, x.view(), m, out.view(), spare)?;
            }
            Ok(())
        };
        all()?;
        let graph = Graph::capture(gpu, all)?;
        let seconds = time(gpu, 5, |_| Ok(graph.launch()?))? / copies as f64;
        let work = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
        lines.push(format!(
            "product {name:9} m={m:<5} {:9.1} us  {:6.2} TB/s  {:6.1} TFLOP/s",
            seconds * 1e6,
            bytes as f64 / seconds / 1e12,
            work / seconds / 1e12
        ));
    }
    Ok(lines)
}

/// What is done row by row, for `m` rows.
pub fn rows(gpu: &Arc<dyn Gpu>, kernels: &Kernels, m: u32) -> Result<Vec<String>> {
    let n = m as usize;
    let blocks = m.div_ceil(32);
    let layout = KvLayout::block_major(KvDtype::Bf16, 32, 128, blocks, 0..1, 0..8);
    let pool = random(gpu, layout.bytes() as usize / 2)?;
    let positions = Buffer::with(gpu, "positions", &words((0..m).collect()))?;
    let zeros = Buffer::with(gpu, "starts", &vec![0; n * 4])?;
    let rows = Rows {
        count: m,
        tokens: positions.view(),
        slots: zeros.view(),
        positions: positions.view(),
        starts: zeros.view(),
        tables: positions.view(),
    };
    let stream = random(gpu, n * 4096 * 2)?;
    let weight = random(gpu, 4096 * 2)?;
    let normed = Buffer::new(gpu, "rows", n * 8192)?;
    let (qkv, angles) = (random(gpu, n * 6144)?, random(gpu, n * 256)?);
    let layer = PoolLayer { memory: pool.view(), layout: &layout, layer: 0 };
    let mut lines = Vec::new();
    let mut timed = |name: &str, work: &dyn Fn() -> Result<()>| -> Result<()> {
        let all = || -> Result<(), baton_workerd::backend::cuda::sys::GpuError> {
            (0..8).try_for_each(|_| {
                work().map_err(|error| {
                    baton_workerd::backend::cuda::sys::GpuError::Unavailable(error.to_string())
                })
            })
        };
        all()?;
        let graph = Graph::capture(gpu, all)?;
        let seconds = time(gpu, 5, |_| Ok(graph.launch()?))? / 8.0;
        lines.push(format!("{name} m={m} {:.1} us", seconds * 1e6));
        Ok(())
    };
    timed("norm", &|| {
        let (stream, weight) = (stream.view(), weight.view());
        Ok(kernels.rms_norm(&DIMS, stream, weight, None, m, normed.view())?)
    })?;
    timed("turn and store", &|| {
        let (qkv, angles) = (qkv.view(), angles.view());
        let out = normed.view();
        Ok(kernels.turn_and_store(&DIMS, qkv, None, None, angles, &rows, &layer, out)?)
    })?;
    Ok(lines)
}

/// One layer's launches for `batch` sequences at 2k, all of them and without some: where a step's time goes. Each
/// repeat has weights of its own.
pub fn layer(gpu: &Arc<dyn Gpu>, kernels: &Kernels, batch: u32) -> Result<Vec<String>> {
    const REPEATS: usize = 8;
    let context = 2048_u32;
    let n = batch as usize;
    let blocks = batch * context / 32;
    let layout = KvLayout::block_major(KvDtype::Bf16, 32, 128, blocks, 0..REPEATS as u32, 0..8);
    let pool = random(gpu, layout.bytes() as usize / 2)?;
    let positions = Buffer::with(gpu, "rows", &words(vec![context - 1; n]))?;
    let starts =
        Buffer::with(gpu, "rows", &words((0..batch).map(|row| row * context / 32).collect()))?;
    let tables = Buffer::with(gpu, "tables", &words((0..blocks).collect()))?;
    let rows = Rows {
        count: batch,
        tokens: positions.view(),
        slots: starts.view(),
        positions: positions.view(),
        starts: starts.view(),
        tables: tables.view(),
    };
    let matrices = |rows: u32, columns: u32| -> Result<Vec<Matrix>> {
        let one = || {
            Ok(Matrix {
                buffer: random(gpu, (rows * columns) as usize)?,
                format: Format::Bf16,
                n: rows,
                k: columns,
            })
        };
        (0..REPEATS).map(|_| one()).collect()
    };
    let (qkv_w, out_w) = (matrices(6144, 4096)?, matrices(4096, 4096)?);
    let (gate_w, down_w) = (matrices(28672, 4096)?, matrices(4096, 14336)?);
    let buffer = |bytes: usize| -> Result<Buffer> {
        let buffer = Buffer::new(gpu, "rows", bytes)?;
        buffer.fill(0)?;
        Ok(buffer)
    };
    let (stream, weight) = (random(gpu, n * 8192)?, random(gpu, 8192)?);
    let (normed, qkv, queries) = (buffer(n * 8192)?, buffer(n * 12288)?, buffer(n * 8192)?);
    let (angles, attended, active) = (random(gpu, n * 256)?, buffer(n * 8192)?, buffer(n * 28672)?);
    let parts = splits(&DIMS, gpu.facts().multiprocessors, batch);
    let (sums, states) = (buffer(n * 32 * 16 * 512)?, buffer(n * 32 * 16 * 8)?);
    let ended = buffer(n * 128)?;
    let names = ["norm", "qkv", "turn", "attention", "output", "norm", "gate, up", "down"];
    let one = |which: usize, repeat: usize| {
        let pool = PoolLayer { memory: pool.view(), layout: &layout, layer: repeat as u32 };
        let multiply = |mode, weights: &[Matrix], x: &Buffer, out: &Buffer| {
            let spare = Spare { gate_up: active.view(), wide: active.view() };
            kernels.multiply(mode, &weights[repeat], x.view(), batch, out.view(), spare)
        };
        match which {
            0 | 5 => {
                kernels.rms_norm(&DIMS, stream.view(), weight.view(), None, batch, normed.view())
            }
            1 => multiply(Mode::Bf16, &qkv_w, &normed, &qkv),
            2 => kernels.turn_and_store(
                &DIMS,
                qkv.view(),
                None,
                None,
                angles.view(),
                &rows,
                &pool,
                queries.view(),
            ),
            3 => {
                let meet = [sums.view(), states.view(), ended.view()];
                kernels.decode_attention(
                    &DIMS,
                    queries.view(),
                    &rows,
                    batch,
                    parts,
                    &pool,
                    meet,
                    attended.view(),
                )
            }
            4 => multiply(Mode::Add, &out_w, &attended, &stream),
            6 => multiply(Mode::Swiglu, &gate_w, &normed, &active),
            _ => multiply(Mode::Add, &down_w, &active, &stream),
        }
    };
    let mut lines = Vec::new();
    let mut timed = |name: &str, wanted: &dyn Fn(usize) -> bool| -> Result<()> {
        let all = || {
            for repeat in 0..REPEATS {
                (0..8).filter(|which| wanted(*which)).try_for_each(|which| one(which, repeat))?;
            }
            Ok(())
        };
        all()?;
        let graph = Graph::capture(gpu, all)?;
        let seconds = time(gpu, 9, |_| Ok(graph.launch()?))? / REPEATS as f64;
        lines.push(format!("layer B={batch} {name:24} {:7.1} us", seconds * 1e6));
        Ok(())
    };
    timed("whole", &|_| true)?;
    for (which, name) in names.iter().enumerate() {
        timed(&format!("without {name} {which}"), &|one| one != which)?;
    }
    for (which, name) in names.iter().enumerate() {
        timed(&format!("only {name}"), &|one| one == which)?;
    }
    timed("only products", &|one| [1, 4, 6, 7].contains(&one))?;
    timed("only norms and products", &|one| ![2, 3].contains(&one))?;
    Ok(lines)
}

/// Attention of the model's shape over a pool of one layer.
pub fn attention(gpu: &Arc<dyn Gpu>, kernels: &Kernels) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (batch, context) in [(1_u32, 2048_u32), (8, 2048), (64, 2048), (256, 2048), (1, 8192)] {
        let blocks = batch * context / 32;
        let layout = KvLayout::block_major(KvDtype::Bf16, 32, 128, blocks, 0..1, 0..8);
        let pool = random(gpu, layout.bytes() as usize / 2)?;
        let positions = Buffer::with(gpu, "positions", &words(vec![context - 1; batch as usize]))?;
        let per_row = context / 32;
        let starts = (0..batch).map(|row| row * per_row).collect();
        let starts = Buffer::with(gpu, "starts", &words(starts))?;
        let tables = (0..blocks).map(|at| (at * 17 + 5) % blocks).collect();
        let tables = Buffer::with(gpu, "tables", &words(tables))?;
        let queries = random(gpu, (batch * 4096) as usize)?;
        let out = Buffer::new(gpu, "attended", batch as usize * 8192)?;
        let parts = splits(&DIMS, gpu.facts().multiprocessors, batch);
        let sums = Buffer::new(gpu, "sums", (batch * 32 * parts * 128 * 4) as usize)?;
        let states = Buffer::new(gpu, "states", (batch * 32 * parts * 8) as usize)?;
        let ended = Buffer::new(gpu, "parts", batch as usize * 32 * 4)?;
        ended.fill(0)?;
        let rows = Rows {
            count: batch,
            tokens: positions.view(),
            slots: positions.view(),
            positions: positions.view(),
            starts: starts.view(),
            tables: tables.view(),
        };
        let layer = PoolLayer { memory: pool.view(), layout: &layout, layer: 0 };
        let all = || {
            for _ in 0..8 {
                kernels.decode_attention(
                    &DIMS,
                    queries.view(),
                    &rows,
                    batch,
                    parts,
                    &layer,
                    [sums.view(), states.view(), ended.view()],
                    out.view(),
                )?;
            }
            Ok(())
        };
        all()?;
        let graph = Graph::capture(gpu, all)?;
        let seconds = time(gpu, 5, |_| Ok(graph.launch()?))? / 8.0;
        lines.push(format!(
            "decode attention B={batch:<3} ctx {context}, {parts} splits {:9.1} us  {:6.2} TB/s",
            seconds * 1e6,
            layout.bytes() as f64 / seconds / 1e12
        ));
    }
    for context in [2048_u32, 8192] {
        let blocks = context / 32;
        let layout = KvLayout::block_major(KvDtype::Bf16, 32, 128, blocks, 0..1, 0..8);
        let pool = random(gpu, layout.bytes() as usize / 2)?;
        let tables = Buffer::with(
            gpu,
            "tables",
            &words((0..blocks).map(|at| (at * 5 + 1) % blocks).collect()),
        )?;
        let tiles = (0..context / 128).rev();
        let tiles = tiles.flat_map(|tile| [tile * 128, 128, tile * 128, 0]).collect();
        let tiles = Buffer::with(gpu, "tiles", &words(tiles))?;
        let any = Buffer::new(gpu, "rows", context as usize * 4)?;
        let queries = random(gpu, context as usize * 4096)?;
        let out = Buffer::new(gpu, "attended", context as usize * 8192)?;
        let rows = Rows {
            count: context,
            tokens: any.view(),
            slots: any.view(),
            positions: any.view(),
            starts: any.view(),
            tables: tables.view(),
        };
        let layer = PoolLayer { memory: pool.view(), layout: &layout, layer: 0 };
        let seconds = time(gpu, 5, |_| {
            let (queries, tiles, out) = (queries.view(), tiles.view(), out.view());
            let count = context / 128;
            Ok(kernels.prefill_attention(&DIMS, queries, &rows, tiles, count, &layer, out)?)
        })?;
        let work = 2.0 * 4096.0 * f64::from(context).powi(2);
        lines.push(format!(
            "prefill attention {context} tokens {:9.1} us  {:6.1} TFLOP/s (causal half counted)",
            seconds * 1e6,
            work / seconds / 1e12
        ));
    }
    Ok(lines)
}
