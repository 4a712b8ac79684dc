//! llama.cpp and ik_llama.cpp in process: their own benchmark programs, one figure a call.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::Setting;

/// A peer's benchmark programs.
pub struct Peer {
    /// What it is called.
    pub name: &'static str,
    folder: PathBuf,
    model: PathBuf,
    /// Options of every call.
    options: Vec<String>,
}

impl Peer {
    /// llama.cpp with its defaults: it repacks what it has kernels for.
    pub fn llama(folder: &Path, setting: &Setting) -> Self {
        Self::new("llama.cpp", folder, setting, &[])
    }

    /// ik_llama.cpp at its best on a CPU: weights repacked at load, flash attention.
    pub fn ik_llama(folder: &Path, setting: &Setting) -> Self {
        Self::new("ik_llama.cpp", folder, setting, &["-rtr", "1", "-fa", "1"])
    }

    fn new(name: &'static str, folder: &Path, setting: &Setting, options: &[&str]) -> Self {
        let mut all = vec!["-t".to_owned(), setting.threads.to_string()];
        all.extend(options.iter().map(|option| (*option).to_owned()));
        Self { name, folder: folder.to_owned(), model: setting.model.clone(), options: all }
    }

    /// Prompt tokens a second.
    ///
    /// # Errors
    /// If the program fails or says something else.
    pub fn prefill(&self, tokens: u32) -> Result<f64> {
        let tokens = tokens.to_string();
        let out = self.run("llama-bench", &["-p", &tokens, "-n", "0", "-r", "1", "-o", "json"])?;
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
        let out = self.run("llama-batched-bench", &args)?;
        // | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
        let mut rows = out.lines().filter(|line| line.starts_with('|'));
        let cells = rows.next_back().context("llama-batched-bench prints a table")?.split('|');
        let speed = cells.map(str::trim).nth(8).with_context(|| format!("a speed in {out}"))?;
        speed.parse().with_context(|| format!("`{speed}` in {out}"))
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let path = self.folder.join(program);
        let mut command = Command::new(&path);
        command.arg("-m").arg(&self.model).args(args).args(&self.options).stdin(Stdio::null());
        // `-rtr` and `-fa` are flags without a value in all programs but llama-bench.
        let output = command.output().with_context(|| path.display().to_string())?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?} ended with {}:\n{errors}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
