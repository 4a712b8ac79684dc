//! The whole back end on tiny random models.

mod formula;

use super::*;
use crate::backend::conformance::{self, Numbers};
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Slot, SlotOpen, StepSeq};
use crate::model::{Architecture, Layer, ModelSpec, Weight, WeightType};

/// splitmix64.
pub struct Random(u64);

impl Random {
    /// From any number.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % limit as u64) as usize
    }

    /// Roughly normal, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.number() >> 11) as f64 / (1_u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }
}

/// Weights with a standard deviation of about `size`.
pub fn random_weight(
    random: &mut Random,
    dtype: WeightType,
    rows: usize,
    cols: usize,
    size: f32,
) -> Weight {
    let mut bytes = Vec::with_capacity(rows * dtype.row_bytes(cols));
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    match dtype {
        WeightType::F32 => {
            (0..rows * cols).for_each(|_| bytes.extend((random.normal() * size).to_le_bytes()));
        }
        WeightType::F16 => {
            (0..rows * cols).for_each(|_| bytes.extend(half(random.normal() * size)));
        }
        WeightType::Bf16 => (0..rows * cols).for_each(|_| {
            bytes.extend(half::bf16::from_f32(random.normal() * size).to_le_bytes());
        }),
        quantised => {
            let (elements, block) = quantised.block();
            for _ in 0..rows * cols / elements as usize {
                let from = bytes.len();
                bytes.extend((0..block).map(|_| random.number() as u8));
                let to = &mut bytes[from..];
                let mut put = |at: usize, value: f32| to[at..at + 2].copy_from_slice(&half(value));
                let scale = size * (1.0 + random.normal().abs());
                match quantised {
                    WeightType::Q8_0 => put(0, scale / 74.0),
                    WeightType::Q4_0 => put(0, scale / 4.6),
                    WeightType::Q5_0 => put(0, scale / 9.2),
                    WeightType::Q6K => put(208, scale / 1400.0),
                    _ => {
                        // Half the codes' range below zero; the K types' 6-bit scales and minima are some 32 of 63.
                        let (steps, six) = match quantised {
                            WeightType::Q4_1 => (15.0, 1.0_f32),
                            WeightType::Q5_1 => (31.0, 1.0),
                            WeightType::Q4K => (15.0, -32.0),
                            _ => (31.0, -32.0),
                        };
                        put(0, scale / (steps * 0.3) / six.abs());
                        put(2, scale / 0.3 * -0.5 / six);
                    }
                }
            }
        }
    }
    Weight { dtype, rows, cols, bytes: bytes.into() }
}

/// Weights of `dtype`, values' of another (GGUF files mix them), and heads, KV heads and their size.
fn tiny_model(
    (dtype, value_dtype): (WeightType, WeightType),
    head: Option<WeightType>,
    heads: (u32, u32, u32),
) -> Model {
    let mut random = Random::new(7);
    let (heads, kv_heads, head_dim) = heads;
    // Rows are whole blocks.
    let (hidden, ffn) = if dtype.block().0 == 256 { (256, 512) } else { (64, 96) };
    let spec = ModelSpec {
        architecture: Architecture::Llama,
        layers: 2,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        vocab: 100,
        rope_theta: 10_000.0,
        rope_factors: Vec::new(),
        rms_eps: 1e-5,
        max_len: 512,
        window: None,
        eos_ids: vec![1],
    };
    let (hidden, ffn) = (hidden as usize, ffn as usize);
    let (queries, keys) = ((heads * head_dim) as usize, (kv_heads * head_dim) as usize);
    let mut matrix = |dtype, rows, cols| {
        random_weight(&mut random, dtype, rows, cols, 1.0 / (cols as f32).sqrt())
    };
    let norm = |len: usize| (0..len).map(|at| 1.0 + (at % 5) as f32 * 0.1).collect::<Vec<f32>>();
    let layers = (0..2)
        .map(|_| Layer {
            attn_norm: norm(hidden),
            q: matrix(dtype, queries, hidden),
            k: matrix(dtype, keys, hidden),
            v: matrix(value_dtype, keys, hidden),
            qkv_bias: None,
            qk_norm: None,
            o: matrix(dtype, hidden, queries),
            ffn_norm: norm(hidden),
            gate: matrix(dtype, ffn, hidden),
            up: matrix(dtype, ffn, hidden),
            down: matrix(dtype, hidden, ffn),
        })
        .collect();
    Model {
        spec,
        embedding: matrix(WeightType::Q8_0, 100, hidden),
        layers,
        final_norm: norm(hidden),
        head: head.map(|dtype| matrix(dtype, 100, hidden)),
        content_hash: [0; 32],
    }
}

