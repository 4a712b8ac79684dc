//! NVIDIA's assembler, called for what it says of each kernel: registers, spills, stack.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The program.
pub struct Ptxas {
    /// Where it is.
    pub program: PathBuf,
}

/// One text for one GPU.
pub struct Assembled {
    /// The text's name.
    pub file: String,
    /// `sm_90a`
    pub gpu: &'static str,
    /// At least one.
    pub kernels: Vec<Kernel>,
}

/// What a kernel needs on one GPU.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Its entry point.
    pub name: String,
    /// Of a thread.
    pub registers: u32,
    /// Bytes of a thread: local arrays that are not in registers.
    pub stack: u32,
    /// Bytes of a thread that registers are saved to or read from.
    pub spilled: u32,
}

impl Kernel {
    /// What of a kernel lies in memory and should be in registers.
    pub fn spills(&self) -> Option<String> {
        let spills = self.stack > 0 || self.spilled > 0;
        spills
            .then(|| format!("a stack frame of {} B and {} B of spills", self.stack, self.spilled))
    }
}

impl Ptxas {
    /// Assembles `ptx`, which is called `file`, for `gpu`.
    ///
    /// # Errors
    /// With what the assembler says.
    pub fn assemble(&self, ptx: &str, file: &str, gpu: &'static str) -> Result<Assembled> {
        let mut text = tempfile::NamedTempFile::new()?;
        text.write_all(ptx.as_bytes())?;
        let output = Command::new(&self.program)
            .args(["--verbose", "--gpu-name", gpu, "--output-file", "/dev/null"])
            .arg(text.path())
            .stdin(Stdio::null())
            .output()
            .with_context(|| self.program.display().to_string())?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("{file} for {gpu}: ptxas fails ({}):\n{said}", output.status);
        }
        let kernels = read(&said);
        ensure!(!kernels.is_empty(), "{file} for {gpu}: ptxas names no kernel:\n{said}");
        Ok(Assembled { file: file.to_owned(), gpu, kernels })
    }
}

/// The kernels that the assembler's report names.
fn read(report: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(Kernel { name, ..Kernel::default() });
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        kernel.stack += before(line, " bytes stack frame");
        kernel.spilled += before(line, " bytes spill stores") + before(line, " bytes spill loads");
        kernel.registers += before(line, " registers");
    }
    kernels
}

/// The number before `what`; 0 if that is not in the line.
fn before(line: &str, what: &str) -> u32 {
    let number = line.split_once(what).map_or("", |(front, _)| front);
    number.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_stack_and_spills_of_each_kernel_are_read() {
        let report = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'add' for 'sm_90a'\n\
            ptxas info    : Function properties for add\n    \
            8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size\n\
            ptxas info    : Compiling entry function 'scale' for 'sm_90a'\n\
            ptxas info    : Function properties for scale\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 8 registers, used 0 barriers\n";
        let kernels = read(report);
        let add = Kernel { name: "add".to_owned(), registers: 255, stack: 8, spilled: 40 };
        let scale = Kernel { name: "scale".to_owned(), registers: 8, stack: 0, spilled: 0 };
        assert_eq!(add.spills().unwrap(), "a stack frame of 8 B and 40 B of spills");
        assert_eq!(scale.spills(), None);
        assert_eq!(kernels, [add, scale]);
    }
}
