//! NIXL as it is found on this machine. Its environment must be set before it is loaded, and most checks need more
//! than one process: so the bodies are ignored tests (`child_…`), run by the others in processes of their own.

mod devices;
mod dying;
mod loading;
mod long;
mod pulls;
mod workers;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::handover::conformance::PATIENCE;

const FOLDER: &str = "BATON_TEST_CHILD_FOLDER";
const NAME: &str = "BATON_TEST_CHILD_NAME";
/// `cuda_copy` is for pools in device memory, which it stages for the socket; it is passed over where there is none.
const OVER_TCP: (&str, &str) = ("UCX_TLS", "tcp,self,cuda_copy");

/// A test of this binary in a process of its own; killed when dropped.
struct Running {
    child: Child,
    output: PathBuf,
    test: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Running {
    /// `test` is a path below this module.
    fn start(test: &'static str, name: &str, folder: &Path, variables: &[(&str, &str)]) -> Self {
        let exe = std::env::current_exe().unwrap();
        Self::start_by(Command::new(exe), test, name, folder, variables)
    }

    /// `command` is this binary, or what runs it.
    fn start_by(
        mut command: Command,
        test: &'static str,
        name: &str,
        folder: &Path,
        variables: &[(&str, &str)],
    ) -> Self {
        let output = folder.join(format!("{name}.output"));
        let file = fs::File::create(&output).unwrap();
        let child = command
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(format!("handover::nixl::tests::{test}"))
            .envs(library::environment(&[]).unwrap())
            .env(FOLDER, folder)
            .env(NAME, name)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, output, test }
    }

    fn id(&self) -> u32 {
        self.child.id()
    }

    fn finish(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} hangs:\n{}", self.test, self.printed());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it printed, without the frame that the test runner puts around.
    fn printed(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap();
        let frame = format!("test handover::nixl::tests::{} ... ", self.test);
        let lines = text.lines().map(|line| line.strip_prefix(&frame).unwrap_or(line));
        let is_frame = |line: &str| {
            ["", "ok", "running 1 test"].contains(&line)
                || line.starts_with("test result: ok. 1 passed")
        };
        lines.filter(|line| !is_frame(line)).collect::<Vec<_>>().join("\n")
    }

    fn succeed(self) {
        self.succeed_within(3 * PATIENCE);
    }

    fn succeed_within(mut self, patience: Duration) {
        let status = self.finish(patience);
        assert!(status.success(), "{} failed: {status}\n{}", self.test, self.printed());
        assert_eq!(self.printed(), "", "{} printed something", self.test);
    }

    /// Ends it by force, if somebody else did not; it had nothing to say, and nothing else ended it.
    fn kill(mut self) {
        self.child.kill().unwrap();
        let status = self.finish(PATIENCE);
        assert_eq!(status.signal(), Some(9), "{} ended: {status}\n{}", self.test, self.printed());
        assert_eq!(self.printed(), "", "{} printed something", self.test);
    }
}

fn alone(test: &'static str, variables: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    Running::start(test, "child", folder.path(), variables).succeed();
}

/// The folder and name given to a child.
fn given() -> (PathBuf, String) {
    let given = |name| std::env::var(name).expect("run by another test, in a process of its own");
    (PathBuf::from(given(FOLDER)), given(NAME))
}

fn library() -> NixlLibrary {
    NixlLibrary::load(None).unwrap_or_else(|error| panic!("{error}"))
}

fn open(name: &str) -> NixlTransport {
    NixlTransport::open(&library(), &NixlSettings::default(), name.to_owned()).unwrap()
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_for_file(folder: &Path, name: &str) -> String {
    wait_for(name, || fs::read_to_string(folder.join(name)).ok())
}

/// Appears whole or not at all.
fn put_file(folder: &Path, name: &str, text: &str) {
    let draft = folder.join(format!("{name}.draft"));
    fs::write(&draft, text).unwrap();
    fs::rename(draft, folder.join(name)).unwrap();
}

/// Figures for whoever runs a test with `--nocapture`.
fn show_figures(folder: &Path) {
    let thread = std::thread::current();
    let test = thread.name().and_then(|name| name.rsplit("::").next()).unwrap_or_default();
    for line in fs::read_to_string(folder.join("figures")).unwrap().lines() {
        println!("{test}: {line}");
    }
}

/// Stops a process; true until now, nothing of it runs any more.
fn stop(process: u32) {
    signal(process, "STOP");
    wait_for("stopped process", || threads_are(process, "T").then_some(()));
}

fn go_on(process: u32) {
    signal(process, "CONT");
}

/// Kills a process and waits until its threads have ended.
fn kill(process: u32) {
    signal(process, "KILL");
    wait_for("ended process", || threads_are(process, "ZX").then_some(()));
}

fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(sent.unwrap().success());
}

/// Whether all threads that a process still has are in one of these states.
fn threads_are(process: u32, states: &str) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else { return true };
    let state = |task: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    };
    tasks.filter_map(state).all(|state| states.contains(state))
}