/// How a sequence is computed; none of it may matter.
#[derive(Clone, Copy, Debug)]
struct Way {
    threads: usize,
    simd: Simd,
    block_tokens: u32,
    /// Input tokens a step at most.
    chunk: usize,
    /// Other sequences in each step.
    neighbours: usize,
}

const PLAIN: Way =
    Way { threads: 1, simd: Simd::Auto, block_tokens: 32, chunk: 1000, neighbours: 0 };

const SCALAR: Simd = Simd::Named("scalar");
const SLOTS: u32 = 9;
const BLOCKS_EACH: u32 = 16;

struct Runner {
    backend: CpuBackend,
    tokens_in_pool: Vec<u32>,
}

impl Runner {
    fn new(model: &Model, way: Way) -> Self {
        let options = CpuOptions {
            threads: way.threads,
            max_sequences: SLOTS,
            max_batch_tokens: 1000,
            blocks: SLOTS * BLOCKS_EACH,
            block_tokens: way.block_tokens,
            simd: way.simd,
        };
        let backend = CpuBackend::new(model, &options).unwrap();
        Self { backend, tokens_in_pool: vec![0; SLOTS as usize] }
    }

    fn open(plan: &mut StepPlan, slot: u32, history: &[u32]) {
        plan.opens.push(SlotOpen {
            slot: Slot(slot),
            sampling: SamplingParams { logprobs: Some(100), ..SamplingParams::greedy() },
            history: history.to_vec(),
            prompt_len: history.len() as u32,
        });
    }

    /// Appends a slot's input; its blocks lie scattered over the pool.
    fn push(&mut self, plan: &mut StepPlan, slot: u32, input: Option<&[u32]>, sample: bool) {
        let start = self.tokens_in_pool[slot as usize];
        let first = plan.tokens.len() as u32;
        let input = match input {
            Some(tokens) => {
                plan.tokens.extend_from_slice(tokens);
                Input::Tokens(first..plan.tokens.len() as u32)
            }
            None => Input::Last,
        };
        let end = start + input.len();
        let blocks = end.div_ceil(self.backend.pool().layout.block_tokens);
        assert!(blocks <= BLOCKS_EACH);
        let table = plan.tables.len() as u32;
        plan.tables.extend((0..blocks).map(|block| BlockIndex(block * SLOTS + slot)));
        let table = table..plan.tables.len() as u32;
        plan.seqs.push(StepSeq { slot: Slot(slot), start, input, table, sample });
        self.tokens_in_pool[slot as usize] = end;
    }

    fn step(&mut self, plan: &StepPlan) -> StepOut {
        let ticket = self.backend.submit(plan).unwrap();
        let mut out = StepOut::default();
        self.backend.collect(ticket, &mut out).unwrap();
        out
    }
}

/// Log-probabilities of all tokens, bit for bit, after the prompt and after each of some greedy tokens.
fn run(model: &Model, prompt: &[u32], way: Way) -> Vec<Vec<(u32, u32)>> {
    let mut runner = Runner::new(model, way);
    let mut random = Random::new(99);
    let mut seen = Vec::new();
    let mut done = 0;
    while seen.len() < 6 {
        let mut plan = StepPlan::default();
        let sequences = way.neighbours as u32 + 1;
        if done == 0 {
            Runner::open(&mut plan, 0, prompt);
            (1..sequences).for_each(|slot| Runner::open(&mut plan, slot, &[slot]));
        }
        let first = random.below(sequences as usize) as u32;
        // The sequence of interest is slot 0, somewhere among the others.
        for slot in (0..sequences).map(|at| (at + first) % sequences) {
            if slot == 0 {
                let chunk = &prompt[done.min(prompt.len())..];
                let chunk = &chunk[..chunk.len().min(way.chunk)];
                let input = (!chunk.is_empty()).then_some(chunk);
                done += chunk.len().max(1);
                runner.push(&mut plan, 0, input, done >= prompt.len());
            } else {
                let tokens: Vec<u32> =
                    (0..1 + random.below(5)).map(|_| random.below(100) as u32).collect();
                runner.push(&mut plan, slot, Some(&tokens), slot % 2 == 0);
            }
        }
        let out = runner.step(&plan);
        if let Some(sampled) = out.samples.iter().find(|sampled| sampled.slot == Slot(0)) {
            let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
            assert_eq!((top.len(), sampled.token), (100, top[0].0));
            seen.push(top.iter().map(|(token, value)| (*token, value.to_bits())).collect());
        }
    }
    seen
}

