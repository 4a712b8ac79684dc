//! In process: one back end and the peers' benchmark programs, the same file, the same threads.
//!
//! Decode is limited by how fast the weights can be read, so it is also told as a part of what this machine reads in
//! the same run: bytes of all matrices a step uses, and of the keys and values.

use std::cell::RefCell;
use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, Result};
use baton_shared::id::BlockIndex;
use baton_shared::text::gguf::Gguf;
use baton_workerd::backend::Backend;
use baton_workerd::backend::cpu::arena::Arena;
use baton_workerd::backend::cpu::{CpuBackend, CpuOptions, Simd};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};
use baton_workerd::model::{self, Model};

use crate::Setting;
use crate::rounds::{Contestant, Table, median, more, number};

/// Prompt tokens of a step: llama.cpp's own default for a physical batch.
const CHUNK: u32 = 512;
const BLOCK_TOKENS: u32 = 32;
/// Tokens before the decoded ones, and how many are decoded.
const CONTEXT: u32 = 128;
const DECODED: u32 = 64;
/// Read for the bandwidth: far more than caches hold.
const READ_BYTES: usize = 256 << 20;
/// Times it is read, of which the median counts.
const READS: usize = 11;

/// All of it as a table.
///
/// # Errors
/// If the model cannot be loaded, or a peer fails.
pub fn run(setting: &Setting) -> Result<Table> {
    let model = model::load(&setting.model).context("the model")?;
    let peers = setting.peers();
    let names = names(&peers.iter().map(|peer| peer.name).collect::<Vec<_>>());
    let mut table = Table::new("In process, tokens a second", &names);
    let rounds = setting.rounds;

    for (tokens, rounds, what) in
        [(512, rounds, "prefill 512"), (6144, rounds.min(2), "prefill 6,144")]
    {
        let mut contestants: Vec<Contestant<'_>> =
            vec![ours(setting, &model, move |ours| ours.prefill(tokens))];
        for peer in &peers {
            let turn = move || Ok(vec![peer.prefill(tokens)?]);
            contestants.push((peer.name.into(), Box::new(turn)));
        }
        table.contest(rounds, &[more(what)], contestants)?;
    }
    // Of each round: tokens a second of one sequence, and the bandwidth just before and just after.
    let alone = RefCell::new(Vec::new());
    let decode_alone = |ours: &mut Ours| {
        let before = read_bandwidth(setting.threads)?;
        let speed = ours.decode(1, CONTEXT, DECODED)?;
        alone.borrow_mut().push((speed, (before + read_bandwidth(setting.threads)?) / 2.0));
        Ok(speed)
    };
    let decode_together = |ours: &mut Ours| ours.decode(8, CONTEXT, DECODED);
    for (sequences, what, decode) in [
        (1, "decode, 1 sequence", &decode_alone as &dyn Fn(&mut Ours) -> Result<f64>),
        (8, "decode, 8 sequences together", &decode_together),
    ] {
        let mut contestants: Vec<Contestant<'_>> = vec![ours(setting, &model, decode)];
        for peer in &peers {
            let turn = move || Ok(vec![peer.decode(sequences, CONTEXT, DECODED)?]);
            contestants.push((peer.name.into(), Box::new(turn)));
        }
        table.contest(rounds, &[more(what)], contestants)?;
    }
    let bytes = bytes_a_token(setting, &model)?;
    let alone = alone.into_inner();
    let mut bandwidths: Vec<f64> = alone.iter().map(|(_, bandwidth)| *bandwidth).collect();
    let mut shares: Vec<f64> =
        alone.iter().map(|(speed, bandwidth)| speed * bytes / bandwidth).collect();
    let bandwidth = median(&mut bandwidths);
    table.note(format!(
        "{} threads read {} GB/s; a token alone reads {} MB, so at most {} tokens a second: Baton reaches **{:.0} %** (the median of the rounds' own).",
        setting.threads,
        number(bandwidth / 1e9),
        number(bytes / 1e6),
        number(bandwidth / bytes),
        100.0 * median(&mut shares)
    ));
    Ok(table)
}

/// The columns of a table that begins with us.
pub fn names(peers: &[&str]) -> Vec<String> {
    std::iter::once("Baton").chain(peers.iter().copied()).map(str::to_owned).collect()
}

/// Our own turns: a back end is made for each, so that none of its threads spins while others have theirs.
fn ours<'a>(
    setting: &'a Setting,
    model: &'a Model,
    turn: impl Fn(&mut Ours) -> Result<f64> + 'a,
) -> Contestant<'a> {
    let run = move || {
        let mut ours = Ours::new(model, setting.threads)?;
        // What a first step sets up is not what is measured; the peers do the same.
        ours.prefill(64)?;
        Ok(vec![turn(&mut ours)?])
    };
    ("Baton".into(), Box::new(run))
}

struct Ours {
    backend: CpuBackend,
    out: StepOut,
}

