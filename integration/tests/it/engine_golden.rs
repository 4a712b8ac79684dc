//! What the worker's CPU back end says against the oracle and against itself: log-probabilities, tiers of kernels.

use std::path::Path;

use baton_integration::files::demo_model;
use baton_integration::oracle::{Cache, KvRounding, Oracle};
use baton_integration::tiny_fp8::TinyFp8;
use baton_integration::tiny_model::{
    TinyArchitecture, TinyDtype, TinyModel, TinyRope, dequantise_gguf,
};
use baton_shared::id::BlockIndex;
use baton_workerd::backend::Backend;
use baton_workerd::backend::cpu::kernels::Kernels;
use baton_workerd::backend::cpu::{CpuBackend, CpuOptions, Simd};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};
use baton_workerd::model;
use baton_workerd::model::narrowed::{CpuWeights, Narrowed};
use half::bf16;

use crate::golden::{golden, quantile};

const BLOCK_TOKENS: u32 = 32;
const BLOCKS: u32 = 20;

/// One sequence on a CPU back end, alone.
pub struct Engine {
    backend: CpuBackend,
    len: u32,
}

impl Engine {
    pub fn new(path: &Path, simd: Simd) -> Self {
        Self::kept(path, CpuWeights::AsIs, simd)
    }

    /// With weights no wider than that.
    fn kept(path: &Path, weights: CpuWeights, simd: Simd) -> Self {
        let options = CpuOptions {
            threads: 2,
            max_sequences: 1,
            max_batch_tokens: BLOCKS * BLOCK_TOKENS,
            blocks: BLOCKS,
            block_tokens: BLOCK_TOKENS,
            simd,
        };
        let mut files = model::open(path).unwrap();
        let mut source = Narrowed::new(&mut files, weights);
        Self { backend: CpuBackend::load(&mut source, &options).unwrap(), len: 0 }
    }

    /// Begins a text: natural-log probabilities of what follows `ids`, `[vocab]`.
    pub fn begin(&mut self, ids: &[u32]) -> Vec<f32> {
        self.len = 0;
        let vocab = self.backend.caps().vocab;
        let sampling = SamplingParams { logprobs: Some(vocab), ..SamplingParams::greedy() };
        let (history, prompt_len) = (ids.to_vec(), ids.len() as u32);
        self.step(Some(SlotOpen { slot: Slot(0), sampling, history, prompt_len }), ids).1
    }

    /// Reads one more token: the most probable next one and all log-probabilities.
    fn step(&mut self, open: Option<SlotOpen>, ids: &[u32]) -> (u32, Vec<f32>) {
        let start = self.len;
        self.len += ids.len() as u32;
        let blocks = self.len.div_ceil(BLOCK_TOKENS);
        let input = Input::Tokens(0..ids.len() as u32);
        let plan = StepPlan {
            opens: open.into_iter().collect(),
            seqs: vec![StepSeq { slot: Slot(0), start, input, table: 0..blocks, sample: true }],
            tokens: ids.to_vec(),
            // Last block first: nothing may rely on neighbours.
            tables: (0..blocks).map(|i| BlockIndex(BLOCKS - 1 - i)).collect(),
        };
        let mut out = StepOut::default();
        let ticket = self.backend.submit(&plan).unwrap();
        self.backend.collect(ticket, &mut out).unwrap();
        let mut logprobs = vec![f32::NAN; self.backend.caps().vocab as usize];
        out.top.iter().for_each(|(id, logprob)| logprobs[*id as usize] = *logprob);
        assert!(logprobs.iter().all(|l| l.is_finite()), "every id has a log-probability");
        (out.samples[0].token, logprobs)
    }

    /// What the pool holds of the text.
    fn cache(&self) -> Cache {
        let pool = self.backend.pool();
        let layout = &pool.layout;
        let dim = layout.head_dim as usize;
        let read = |layer: u32, kv: u32| -> Vec<f32> {
            let mut out = Vec::new();
            for position in 0..self.len {
                let block = BlockIndex(BLOCKS - 1 - position / BLOCK_TOKENS);
                for head in layout.heads.clone() {
                    let at = layout.offset(block, layer, head, kv) as usize
                        + (position % BLOCK_TOKENS) as usize * dim * 2;
                    let mut vector = vec![0; dim * 2];
                    pool.region.read(at, &mut vector).unwrap();
                    let (elements, _) = vector.as_chunks();
                    out.extend(elements.iter().map(|bits| bf16::from_le_bytes(*bits).to_f32()));
                }
            }
            out
        };
        let all = |kv| layout.layers.clone().map(|layer| read(layer, kv)).collect();
        Cache { keys: all(0), values: all(1) }
    }
}

fn errors(got: &[f32], expected: &[f32]) -> Vec<f32> {
    let mut order: Vec<usize> = (0..expected.len()).collect();
    order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
    order[..20].iter().map(|id| (got[*id] - expected[*id]).abs()).collect()
}

