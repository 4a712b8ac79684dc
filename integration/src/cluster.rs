//! A whole local cluster: workers and router as processes, each with a configuration file of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value, toml};

use crate::client::Client;
use crate::process::{Process, Program, free_port};
use crate::relay::Relay;

/// A daemon of a cluster.
#[derive(Debug)]
pub struct Member {
    /// The process.
    pub process: Process,
    /// Where it serves.
    pub address: SocketAddr,
}

/// Running workers and, in front of them, a router.
#[derive(Debug)]
pub struct Cluster {
    /// In the order they were given.
    pub workers: Vec<Member>,
    /// Its admin port is in its configuration.
    pub router: Option<Member>,
    plan: Plan,
    folder: PathBuf,
}

/// What a cluster is made of: tables with the keys of `config/workerd-*.toml` and `config/router.toml`.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Name and configuration of each worker; `server.listen` is needed.
    pub workers: Vec<(String, Table)>,
    /// Configuration of the router; `server.listen` is needed.
    pub router: Option<Table>,
    /// Set for each worker, beside the caller's own environment.
    pub environment: Vec<(String, String)>,
}

impl Plan {
    /// `contexts` context workers and `generations` generation workers of one thread each on free ports with a
    /// router before them, all serving `model`. `worker` is laid over each worker's keys.
    ///
    /// # Errors
    /// When no port is free.
    pub fn local(
        model: &Path,
        contexts: usize,
        generations: usize,
        worker: &Table,
    ) -> Result<Self> {
        let mut plan = Self::default();
        let mut servers = [Vec::new(), Vec::new()];
        for index in 0..contexts + generations {
            let (role, number) = if index < contexts {
                ("context", index)
            } else {
                ("generation", index - contexts)
            };
            let listen = format!("127.0.0.1:{}", free_port()?);
            let mut table = toml! {
                [engine]
                threads = 1
                device = "cpu"
                [kv]
                pool = "64MiB"
                [log]
                format = "text"
            };
            table.insert("model".into(), model.to_string_lossy().into_owned().into());
            table.insert("role".into(), role.into());
            set(&mut table, &["server", "listen"], listen.clone());
            overlay(&mut table, worker);
            let mut server = Table::new();
            server.insert("url".into(), listen.into());
            servers[usize::from(index >= contexts)].push(Value::Table(server));
            plan.workers.push((format!("{role}-{number}"), table));
        }
        let [context, generation] = servers;
        let mut router = Table::new();
        set(&mut router, &["server", "listen"], format!("127.0.0.1:{}", free_port()?));
        set(&mut router, &["server", "admin_listen"], format!("127.0.0.1:{}", free_port()?));
        set(&mut router, &["server", "threads"], 1);
        set(&mut router, &["log", "format"], "text");
        set(&mut router, &["context", "servers"], context);
        set(&mut router, &["generation", "servers"], generation);
        plan.router = Some(router);
        Ok(plan)
    }

    /// Puts a relay between the router and each worker, in the order of the workers. Peers still meet directly.
    ///
    /// # Errors
    /// When a relay cannot listen or a worker's address is not known.
    pub async fn behind_relays(&mut self) -> Result<Vec<Relay>> {
        let mut relays = Vec::new();
        for (_, table) in &self.workers {
            relays.push(Relay::start(listen_of(table)?).await?);
        }
        let mut addresses = relays.iter().map(|relay| relay.address.to_string());
        for role in ["context", "generation"] {
            let servers = self.router.as_mut().and_then(|router| router.get_mut(role));
            let servers = servers.and_then(|section| section.get_mut("servers"));
            let servers = servers.and_then(Value::as_array_mut).context("a router with servers")?;
            for server in servers {
                let address = addresses.next().context("a worker for each server")?;
                server
                    .as_table_mut()
                    .context("a server is a table")?
                    .insert("url".into(), address.into());
            }
        }
        Ok(relays)
    }
}

/// Sets `table[path…] = value`, making the tables on the way.
///
/// # Panics
/// If something on the way is no table.
pub fn set(table: &mut Table, path: &[&str], value: impl Into<Value>) {
    match path {
        [] => {}
        [last] => drop(table.insert((*last).to_owned(), value.into())),
        [first, rest @ ..] => {
            let inner = table.entry(*first).or_insert_with(|| Value::Table(Table::new()));
            set(inner.as_table_mut().expect("a section is a table"), rest, value);
        }
    }
}

