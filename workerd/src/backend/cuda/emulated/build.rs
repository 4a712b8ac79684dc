//! Compiles kernel sources for the host into a shared object, once for the same sources: `kernels/host/emulator.cpp` with
//! the list of kernels that it wants.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// How the host compiles kernels. `initial-exec`: `threadIdx` is reached as fast as a global variable.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-ftls-model=initial-exec",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
];
/// What the preprocessor leaves where a kernel begins.
const MARK: &str = "BATON_ENTRY";
/// Beside the sources.
const HOST: [&str; 3] = ["machine.hpp", "shim.hpp", "emulator.cpp"];

/// A source and its name.
pub struct Source {
    /// Without `.cu`.
    pub name: String,
    /// Without the prelude.
    pub text: String,
}

/// Where the kernels are.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All kernel sources, by name.
pub fn sources() -> Vec<Source> {
    let entries = std::fs::read_dir(folder()).expect("the kernels' folder is there");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    paths.sort();
    let name = |path: &Path| path.file_stem().expect("a name").to_string_lossy().into_owned();
    paths.iter().map(|path| Source { name: name(path), text: read(path) }).collect()
}

/// The shared object of these sources.
///
/// # Panics
/// If they do not compile.
pub fn shared_object(sources: &[Source]) -> PathBuf {
    let prelude = read(&folder().join("prelude.cuh"));
    let host = HOST.map(|name| (name, read(&folder().join("host").join(name))));
    let mut hash = Sha256::new();
    for text in FLAGS.iter().copied().chain([&*prelude]) {
        hash.update(text);
    }
    for (name, text) in sources.iter().map(|s| (&*s.name, &s.text)) {
        hash.update(format!("{name} {}\n{text}", text.len()));
    }
    for (name, text) in &host {
        hash.update(format!("{name} {}\n{text}", text.len()));
    }
    let digest = hash.finalize();
    let hash: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let own = std::env::current_exe().expect("this program is a file");
    let target = own.parent().expect("it is in a folder");
    let object = target.join(format!("emulator-{hash}.so"));
    let lock = File::create(target.join("emulator.lock")).expect("a lock can be made");
    lock.lock().expect("the lock can be taken");
    if !object.exists() {
        let work = tempfile::tempdir_in(target).expect("a folder can be made");
        compile(work.path(), &prelude, &host, sources);
        std::fs::rename(work.path().join("emulator.so"), &object).expect("the object is there");
    }
    object
}

fn compile(work: &Path, prelude: &str, host: &[(&str, String)], sources: &[Source]) {
    let write = |name: &str, text: &str| std::fs::write(work.join(name), text).expect("written");
    write("prelude.cuh", prelude);
    for (name, text) in host {
        write(name, text);
    }
    let (mut includes, mut entries) = (String::new(), String::new());
    for Source { name, text } in sources {
        write(&format!("{name}.cu"), text);
        includes += &format!(
            "namespace in_{name} {{\n#include \"prelude.cuh\"\n#include \"{name}.cu\"\n}}\n"
        );
        entries += &entries_of(work, name);
    }
    write("sources.inc", &includes);
    write("entries.inc", &entries);
    let mut command = Command::new("g++");
    command.args(FLAGS).args(["emulator.cpp", "-o", "emulator.so"]).current_dir(work);
    run(command, "the kernels do not compile for the host");
}

/// `ENTRY(source, kernel, threads)` of each kernel of a source.
fn entries_of(work: &Path, name: &str) -> String {
    let mark = format!("-DKERNEL(threads, blocks)={MARK} threads void");
    let mut command = Command::new("g++");
    command.args(["-E", "-P", "-x", "c++", "-DBATON_HOST", &mark, "-include", "prelude.cuh"]);
    command.arg(format!("{name}.cu")).current_dir(work);
    let text = run(command, "the preprocessor fails");
    let entry = |rest: &str| {
        let (threads, rest) = rest.split_once(" void ").expect("a kernel's threads");
        let (kernel, _) = rest.split_once('(').expect("a kernel's name");
        format!("ENTRY({name}, {}, {})\n", kernel.trim(), threads.trim())
    };
    text.split(MARK).skip(1).map(entry).collect()
}

fn run(mut command: Command, what: &str) -> String {
    let output = command.output().expect("g++ can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{what}:\n{said}");
    String::from_utf8(output.stdout).expect("text")
}
