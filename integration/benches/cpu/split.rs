//! What disaggregation is for, on one machine: a context and a generation worker behind the router, with as many
//! threads each, against one worker for both. The cores are the same, so throughput cannot grow; delays can shrink.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use baton_integration::cluster::{Cluster, Plan};
use toml::toml;

use crate::Setting;
use crate::load::{Crowd, Prompts, disturb};
use crate::rounds::{Contestant, Figure, Table, less, more};
use crate::servers::Server;

/// Short prompts, long answers.
const CROWD: Crowd = Crowd { clients: 8, requests: 3, prompt: 32, answer: 128 };
/// Turns of the crowd in a round: seconds long, so that both sides see the same mood of the machine.
const TURNS: usize = 3;
const STREAMS: usize = 4;
const PROMPTS: usize = 3;
const LENGTH: usize = 1500;

const THROUGHPUT: [Figure; 1] = [more("8 clients, 32 + 128 tokens: generated tokens/s")];
const DELAYS: [Figure; 3] = [
    less("4 running streams while 1,500-token prompts arrive: p99 gap, s"),
    more("the same: tokens/s of the streams"),
    less("the same: first token of a long prompt, s (median)"),
];

/// All of it as a table. Both sides are up all the time and take turns: an idle one costs under 1 % of a core, and what
/// the machine's speed does between two starts would otherwise be part of the ratio.
///
/// # Errors
/// If a daemon does not come up or does not answer.
pub fn run(setting: &Setting) -> Result<Table> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let prompts = Prompts::new(setting)?;
    let folder = tempfile::tempdir()?;
    let cluster = runtime.block_on(start(setting, folder.path()))?;
    let two = cluster.router.as_ref().context("a router")?.address;
    let server = runtime.block_on(Server::baton(setting, "512MiB"))?;
    let one = server.address;

    let names = ["context + generation", "one worker"].map(str::to_owned);
    let title = format!("Two workers, {} threads each, against one", setting.threads);
    let mut table = Table::new(title, &names);
    let crowd = |address| Ok(vec![runtime.block_on(CROWD.generate(&prompts, address))?]);
    let delays = |address| {
        let seen = runtime.block_on(disturb(&prompts, address, STREAMS, PROMPTS, LENGTH))?;
        Ok(vec![seen.p99_gap, seen.tokens, seen.first_token])
    };
    table.contest(setting.rounds * TURNS, &THROUGHPUT, turns(&names, [two, one], &crowd))?;
    table.contest(setting.rounds.min(2), &DELAYS, turns(&names, [two, one], &delays))?;
    runtime.block_on(async { cluster.stop(Duration::from_secs(90)) })?;
    Ok(table)
}

async fn start(setting: &Setting, folder: &Path) -> Result<Cluster> {
    let mut worker = toml! {
        [kv]
        pool = "256MiB"
    };
    baton_integration::cluster::set(
        &mut worker,
        &["engine", "threads"],
        i64::try_from(setting.threads)?,
    );
    let plan = Plan::local(&setting.model, 1, 1, &worker)?;
    Cluster::start(&plan, folder, Duration::from_secs(120)).await
}

/// The same turn at each address.
fn turns<'a>(
    names: &[String],
    addresses: [SocketAddr; 2],
    turn: &'a dyn Fn(SocketAddr) -> Result<Vec<f64>>,
) -> Vec<Contestant<'a>> {
    let of = |(name, address): (&String, _)| -> Contestant<'a> {
        (name.clone(), Box::new(move || turn(address)))
    };
    names.iter().zip(addresses).map(of).collect()
}
