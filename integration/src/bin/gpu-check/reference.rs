//! An independent computation of the same models, where Python has transformers: what it gives is compared with the GPU's.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use baton_integration::tiny_model::{TinyArchitecture, TinyModel, TinyRope};
use baton_workerd::backend::cuda::sys::Gpu;
use baton_workerd::backend::cuda::{CudaBackend, CudaOptions, PoolSize};
use baton_workerd::model;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::agreement::{self, Difference, Lane, OUTPUT, Seen};

const SCRIPT: &str = include_str!("reference.py");
/// The script's exit code where a package is missing.
const MISSING: i32 = 4;

#[derive(Deserialize)]
struct Step {
    token: u32,
    logprob: f32,
    top: Vec<(u32, f32)>,
}

#[derive(Deserialize)]
struct Answer {
    model: String,
    steps: Vec<Step>,
}

/// Runs the script; `None` where there is no Python or it lacks a package.
fn script(args: &[&str]) -> Result<Option<String>> {
    let output = Command::new("python3").arg("-c").arg(SCRIPT).args(args).output();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if output.status.code() == Some(MISSING) {
        return Ok(None);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let end: String = errors.chars().rev().take(2000).collect::<Vec<_>>().iter().rev().collect();
    ensure!(output.status.success(), "reference.py: {}: {end}", output.status);
    Ok(Some(String::from_utf8(output.stdout)?))
}

fn shapes() -> [(&'static str, TinyModel); 4] {
    let shape = |architecture, rope, heads, kv_heads, head_dim| TinyModel {
        architecture,
        rope,
        hidden: 256,
        ffn: 512,
        heads,
        kv_heads,
        head_dim,
        seed: rand::random(),
        ..TinyModel::default()
    };
    [
        ("llama", shape(TinyArchitecture::Llama, TinyRope::Plain, 4, 2, 64)),
        ("llama-scaled", shape(TinyArchitecture::Llama, TinyRope::Llama3, 8, 2, 32)),
        ("qwen2", shape(TinyArchitecture::Qwen2, TinyRope::Plain, 6, 2, 64)),
        ("qwen3", shape(TinyArchitecture::Qwen3, TinyRope::Plain, 4, 1, 128)),
    ]
}

/// What transformers goes by.
fn name_type(config: &Path, name: &str) -> Result<()> {
    let mut values: Value = serde_json::from_slice(&std::fs::read(config)?)?;
    values["model_type"] = name.split('-').next().into();
    Ok(std::fs::write(config, values.to_string())?)
}

/// A model's name, and how far it is from the reference.
type Compared = (String, Result<Difference>);

/// For each model; `None` where there is no reference.
pub fn numbers(gpu: &Arc<dyn Gpu>) -> Result<Option<Vec<Compared>>> {
    let folder = tempfile::tempdir()?;
    let prompts: Vec<Vec<u32>> = [1, 17, 32, 90, 300]
        .iter()
        .map(|len| (0..*len).map(|at| (at * at * 11 + at * 5 + len) % 500 + 5).collect())
        .collect();
    for (name, shape) in shapes() {
        let path = folder.path().join(name);
        shape.write(&path)?;
        name_type(&path.join("config.json"), name)?;
        let asked: Vec<Value> =
            prompts.iter().map(|prompt| json!({"prompt": prompt, "steps": OUTPUT})).collect();
        std::fs::write(path.join("prompts.json"), serde_json::to_string(&asked)?)?;
    }
    let root = folder.path().to_str().context("a path that is text")?;
    let Some(output) = script(&["numbers", root])? else { return Ok(None) };
    let answers: Vec<Answer> =
        output.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let compared = shapes().map(|(name, _)| {
        let own = answers.iter().filter(|answer| answer.model == name);
        let seen: Vec<Vec<Seen>> = own
            .map(|answer| {
                let steps = answer.steps.iter();
                let seen = |step: &Step| Seen {
                    token: step.token,
                    logprob: step.logprob,
                    top: step.top.clone(),
                };
                steps.map(seen).collect()
            })
            .collect();
        (format!("{name}, transformers"), on_gpu(gpu, &folder.path().join(name), &prompts, &seen))
    });
    Ok(Some(compared.into()))
}

fn on_gpu(
    gpu: &Arc<dyn Gpu>,
    path: &Path,
    prompts: &[Vec<u32>],
    reference: &[Vec<Seen>],
) -> Result<Difference> {
    ensure!(reference.len() == prompts.len(), "{} answers", reference.len());
    let options = CudaOptions {
        max_sequences: 8,
        max_batch_tokens: 1024,
        max_len: 1024,
        pool: PoolSize::Blocks(80),
        block_tokens: 32,
        graphs: true,
    };
    let mut backend = CudaBackend::load(gpu, &mut model::open(path)?, &options)?;
    let lanes: Vec<Lane> = prompts
        .iter()
        .zip(reference)
        .map(|(prompt, seen)| Lane {
            prompt: prompt.clone(),
            forced: seen.iter().map(|seen| seen.token).collect(),
        })
        .collect();
    Ok(agreement::compare(reference, &agreement::run(&mut backend, &lanes, 100)?))
}

/// What its own generation takes, as it says it; `None` where there is no reference.
pub fn speed() -> Result<Option<String>> {
    script(&["speed"])
}
