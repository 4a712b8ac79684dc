//! Matrix kernels alone: operations and bytes of weights a second of CPU time, one thread.
//!
//! `cargo bench --bench kernels -- [--threads N] [--mib N] [TYPE | TIER | TOKENS]...` measures the types, tiers and
//! tokens of a step that are named, all without a name. Each thread goes through its own weights of N MiB (default 96: decode reads them from memory) as
//! a step does: runs of panels, and for each the step's tokens, at most 32 at a time. The last column is weight bytes a
//! second beside what the same threads read in the same run. CPU time, so that what else the machine does counts little.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::hint::black_box;
use std::time::Duration;

use baton_workerd::backend::cpu::arena::Arena;
use baton_workerd::backend::cpu::kernels::{Kernels, QUANT, QuantBlock, ROWS, TOKENS, Tile};
use baton_workerd::backend::cpu::kernels::{scalar, wants_quantised};
use baton_workerd::backend::cpu::repack::Panels;
use baton_workerd::model::{Scales, Weight, WeightType};
use rustix::time::{ClockId, clock_gettime};

/// Inputs of the weights.
const COLUMNS: usize = 1536;
/// Panels that are gone through with all tokens before the next, as the engine does.
const RUN: usize = 8;
/// Tokens of a step.
const STEPS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 512];

struct Options {
    threads: usize,
    bytes: usize,
    names: Vec<String>,
}

impl Options {
    fn from_args() -> Self {
        let mut options = Self { threads: 1, bytes: 96 << 20, names: Vec::new() };
        let mut args = std::env::args().skip(1);
        let number = |text: Option<String>| -> usize {
            text.and_then(|text| text.parse().ok()).expect("a number follows")
        };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--threads" => options.threads = number(args.next()),
                "--mib" => options.bytes = number(args.next()) << 20,
                name => options.names.push(name.to_lowercase()),
            }
        }
        options
    }

    fn wants_step(&self, tokens: usize) -> bool {
        let given = |tokens: usize| self.names.contains(&tokens.to_string());
        given(tokens) || !STEPS.into_iter().any(given)
    }

    /// Whether all names of `all` that were given leave this one in.
    fn wants(&self, name: &str, mut all: impl Iterator<Item = &'static str>) -> bool {
        let given = |name: &str| self.names.contains(&name.to_lowercase());
        given(name) || !all.any(given)
    }
}

fn main() {
    let options = Options::from_args();
    let tiers: Vec<_> =
        Kernels::tiers().into_iter().filter(|t| t.name != scalar::TABLE.name).collect();
    let read = read_bandwidth(&options);
    println!("{} threads read {:.1} GB/s", options.threads, read / 1e9);
    println!("{:>8} {:>6} {:>5} {:>9} {:>8} {:>6}", "tier", "type", "M", "GOP/s", "GB/s", "read");
    for dtype in WeightType::ALL {
        if !options.wants(dtype.name(), WeightType::ALL.into_iter().map(WeightType::name)) {
            continue;
        }
        let panels = panels(dtype, options.bytes);
        for kernels in &tiers {
            if !options.wants(kernels.name, tiers.iter().map(|tier| tier.name)) {
                continue;
            }
            for tokens in STEPS.into_iter().filter(|tokens| options.wants_step(*tokens)) {
                let seconds = measure(&options, || step(kernels, &panels, tokens)).as_secs_f64();
                // Of all threads, each of which does the same.
                let all = options.threads as f64 / seconds;
                let operations = (2 * panels.rows * panels.cols * tokens) as f64 * all;
                let bytes = panels.bytes(0..panels.count()).len() as f64 * all;
                println!(
                    "{:>8} {:>6} {tokens:>5} {:>9.1} {:>8.2} {:>5.0}%",
                    kernels.name,
                    dtype.name(),
                    operations / 1e9,
                    bytes / 1e9,
                    100.0 * bytes / read
                );
            }
        }
    }
}

/// Weights of about that many bytes; which numbers they are costs nothing.
fn panels(dtype: WeightType, bytes: usize) -> Panels {
    let row = dtype.row_bytes(COLUMNS);
    let rows = bytes / row / (ROWS * RUN) * (ROWS * RUN);
    // 0x11 in all places makes small numbers of every type.
    let bytes = vec![0x11; rows * row].into();
    let weight = Weight { dtype, rows, cols: COLUMNS, bytes, scales: Scales::One };
    Panels::new(&weight, &mut Arena::default()).expect("there is memory")
}

/// All products of a step of `tokens` tokens.
fn step(kernels: &Kernels, panels: &Panels, tokens: usize) {
    let quantised = vec![
        QuantBlock { q: [0x0102_0304; 8], d: 1.0, sum: 80.0, halves: [40; 2] };
        COLUMNS / QUANT * tokens
    ];
    let float = vec![1.0; if wants_quantised(panels.dtype) { 0 } else { COLUMNS * tokens }];
    let mut out = vec![0.0; RUN * ROWS * TOKENS];
    for first in (0..panels.count()).step_by(RUN) {
        let bytes = panels.bytes(first..first + RUN);
        for token in (0..tokens).step_by(TOKENS) {
            let count = TOKENS.min(tokens - token);
            let tile = if wants_quantised(panels.dtype) {
                let blocks = COLUMNS / QUANT;
                Tile::Quantised(&quantised[token * blocks..(token + count) * blocks])
            } else {
                Tile::Float(&float[token * COLUMNS..(token + count) * COLUMNS])
            };
            let out = &mut out[..RUN * ROWS * count];
            kernels.product(panels.dtype, bytes, tile, count, out);
            black_box(out);
        }
    }
}

fn read_bandwidth(options: &Options) -> f64 {
    let words = vec![1_u64; options.bytes / 8];
    let seconds = measure(options, || {
        let mut sums = [0_u64; 16];
        for words in words.as_chunks::<16>().0 {
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum ^= word;
            }
        }
        black_box(sums);
    });
    (options.threads * options.bytes) as f64 / seconds.as_secs_f64()
}

/// CPU time of one thread while all do the same; the best of some rounds.
fn measure(options: &Options, work: impl Fn() + Sync) -> Duration {
    let round = || {
        std::thread::scope(|scope| {
            let threads = (0..options.threads).map(|_| {
                scope.spawn(|| {
                    let before = cpu_time();
                    work();
                    cpu_time() - before
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).max()
        })
    };
    let first = round().expect("a thread");
    let rounds = (Duration::from_millis(300).as_nanos() / first.as_nanos().max(1)).clamp(2, 30);
    (0..rounds).filter_map(|_| round()).min().expect("two rounds").min(first)
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
