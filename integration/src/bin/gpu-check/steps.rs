//! How fast whole steps of an 8B-shaped model are.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use baton_shared::id::BlockIndex;
use baton_workerd::backend::Backend;
use baton_workerd::backend::cuda::sys::Gpu;
use baton_workerd::backend::cuda::{CudaBackend, CudaOptions, PoolSize};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};

use crate::models::Large;
use crate::speed::random;

/// An 8B-shaped model and a pool for `sequences` of `context` tokens, filled with random keys and values.
pub struct Steps {
    pub backend: CudaBackend,
    context: u32,
    plan: StepPlan,
}

impl Steps {
    pub fn new(gpu: &Arc<dyn Gpu>, layers: u32, sequences: u32, context: u32) -> Result<Self> {
        let blocks = sequences * (context / 32 + 4);
        let options = CudaOptions {
            max_sequences: sequences,
            max_batch_tokens: 8192,
            max_len: 16_384,
            pool: PoolSize::Blocks(blocks.max(8192 / 32 + 1)),
            block_tokens: 32,
            graphs: true,
        };
        let begun = Instant::now();
        let mut model = Large::llama_8b(layers);
        println!("  weights made in {:.1} s", begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let backend = CudaBackend::load(gpu, &mut model, &options).context("loading")?;
        println!("  loaded with graphs in {:.1} s", begun.elapsed().as_secs_f64());
        let layout = &backend.pool().layout;
        let bytes = layout.bytes() as usize;
        let piece = 64 << 20;
        let values = random(gpu, piece / 2)?;
        let mut host = vec![0; piece];
        values.read(0, &mut host)?;
        for at in (0..bytes).step_by(piece) {
            backend
                .pool()
                .region
                .write(at, &host[..piece.min(bytes - at)])
                .map_err(anyhow::Error::msg)?;
        }
        Ok(Self { backend, context, plan: StepPlan::default() })
    }

    /// Seconds of a step of `batch` sequences that decode, one step ahead.
    pub fn decode(&mut self, batch: u32, steps: u32) -> Result<f64> {
        let per = self.context / 32 + 4;
        let first = self.context - steps / 2;
        let mut tickets = std::collections::VecDeque::new();
        let mut out = StepOut::default();
        let mut times = Vec::new();
        let mut last = Instant::now();
        for step in 0..steps {
            let plan = &mut self.plan;
            plan.clear();
            for slot in 0..batch {
                if step == 0 {
                    plan.opens.push(SlotOpen {
                        slot: Slot(slot),
                        sampling: SamplingParams::greedy(),
                        history: vec![7 + slot],
                        prompt_len: 1,
                    });
                }
                let start = first + step;
                let table = plan.tables.len() as u32;
                plan.tables
                    .extend((0..(start + 1).div_ceil(32)).map(|at| BlockIndex(slot * per + at)));
                let table = table..plan.tables.len() as u32;
                let slot = Slot(slot);
                plan.seqs.push(StepSeq { slot, start, input: Input::Last, table, sample: true });
            }
            tickets.push_back(self.backend.submit(plan)?);
            if tickets.len() > 1 {
                let ticket = tickets.pop_front().context("a step")?;
                self.backend.collect(ticket, &mut out)?;
                times.push(last.elapsed().as_secs_f64());
                last = Instant::now();
            }
        }
        while let Some(ticket) = tickets.pop_front() {
            self.backend.collect(ticket, &mut out)?;
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Seconds of the prefill of one prompt in one step.
    pub fn prefill(&mut self, tokens: u32) -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..4 {
            let plan = &mut self.plan;
            plan.clear();
            plan.tokens = (0..tokens).map(|at| at * 13 % 128_000).collect();
            plan.tables = (0..tokens.div_ceil(32)).map(BlockIndex).collect();
            plan.opens.push(SlotOpen {
                slot: Slot(0),
                sampling: SamplingParams::greedy(),
                history: vec![1],
                prompt_len: 1,
            });
            let table = 0..plan.tables.len() as u32;
            let input = Input::Tokens(0..tokens);
            plan.seqs.push(StepSeq { slot: Slot(0), start: 0, input, table, sample: true });
            let begun = Instant::now();
            let ticket = self.backend.submit(plan)?;
            self.backend.collect(ticket, &mut StepOut::default())?;
            times.push(begun.elapsed().as_secs_f64());
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
