//! `baton-up FILE`: starts a whole local cluster, workers and router, from one file, and ends it as a whole.
//!
//! FILE has a `[router]` table with the keys of `router.toml` and a `[[worker]]` table with the keys of `workerd.toml`
//! for each worker (`name` names it in the logs).

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_integration::cli::Up;
use baton_integration::cluster::{Cluster, Plan};
use baton_integration::scrape::Metrics;
use clap::Parser;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use toml::{Table, Value};

/// Loading a model may take that long.
const READY: Duration = Duration::from_secs(300);
/// Leases of answers nobody fetched last 60 s.
const STOP: Duration = Duration::from_secs(90);
/// Bad configuration.
const CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Up::parse();
    let plan = match read(&cli.file) {
        Ok(plan) => plan,
        Err(error) => return fail(&error, CONFIG),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done =
        runtime.context("the runtime").and_then(|runtime| runtime.block_on(run(&cli, &plan)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a program")]
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("baton-up: {error:#}");
    ExitCode::from(code)
}

fn say(line: &str) {
    // A reader that went away does not stop a cluster.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The plan in `file`.
fn read(file: &Path) -> Result<Plan> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut table: Table = toml::from_str(&text).with_context(|| file.display().to_string())?;
    let mut plan = Plan::default();
    match table.remove("router") {
        Some(Value::Table(router)) => plan.router = Some(router),
        Some(_) => bail!("{}: `router` must be a table", file.display()),
        None => bail!("{}: a `[router]` table is needed", file.display()),
    }
    let Some(Value::Array(workers)) = table.remove("worker") else {
        bail!("{}: at least one `[[worker]]` table is needed", file.display());
    };
    if let Some(key) = table.keys().next() {
        bail!("{}: unknown key `{key}`; known are `router` and `worker`", file.display());
    }
    for (index, worker) in workers.into_iter().enumerate() {
        let Value::Table(mut worker) = worker else {
            bail!("{}: `worker` must be tables: `[[worker]]`", file.display());
        };
        let name = match worker.remove("name") {
            Some(Value::String(name)) => name,
            Some(other) => bail!("{}: `worker.name` = `{other}` is not text", file.display()),
            None => format!("worker-{index}"),
        };
        // Daemons run in a folder of their own; a path that exists here is meant from here.
        if let Some(Value::String(model)) = worker.get_mut("model")
            && let Ok(absolute) = std::path::absolute(&*model)
            && absolute.exists()
        {
            *model = absolute.to_string_lossy().into_owned();
        }
        plan.workers.push((name, worker));
    }
    Ok(plan)
}

async fn run(cli: &Up, plan: &Plan) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // The terminal is closed; the daemons would read their configuration again.
    let mut hang_up = signal(SignalKind::hangup())?;
    let folder = match &cli.logs {
        Some(folder) => std::path::absolute(folder)?,
        None => tempfile::Builder::new().prefix("baton-").tempdir()?.keep(),
    };
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    say(&format!(
        "starting {} workers and the router; logs are in {}",
        plan.workers.len(),
        folder.display()
    ));
    let begun = Instant::now();
    let stopped = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    };
    tokio::pin!(stopped);
    let mut cluster = tokio::select! {
        started = Cluster::start(plan, &folder, READY) => started?,
        () = &mut stopped => return Ok(()),
    };
    say(&format!("ready after {:.1} s", begun.elapsed().as_secs_f64()));
    if cli.try_it {
        tokio::select! {
            tried = demonstrate(&cluster, plan) => tried?,
            () = &mut stopped => return cluster.stop(STOP),
        }
    }
    if cli.once {
        return cluster.stop(STOP);
    }
    let address = cluster.router.as_ref().context("a router")?.address;
    say(&format!(
        "\nserving at http://{address} (Ctrl-C ends it); try\n\n{}",
        curl(&address.to_string(), &model(&cluster).await?)
    ));
    let died = watch(&mut cluster);
    let dead = tokio::select! {
        name = died => Some(name?),
        () = stopped => None,
    };
    say("stopping");
    match dead {
        Some(name) => {
            drop(cluster);
            bail!("`{name}` ended by itself; its log is in {}", folder.display())
        }
        None => cluster.stop(STOP),
    }
}

