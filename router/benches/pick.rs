//! What one choice of a worker costs, by policy and number of workers.
//!
//! Prints nanoseconds of `Table::pick`: the choice from the newest table, and what the policy remembers of it. Workers have
//! different loads; prompts are 64 of 8 KiB that share their first half, conversations are 64. What reading such a prompt
//! costs, which `prefix` (and `conversation` without an id) needs once a request, is a line of its own.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_router::config::{LoadMeasure, PolicyName, RouterConfig, ServerEntry};
use baton_router::health::Outcome;
use baton_router::policy::{Features, Tried};
use baton_router::table::worker::InFlight;
use baton_router::table::{Phase, Table};

const WORKERS: [usize; 3] = [2, 16, 256];
const PROMPT: usize = 8 << 10;

fn main() {
    let (prompts, conversations) = (prompts(), conversations());
    println!(
        "{:>28} {:>9} {:>9} {:>9}",
        "ns a pick, of workers:", WORKERS[0], WORKERS[1], WORKERS[2]
    );
    for (name, policy, load, features) in [
        ("round_robin", PolicyName::RoundRobin, LoadMeasure::Requests, &prompts),
        ("least_loaded, requests", PolicyName::LeastLoaded, LoadMeasure::Requests, &prompts),
        ("least_loaded, tokens", PolicyName::LeastLoaded, LoadMeasure::Tokens, &prompts),
        ("power_of_two, requests", PolicyName::PowerOfTwo, LoadMeasure::Requests, &prompts),
        ("power_of_two, tokens", PolicyName::PowerOfTwo, LoadMeasure::Tokens, &prompts),
        ("prefix, requests", PolicyName::Prefix, LoadMeasure::Requests, &prompts),
        ("prefix, tokens", PolicyName::Prefix, LoadMeasure::Tokens, &prompts),
        ("conversation, by id", PolicyName::Conversation, LoadMeasure::Requests, &conversations),
        ("conversation, by prompt", PolicyName::Conversation, LoadMeasure::Requests, &prompts),
    ] {
        let nanos = WORKERS.map(|workers| pick(workers, policy, load, features));
        println!("{name:>28} {:>9.0} {:>9.0} {:>9.0}", nanos[0], nanos[1], nanos[2]);
    }
    let text = text(0);
    let read = nanos(|_| {
        let mut features = Features::of_text(text.len());
        features.read(&text, None);
        features
    });
    println!("{:>28} {read:>9.0}", "reading a prompt of 8 KiB");
}

/// Nanoseconds a pick among so many workers.
fn pick(workers: usize, policy: PolicyName, load: LoadMeasure, features: &[Features]) -> f64 {
    let server = |index: usize| {
        let url = format!("10.0.{}.{}:8001", index / 250, index % 250 + 1);
        ServerEntry::new(url.parse().expect("it is an address"))
    };
    let mut config = RouterConfig::default();
    config.context.servers = (0..workers).map(server).collect();
    (config.context.policy, config.context.load) = (policy, Some(load));
    let table = Table::new(config).expect("names are good");
    let snapshot = table.snapshot_full();
    let mut busy: Vec<InFlight> = Vec::new();
    for (index, worker) in snapshot.context.iter().enumerate() {
        table.report(worker, Outcome::Served);
        busy.extend((0..index % 7).map(|_| worker.begin(500)));
    }
    let tried = Tried::default();
    nanos(|turn| table.pick(Phase::Context, &features[turn % features.len()], &tried))
}

/// Best of several batches: what the machine does beside only ever adds.
fn nanos<T>(mut work: impl FnMut(usize) -> T) -> f64 {
    const BATCH: usize = 2000;
    (0..4 * BATCH).for_each(|turn| drop(black_box(work(turn))));
    let batch = |_| {
        let start = Instant::now();
        (0..BATCH).for_each(|turn| drop(black_box(work(turn))));
        start.elapsed()
    };
    let best: Duration = (0..30).map(batch).min().expect("there are 30 batches");
    best.as_secs_f64() * 1e9 / BATCH as f64
}

/// The first half is everybody's.
fn text(number: usize) -> Vec<u8> {
    let own = |at: usize| if at < PROMPT / 2 { at } else { at + number };
    (0..PROMPT).map(|at| (own(at) * 7919 % 251) as u8).collect()
}

fn prompts() -> Vec<Features> {
    let prompt = |number| {
        let mut features = Features::of_text(PROMPT);
        features.read(&text(number), None);
        features
    };
    (0..64).map(prompt).collect()
}

fn conversations() -> Vec<Features> {
    let conversation = |number: usize| Features {
        conversation: Some(Features::conversation_of(number.to_string().as_bytes())),
        ..Features::of_text(PROMPT)
    };
    (0..64).map(conversation).collect()
}
