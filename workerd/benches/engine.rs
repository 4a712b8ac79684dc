//! Speed of the CPU back end alone, without HTTP and scheduler: tokens a second by the clock and a CPU second.
//!
//! Drives the `Backend` trait with whole sequences: `prefill:N` computes a prompt of N tokens in chunks, `decode:B`
//! generates with B sequences side by side. `--beside stranger` keeps one core busy with something else meanwhile,
//! `--beside twin` runs a second process that does the same. The best of some rounds counts; a tenth more or less is noise.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use baton_shared::id::BlockIndex;
use baton_workerd::backend::Backend;
use baton_workerd::backend::cpu::{CpuBackend, CpuOptions, Simd};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};
use baton_workerd::model;
use clap::{Parser, ValueEnum};
use rustix::time::{ClockId, clock_gettime};

const BLOCK_TOKENS: u32 = 32;
const MODEL: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf");

/// Tokens a second of the CPU back end.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// `.gguf` file or Hugging Face folder
    #[arg(long, default_value = MODEL)]
    model: PathBuf,
    /// Compute threads; 0 = as many as there are cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// What to measure: `prefill:TOKENS`, `decode:SEQUENCES`, `decode:SEQUENCES@CONTEXT`
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "prefill:512,prefill:2048,prefill:6144,decode:1,decode:4,decode:8,decode:16"
    )]
    rows: Vec<Row>,
    /// Prompt tokens a step
    #[arg(long, default_value_t = 512)]
    chunk: u32,
    /// Steps of a decode round
    #[arg(long, default_value_t = 64)]
    steps: u32,
    /// Rounds of each row, of which the best counts
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// What else runs meanwhile, one after the other
    #[arg(long, value_delimiter = ',', default_value = "none")]
    beside: Vec<Beside>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Use the plain kernels
    #[arg(long)]
    scalar: bool,
    /// Only keep a core busy, for ever
    #[arg(long, hide = true)]
    spin: bool,
    /// Run the rows for ever; says `ready` after the first round
    #[arg(long, hide = true)]
    forever: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug)]