impl Ours {
    fn new(model: &Model, threads: usize) -> Result<Self> {
        let options = CpuOptions {
            threads,
            max_sequences: 8,
            max_batch_tokens: CHUNK,
            blocks: 256,
            block_tokens: BLOCK_TOKENS,
            simd: Simd::Auto,
        };
        Ok(Self { backend: CpuBackend::new(model, &options)?, out: StepOut::default() })
    }

    /// Prompt tokens a second, in chunks.
    fn prefill(&mut self, tokens: u32) -> Result<f64> {
        let begun = Instant::now();
        self.read(0, 0, tokens)?;
        Ok(f64::from(tokens) / begun.elapsed().as_secs_f64())
    }

    /// Tokens a second of all together.
    fn decode(&mut self, sequences: u32, context: u32, tokens: u32) -> Result<f64> {
        let blocks = (context + tokens).div_ceil(BLOCK_TOKENS);
        for slot in 0..sequences {
            self.read(slot, slot * blocks, context)?;
        }
        let mut plan = StepPlan::default();
        let begun = Instant::now();
        for step in 0..tokens {
            plan.clear();
            let start = context + step;
            for slot in 0..sequences {
                let table = plan.tables.len() as u32;
                let own = slot * blocks..slot * blocks + (start + 1).div_ceil(BLOCK_TOKENS);
                plan.tables.extend(own.map(BlockIndex));
                let table = table..plan.tables.len() as u32;
                let (slot, input) = (Slot(slot), Input::Last);
                plan.seqs.push(StepSeq { slot, start, input, table, sample: true });
            }
            self.step(&plan)?;
        }
        Ok(f64::from(sequences * tokens) / begun.elapsed().as_secs_f64())
    }

    /// Gives `slot` a prompt, in chunks, into the blocks from `first` on.
    fn read(&mut self, slot: u32, first: u32, tokens: u32) -> Result<()> {
        let slot = Slot(slot);
        for start in (0..tokens).step_by(CHUNK as usize) {
            let end = tokens.min(start + CHUNK);
            let (sampling, history) = (SamplingParams::greedy(), vec![1]);
            let open = SlotOpen { slot, sampling, history, prompt_len: 1 };
            let blocks = end.div_ceil(BLOCK_TOKENS);
            let input = Input::Tokens(0..end - start);
            let plan = StepPlan {
                opens: (start == 0).then_some(open).into_iter().collect(),
                seqs: vec![StepSeq { slot, start, input, table: 0..blocks, sample: end == tokens }],
                tokens: (start..end).map(|i| 1000 + i * 37 % 20_000).collect(),
                tables: (first..first + blocks).map(BlockIndex).collect(),
            };
            self.step(&plan)?;
        }
        Ok(())
    }

    fn step(&mut self, plan: &StepPlan) -> Result<()> {
        let ticket = self.backend.submit(plan)?;
        Ok(self.backend.collect(ticket, &mut self.out)?)
    }
}

/// What a step of one sequence reads: every matrix once, and the keys and values of what came before.
fn bytes_a_token(setting: &Setting, model: &Model) -> Result<f64> {
    let header = Gguf::open(&setting.model)?;
    let file = std::fs::metadata(&setting.model)?.len();
    let mut starts: Vec<(u64, &str)> =
        header.tensors.iter().map(|tensor| (tensor.offset, tensor.name.as_str())).collect();
    starts.sort_unstable();
    let ends = starts.iter().skip(1).map(|(start, _)| *start).chain([file - header.data_offset]);
    let own_head = starts.iter().any(|(_, name)| *name == "output.weight");
    let sizes = starts.iter().zip(ends).map(|((start, name), end)| match *name {
        // Only one row of it is read where the head is another matrix.
        "token_embd.weight" if own_head => 0,
        _ => end - start,
    });
    let spec = &model.spec;
    let cached = u64::from(spec.layers * spec.kv_width()) * 2 * 2;
    let context = u64::from(CONTEXT + DECODED / 2);
    Ok((sizes.sum::<u64>() + cached * context) as f64)
}

/// Bytes a second that all threads together read from memory: each its part in order, in huge pages as weights lie.
fn read_bandwidth(threads: usize) -> Result<f64> {
    let mut memory = Arena::default().take(READ_BYTES)?;
    memory.fill(1);
    let together = Barrier::new(threads);
    let read = |part: &[u8]| {
        let pass = |_| {
            together.wait();
            let begun = Instant::now();
            std::hint::black_box(sum(part));
            together.wait();
            READ_BYTES as f64 / begun.elapsed().as_secs_f64()
        };
        median(&mut (0..READS).map(pass).collect::<Vec<_>>())
    };
    Ok(std::thread::scope(|scope| {
        let mut parts = memory.chunks(memory.len().div_ceil(threads));
        let first = parts.next().unwrap_or(&[]);
        parts.for_each(|part| drop(scope.spawn(|| read(part))));
        read(first)
    }))
}

/// Eight sums side by side: loads are what it waits for.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    for eight in bytes.as_chunks::<8>().0.as_chunks::<8>().0 {
        for (sum, word) in sums.iter_mut().zip(eight) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}
