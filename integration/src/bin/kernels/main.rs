//! `kernels`: makes `workerd/kernels/ptx/` of `workerd/kernels/*.cu`, or, with `--check`, says where the two differ.
//!
//! A kernel source names in its first comment what it is compiled for (`// Targets: compute_80 compute_90a`). Each of
//! these texts is assembled for every GPU that may have to run it, where a kernel may neither spill nor have a stack
//! frame, nor use more registers than `workerd/kernels/limits.toml` says.

mod limits;
mod nvrtc;
mod ptxas;
mod source;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use baton_integration::files;
use clap::Parser;

use limits::Limits;
use nvrtc::Nvrtc;
use ptxas::{Assembled, Ptxas};
use source::Source;

/// Compiles the GPU kernels to PTX.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Changes nothing: fails where a source and what is kept of it differ.
    #[arg(long)]
    check: bool,
    /// Folder of the kernels [default: this source tree's].
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Only these sources (`attention` for `attention.cu`).
    names: Vec<String>,
}

/// One text of PTX and what became of it on each GPU.
struct Compiled {
    /// `NAME.TARGET.ptx`
    file: String,
    source: String,
    ptx: String,
    assembled: Vec<Assembled>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(faults) if faults.is_empty() => ExitCode::SUCCESS,
        Ok(faults) => {
            for fault in faults {
                complain(&fault);
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last words of a program")]
fn complain(what: &str) {
    eprintln!("kernels: {what}");
}

/// Everything that is wrong with kernels that compile.
///
/// # Errors
/// If one does not compile, or a tool or a file is not to be had.
fn run(cli: &Cli) -> Result<Vec<String>> {
    let folder = cli.folder.clone().unwrap_or_else(|| files::top().join("workerd/kernels"));
    let sources = Source::all(&folder)?;
    if let Some(name) = cli.names.iter().find(|name| !sources.iter().any(|s| s.name == **name)) {
        bail!("{}: no such source", folder.join(format!("{name}.cu")).display());
    }
    let wanted = |source: &&Source| cli.names.is_empty() || cli.names.contains(&source.name);
    let compiled = compile_all(sources.iter().filter(wanted).collect())?;
    let mut limits = Limits::read(&folder)?;
    let mut faults = Vec::new();
    if cli.check {
        faults.extend(compiled.iter().filter_map(|one| difference(&folder, one)));
        for one in &compiled {
            for gpu in &one.assembled {
                let excess = |kernel| limits.excess(&one.source, kernel, gpu.gpu);
                faults.extend(gpu.kernels.iter().filter_map(excess));
            }
        }
    } else {
        for one in &compiled {
            limits.forget(&one.source);
            write(&folder.join("ptx").join(&one.file), &one.ptx)?;
        }
        for one in &compiled {
            one.assembled.iter().flat_map(|gpu| &gpu.kernels).for_each(|kernel| {
                limits.raise(&one.source, kernel);
            });
        }
    }
    faults.extend(leftovers(&folder, &sources, &mut limits, cli.check)?);
    if !cli.check {
        limits.write(&folder)?;
    }
    print(&compiled)?;
    for gpu in compiled.iter().flat_map(|one| &one.assembled) {
        faults.extend(gpu.kernels.iter().filter_map(|kernel| {
            let wrong = kernel.spills()?;
            Some(format!("{} for {}: `{}` has {wrong}", gpu.file, gpu.gpu, kernel.name))
        }));
    }
    Ok(faults)
}

/// All texts, in the order of `sources`; one thread a source.
fn compile_all(sources: Vec<&Source>) -> Result<Vec<Compiled>> {
    let nvrtc = Nvrtc::load(&files::dep("nvrtc/libnvrtc.so.12").context(TOOLS)?)?;
    let ptxas = Ptxas { program: files::dep("bin/ptxas").context(TOOLS)? };
    let compiled: Result<Vec<Vec<Compiled>>> = std::thread::scope(|scope| {
        let one = |source| compile(&nvrtc, &ptxas, source);
        let threads: Vec<_> =
            sources.into_iter().map(|source| scope.spawn(move || one(source))).collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    });
    Ok(compiled?.into_iter().flatten().collect())
}

/// What to do when a tool is missing.
const TOOLS: &str = "`integration/setup.sh --tools` fetches it";

fn compile(nvrtc: &Nvrtc, ptxas: &Ptxas, source: &Source) -> Result<Vec<Compiled>> {
    let one = |target: &source::Target| {
        let ptx = nvrtc.compile(&source.text, &source.name, target.name).with_context(|| {
            format!("{}.cu for {}: NVRTC does not take it", source.name, target.name)
        })?;
        let file = format!("{}.{}.ptx", source.name, target.name);
        let assembled = target.gpus.iter().map(|gpu| ptxas.assemble(&ptx, &file, gpu));
        let assembled = assembled.collect::<Result<_>>()?;
        Ok(Compiled { file, source: source.name.clone(), ptx, assembled })
    };
    source.targets.iter().map(|target| one(target)).collect()
}

/// How what is kept of a source differs from what it gives.
fn difference(folder: &Path, one: &Compiled) -> Option<String> {
    let path = folder.join("ptx").join(&one.file);
    match std::fs::read_to_string(&path) {
        Ok(kept) if kept == one.ptx => None,
        Ok(_) => {
            Some(format!("{}: not what {}.cu gives: `make kernels`", path.display(), one.source))
        }
        Err(error) => Some(format!("{}: {error}: `make kernels`", path.display())),
    }
}

/// PTX and limits without a source: removed, or faults of a check.
fn leftovers(
    folder: &Path,
    sources: &[Source],
    limits: &mut Limits,
    check: bool,
) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let belongs: BTreeSet<String> = sources
        .iter()
        .flat_map(|s| s.targets.iter().map(|target| format!("{}.{}.ptx", s.name, target.name)))
        .collect();
    for path in source::listing(&folder.join("ptx"))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if belongs.contains(&*name) {
            continue;
        }
        if check {
            faults.push(format!("{}: no source gives this: `make kernels`", path.display()));
        } else {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    for name in limits.without(sources) {
        if check {
            faults.push(format!("{}: [{name}] has no source: `make kernels`", limits::FILE));
        } else {
            limits.forget(&name);
        }
    }
    Ok(faults)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

/// A line a text and kernel: most registers of all its GPUs.
fn print(compiled: &[Compiled]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for one in compiled {
        let names: BTreeSet<&str> =
            one.assembled.iter().flat_map(|gpu| &gpu.kernels).map(|kernel| &*kernel.name).collect();
        for name in names {
            let on = one.assembled.iter().filter_map(|gpu| {
                let kernel = gpu.kernels.iter().find(|kernel| kernel.name == name)?;
                Some(format!("{} {}", gpu.gpu, kernel.registers))
            });
            writeln!(out, "{}: {name}: registers {}", one.file, on.collect::<Vec<_>>().join(", "))?;
        }
    }
    Ok(())
}