enum Row {
    Prefill { tokens: u32 },
    Decode { sequences: u32, context: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Beside {
    None,
    Stranger,
    Twin,
}

/// Tokens of a round and what they took.
#[derive(Clone, Copy, Debug)]
struct Speed {
    tokens: u32,
    seconds: f64,
    cpu_seconds: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.spin {
        loop {
            std::hint::black_box(0);
        }
    }
    let mut driver = Driver::new(&args)?;
    if args.forever {
        for row in args.rows.iter().cycle() {
            driver.round(*row)?;
            println!("ready");
        }
    }
    if !args.json {
        let [resident, highest] = resident_mib()?;
        println!("{} threads, {} kernels", driver.threads, driver.backend.simd());
        println!(
            "{resident:.0} MiB resident after loading, {highest:.0} MiB at most while loading"
        );
        println!(
            "{:>18} {:>10} {:>12} {:>14} {:>8}",
            "row", "beside", "tok/s", "tok/CPU s", "ratio"
        );
    }
    for row in &args.rows {
        let mut alone = None;
        for beside in &args.beside {
            let _other = beside.start(&args, *row)?;
            let best = driver.best(*row, args.rounds)?;
            let first = *alone.get_or_insert(best.rate());
            print(&args, &driver, *row, *beside, best, best.rate() / first);
        }
    }
    Ok(())
}

fn print(args: &Args, driver: &Driver, row: Row, beside: Beside, speed: Speed, ratio: f64) {
    let beside = beside.to_possible_value().expect("no variant is skipped").get_name().to_owned();
    let cpu_rate = f64::from(speed.tokens) / speed.cpu_seconds;
    if args.json {
        let line = serde_json::json!({
            "row": row.to_string(), "beside": beside, "threads": driver.threads, "chunk": args.chunk,
            "tokens": speed.tokens, "seconds": speed.seconds, "cpu_seconds": speed.cpu_seconds,
            "tokens_per_second": speed.rate(), "tokens_per_cpu_second": cpu_rate, "ratio": ratio,
        });
        println!("{line}");
    } else {
        let (row, rate) = (row.to_string(), speed.rate());
        println!("{row:>18} {beside:>10} {rate:>12.1} {cpu_rate:>14.1} {ratio:>8.2}");
    }
}

struct Driver {
    backend: CpuBackend,
    threads: usize,
    chunk: u32,
    steps: u32,
    /// Of the row.
    sequences: u32,
    plan: StepPlan,
    out: StepOut,
}

impl Driver {
    fn new(args: &Args) -> Result<Self> {
        let model = model::load(&args.model)?;
        let threads = match args.threads {
            0 => baton_shared::os::cores_available().get(),
            threads => threads,
        };
        let blocks = |row: &Row| match *row {
            Row::Prefill { tokens } => tokens.div_ceil(BLOCK_TOKENS),
            Row::Decode { sequences, context } => {
                sequences * (context + args.steps).div_ceil(BLOCK_TOKENS)
            }
        };
        let max_sequences = args.rows.iter().map(|row| row.sequences()).max().unwrap_or(1);
        let options = CpuOptions {
            threads,
            max_sequences,
            max_batch_tokens: args.chunk.max(max_sequences),
            blocks: args.rows.iter().map(blocks).max().unwrap_or(1),
            block_tokens: BLOCK_TOKENS,
            simd: if args.scalar { Simd::Named("scalar") } else { Simd::Auto },
        };
        let backend = CpuBackend::new(&model, &options)?;
        let (chunk, steps) = (args.chunk, args.steps);
        ensure!(chunk > 0 && steps > 0, "`--chunk` and `--steps` are at least 1");
        let (plan, out) = (StepPlan::default(), StepOut::default());
        Ok(Self { backend, threads, chunk, steps, sequences: 1, plan, out })
    }

    fn best(&mut self, row: Row, rounds: u32) -> Result<Speed> {
        let mut best = self.round(row)?;
        for _ in 1..rounds {
            let speed = self.round(row)?;
            if speed.rate() > best.rate() {
                best = speed;
            }
        }
        Ok(best)
    }

    fn round(&mut self, row: Row) -> Result<Speed> {
        self.sequences = row.sequences();
        match row {
            Row::Prefill { tokens } => {
                let start = (Instant::now(), cpu_seconds());
                self.prefill(0, tokens)?;
                Ok(Speed::since(start, tokens))
            }
            Row::Decode { sequences, context } => {
                for slot in 0..sequences {
                    self.prefill(slot, context)?;
                }
                let start = (Instant::now(), cpu_seconds());
                for step in 0..self.steps {
                    self.plan.clear();
                    for slot in 0..sequences {
                        self.push(slot, context + step, Input::Last, true);
                    }
                    self.step()?;
                }
                Ok(Speed::since(start, sequences * self.steps))
            }
        }
    }

    fn prefill(&mut self, slot: u32, tokens: u32) -> Result<()> {
        for start in (0..tokens).step_by(self.chunk as usize) {
            let len = self.chunk.min(tokens - start);
            self.plan.clear();
            if start == 0 {
                let sampling = SamplingParams::greedy();
                let history = vec![0; tokens as usize];
                let open = SlotOpen { slot: Slot(slot), sampling, history, prompt_len: tokens };
                self.plan.opens.push(open);
            }
            let vocab = self.backend.caps().vocab;
            let token = |at: u32| (at.wrapping_mul(2_654_435_761) >> 8) % vocab;
            self.plan.tokens.extend((start..start + len).map(|at| token(at + slot * 7919)));
            self.push(slot, start, Input::Tokens(0..len), start + len == tokens);
            self.step()?;
        }
        Ok(())
    }

    fn push(&mut self, slot: u32, start: u32, input: Input, sample: bool) {
        let blocks = (start + input.len()).div_ceil(BLOCK_TOKENS);
        let first = self.plan.tables.len() as u32;
        // Blocks of the sequences alternate, as they do in a pool that has been used for a while.
        let block = |at: u32| BlockIndex(at * self.sequences + slot);
        self.plan.tables.extend((0..blocks).map(block));
        let table = first..first + blocks;
        self.plan.seqs.push(StepSeq { slot: Slot(slot), start, input, table, sample });
    }

    fn step(&mut self) -> Result<()> {
        let ticket = self.backend.submit(&self.plan)?;
        self.backend.collect(ticket, &mut self.out)?;
        Ok(())
    }
}

impl Speed {
    fn since((start, cpu): (Instant, f64), tokens: u32) -> Self {
        let seconds = start.elapsed().as_secs_f64();
        Self { tokens, seconds, cpu_seconds: cpu_seconds() - cpu }
    }

    fn rate(&self) -> f64 {
        f64::from(self.tokens) / self.seconds
    }
}

impl Row {
    fn sequences(self) -> u32 {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { sequences, .. } => sequences,
        }
    }
}

impl FromStr for Row {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, number) = text.split_once(':').context("not `prefill:N` or `decode:N`")?;
        let row = match (kind, number.split_once('@')) {
            ("prefill", None) => Self::Prefill { tokens: number.parse()? },
            ("decode", None) => Self::Decode { sequences: number.parse()?, context: 128 },
            ("decode", Some((sequences, context))) => {
                Self::Decode { sequences: sequences.parse()?, context: context.parse()? }
            }
            _ => bail!("not `prefill:N`, `decode:N` or `decode:N@CONTEXT`"),
        };
        let (Self::Prefill { tokens: size } | Self::Decode { sequences: size, .. }) = row;
        ensure!(size > 0, "at least 1");
        Ok(row)
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self {
            Self::Prefill { tokens } => format!("prefill:{tokens}"),
            Self::Decode { sequences, context } => format!("decode:{sequences}@{context}"),
        };
        f.pad(&text)
    }
}

/// A process that runs until this is dropped.
struct Other(Option<Child>);

impl Drop for Other {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Already gone: all the better.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Beside {
    fn start(self, args: &Args, row: Row) -> Result<Other> {
        let own = std::env::current_exe()?;
        let child = match self {
            Self::None => return Ok(Other(None)),
            // Bound to a core: else the system moves it to whichever is idle.
            Self::Stranger => {
                Command::new("taskset").args(["-c", "0"]).arg(own).arg("--spin").spawn()
            }
            Self::Twin => Command::new(own)
                .args(["--forever", "--model"])
                .arg(&args.model)
                .args(["--rows", &row.to_string(), "--chunk", &args.chunk.to_string()])
                .args(["--threads", &args.threads.to_string()])
                .stdout(Stdio::piped())
                .spawn(),
        };
        let mut child = Other(Some(child.context("cannot start what runs beside")?));
        if let Some(stdout) = child.0.as_mut().and_then(|child| child.stdout.take()) {
            let mut lines = BufReader::new(stdout).lines();
            lines.next().context("the twin has ended")??;
            // It goes on saying `ready`, to nobody.
            std::thread::spawn(move || lines.for_each(drop));
        }
        Ok(child)
    }
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// What this process has in memory, and had at most.
fn resident_mib() -> Result<[f64; 2]> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("no such line")?;
        anyhow::Ok(kib.parse::<f64>()? / 1024.0)
    };
    Ok([of("VmRSS:")?, of("VmHWM:")?])
}
