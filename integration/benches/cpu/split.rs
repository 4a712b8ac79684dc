//! What disaggregation is for, on one machine: a context and a generation worker behind the router, with as many
//! threads each, against one worker for both. The cores are the same, so throughput cannot grow; delays can shrink.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use baton_integration::cluster::{Cluster, Plan};
use tokio::runtime::Runtime;
use toml::toml;

use crate::Setting;
use crate::load::{Crowd, Prompts, disturb};
use crate::rounds::{Contestant, Figure, Table, less, more};
use crate::servers::Server;

/// Short prompts, long answers.
const CROWD: Crowd = Crowd { clients: 8, requests: 1, prompt: 32, answer: 128 };
const STREAMS: usize = 4;
const PROMPTS: usize = 3;
const LENGTH: usize = 1500;

const FIGURES: [Figure; 4] = [
    more("8 clients, 32 + 128 tokens: generated tokens/s"),
    less("4 running streams while 1,500-token prompts arrive: p99 gap, s"),
    more("the same: tokens/s of the streams"),
    less("the same: first token of a long prompt, s (median)"),
];

/// All of it as a table.
///
/// # Errors
/// If a daemon does not come up or does not answer.
pub fn run(setting: &Setting) -> Result<Table> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let prompts = Prompts::new(setting)?;
    let names = ["context + generation", "one worker"].map(str::to_owned);
    let two = || {
        let folder = tempfile::tempdir()?;
        let mut worker = toml! {
            [kv]
            pool = "256MiB"
        };
        let threads = i64::try_from(setting.threads)?;
        baton_integration::cluster::set(&mut worker, &["engine", "threads"], threads);
        let plan = Plan::local(&setting.model, 1, 1, &worker)?;
        let patience = Duration::from_secs(120);
        let cluster = runtime.block_on(Cluster::start(&plan, folder.path(), patience))?;
        let router = cluster.router.as_ref().context("a router")?.address;
        let figures = measure(&runtime, &prompts, router)?;
        runtime.block_on(async { cluster.stop(Duration::from_secs(90)) })?;
        Ok(figures)
    };
    let one = || {
        let server = runtime.block_on(Server::baton(setting, "512MiB"))?;
        measure(&runtime, &prompts, server.address)
    };
    let contestants: Vec<Contestant<'_>> =
        vec![(names[0].clone(), Box::new(two)), (names[1].clone(), Box::new(one))];
    let title = format!("Two workers, {} threads each, against one", setting.threads);
    let mut table = Table::new(title, &names);
    table.contest(setting.rounds.min(2), &FIGURES, contestants)?;
    Ok(table)
}

fn measure(runtime: &Runtime, prompts: &Prompts, address: SocketAddr) -> Result<Vec<f64>> {
    runtime.block_on(async {
        let tokens = CROWD.generate(prompts, address).await?;
        let disturbed = disturb(prompts, address, STREAMS, PROMPTS, LENGTH).await?;
        Ok(vec![tokens, disturbed.p99_gap, disturbed.tokens, disturbed.first_token])
    })
}
