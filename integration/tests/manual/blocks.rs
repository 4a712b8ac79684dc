//! The commands that the documentation tells people to run, run: block by block, in the order of a page, in one shell.
//!
//! A fenced block is run if `run` stands behind its language: ```` ```sh run ````, ```` ```python run ````. More words:
//! `until=WORD` leaves it running in the background, and what follows begins when its output has the word; `alone` ends
//! what runs there before, as Ctrl-C does; `file=NAME` writes the block into a file instead; `fresh` is for a machine that
//! has nothing yet (`fresh_root.rs`).
//! A page's blocks get a network of their own, so that the documented ports are free, and end with it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use baton_integration::files;

use crate::page::{self, Fence, Page};

/// A page's blocks may take so long, in seconds.
const PATIENCE: &str = "300";

/// What a test that cannot run here says; the runner would keep it to itself.
pub fn skipped(name: &str, why: &str) {
    std::io::stderr().write_all(format!("skipped: {name}: {why}\n").as_bytes()).unwrap();
}

/// The words behind a block's language.
pub struct Words<'a>(Vec<&'a str>);

impl<'a> Words<'a> {
    pub fn of(info: &'a str) -> Self {
        Self(info.split_whitespace().skip(1).collect())
    }

    pub fn has(&self, word: &str) -> bool {
        self.0.contains(&word)
    }

    pub fn value(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The pages with blocks to run, in the order in which a newcomer reads them.
fn pages() -> Vec<Page> {
    let mut paths = vec![PathBuf::from("README.md")];
    paths.extend(["CONTRIBUTING.md", "SECURITY.md"].map(PathBuf::from));
    paths.extend(page::below("docs/src"));
    paths.retain(|path| files::top().join(path).exists());
    let pages = paths.iter().map(page::read);
    pages.filter(|page| page.fences().iter().any(|it| Words::of(&it.info).has("run"))).collect()
}

/// One shell script of a page's blocks. `is_fresh`: also those for a machine that has nothing yet.
pub fn script(page: &Page, is_fresh: bool) -> String {
    let mut script = String::from(PRELUDE);
    for fence in page.fences() {
        let words = Words::of(&fence.info);
        let file = words.value("file");
        let is_wanted = words.has("run") || file.is_some() || is_fresh && words.has("fresh");
        if !is_wanted {
            continue;
        }
        if words.has("alone") {
            script.push_str("end_all\n");
        }
        let Fence { info, line, text: body } = &fence;
        let place = format!("at '{}:{line}'\n", page.path.display());
        let _ = if let Some(name) = file {
            write!(script, "cat > '{name}' <<'END-OF-BLOCK'\n{body}END-OF-BLOCK\n")
        } else if let Some(word) = words.value("until") {
            let log = format!("\"$blocks/{line}\"");
            write!(script, "{place}(\n{body}) > {log} 2>&1 &\nuntil_said '{word}' {log} $!\n")
        } else if info.starts_with("python") {
            write!(script, "{place}python3 - <<'END-OF-BLOCK'\n{body}END-OF-BLOCK\n")
        } else {
            write!(script, "{place}{body}")
        };
    }
    script.push_str("at 'the end'\nend_all\n");
    script
}

/// `at PLACE` says where it is; a block that fails ends the page there, and an answer that says so is a failure.
const PRELUDE: &str = r#"
set -eu -o pipefail -m
blocks=$(mktemp -d)
# Also what goes on for a moment when its shell is gone, as daemons that drain: their ports are wanted again.
end_all() {
    local jobs job
    jobs=$(jobs -p)
    for job in $jobs; do kill -- "-$job" 2>/dev/null || true; done
    wait || true
    for job in $jobs; do while kill -0 -- "-$job" 2>/dev/null; do sleep 0.1; done; done
}
at() { echo "--- $1"; }
curl() { command curl -fsS "$@"; }
until_said() {
    while sleep 0.1; do
        grep -q "$1" "$2" 2>/dev/null && { cat "$2"; return; }
        kill -0 "$3" 2>/dev/null || break
    done
    cat "$2"
    echo "it never said: $1"
    exit 1
}
"#;

/// Loopback is down in a new network.
const LOOPBACK_UP: &str = "python3 -c 'import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack(\"16sh14x\", b\"lo\", 0x49))'\n";

/// A folder that looks like a clone: what commands name is there.
fn folder_like_a_clone() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let top = files::top();
    for name in [".deps", "target", "Makefile", "integration"] {
        std::os::unix::fs::symlink(top.join(name), folder.path().join(name)).unwrap();
    }
    let copied = Command::new("cp").arg("-r").arg(top.join("config")).arg(folder.path()).status();
    assert!(copied.unwrap().success());
    folder
}

/// Runs a page; what it printed if it failed.
fn run(page: &Page) -> Result<(), String> {
    let folder = folder_like_a_clone();
    let top = files::top();
    let own = std::env::current_exe().unwrap();
    let binaries = own.ancestors().nth(2).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    // `make` belongs into the tree itself, and what it would build has been built: these tests run beside others of Cargo.
    let make = format!("make() {{ command make -o build -C '{}' \"$@\"; }}\n", top.display());
    let script = format!("{LOOPBACK_UP}{make}{}", script(page, false));
    let output = Command::new("timeout")
        .args(["-k", "2", PATIENCE])
        .args(["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["bash", "-c", &script])
        .current_dir(folder.path())
        .env("PATH", format!("{}:{path}", binaries.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(());
    }
    let page = page.path.display();
    Err(format!("{page}: {}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr)))
}

fn has_own_networks() -> bool {
    let probe = Command::new("unshare").args(["--net", "--pid", "--fork", "true"]).output();
    probe.is_ok_and(|output| output.status.success())
}

#[test]
fn what_the_documentation_tells_people_to_run_runs() {
    let name = "what_the_documentation_tells_people_to_run_runs";
    if !has_own_networks() {
        skipped(name, "a network of its own needs root and `unshare`");
        return;
    }
    let pages = pages();
    assert!(pages.iter().any(|page| page.path == Path::new("README.md")));
    let failed: Vec<String> = pages.iter().filter_map(|page| run(page).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn blocks_become_one_script_in_their_order() {
    let text = "```sh run until=ready\nserve\n```\n```toml file=x.toml\na = 1\n```\n```sh\nno\n```\n\
                ```sh fresh\nget\n```\n```python run\nprint(1)\n```\n```sh run alone\nask\n```\n";
    let page = Page { path: "P.md".into(), text: text.to_owned() };
    let quick = script(&page, false);
    let body = quick.strip_prefix(PRELUDE).unwrap();
    let expected = "at 'P.md:2'\n(\nserve\n) > \"$blocks/2\" 2>&1 &\nuntil_said 'ready' \"$blocks/2\" $!\n\
                    cat > 'x.toml' <<'END-OF-BLOCK'\na = 1\nEND-OF-BLOCK\n\
                    at 'P.md:14'\npython3 - <<'END-OF-BLOCK'\nprint(1)\nEND-OF-BLOCK\n\
                    end_all\nat 'P.md:17'\nask\nat 'the end'\nend_all\n";
    assert_eq!(body, expected);
    assert!(script(&page, true).contains("at 'P.md:11'\nget\n"));
}
