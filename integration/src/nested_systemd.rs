//! A real systemd that is not PID 1 of the machine, for tests of units and packages. It sees the machine's files; what it
//! changes stays in its memory (`nested_systemd.sh` says how), and all of it ends with the [`Nested`].

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::netns;

const SCRIPT: &str = include_str!("nested_systemd.sh");
/// What the script and [`Nested::run`] start.
const PROGRAMS: [&str; 6] = ["unshare", "nsenter", "setpriv", "ip", "mountpoint", "timeout"];
/// The kinds of mounts that the script makes, where nobody sees them.
const MOUNTS: &str = "mount --make-rprivate /
    mount -t tmpfs trial /mnt
    mkdir /mnt/upper /mnt/work /mnt/merged /mnt/group
    mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work trial /mnt/merged
    mount -t cgroup2 trial /mnt/group";
/// Its start, and its end.
const PATIENCE: Duration = Duration::from_secs(120);
/// No command inside may take longer.
const COMMAND_SECONDS: &str = "300";

/// A running one.
#[derive(Debug)]
pub struct Nested {
    script: Child,
    pid: u32,
    folder: TempDir,
}

impl Nested {
    /// Why there can be none here, if so.
    pub fn missing() -> Option<String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_here = |name: &&str| std::env::split_paths(&path).any(|at| at.join(name).exists());
        if let Some(name) = PROGRAMS.iter().find(|name| !is_here(name)) {
            return Some(format!("there is no `{name}`"));
        }
        if !Path::new("/lib/systemd/systemd").exists() {
            return Some("there is no systemd".to_owned());
        }
        let mut trial = Command::new("unshare");
        trial.args(["--pid", "--fork", "--mount", "--uts", "--ipc", "--cgroup", "--net"]);
        trial.args(["sh", "-ec", MOUNTS]);
        match trial.output() {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Starts one and waits until it is up.
    ///
    /// # Errors
    /// If it does not come up; with what it wrote.
    pub fn boot() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("nested_systemd.sh");
        fs::write(&file, SCRIPT)?;
        let log = fs::File::create(folder.path().join("log"))?;
        let script = Command::new("sh")
            .arg(&file)
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut nested = Self { script, pid: 0, folder };
        let begun = Instant::now();
        while !nested.is_up()? {
            if begun.elapsed() > PATIENCE || nested.script.try_wait()?.is_some() {
                let log = fs::read_to_string(nested.folder.path().join("log"))?;
                bail!("the nested systemd does not come up: {log}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(nested)
    }

    fn is_up(&mut self) -> Result<bool> {
        if self.pid == 0 {
            let Ok(pid) = fs::read_to_string(self.folder.path().join("pid")) else {
                return Ok(false);
            };
            self.pid = pid.trim().parse()?;
        }
        let state = self.run(&["systemctl", "is-system-running"])?;
        Ok(matches!(&*state.stdout, b"running\n" | b"degraded\n"))
    }

    /// What is `/mnt/shared` inside.
    pub fn shared(&self) -> PathBuf {
        self.folder.path().join("shared")
    }

    /// Its network, as [`netns::enter`] wants it.
    pub fn network(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }

    /// Runs a command inside.
    ///
    /// # Errors
    /// If it cannot be started; how it ends is the caller's business.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new("timeout");
        command.args(["-k", "2", COMMAND_SECONDS, "nsenter", "--all", "--target"]);
        command.arg(self.pid.to_string()).arg("--").args(args);
        command.env_clear().stdin(Stdio::null());
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command.output().with_context(|| format!("{args:?}"))
    }

    /// Runs a shell script inside, which must succeed, and returns what it wrote.
    ///
    /// # Errors
    /// If it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.run(&["sh", "-ec", script])?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "`{script}` ended with {}: {out}{err}", output.status);
        Ok(out)
    }

    /// One property of a unit, `ActiveState` or `MainPID`.
    ///
    /// # Errors
    /// If systemd does not answer.
    pub fn show(&self, unit: &str, property: &str) -> Result<String> {
        let shown = self.sh(&format!("systemctl show --value -p {property} {unit}"))?;
        Ok(shown.trim().to_owned())
    }

    /// What has the journal of these units, oldest first, one line each.
    ///
    /// # Errors
    /// If there is no journal.
    pub fn journal(&self, pattern: &str) -> Result<Vec<String>> {
        let lines = self.sh(&format!("journalctl --sync && journalctl -o cat -u '{pattern}'"))?;
        Ok(lines.lines().map(str::to_owned).collect())
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(journal) = self.run(&["journalctl", "-n", "60", "-o", "cat", "--no-pager"])
        {
            let journal = String::from_utf8_lossy(&journal.stdout).into_owned();
            let _ = writeln!(std::io::stderr(), "--- end of the nested journal\n{journal}");
        }
        // Its PID 1 takes everything with it; the script then tidies up.
        let pid = if self.pid == 0 { self.script.id() } else { self.pid };
        let killed = Command::new("kill").arg("-KILL").arg(pid.to_string()).status();
        if let Err(error) = killed.and_then(|_| self.script.wait()) {
            let _ = writeln!(std::io::stderr(), "the nested systemd is left behind: {error}");
        }
    }
}

/// Runs `work` on a thread of its own in another network, with a runtime, and returns what it returns.
///
/// # Panics
/// If it does.
pub fn in_network<T, F>(network: PathBuf, work: impl FnOnce() -> F + Send) -> T
where
    T: Send,
    F: Future<Output = T>,
{
    let body = || {
        netns::enter(&network).expect("the network namespace can be entered");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be had").block_on(work())
    };
    let joined = std::thread::scope(|scope| scope.spawn(body).join());
    joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
