//! Real workers of a tiny model on the device and on the CPU: whether an answer that two of them make together is the one
//! that one makes alone, and whether a crowd is served.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use baton_integration::client::Client;
use baton_integration::cluster::{Cluster, Plan, overlay, set};
use baton_integration::process::free_port;
use baton_integration::tiny_model::{TinyArchitecture, TinyModel};
use serde_json::{Value, json};
use toml::{Table, toml};

const PATH: &str = "/v1/completions";
const READY: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(20);
const MODEL: &str = "tiny-gpu";
const TOKENS: u64 = 24;

/// A generated text: its tokens and their log-probabilities.
#[derive(Clone, Debug, PartialEq)]
struct Text {
    tokens: Vec<String>,
    logprobs: Vec<f64>,
}

/// Where both halves are computed.
type Way = (&'static str, usize, usize);

/// Lines to be printed, and how many of them are wrong.
pub fn check(device: u32) -> Result<(Vec<String>, usize)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(device))
}

async fn run(device: u32) -> Result<(Vec<String>, usize)> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join(MODEL);
    let shape = TinyModel {
        architecture: TinyArchitecture::Llama,
        hidden: 256,
        ffn: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ..TinyModel::default()
    };
    shape.write(&model)?;
    let gpu = toml! { [kv]
    free_gpu_memory_fraction = 0.02 };
    let mut gpu: Table = gpu;
    set(&mut gpu, &["engine", "device"], format!("cuda:{device}"));
    let mut plan = Plan::local(&model, 1, 1, &gpu)?;
    // Beside the pair: one GPU worker and one CPU worker that the router does not know.
    for name in ["alone-gpu", "alone-cpu"] {
        let mut table = plan.workers[1].1.clone();
        table.insert("role".into(), "both".into());
        set(&mut table, &["server", "listen"], format!("127.0.0.1:{}", free_port()?));
        if name == "alone-cpu" {
            let cpu: Table = toml! { [engine]
            device = "cpu" };
            overlay(&mut table, &cpu);
            table
                .get_mut("kv")
                .and_then(toml::Value::as_table_mut)
                .map(|kv| kv.remove("free_gpu_memory_fraction"));
        }
        plan.workers.push((name.to_owned(), table));
    }
    let cluster = Cluster::start(&plan, folder.path(), READY).await?;
    let seen = compare(&cluster).await;
    let logs: Vec<String> = cluster.workers.iter().map(|member| member.process.log()).collect();
    cluster.stop(STOP).context("the end of all workers")?;
    let (mut lines, wrong) = seen.with_context(|| format!("workers: {}", logs.join("\n---\n")))?;
    let said = logs.iter().flat_map(|log| log.lines());
    let said = said
        .filter(|line| line.contains("pool") || line.contains("transport") || line.contains("GPU"));
    lines.extend(said.map(|line| format!("  log: {line}")));
    Ok((lines, wrong))
}

async fn compare(cluster: &Cluster) -> Result<(Vec<String>, usize)> {
    let clients: Vec<Client> = cluster.workers.iter().map(|member| member.client()).collect();
    let ways: [Way; 4] = [
        ("context GPU, generation GPU", 0, 1),
        ("context CPU, generation GPU", 3, 1),
        ("context GPU, generation CPU", 0, 3),
        ("all on the CPU", 3, 3),
    ];
    let (mut lines, mut wrong) = (Vec::new(), 0);
    let mut worst = [0.0_f64; 4];
    let mut equal = [0; 4];
    let prompts: Vec<Vec<u64>> = [3, 31, 32, 33, 100, 257, 600]
        .iter()
        .map(|len| (0..*len).map(|at| (at * at * 7 + at * 3 + len) % 500 + 5).collect())
        .collect();
    let mut id = 1000;
    for prompt in &prompts {
        let alone = text(&clients[2].post(PATH, &request(prompt)).await?.ok()?)?;
        for (way, (_, context, generation)) in ways.iter().enumerate() {
            id += 1;
            let text = two(&clients[*context], &clients[*generation], prompt, id).await?;
            let shared = alone.tokens.iter().zip(&text.tokens).take_while(|(a, b)| a == b).count();
            equal[way] += usize::from(text == alone);
            for (left, right) in alone.logprobs.iter().zip(&text.logprobs).take(shared) {
                worst[way] = worst[way].max((left - right).abs());
            }
        }
    }
    for (way, (name, ..)) in ways.iter().enumerate() {
        let is_exact = equal[way] == prompts.len();
        let is_right = if way == 0 { is_exact } else { worst[way] < f64::from(crate::BOUND) };
        wrong += usize::from(!is_right);
        lines.push(format!(
            "{} {name}: {} of {} answers as of one GPU worker to the last bit, {:.4} nats apart at most",
            if is_right { "ok   " } else { "WRONG" },
            equal[way],
            prompts.len(),
            worst[way]
        ));
    }
    let (line, is_right) = crowd(&cluster.client(), &clients[2], &prompts).await?;
    wrong += usize::from(!is_right);
    lines.push(format!("{} {line}", if is_right { "ok   " } else { "WRONG" }));
    Ok((lines, wrong))
}

