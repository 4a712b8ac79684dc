//! Servers under load: one worker of ours, or `llama-server`, each with a port and a log of its own.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_integration::client::Client;
use baton_integration::files;
use baton_integration::process::free_port;
use tempfile::TempDir;

use crate::Setting;

/// Loading a model takes no longer.
const READY: Duration = Duration::from_secs(120);
/// Sequences a server holds at a time.
pub const SLOTS: u32 = 8;
/// Tokens a sequence may have.
pub const ROOM: u32 = 2048;

/// A running server; ended when dropped.
pub struct Server {
    child: Child,
    /// Where it serves.
    pub address: SocketAddr,
    _folder: TempDir,
}

impl Server {
    /// One worker for both phases.
    ///
    /// # Errors
    /// If it does not come up.
    pub async fn baton(setting: &Setting, pool: &str) -> Result<Self> {
        let program = files::binary("baton-workerd")?;
        let threads = setting.threads.to_string();
        Self::start(&program, &|command, address| {
            command.arg(&setting.model).args(["--role", "both", "--listen", &address.to_string()]);
            command.args(["--threads", &threads, "--kv-pool", pool]);
        })
        .await
    }

    /// `llama-server` with as many slots.
    ///
    /// # Errors
    /// If it does not come up.
    pub async fn llama(folder: &Path, setting: &Setting) -> Result<Self> {
        let program = folder.join("llama-server");
        let [threads, slots] = [setting.threads.to_string(), SLOTS.to_string()];
        let room = (SLOTS * ROOM).to_string();
        Self::start(&program, &|command, address| {
            let port = address.port().to_string();
            command.arg("-m").arg(&setting.model).args(["--host", "127.0.0.1", "--port", &port]);
            command.args(["-t", &threads, "-tb", &threads, "-np", &slots, "-c", &room]);
        })
        .await
    }

    async fn start(program: &Path, arguments: &dyn Fn(&mut Command, SocketAddr)) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let out = File::create(&log)?;
        let mut command = Command::new(program);
        arguments(&mut command, address);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| program.display().to_string())?;
        let mut server = Self { child, address, _folder: folder };
        server.ready(program, &log).await?;
        Ok(server)
    }

    async fn ready(&mut self, program: &Path, log: &PathBuf) -> Result<()> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(log).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(8).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                bail!("`{}` ended with {status}:\n{}", program.display(), tail.join("\n"));
            }
            if Client::new(self.address)
                .get("/health")
                .await
                .is_ok_and(|answer| answer.status == 200)
            {
                return Ok(());
            }
            if begun.elapsed() > READY {
                bail!("`{}` is not ready after {READY:?}", program.display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
