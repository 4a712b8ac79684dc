//! llama.cpp and ik_llama.cpp in process: their own benchmark programs, one figure a call.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::Setting;

/// No call takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A peer's benchmark programs.
pub struct Peer {
    /// What it is called.
    pub name: &'static str,
    folder: PathBuf,
    model: PathBuf,
    threads: String,
    options: Options,
}

/// What a peer needs to be at its best.
struct Options {
    llama_bench: &'static [&'static str],
    /// Long prompts need no warming up: it would double their time.
    cold: &'static [&'static str],
    llama_batched_bench: &'static [&'static str],
}

/// With its defaults it repacks what it has kernels for, and chooses how to attend.
const LLAMA: Options =
    Options { llama_bench: &[], cold: &["--no-warmup"], llama_batched_bench: &[] };
/// Weights repacked at load, flash attention.
const IK_LLAMA: Options = Options {
    llama_bench: &["-rtr", "1", "-fa", "1"],
    cold: &["-w", "0"],
    llama_batched_bench: &["-rtr", "-fa", "1"],
};

impl Peer {
    /// llama.cpp.
    pub fn llama(folder: &Path, setting: &Setting) -> Self {
        Self::new("llama.cpp", folder, setting, LLAMA)
    }

    /// ik_llama.cpp.
    pub fn ik_llama(folder: &Path, setting: &Setting) -> Self {
        Self::new("ik_llama.cpp", folder, setting, IK_LLAMA)
    }

    fn new(name: &'static str, folder: &Path, setting: &Setting, options: Options) -> Self {
        let (folder, model) = (folder.to_owned(), setting.model.clone());
        Self { name, folder, model, threads: setting.threads.to_string(), options }
    }

    /// Prompt tokens a second.
    ///
    /// # Errors
    /// If the program fails or says something else.
    pub fn prefill(&self, tokens: u32) -> Result<f64> {
        let cold = if tokens > 1024 { self.options.cold } else { &[] };
        let tokens = tokens.to_string();
        let args = ["-p", &tokens, "-n", "0", "-r", "1", "-o", "json"];
        let (out, _) =
            self.run("llama-bench", &[&args, self.options.llama_bench, cold].concat())?;
        let from = out.find('[').context("llama-bench prints JSON")?;
        let figures: serde_json::Value = serde_json::from_str(&out[from..])?;
        figures[0]["avg_ts"].as_f64().with_context(|| format!("`avg_ts` in {out}"))
    }

    /// Tokens a second of `sequences` together, each with `context` tokens before.
    ///
    /// # Errors
    /// If the program fails or says something else.
    pub fn decode(&self, sequences: u32, context: u32, tokens: u32) -> Result<f64> {
        let room = sequences * (context + tokens + 32);
        let [room, sequences, context, tokens] =
            [room, sequences, context, tokens].map(|n| n.to_string());
        let args = ["-c", &room, "-npp", &context, "-ntg", &tokens, "-npl", &sequences];
        let args = [&args, self.options.llama_batched_bench].concat();
        // One prints its table to stdout, the other among its log.
        let (out, log) = self.run("llama-batched-bench", &args)?;
        // | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
        let mut rows = out.lines().chain(log.lines()).filter(|line| line.starts_with('|'));
        let cells = rows.next_back().context("llama-batched-bench prints a table")?.split('|');
        let speed =
            cells.map(str::trim).nth(8).with_context(|| format!("a speed in {out}{log}"))?;
        speed.parse().with_context(|| format!("`{speed}` in {out}{log}"))
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<(String, String)> {
        let path = self.folder.join(program);
        // One of them writes a log into the current folder.
        let folder = tempfile::tempdir()?;
        let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
        let mut command = Command::new(&path);
        command.current_dir(folder.path()).stdin(Stdio::null());
        command.stdout(File::create(&out)?).stderr(File::create(&err)?);
        command.arg("-m").arg(&self.model).args(["-t", &self.threads]).args(args);
        let mut child = command.spawn().with_context(|| path.display().to_string())?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                bail!("`{program}` takes longer than {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let errors = std::fs::read_to_string(&err).unwrap_or_default();
        ensure!(status.success(), "{command:?} ended with {status}:\n{errors}");
        Ok((std::fs::read_to_string(&out)?, errors))
    }
}
