//! The worker's own tests that a GPU can run, from the test program beside this one: each kernel and the sampler against
//! formulas, the whole back end against the CPU's, and the kernels of every tier that this CPU has.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Beside this program in the bundle.
const PROGRAM: &str = "worker-tests";
/// Filters of tests, and whether these are ignored unless asked for.
const TESTS: [(&str, bool); 3] =
    [("gpu_kernels", true), ("gpu_numbers", true), ("backend::cpu::kernels::", false)];

/// Runs them; `None` where the program is not there.
///
/// # Errors
/// If one of them fails; its output is on the terminal.
pub fn check() -> Result<Option<()>> {
    let own = std::env::current_exe().context("where this program is")?;
    let program = own.with_file_name(PROGRAM);
    if !program.exists() {
        return Ok(None);
    }
    for (filter, is_ignored) in TESTS {
        let mut command = Command::new(&program);
        command.args(["--nocapture", "--test-threads=1", filter]);
        if is_ignored {
            command.arg("--ignored");
        }
        let status = command.status().with_context(|| program.display().to_string())?;
        ensure!(status.success(), "tests `{filter}`: {status}");
    }
    Ok(Some(()))
}
