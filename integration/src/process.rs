//! One real binary as a child process: own folder, log kept and shown when the test fails, ended on drop.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::files;

/// After SIGSTOP, on a busy machine.
const STANDS_STILL: Duration = Duration::from_secs(10);

/// A port nobody listens on now, and that this process has not given out before. It is below those that the system
/// gives to outgoing connections and to whoever binds to any port: these would take it before its daemon does.
///
/// # Errors
/// When there seems to be none.
pub fn free_port() -> Result<u16> {
    const PORTS: Range<u16> = 10_000..32_000;
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..1000 {
        let port = rand::random_range(PORTS);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && given.insert(port) {
            return Ok(port);
        }
    }
    bail!("no free port among {PORTS:?}")
}

/// How to start a binary.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its file name, `baton-router`.
    pub binary: &'static str,
    /// What it is called in logs.
    pub name: String,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Set for it, beside the caller's own environment.
    pub env: Vec<(String, String)>,
}

/// A running child process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Program {
    /// `binary` with `args`, logging as `name`.
    pub fn new<A: Into<OsString>>(
        binary: &'static str,
        name: impl Into<String>,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let args = args.into_iter().map(Into::into).collect();
        Self { binary, name: name.into(), args, env: Vec::new() }
    }

    /// Starts it; stdout and stderr go to `folder/NAME.log`.
    ///
    /// # Errors
    /// If it was not built or cannot be started.
    pub fn spawn(&self, folder: &Path) -> Result<Process> {
        self.run(folder, Command::new(files::binary(self.binary)?), Stdio::null())
    }

    /// The same with a listening `socket` called `name`, as a service manager hands it over.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_with_socket(&self, folder: &Path, name: &str, socket: OwnedFd) -> Result<Process> {
        // The number of the process that is to have it is known only inside it.
        const ACTIVATE: &str = "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", ACTIVATE]).arg(files::binary(self.binary)?);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name);
        self.run(folder, command, socket.into())
    }

    fn run(&self, folder: &Path, mut command: Command, stdin: Stdio) -> Result<Process> {
        let log = folder.join(format!("{}.log", self.name));
        let out = File::options().create(true).append(true).open(&log).context("its log")?;
        let child = command
            .args(&self.args)
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .current_dir(folder)
            .stdin(stdin)
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting `{}`", self.binary))?;
        Ok(Process { child, name: self.name.clone(), log, ended: None })
    }
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// If it has ended.
    pub fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).context("VmRSS")?;
        Ok(kilobytes.parse::<u64>()? * 1024)
    }

    /// File descriptors it holds.
    ///
    /// # Errors
    /// If it has ended.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.id()))?.count())
    }

    /// Its end, if it has ended.
    ///
    /// # Errors
    /// If the system cannot tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Sends a signal, unless it has ended.
    ///
    /// # Errors
    /// If there is no such program to send it with.
    pub fn signal(&mut self, name: &str) -> Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        // The child was not waited for, so its id cannot belong to another process.
        // The shell's own `kill`: the program is not on every machine.
        let order = format!("kill -{name} {}", self.id());
        let sent = Command::new("sh").arg("-c").arg(order).stderr(Stdio::null()).status();
        sent.context("`sh`")?;
        if name == "STOP" { self.stands_still() } else { Ok(()) }
    }

    /// Waits until none of its threads runs any more: each stops by itself when its turn comes.
    fn stands_still(&self) -> Result<()> {
        let tasks = format!("/proc/{}/task", self.id());
        let begun = Instant::now();
        loop {
            let mut runs = false;
            for task in fs::read_dir(&tasks)? {
                let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
                // `ID (NAME) STATE ...`; a name may hold anything.
                let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
                runs |= state.is_some_and(|state| !"TZX".contains(state));
            }
            if !runs {
                return Ok(());
            }
            ensure!(begun.elapsed() < STANDS_STILL, "it goes on after SIGSTOP");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it goes on for longer than `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if begun.elapsed() > patience {
                bail!("`{}` still runs after {patience:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM, then its exit status.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn terminate(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait(patience)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let mut err = std::io::stderr();
            let _ = writeln!(err, "--- end of the log of `{}`", self.name);
            for line in log.lines().skip(log.lines().count().saturating_sub(40)) {
                let _ = writeln!(err, "{line}");
            }
        }
        if matches!(self.ended(), Ok(None)) {
            // Stopped children (SIGSTOP) end by SIGKILL too.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