/// Lays `over` on `table`: sections are joined, other values replaced.
pub fn overlay(table: &mut Table, over: &Table) {
    for (key, value) in over {
        match (table.get_mut(key), value) {
            (Some(Value::Table(inner)), Value::Table(over)) => overlay(inner, over),
            _ => drop(table.insert(key.clone(), value.clone())),
        }
    }
}

/// `server.listen` of a daemon's table as an address.
fn listen_of(table: &Table) -> Result<SocketAddr> {
    address_of(table, "listen")
}

fn address_of(table: &Table, key: &str) -> Result<SocketAddr> {
    let listen = table.get("server").and_then(|server| server.get(key));
    let listen =
        listen.and_then(Value::as_str).with_context(|| format!("`server.{key}` is needed"))?;
    let local = listen.replace("localhost", &Ipv4Addr::LOCALHOST.to_string());
    local.parse().with_context(|| format!("`server.{key}` = `{listen}` is not HOST:PORT"))
}

impl Cluster {
    /// Starts everything and waits until all of it accepts work; logs and configurations go to `folder`.
    ///
    /// # Errors
    /// If a daemon ends (with the end of its log) or is not ready within `patience`.
    pub async fn start(plan: &Plan, folder: &Path, patience: Duration) -> Result<Self> {
        let (plan, folder) = (plan.clone(), folder.to_owned());
        let mut cluster = Self { workers: Vec::new(), router: None, plan, folder };
        let plan = cluster.plan.clone();
        for (name, table) in &plan.workers {
            cluster.workers.push(cluster.spawn("baton-workerd", name, table)?);
        }
        if let Some(table) = &plan.router {
            cluster.router = Some(cluster.spawn("baton-router", "router", table)?);
        }
        let begun = Instant::now();
        for member in cluster.workers.iter_mut().chain(&mut cluster.router) {
            member.ready(patience.saturating_sub(begun.elapsed())).await?;
        }
        Ok(cluster)
    }

    /// Starts one daemon more, or again, with the same folder.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, binary: &'static str, name: &str, table: &Table) -> Result<Member> {
        let file = self.folder.join(format!("{name}.toml"));
        std::fs::write(&file, toml::to_string(table)?)?;
        let args = ["--config".into(), file.into_os_string()];
        let mut program = Program::new(binary, name, args);
        if binary == "baton-workerd" {
            program.env.clone_from(&self.plan.environment);
        }
        let process = program.spawn(&self.folder)?;
        Ok(Member { process, address: listen_of(table)? })
    }

    /// Starts a worker that has ended again, as it was configured.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart(&mut self, index: usize) -> Result<()> {
        let (name, table) = self.plan.workers.get(index).context("a worker of the plan")?;
        self.workers[index] = self.spawn("baton-workerd", name, table)?;
        Ok(())
    }

    /// Where the router tells operators about itself.
    ///
    /// # Panics
    /// If it has no router with an admin port.
    pub fn admin(&self) -> Client {
        let router = self.plan.router.as_ref().expect("a cluster with a router");
        Client::new(address_of(router, "admin_listen").expect("a router with an admin port"))
    }

    /// Where clients go.
    ///
    /// # Panics
    /// If it has no router.
    pub fn client(&self) -> Client {
        Client::new(self.router.as_ref().expect("a cluster with a router").address)
    }

    /// Ends everything, router first.
    ///
    /// # Errors
    /// If a daemon does not end within `patience`, or not with exit code 0.
    pub fn stop(mut self, patience: Duration) -> Result<()> {
        for member in self.router.iter_mut() {
            member.stop(patience)?;
        }
        for member in &mut self.workers {
            member.process.signal("TERM")?;
        }
        for member in &mut self.workers {
            member.stop(patience)?;
        }
        Ok(())
    }
}

impl Member {
    /// Talks to it.
    pub fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// Waits until `/health` says 200.
    ///
    /// # Errors
    /// If it ends, or takes longer than `patience`.
    pub async fn ready(&mut self, patience: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.ended()? {
                let log = self.process.log();
                let tail = log.lines().rev().take(8).collect::<Vec<_>>();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n  ");
                bail!("`{}` ended with {status}:\n  {tail}", self.process.name());
            }
            if let Ok(answer) = self.client().get("/health").await
                && answer.status == 200
            {
                return Ok(());
            }
            if begun.elapsed() > patience {
                bail!("`{}` is not ready after {patience:?}", self.process.name());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGTERM; it must end with exit code 0.
    ///
    /// # Errors
    /// If it does not.
    pub fn stop(&mut self, patience: Duration) -> Result<()> {
        let status = self.process.terminate(patience)?;
        ensure!(status.success(), "`{}` ended with {status}", self.process.name());
        Ok(())
    }
}
