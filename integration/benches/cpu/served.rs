//! Over HTTP: one worker of ours against `llama-server`, eight sequences each.

use anyhow::Result;
use tokio::runtime::Runtime;

use crate::Setting;
use crate::engine::names;
use crate::load::{Crowd, Prompts, disturb};
use crate::rounds::{Contestant, Figure, Table, cpu_seconds, less, more};
use crate::servers::Server;

/// Eight clients, twice each.
const CROWD: Crowd = Crowd { clients: 8, requests: 2, prompt: 128, answer: 64 };
/// Beside four running streams, prompts of 1,500 tokens.
const STREAMS: usize = 4;
const PROMPTS: usize = 3;
const LENGTH: usize = 1500;

const FIGURES: [Figure; 5] = [
    more("8 clients, 128 + 64 tokens: generated tokens/s"),
    less("the same: CPU ms a generated token"),
    less("4 running streams while 1,500-token prompts arrive: p99 gap, s"),
    more("the same: tokens/s of the streams"),
    less("the same: first token of a long prompt, s (median)"),
];

/// All of it as a table.
///
/// # Errors
/// If a server does not come up or does not answer.
pub fn run(setting: &Setting) -> Result<Table> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let prompts = Prompts::new(setting)?;
    let turn = |server: Server| measure(&runtime, &prompts, &server);
    let turn = &turn;
    let ours = || turn(runtime.block_on(Server::baton(setting, "512MiB"))?);
    let mut contestants: Vec<Contestant<'_>> = vec![("Baton".into(), Box::new(ours))];
    if let Some(folder) = &setting.llama {
        let theirs = || turn(runtime.block_on(Server::llama(folder, setting))?);
        contestants.push(("llama-server".into(), Box::new(theirs)));
    }
    let mut table = Table::new("Served over HTTP", &names(&["llama-server"]));
    table.contest(setting.rounds.min(2), &FIGURES, contestants)?;
    Ok(table)
}

fn measure(runtime: &Runtime, prompts: &Prompts, server: &Server) -> Result<Vec<f64>> {
    runtime.block_on(async {
        let before = cpu_seconds(server.id());
        let tokens = CROWD.generate(prompts, server.address).await?;
        let generated = CROWD.clients * CROWD.requests * CROWD.answer as usize;
        let cpu = (cpu_seconds(server.id()) - before) * 1e3 / generated as f64;
        let disturbed = disturb(prompts, server.address, STREAMS, PROMPTS, LENGTH).await?;
        Ok(vec![tokens, cpu, disturbed.p99_gap, disturbed.tokens, disturbed.first_token])
    })
}