fn prompt(len: usize) -> Vec<u32> {
    let mut random = Random::new(len as u64);
    (0..len).map(|_| random.below(100) as u32).collect()
}

#[test]
fn a_sequence_gives_the_same_bits_in_every_way() {
    for dtype in WeightType::ALL {
        let head_dim = if dtype.block().0 == 256 { 64 } else { 16 };
        let model = tiny_model((dtype, WeightType::Q8_0), None, (4, 2, head_dim));
        for len in [1, 33, 70] {
            let prompt = prompt(len);
            let plain = run(&model, &prompt, PLAIN);
            let ways = [
                Way { neighbours: 7, ..PLAIN },
                Way { neighbours: 3, chunk: 7, threads: 2, ..PLAIN },
                Way { chunk: 1, ..PLAIN },
                Way { chunk: 32, block_tokens: 16, ..PLAIN },
                Way { chunk: 33, block_tokens: 64, ..PLAIN },
                Way { threads: 2, ..PLAIN },
                Way { simd: SCALAR, chunk: 7, neighbours: 2, block_tokens: 8, ..PLAIN },
            ];
            let tiers = Kernels::tiers().into_iter().map(|tier| Simd::Named(tier.name));
            for way in ways.into_iter().chain(tiers.map(|simd| Way { simd, ..PLAIN })) {
                assert_eq!(run(&model, &prompt, way), plain, "{dtype:?} {len} {way:?}");
            }
        }
    }
}

#[test]
fn a_sequence_of_several_spans_gives_the_same_bits_in_every_way() {
    for heads in [(6, 2, 16), (4, 4, 8), (8, 1, 24)] {
        let model = tiny_model((WeightType::Q8_0, WeightType::F32), None, heads);
        // The first samples lie around the end of a span of 256 positions.
        for len in [253, 509 - 6] {
            let prompt = prompt(len);
            let plain = run(&model, &prompt, PLAIN);
            let ways = [
                Way { chunk: 1, threads: 2, ..PLAIN },
                Way { chunk: 100, neighbours: 2, ..PLAIN },
                Way { chunk: 37, threads: 2, block_tokens: 64, ..PLAIN },
                Way { simd: Simd::Named("scalar"), chunk: 250, ..PLAIN },
            ];
            for way in ways {
                assert_eq!(run(&model, &prompt, way), plain, "{heads:?} {len} {way:?}");
            }
        }
    }
}

#[test]
fn a_cpu_back_end_keeps_the_contract() {
    let model = tiny_model((WeightType::Q4_1, WeightType::Q8_0), None, (4, 2, 16));
    for (threads, simd, block_tokens) in [(1, Simd::Auto, 32), (2, Simd::Auto, 8), (1, SCALAR, 16)]
    {
        let options = CpuOptions {
            threads,
            max_sequences: 4,
            max_batch_tokens: 64,
            blocks: 32,
            block_tokens,
            simd,
        };
        conformance::suite(
            &|| Box::new(CpuBackend::new(&model, &options).unwrap()),
            Numbers::Exact,
        );
    }
}

#[test]
fn any_number_of_heads_and_an_own_head_matrix_give_the_same_bits_in_every_way() {
    for heads in [(3, 1, 40), (6, 6, 8), (2, 1, 128)] {
        let model = tiny_model((WeightType::F32, WeightType::Q4_1), Some(WeightType::Bf16), heads);
        let prompt = prompt(40);
        let plain = run(&model, &prompt, PLAIN);
        let chunked = Way { chunk: 9, neighbours: 5, threads: 2, ..PLAIN };
        let scalar = Way { simd: SCALAR, ..PLAIN };
        assert_eq!(run(&model, &prompt, chunked), plain);
        assert_eq!(run(&model, &prompt, scalar), plain);
    }
}