/// Reads the engine's cache, so that the bound is sharp: see [`Oracle::logprobs_over`].
fn assert_equal_over_the_same_cache(engine: &mut Engine, oracle: &Oracle, ids: &[u32]) {
    let got = engine.begin(ids);
    let (expected, distance) = oracle.logprobs_over(ids, &engine.cache());
    let error = quantile(&mut errors(&got, &expected), 1.0);
    assert!(error <= 1e-3, "{} tokens: {error}", ids.len());
    // Half a bf16 step is at most 1/256 of an element.
    assert!(distance <= 1.1 / 256.0, "{} tokens: {distance}", ids.len());
}

#[test]
fn int8_activations_move_the_demo_models_log_probabilities_little() {
    let [median, high, largest] =
        off_the_recorded(&mut Engine::new(&demo_model().unwrap(), Simd::Auto));
    println!("median {median}, 95th percentile {high}, largest {largest}");
}

#[test]
fn so_do_bf16_weights_that_are_kept_in_8_bits() {
    let folder = tempfile::tempdir().unwrap();
    dequantise_gguf(&demo_model().unwrap(), folder.path()).unwrap();
    let mut engine = Engine::kept(folder.path(), CpuWeights::Q8_0, Simd::Auto);
    let [median, high, largest] = off_the_recorded(&mut engine);
    println!("median {median}, 95th percentile {high}, largest {largest}");
}

/// How far the five most probable ids' log-probabilities are off: the median, 95 of a hundred, the most.
fn off_the_recorded(engine: &mut Engine) -> [f32; 3] {
    let mut all = Vec::new();
    for case in golden().cases {
        let got = engine.begin(&case.ids);
        let top = &case.f32_bf16_kv.top[..5];
        all.extend(top.iter().map(|(id, expected)| (got[*id as usize] - expected).abs()));
    }
    let [median, high, largest] = [0.5, 0.95, 1.0].map(|part| quantile(&mut all, part));
    assert!(median <= 0.1 && high <= 0.35, "{median} {high} {largest}");
    [median, high, largest]
}

#[test]
fn a_bf16_folder_of_the_demo_model_says_what_the_oracle_says() {
    let folder = tempfile::tempdir().unwrap();
    dequantise_gguf(&demo_model().unwrap(), folder.path()).unwrap();
    let mut engine = Engine::new(folder.path(), Simd::Auto);
    let oracle = Oracle::from_hf(folder.path()).unwrap();
    let mut drifted = Vec::new();
    for case in golden().cases {
        assert_equal_over_the_same_cache(&mut engine, &oracle, &case.ids);
        if case.ids.len() < 100 {
            let got = engine.begin(&case.ids);
            drifted.extend(errors(&got, &oracle.logprobs(&case.ids, KvRounding::Bf16)));
        }
    }
    // Each with a cache of its own: golden.rs says why the largest is no smaller.
    let [median, largest] = [0.5, 1.0].map(|part| quantile(&mut drifted, part));
    println!("median {median}, largest {largest}");
    assert!(median <= 5e-3 && largest <= 0.06, "{median} {largest}");
}

#[test]
fn tiny_checkpoints_of_every_type_say_what_the_oracle_says() {
    for (dtype, kv_heads) in [(TinyDtype::F32, 4), (TinyDtype::F16, 8), (TinyDtype::Bf16, 4)] {
        let folder = tempfile::tempdir().unwrap();
        TinyModel { dtype, kv_heads, ..TinyModel::default() }.write(folder.path()).unwrap();
        let mut engine = Engine::new(folder.path(), Simd::Auto);
        let oracle = Oracle::from_hf(folder.path()).unwrap();
        for len in [1, 31, 32, 33, 500] {
            let ids: Vec<u32> = (0..len).map(|i| 3 + (i * i + 7 * i) % 500).collect();
            assert_equal_over_the_same_cache(&mut engine, &oracle, &ids);
        }
    }
}

#[test]
fn fp8_checkpoints_say_what_the_oracle_says() {
    for kind in TinyFp8::ALL {
        let folder = tempfile::tempdir().unwrap();
        TinyModel::default().write_fp8(folder.path(), kind).unwrap();
        let mut engine = Engine::new(folder.path(), Simd::Auto);
        let oracle = Oracle::from_hf(folder.path()).unwrap().in_bf16();
        for len in [1, 33, 500] {
            let ids: Vec<u32> = (0..len).map(|i| 3 + (i * i + 7 * i) % 500).collect();
            assert_equal_over_the_same_cache(&mut engine, &oracle, &ids);
        }
        for kept in [CpuWeights::Q8_0, CpuWeights::Q4_1] {
            let mut engine = Engine::kept(folder.path(), kept, Simd::Auto);
            let (got, expected) =
                (engine.begin(&[70, 90, 300]), oracle.logprobs(&[70, 90, 300], KvRounding::Bf16));
            let off = quantile(&mut errors(&got, &expected), 0.5);
            assert!(off > 0.0 && off < 1.0, "{kind:?} {kept:?}: {off}");
        }
    }
}

