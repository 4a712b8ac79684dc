//! The whole back end on an emulated device: the numbers are the CPU back end's, within what bf16 activations round away,
//! however a sequence is computed.

mod attention;
mod device;
mod faults;
mod gpu;
mod kernels;
pub mod model;
mod products;
mod sampler;

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_shared::id::BlockIndex;

use self::device::Device;
use self::model::{Shape, VOCAB, tiny_model};
use super::sys::Gpu;
use super::*;
use crate::backend::conformance::{self, Numbers};
use crate::backend::cpu::{CpuBackend, CpuOptions, Simd};
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Input, SlotOpen, StepSeq};
use crate::model::{Architecture, Model};

/// How far log-probabilities may be from the CPU's, whose activations are f32 and not bf16: at most, and the root of the
/// mean square. Seen: 0.063 and 0.011.
const FROM_CPU: (f32, f32) = (0.1, 0.016);
/// How far they may be apart between two ways to compute them on the device. Seen: 0.021 and 0.006.
const APART: (f32, f32) = (0.04, 0.01);
const BLOCK_TOKENS: u32 = 8;
const BLOCKS: u32 = 128;
const SEQUENCES: u32 = 6;

/// By sequence and position: log-probabilities of all tokens after it.
type Seen = BTreeMap<(usize, u32), Vec<f32>>;

/// A sequence whose tokens are given, and how many of them each step takes.
#[derive(Clone)]
struct Given {
    tokens: Vec<u32>,
    pieces: Vec<u32>,
}

fn tokens(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| (seed * 31 + at * 7 + at * at * 3) % VOCAB).collect()
}

impl Given {
    /// So many tokens in pieces of this size, then one by one.
    fn new(seed: u32, prompt: u32, piece: u32, then: u32) -> Self {
        let mut pieces: Vec<u32> =
            (0..prompt).step_by(piece as usize).map(|at| piece.min(prompt - at)).collect();
        pieces.extend((0..then).map(|_| 1));
        Self { tokens: tokens(seed, prompt + then), pieces }
    }
}

fn sampling() -> SamplingParams {
    SamplingParams { logprobs: Some(VOCAB), ..SamplingParams::greedy() }
}

/// Runs sequences side by side: a step takes a piece of each that has one left, decodes in front. Copied to other blocks
/// before the step of that number.
fn run(backend: &mut dyn Backend, sequences: &[Given], copied_before: Option<usize>) -> Seen {
    let mut seen = Seen::new();
    let each = BLOCKS / 2 / sequences.len() as u32;
    let mut moved = 0;
    let mut start = vec![0_u32; sequences.len()];
    for step in 0.. {
        let mut running: Vec<usize> =
            (0..sequences.len()).filter(|at| step < sequences[*at].pieces.len()).collect();
        if running.is_empty() {
            break;
        }
        if copied_before == Some(step) {
            moved = BLOCKS / 2;
            let pairs: Vec<_> =
                (0..moved).map(|block| (BlockIndex(block), BlockIndex(block + moved))).collect();
            backend.copy_blocks(&pairs).unwrap();
        }
        running.sort_by_key(|at| sequences[*at].pieces[step] > 1);
        let mut plan = StepPlan::default();
        for &at in &running {
            let (given, from) = (&sequences[at], start[at]);
            let end = from + given.pieces[step];
            if step == 0 {
                plan.opens.push(SlotOpen {
                    slot: Slot(at as u32),
                    sampling: sampling(),
                    history: given.tokens[..1].to_vec(),
                    prompt_len: 1,
                });
            }
            let first = plan.tokens.len() as u32;
            plan.tokens.extend(&given.tokens[from as usize..end as usize]);
            let table = plan.tables.len() as u32;
            // Blocks of one sequence lie apart, in falling order.
            let count = sequences.len() as u32;
            let block = |number: u32| BlockIndex(moved + (each - 1 - number) * count + at as u32);
            plan.tables.extend((0..end.div_ceil(BLOCK_TOKENS)).map(block));
            plan.seqs.push(StepSeq {
                slot: Slot(at as u32),
                start: from,
                input: Input::Tokens(first..plan.tokens.len() as u32),
                table: table..plan.tables.len() as u32,
                sample: true,
            });
            start[at] = end;
        }
        let ticket = backend.submit(&plan).unwrap();
        let mut out = StepOut::default();
        backend.collect(ticket, &mut out).unwrap();
        assert_eq!(out.samples.len(), running.len());
        for (sampled, at) in out.samples.iter().zip(running) {
            let mut all = vec![f32::NAN; VOCAB as usize];
            for (token, logprob) in &out.top[sampled.top.start as usize..sampled.top.end as usize] {
                all[*token as usize] = *logprob;
            }
            assert_eq!((sampled.slot, sampled.rank), (Slot(at as u32), 1));
            assert_eq!(sampled.logprob, all[sampled.token as usize]);
            assert!(all.iter().all(|logprob| !logprob.is_nan()), "all tokens are told");
            seen.insert((at, start[at]), all);
        }
    }
    seen
}