/// Returns the name of the first daemon that ends.
async fn watch(cluster: &mut Cluster) -> Result<String> {
    loop {
        for member in cluster.workers.iter_mut().chain(&mut cluster.router) {
            if member.process.ended()?.is_some() {
                return Ok(member.process.name().to_owned());
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The first model served.
async fn model(cluster: &Cluster) -> Result<String> {
    let models = cluster.client().get("/v1/models").await?.ok()?;
    Ok(models["data"][0]["id"].as_str().context("a model in /v1/models")?.to_owned())
}

fn curl(address: &str, model: &str) -> String {
    format!(
        "curl http://{address}/v1/completions -H \"Content-Type: application/json\" \\\n  \
         -d '{{\"model\":\"{model}\",\"prompt\":\"NVIDIA is a great company because\",\
         \"max_tokens\":16,\"temperature\":0}}'\n"
    )
}

/// Sends the request of TensorRT-LLM's documentation through the whole path and prints the answer as it comes.
async fn demonstrate(cluster: &Cluster, plan: &Plan) -> Result<()> {
    let prompt = "NVIDIA is a great company because";
    let request = json!({
        "model": model(cluster).await?, "prompt": prompt, "max_tokens": 16, "temperature": 0,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let before = scrape(cluster).await?;
    let mut out = std::io::stdout();
    let _ = write!(out, "\n  {prompt}");
    let begun = Instant::now();
    let mut first = None;
    let mut stream = cluster.client().stream("/v1/completions", &request).await?;
    let mut usage = json!(null);
    while let Some(event) = stream.event().await? {
        if event == "[DONE]" {
            break;
        }
        let chunk: serde_json::Value = serde_json::from_str(&event)?;
        if chunk["error"].is_object() {
            bail!("the answer broke off: {chunk}");
        }
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
        let text = chunk["choices"][0]["text"].as_str().unwrap_or_default();
        if !text.is_empty() {
            first.get_or_insert_with(|| begun.elapsed());
        }
        let _ = write!(out, "{text}").and_then(|()| out.flush());
    }
    let total = begun.elapsed();
    say(&format!(
        "\n\n{} prompt tokens, {} generated; first after {:.0} ms, all after {:.0} ms",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        first.unwrap_or(total).as_secs_f64() * 1e3,
        total.as_secs_f64() * 1e3,
    ));
    let after = scrape(cluster).await?;
    for (((name, _), before), after) in plan.workers.iter().zip(&before).zip(&after) {
        let grown = |series: &str, labels: &[(&str, &str)]| {
            after.sum(series, labels) - before.sum(series, labels)
        };
        let tokens = |source| grown("baton_worker_prompt_tokens_total", &[("source", source)]);
        let (computed, pulled, prefix) = (tokens("computed"), tokens("pulled"), tokens("prefix"));
        let generated = grown("baton_worker_generated_tokens_total", &[]);
        let moved = grown("baton_worker_handover_bytes_total", &[]);
        let seconds = grown("baton_worker_handover_seconds_sum", &[]);
        let did = match (computed > 0.0, pulled > 0.0) {
            (true, _) => format!("computed {computed} prompt tokens and the first token"),
            (_, true) => format!(
                "pulled {pulled} prompt tokens ({:.0} KiB of KV cache over NIXL in {:.1} ms), generated {generated}",
                moved / 1024.0,
                seconds * 1e3,
            ),
            _ => "had nothing to do".to_owned(),
        };
        let known =
            if prefix > 0.0 { format!("; knew {prefix} prompt tokens") } else { String::new() };
        say(&format!("  {name}: {did}{known}"));
    }
    Ok(())
}

async fn scrape(cluster: &Cluster) -> Result<Vec<Metrics>> {
    let mut all = Vec::new();
    for worker in &cluster.workers {
        all.push(Metrics::of(worker.address, "/prometheus/metrics").await?);
    }
    Ok(all)
}