/// One of each architecture and each way to tell positions.
fn tiny_shapes() -> Vec<TinyModel> {
    let shape = |architecture, rope| TinyModel {
        architecture,
        rope,
        dtype: TinyDtype::F32,
        ..TinyModel::default()
    };
    use TinyArchitecture::{Llama, Mistral, Qwen2, Qwen3};
    vec![
        shape(Mistral, TinyRope::Plain),
        shape(Llama, TinyRope::Linear(4.0)),
        shape(Llama, TinyRope::Llama3),
        shape(Qwen2, TinyRope::Plain),
        // Heads that are wider than the stream is, together, and seven queries a key.
        TinyModel { heads: 7, kv_heads: 1, head_dim: 64, ..shape(Qwen2, TinyRope::Linear(2.0)) },
        shape(Qwen3, TinyRope::Plain),
        TinyModel { heads: 4, kv_heads: 2, head_dim: 128, ..shape(Qwen3, TinyRope::Llama3) },
    ]
}

#[test]
fn every_architecture_says_what_the_oracle_says_from_both_formats() {
    for tiny in tiny_shapes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tiny.gguf");
        tiny.write(folder.path()).unwrap();
        tiny.write_gguf(&file).unwrap();
        let oracle = Oracle::from_hf(folder.path()).unwrap();
        let mut engines = [folder.path(), &file].map(|path| Engine::new(path, Simd::Auto));
        for len in [1, 33, 250] {
            let ids: Vec<u32> = (0..len).map(|i| 3 + (i * i + 7 * i) % 500).collect();
            for engine in &mut engines {
                assert_equal_over_the_same_cache(engine, &oracle, &ids);
            }
        }
        let ids: Vec<u32> = (3..100).collect();
        let expected = oracle.logprobs(&ids, KvRounding::F32);
        // With that format's own order of rows and settings.
        let other = Oracle::from_gguf(&file).unwrap().logprobs(&ids, KvRounding::F32);
        assert!(quantile(&mut errors(&other, &expected), 1.0) <= 1e-3, "{tiny:?}");
        // And it is no plain Llama's: what is switched on counts.
        let plain = TinyModel {
            architecture: TinyArchitecture::Llama,
            rope: TinyRope::Plain,
            ..tiny.clone()
        };
        if tiny.architecture == TinyArchitecture::Mistral {
            continue;
        }
        plain.write(folder.path()).unwrap();
        let plain = Oracle::from_hf(folder.path()).unwrap().logprobs(&ids, KvRounding::F32);
        assert!(quantile(&mut errors(&expected, &plain), 1.0) > 0.1, "{tiny:?}");
    }
}

#[test]
fn every_architecture_gives_the_same_bits_on_every_tier_of_kernels() {
    for tiny in tiny_shapes() {
        let folder = tempfile::tempdir().unwrap();
        tiny.write(folder.path()).unwrap();
        let ids: Vec<u32> = (0..77).map(|i| 3 + (i * i + 7 * i) % 500).collect();
        let [one, two] = [Simd::Auto, Simd::Named("scalar")].map(|simd| {
            let mut engine = Engine::new(folder.path(), simd);
            let mut all = engine.begin(&ids);
            all.extend(engine.step(None, &[5]).1);
            let cache = engine.cache();
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            (bits(&all), bits(&cache.keys.concat()), bits(&cache.values.concat()))
        });
        assert!(one == two, "{tiny:?}");
    }
}

#[test]
fn the_demo_model_gives_the_same_bits_on_every_tier_of_kernels() {
    let path = demo_model().unwrap();
    let tiers: Vec<_> = Kernels::tiers().into_iter().map(|tier| tier.name).collect();
    println!("{tiers:?}");
    assert_eq!(tiers[0], "scalar");
    let mut engines: Vec<_> =
        tiers.iter().map(|tier| Engine::new(&path, Simd::Named(tier))).collect();
    for case in golden().cases.iter().filter(|case| (9..=41).contains(&case.ids.len())).step_by(3) {
        let all = engines.iter_mut().map(|engine| {
            let mut all = engine.begin(&case.ids);
            let mut token = case.ids[0];
            for _ in 0..4 {
                let (next, logprobs) = engine.step(None, &[token]);
                token = next;
                all.extend(logprobs);
            }
            let cache = engine.cache();
            let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            (bits(&all), bits(&cache.keys.concat()), bits(&cache.values.concat()))
        });
        let all: Vec<_> = all.collect();
        for (tier, bits) in tiers.iter().zip(&all) {
            assert!(*bits == all[0], "{tier} differs from scalar after {:?}", case.prompt);
        }
    }
}
