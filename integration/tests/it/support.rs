//! What the topics share: a cluster in a folder of its own, requests, and answers in a form that can be compared.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use baton_integration::client::Client;
use baton_integration::cluster::{Cluster, Member, Plan};
use baton_integration::eventually::eventually;
use baton_integration::relay::Relay;
use baton_integration::scrape::Metrics;
use serde_json::{Value, json};
use tempfile::TempDir;
use toml::Table;

/// Loading a model on a busy machine.
pub const READY: Duration = Duration::from_secs(60);
/// An idle daemon ends at once.
pub const STOP: Duration = Duration::from_secs(20);

/// A cluster and the folder it lives in.
pub struct Running {
    pub cluster: Cluster,
    pub folder: TempDir,
}

/// `contexts` and `generations` workers with `model` behind a router.
pub async fn start(model: &Path, contexts: usize, generations: usize, worker: Table) -> Running {
    start_plan(|| Plan::local(model, contexts, generations, &worker).unwrap()).await
}

/// What `plan` says, made anew when a port was taken meanwhile.
pub async fn start_plan(plan: impl Fn() -> Plan) -> Running {
    let mut tries = 0;
    loop {
        if let Some(running) = attempt(&plan(), &mut tries).await {
            return running;
        }
    }
}

/// The same with a relay before each worker, in the order of the workers.
pub async fn start_behind_relays(plan: impl Fn() -> Plan) -> (Running, Vec<Relay>) {
    let mut tries = 0;
    loop {
        let mut plan = plan();
        let relays = plan.behind_relays().await.unwrap();
        if let Some(running) = attempt(&plan, &mut tries).await {
            return (running, relays);
        }
    }
}

/// `None` if somebody else took a port between our looking and a daemon's binding.
async fn attempt(plan: &Plan, tries: &mut u32) -> Option<Running> {
    let folder = tempfile::tempdir().unwrap();
    match Cluster::start(plan, folder.path(), READY).await {
        Ok(cluster) => Some(Running { cluster, folder }),
        Err(error) if *tries < 3 && format!("{error:#}").contains("in use") => {
            *tries += 1;
            None
        }
        Err(error) => panic!("{error:#}"),
    }
}

impl Running {
    pub fn context(&mut self, index: usize) -> &mut Member {
        &mut self.cluster.workers[index]
    }

    /// Ends it; everything must end well.
    pub fn stop(self) {
        self.cluster.stop(STOP).unwrap();
        drop(self.folder);
    }
}

/// A worker's metrics.
pub async fn metrics(member: &Member) -> Metrics {
    Metrics::of(member.address, "/prometheus/metrics").await.unwrap()
}

/// Blocks of a worker in `state`.
pub async fn blocks(member: &Member, state: &str) -> f64 {
    metrics(member).await.sum("baton_worker_kv_blocks", &[("state", state)])
}

/// Waits until no block of any worker is in use: all of them at one look. How long that took.
pub async fn all_free(cluster: &Cluster, patience: Duration) -> Duration {
    let begun = Instant::now();
    eventually(patience, "all blocks of all workers are free", || async {
        for member in &cluster.workers {
            let metrics = metrics(member).await;
            let busy = |state| metrics.sum("baton_worker_kv_blocks", &[("state", state)]);
            if ["used", "leased", "in_flight", "quarantined"].map(busy) != [0.0; 4] {
                return None;
            }
        }
        Some(begun.elapsed())
    })
    .await
}

/// Sum of a metric over workers.
pub async fn sum(members: &[Member], name: &str, labels: &[(&str, &str)]) -> f64 {
    let mut sum = 0.0;
    for member in members {
        sum += metrics(member).await.sum(name, labels);
    }
    sum
}

/// What the router counted.
pub async fn router_sum(cluster: &Cluster, name: &str, labels: &[(&str, &str)]) -> f64 {
    let answer = cluster.admin().get("/metrics").await.unwrap();
    Metrics::parse(std::str::from_utf8(&answer.body).unwrap()).sum(name, labels)
}

/// Whether the router would send requests to all of its workers: it is ready when it has one of each role.
pub async fn all_usable(cluster: &Cluster) -> bool {
    let Ok(answer) = cluster.admin().get("/admin/workers").await else { return false };
    let Ok(workers) = answer.json() else { return false };
    let mut workers = workers["workers"].as_array().into_iter().flatten();
    workers.all(|worker| worker["condition"] == "up")
}

/// All a client can tell two answers apart by, but ids and times.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub text: String,
    pub finish: String,
    pub usage: [u64; 3],
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<f64>,
    pub top_logprobs: Vec<Value>,
}

/// Sends a completion request, streamed or not, and takes the answer apart.
pub async fn complete(client: Client, request: &Value, stream: bool) -> Outcome {
    let mut request = request.clone();
    if !stream {
        let answer = client.post("/v1/completions", &request).await.unwrap().ok().unwrap();
        return outcome(std::slice::from_ref(&answer), &answer["usage"]);
    }
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let events = client.stream("/v1/completions", &request).await.unwrap().events().await.unwrap();
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]), "the usage chunk has no choice: {last}");
    outcome(chunks, &last["usage"])
}

/// Joins chunks; a whole answer is one chunk.
pub fn outcome(chunks: &[Value], usage: &Value) -> Outcome {
    let number = |key: &str| usage[key].as_u64().unwrap_or_else(|| panic!("{key} in {usage}"));
    let usage = ["prompt_tokens", "completion_tokens", "total_tokens"].map(number);
    let mut joined = Outcome {
        text: String::new(),
        finish: String::new(),
        usage,
        tokens: Vec::new(),
        token_logprobs: Vec::new(),
        top_logprobs: Vec::new(),
    };
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        joined.text += choice["text"].as_str().unwrap_or_else(|| panic!("no text in {chunk}"));
        if let Some(finish) = choice["finish_reason"].as_str() {
            assert!(joined.finish.is_empty(), "a second finish reason: {chunks:?}");
            joined.finish = finish.to_owned();
        }
        let logprobs = &choice["logprobs"];
        let list = |key: &str| logprobs[key].as_array().cloned().unwrap_or_default();
        joined.tokens.extend(list("tokens").iter().map(|one| one.as_str().unwrap().to_owned()));
        joined
            .token_logprobs
            .extend(list("token_logprobs").iter().map(|one| one.as_f64().unwrap()));
        joined.top_logprobs.extend(list("top_logprobs"));
    }
    joined
}

/// Tells whoever looks at a test's output (`--nocapture`, or a failure).
#[expect(clippy::print_stdout, reason = "the harness keeps it until somebody wants it")]
pub fn note(text: impl std::fmt::Display) {
    println!("{text}");
}

/// Token ids that look random, the same for the same seed.
pub fn token_ids(seed: u64, count: usize, vocab: u64) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % vocab
    };
    (0..count).map(|_| next()).collect()
}

/// A test that cannot run here. Past the test runner, which would keep the line to itself.
pub fn skipped(name: &str, why: &str) {
    std::io::stderr().write_all(format!("skipped: {name}: {why}\n").as_bytes()).unwrap();
}

/// Runs a command to its end, which must come within two minutes.
pub async fn finished(mut command: Command) -> Output {
    let run = move || {
        let [mut out, mut err] = [(), ()].map(|()| tempfile::tempfile().unwrap());
        command.stdin(Stdio::null());
        command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(120) {
                child.kill().unwrap();
                panic!("{command:?} does not end");
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let read = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut bytes)).unwrap();
            bytes
        };
        Output { status, stdout: read(&mut out), stderr: read(&mut err) }
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}
