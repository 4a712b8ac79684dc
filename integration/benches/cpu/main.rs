//! `make bench`: the CPU engine beside its peers, on one machine, with the same file and the same number of threads.
//!
//! Contestants take turns in each round, figures are medians, and a ratio is the median of the rounds' ratios: a shared
//! machine's speed drifts by more than what is measured. Absolute figures are for orientation. Everything listens on
//! loopback, and is bounded in count and time.
#![expect(clippy::print_stdout, reason = "the tables are what it is for")]
#![expect(clippy::print_stderr, reason = "how far it is")]

mod engine;
mod load;
mod memory;
mod peers;
mod rounds;
mod served;
mod servers;
mod split;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use baton_integration::files;
use clap::{Parser, ValueEnum};

use peers::Peer;

/// Measures the CPU engine beside llama.cpp.
#[derive(Parser)]
struct Cli {
    /// What to measure [default: all]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// A `.gguf` file [default: the demo model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Compute threads of each contestant
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How often everybody has a turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Folder with llama.cpp's programs [default: what `make bench` built; none: measured alone]
    #[arg(long)]
    llama: Option<PathBuf>,
    /// Folder with ik_llama.cpp's programs, another contestant in process
    #[arg(long)]
    ik_llama: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// In process: prefill, decode alone and in a batch, against the memory's bandwidth
    Engine,
    /// Over HTTP: eight clients; running streams while long prompts arrive
    Served,
    /// A context and a generation worker behind the router, against one worker
    Split,
    /// Memory after loading, CPU while idle
    Memory,
}

/// What every part is told.
pub struct Setting {
    model: PathBuf,
    threads: usize,
    rounds: usize,
    llama: Option<PathBuf>,
    ik_llama: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    // From the tree's top folder, where `make` is called: we run in another, and peers in folders of their own.
    let whole = |path: PathBuf| {
        files::top().join(&path).canonicalize().with_context(|| path.display().to_string())
    };
    let model = match cli.model {
        Some(path) => whole(path)?,
        None => files::demo_model()?,
    };
    let llama = cli.llama.or_else(|| files::dep("llama.cpp/bin").ok()).map(whole).transpose()?;
    let ik_llama = cli.ik_llama.map(whole).transpose()?;
    let (threads, rounds) = (cli.threads.max(1), cli.rounds.max(1));
    let setting = Setting { model, threads, rounds, llama, ik_llama };
    println!("{}\n", headline(&setting)?);
    let mut failed = 0;
    let all = [Part::Engine, Part::Served, Part::Split, Part::Memory];
    for part in all.into_iter().filter(|part| cli.parts.is_empty() || cli.parts.contains(part)) {
        let table = match part {
            Part::Engine => engine::run(&setting),
            Part::Served => served::run(&setting),
            Part::Split => split::run(&setting),
            Part::Memory => memory::run(&setting),
        };
        match table {
            Ok(table) => println!("{table}\n"),
            Err(error) => {
                println!("bench: {error:#}\n");
                failed += 1;
            }
        }
    }
    ensure!(failed == 0, "{failed} parts could not be measured");
    Ok(())
}

/// What was measured, and where.
fn headline(setting: &Setting) -> Result<String> {
    let about = std::fs::read_to_string("/proc/cpuinfo")?;
    let processor =
        about.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    Ok(format!(
        "{}, {} threads, {} rounds; {} cores of {}, load average {load} before",
        setting.model.file_name().unwrap_or_default().to_string_lossy(),
        setting.threads,
        setting.rounds,
        std::thread::available_parallelism()?,
        processor.unwrap_or("an unknown processor"),
    ))
}

impl Setting {
    /// Who competes in process.
    fn peers(&self) -> Vec<Peer> {
        let mut peers = Vec::new();
        if let Some(folder) = &self.llama {
            peers.push(Peer::llama(folder, self));
        }
        if let Some(folder) = &self.ik_llama {
            peers.push(Peer::ik_llama(folder, self));
        }
        peers
    }
}