/// Requests at once through the router: all are served, and each says what it says alone, within the bound.
async fn crowd(router: &Client, alone: &Client, prompts: &[Vec<u64>]) -> Result<(String, bool)> {
    const CROWD: usize = 64;
    let mut expected = Vec::new();
    for prompt in prompts {
        expected.push(text(&alone.post(PATH, &request(prompt)).await?.ok()?)?);
    }
    let mut crowd = tokio::task::JoinSet::new();
    for number in 0..CROWD {
        let (router, which) = (*router, number % prompts.len());
        let body = request(&prompts[which]);
        crowd.spawn(async move {
            Ok::<_, anyhow::Error>((which, router.post(PATH, &body).await?.ok()?))
        });
    }
    let (mut served, mut same, mut worst) = (0, 0, 0.0_f64);
    while let Some(answer) = crowd.join_next().await {
        let (which, answer) = answer??;
        let (text, alone) = (text(&answer)?, &expected[which]);
        let shared = alone.tokens.iter().zip(&text.tokens).take_while(|(a, b)| a == b).count();
        served += usize::from(text.tokens.len() == TOKENS as usize);
        same += usize::from(shared == alone.tokens.len());
        for (left, right) in alone.logprobs.iter().zip(&text.logprobs).take(shared) {
            worst = worst.max((left - right).abs());
        }
    }
    let line = format!(
        "{served} of {CROWD} requests at once through the router served, {same} with the tokens of one alone, {worst:.4} nats apart at most"
    );
    Ok((line, served == CROWD && worst < f64::from(crate::BOUND)))
}

fn request(prompt: &[u64]) -> Value {
    json!({"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "logprobs": 1})
}

/// Both hops by hand.
async fn two(context: &Client, generation: &Client, prompt: &[u64], id: u64) -> Result<Text> {
    let mut first = request(prompt);
    first["disaggregated_params"] =
        json!({"request_type": "context_only", "disagg_request_id": id});
    let answer = context.post(PATH, &first).await?.ok().context("the context half")?;
    let mut second = first.clone();
    second["prompt"] = answer["prompt_token_ids"].clone();
    second["disaggregated_params"] = answer["choices"][0]["disaggregated_params"].clone();
    second["disaggregated_params"]["request_type"] = json!("generation_only");
    second["disaggregated_params"]["ctx_usage"] = answer["usage"].clone();
    text(&generation.post(PATH, &second).await?.ok().context("the generation half")?)
}

fn text(answer: &Value) -> Result<Text> {
    let logprobs = &answer["choices"][0]["logprobs"];
    let tokens = logprobs["tokens"].as_array().context("tokens")?;
    let tokens: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    let values = logprobs["token_logprobs"].as_array().context("log-probabilities")?;
    let logprobs: Vec<f64> = values.iter().filter_map(Value::as_f64).collect();
    ensure!(tokens.len() == logprobs.len() && !tokens.is_empty(), "{answer}");
    Ok(Text { tokens, logprobs })
}
