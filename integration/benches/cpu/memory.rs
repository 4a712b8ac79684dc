//! What a loaded server holds, and what it does while nobody asks.

use std::time::Duration;

use anyhow::{Context, Result};
use baton_shared::text::gguf::Gguf;

use crate::Setting;
use crate::engine::names;
use crate::load::{Crowd, Prompts};
use crate::rounds::{Table, cpu_seconds, number};
use crate::servers::Server;

const POOL_MIB: f64 = 384.0;
/// How long nobody asks.
const IDLE: Duration = Duration::from_secs(5);
/// Fills what is filled by use.
const CROWD: Crowd = Crowd { clients: 4, requests: 1, prompt: 256, answer: 8 };

/// All of it as a table.
///
/// # Errors
/// If a server does not come up or does not answer.
pub fn run(setting: &Setting) -> Result<Table> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let prompts = Prompts::new(setting)?;
    let mut columns = Vec::new();
    let measure = async |server: Server| {
        let loaded = resident(server.id())?;
        let before = cpu_seconds(server.id());
        tokio::time::sleep(IDLE).await;
        let idle = 100.0 * (cpu_seconds(server.id()) - before) / IDLE.as_secs_f64();
        CROWD.generate(&prompts, server.address).await?;
        let used = resident(server.id())?;
        anyhow::Ok([number(loaded), number(used), format!("{idle:.1}")])
    };
    columns.push(runtime.block_on(async {
        measure(Server::baton(setting, &format!("{POOL_MIB}MiB")).await?).await
    })?);
    if let Some(folder) = &setting.llama {
        columns.push(
            runtime.block_on(async { measure(Server::llama(folder, setting).await?).await })?,
        );
    }
    let mut table = Table::new("Memory and rest", &names(&["llama-server"]));
    let rows = [
        "resident after loading, MiB",
        "resident after 4 prompts of 256, MiB",
        "CPU while idle, % of a core",
    ];
    for (i, what) in rows.into_iter().enumerate() {
        table.row(what, columns.iter().map(|column| column[i].clone()).collect());
    }
    let header = Gguf::open(&setting.model)?;
    let weights = std::fs::metadata(&setting.model)?.len() - header.data_offset;
    let weights = weights as f64 / f64::from(1 << 20);
    table.note(format!(
        "Baton: {} MiB of weights + {POOL_MIB} MiB of pool = {} MiB",
        number(weights),
        number(weights + POOL_MIB)
    ));
    Ok(table)
}

/// MiB of memory that are a process's own or shared at the moment.
fn resident(id: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).context("VmRSS")?;
    Ok(kilobytes.parse::<f64>()? / 1024.0)
}
