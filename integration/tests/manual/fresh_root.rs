//! README and tutorial, word for word, in a Debian that has nothing yet: only what the README says is needed gets
//! installed, and the machine lends its Rust toolchain and the crates it has. The last commit is what is tried.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use baton_integration::files;

use crate::blocks::{script, skipped};
use crate::page;

/// A whole build on a busy machine is in it.
const PATIENCE: &str = "7200";

/// The documented ports: here they are the machine's.
const PORTS: [u16; 5] = [8000, 8001, 8002, 8003, 9000];

/// What downloads may need to know of the machine.
const HANDED_ON: [&str; 7] = [
    "PIP_INDEX_URL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// Files of certificates that downloads may need. They get places of their own: the fresh Debian writes its own there.
const CERTIFICATES: [&str; 3] = ["PIP_CERT", "SSL_CERT_FILE", "CARGO_HTTP_CAINFO"];

/// Why it cannot run here.
fn hindrance() -> Option<String> {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|it| it.stdout == b"0\n");
    if !is_root {
        return Some("it needs root".to_owned());
    }
    if Command::new("debootstrap").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Some("`debootstrap` is not installed".to_owned());
    }
    let taken = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_err();
    PORTS.iter().find(|port| taken(port)).map(|port| format!("port {port} is taken"))
}

/// `$NAME`, else a folder in `$HOME`.
fn home_of(name: &str, default: &str) -> PathBuf {
    let home = || Path::new(&std::env::var("HOME").unwrap()).join(default);
    std::env::var_os(name).map_or_else(home, PathBuf::from)
}

/// Runs in namespaces of its own: mounts, processes.
const OUTSIDE: &str = r#"
set -eu
mount --make-rprivate /
mount -t proc proc "$ROOT/proc"
mount -t sysfs sysfs "$ROOT/sys"
mount --rbind /dev "$ROOT/dev"
for folder in "$RUSTUP" "$CARGO/bin" "$CARGO/registry"; do
    [ -d "$folder" ] || continue
    mkdir -p "$ROOT$folder"
    mount --rbind "$folder" "$ROOT$folder"
done
for file in /etc/resolv.conf /etc/pip.conf "$CARGO/config.toml"; do
    if [ -f "$file" ]; then mkdir -p "$ROOT$(dirname "$file")"; cp -L "$file" "$ROOT$file"; fi
done
cd /
exec env -i "$@" HOME=/root TERM=dumb DEBIAN_FRONTEND=noninteractive RUSTUP_HOME="$RUSTUP" CARGO_HOME="$CARGO" \
    PATH="$CARGO/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    chroot "$ROOT" bash -c 'cd /root/baton && for page in /root/pages/*; do bash "$page" || exit 1; done'
"#;

fn run(command: &mut Command, what: &str) {
    let status = command.stdin(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{what}: {status:?}");
}

#[test]
#[ignore = "installs and builds everything in a new Debian: make test-long"]
fn readme_and_tutorial_work_in_a_fresh_debian() {
    if let Some(why) = hindrance() {
        return skipped("readme_and_tutorial_work_in_a_fresh_debian", &why);
    }
    // Beside the build: `/tmp` may be small, or of memory.
    let folder = tempfile::tempdir_in(files::top().join("target")).unwrap();
    let root = folder.path().join("root");
    let mut bootstrap = Command::new("debootstrap");
    bootstrap.args(["--variant=minbase", "bookworm"]).arg(&root);
    run(bootstrap.stdout(Stdio::null()), "debootstrap");
    // A package list, as each installed machine has one.
    run(Command::new("chroot").arg(&root).args(["apt-get", "update", "-q"]), "apt-get update");
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--no-local"]).arg(files::top()).arg(root.join("root/baton"));
    run(&mut clone, "git clone");
    let pages = root.join("root/pages");
    std::fs::create_dir(&pages).unwrap();
    for (number, path) in ["README.md", "docs/src/use/start.md"].iter().enumerate() {
        std::fs::write(pages.join(number.to_string()), script(&page::read(path), true)).unwrap();
    }
    let given = |names: &[&'static str]| -> Vec<(&str, String)> {
        names.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?))).collect()
    };
    let mut handed_on: Vec<_> =
        given(&HANDED_ON).iter().map(|(name, value)| format!("{name}={value}")).collect();
    for (name, file) in given(&CERTIFICATES) {
        std::fs::copy(file, root.join("root").join(name)).unwrap();
        handed_on.push(format!("{name}=/root/{name}"));
    }
    let mut inside = Command::new("timeout");
    inside
        .args(["-k", "2", PATIENCE])
        .args(["unshare", "--mount", "--pid", "--fork", "--kill-child"])
        .args(["bash", "-c", OUTSIDE, "outside"])
        .args(handed_on)
        .env("ROOT", &root)
        .env("RUSTUP", home_of("RUSTUP_HOME", ".rustup"))
        .env("CARGO", home_of("CARGO_HOME", ".cargo"));
    run(&mut inside, "README and tutorial");
}