/// What both have seen is no farther apart than `bounds`: at most, and the root of the mean square.
fn assert_near(left: &Seen, right: &Seen, bounds: (f32, f32), what: &str) {
    let (mut most, mut squares, mut count) = (0.0_f32, 0.0, 0);
    for (place, left) in left {
        let Some(right) = right.get(place) else { continue };
        for (left, right) in left.iter().zip(right) {
            let far = (left - right).abs();
            most = most.max(far);
            squares += far * far;
            count += 1;
        }
    }
    assert!(count >= 4 * VOCAB, "{what}: there is something to compare");
    let root = (squares / count as f32).sqrt();
    println!("{what}: {most} at most, {root} in the root of the mean square");
    assert!(
        most < bounds.0 && root < bounds.1,
        "{what}: {most} at most, {root} in the root of the mean square"
    );
}

fn cpu(model: &Model) -> CpuBackend {
    let options = CpuOptions {
        threads: 1,
        max_sequences: SEQUENCES,
        max_batch_tokens: 512,
        blocks: BLOCKS,
        block_tokens: BLOCK_TOKENS,
        simd: Simd::Auto,
    };
    CpuBackend::new(model, &options).unwrap()
}

fn options() -> CudaOptions {
    CudaOptions {
        max_sequences: SEQUENCES,
        max_batch_tokens: 512,
        max_len: 256,
        pool: PoolSize::Blocks(BLOCKS),
        block_tokens: BLOCK_TOKENS,
        graphs: true,
    }
}

fn cuda(gpu: &Arc<dyn Gpu>, model: &Model, options: &CudaOptions) -> CudaBackend {
    CudaBackend::load(gpu, &mut &*model, options).unwrap()
}

const SHAPES: [Shape; 4] = [
    Shape { architecture: Architecture::Llama, heads: (4, 2, 32), tied: true },
    Shape { architecture: Architecture::Qwen2, heads: (3, 1, 64), tied: true },
    Shape { architecture: Architecture::Qwen3, heads: (2, 2, 128), tied: false },
    Shape { architecture: Architecture::Llama, heads: (20, 1, 32), tied: false },
];

#[test]
fn the_numbers_are_the_cpus_however_a_sequence_is_computed() {
    let lens = [37, 5, 18, 1];
    let whole: Vec<Given> =
        (0..).zip(lens).map(|(seed, len)| Given::new(seed, len, 512, 3)).collect();
    let pieces = [9, 2, 8, 1];
    let chunks: Vec<Given> = (0..)
        .zip(lens.into_iter().zip(pieces))
        .map(|(seed, (len, piece))| Given::new(seed, len, piece, 3))
        .collect();
    for shape in SHAPES {
        let model = tiny_model(&shape);
        let wanted = run(&mut cpu(&model), &whole, None);
        // In rising order with graphs, in falling order without; with the vendor's library.
        for (backward, graphs, has_blas) in
            [(false, true, false), (true, false, false), (false, true, true)]
        {
            if has_blas && !shape.tied {
                continue;
            }
            let device = Device::new(backward, has_blas);
            let options = CudaOptions { graphs, ..options() };
            let mut backend = cuda(&device.gpu, &model, &options);
            let way = format!("{shape:?}, backward {backward}, blas {has_blas}");
            let seen = run(&mut backend, &whole, None);
            assert_eq!(seen.len(), wanted.len());
            assert_near(&seen, &wanted, FROM_CPU, &format!("{way}: whole"));
            let other = run(&mut backend, &chunks, Some(3));
            assert_near(&other, &seen, APART, &format!("{way}: in chunks and copied blocks"));
            for (at, given) in whole.iter().enumerate().take(2) {
                let alone = run(&mut backend, std::slice::from_ref(given), None);
                let alone = alone.into_iter().map(|((_, end), all)| ((at, end), all)).collect();
                assert_near(&alone, &seen, APART, &format!("{way}: alone"));
            }
            drop(backend);
            device.assert_nothing_is_left();
        }
    }
}

#[test]
fn a_cuda_back_end_keeps_the_contract() {
    let model = tiny_model(&SHAPES[0]);
    for (graphs, has_blas) in [(true, false), (false, true)] {
        let options = CudaOptions { max_sequences: 4, max_batch_tokens: 64, graphs, ..options() };
        let options = CudaOptions { pool: PoolSize::Blocks(32), ..options };
        let device = Device::new(false, has_blas);
        let make = || Box::new(cuda(&device.gpu, &model, &options)) as Box<dyn Backend>;
        conformance::suite(&make, Numbers::Within(APART.0));
        device.assert_nothing_is_left();
    }
}