#[test]
fn copied_blocks_continue_like_their_originals() {
    let model = tiny_model((WeightType::F32, WeightType::F32), None, (4, 2, 16));
    let mut runner = Runner::new(&model, PLAIN);
    let prompt = prompt(50);
    let mut plan = StepPlan::default();
    Runner::open(&mut plan, 0, &prompt);
    runner.push(&mut plan, 0, Some(&prompt), true);
    runner.step(&plan);
    let pairs: Vec<_> =
        (0..2).map(|at| (BlockIndex(at * SLOTS), BlockIndex(at * SLOTS + 3))).collect();
    runner.backend.copy_blocks(&pairs).unwrap();
    runner.tokens_in_pool[3] = 50;
    let mut plan = StepPlan::default();
    Runner::open(&mut plan, 3, &prompt);
    runner.push(&mut plan, 0, Some(&[5]), true);
    runner.push(&mut plan, 3, Some(&[5]), true);
    let out = runner.step(&plan);
    assert_eq!(out.top[..100], out.top[100..]);
    let outside = [(BlockIndex(0), BlockIndex(SLOTS * BLOCKS_EACH))];
    assert!(runner.backend.copy_blocks(&outside).is_err());
}

#[test]
fn a_plan_outside_the_limits_is_refused_and_changes_nothing() {
    let model = tiny_model((WeightType::F32, WeightType::F32), None, (4, 2, 16));
    let plan_of = |runner: &mut Runner, tokens: &[u32]| {
        let mut plan = StepPlan::default();
        Runner::open(&mut plan, 0, tokens);
        runner.push(&mut plan, 0, Some(tokens), true);
        plan
    };
    type Spoil = fn(&mut StepPlan);
    let spoil: [(&str, Spoil); 11] = [
        ("token", |plan| plan.tokens[3] = 100),
        ("tokens", |plan| plan.seqs[0].input = Input::Tokens(0..41)),
        ("no tokens", |plan| plan.seqs[0].input = Input::Tokens(7..7)),
        ("block", |plan| plan.tables[1].0 = SLOTS * BLOCKS_EACH),
        ("table", |plan| plan.seqs[0].table = 0..3),
        ("short table", |plan| plan.seqs[0].table = 0..1),
        ("position", |plan| plan.seqs[0].start = u32::MAX),
        ("slot", |plan| plan.seqs[0].slot.0 = SLOTS),
        ("opened slot", |plan| plan.opens[0].slot.0 = SLOTS),
        ("never opened", |plan| plan.opens.clear()),
        ("slot and block twice", |plan| plan.seqs.push(plan.seqs[0].clone())),
    ];
    for (name, spoil) in spoil {
        let mut runner = Runner::new(&model, PLAIN);
        let mut plan = plan_of(&mut runner, &prompt(40));
        spoil(&mut plan);
        let refused = runner.backend.submit(&plan);
        assert!(matches!(refused, Err(BackendError::InvalidPlan(_))), "{name}");
        assert!(runner.backend.slots.iter().all(Option::is_none), "{name}");
    }
    let mut runner = Runner::new(&model, PLAIN);
    let plan = plan_of(&mut runner, &prompt(40));
    assert_eq!(runner.step(&plan).samples.len(), 1);
}

#[test]
fn outputs_are_collected_in_order_and_wrong_tickets_lose_nothing() {
    let model = tiny_model((WeightType::F32, WeightType::F32), None, (4, 2, 16));
    let mut runner = Runner::new(&model, PLAIN);
    let mut plan = StepPlan::default();
    Runner::open(&mut plan, 0, &[1, 2]);
    runner.push(&mut plan, 0, Some(&[1, 2]), true);
    let ticket = runner.backend.submit(&plan).unwrap();
    let mut out = StepOut::default();
    assert!(runner.backend.collect(StepTicket(ticket.0 + 1), &mut out).is_err());
    runner.backend.collect(ticket, &mut out).unwrap();
    assert_eq!(out.samples.len(), 1);
    assert!(runner.backend.collect(ticket, &mut out).is_err());
}

#[test]
fn a_model_of_another_shape_is_refused() {
    let model = tiny_model((WeightType::F32, WeightType::F32), None, (4, 2, 16));
    let mut short = model.clone();
    short.layers[1].down.cols = 64;
    let mut odd = model.clone();
    odd.spec.head_dim = 12;
    for model in [short, odd] {
        assert!(matches!(check::model(&model), Err(message) if message.contains('`')));
    }
}

#[test]
fn it_conforms() {
    let model = tiny_model((WeightType::Q4_1, WeightType::Q8_0), None, (4, 2, 16));
    let options = CpuOptions {
        threads: 2,
        max_sequences: 4,
        max_batch_tokens: 16,
        blocks: 32,
        block_tokens: 8,
        simd: Simd::Auto,
    };
    conformance::suite(&|| Box::new(CpuBackend::new(&model, &options).unwrap()), Numbers::Exact);
}
