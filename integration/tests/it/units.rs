//! The unit files of `config/systemd/`, as systemd reads them. What they do is tried in `nested`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use baton_integration::files::top;
use tempfile::TempDir;

use crate::support::{finished, skipped};

const UNITS: [&str; 4] =
    ["baton.target", "baton-router.service", "baton-router.socket", "baton-workerd@.service"];

/// A root folder with this system's own units and ours, and something executable wherever ours start a program.
async fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    for folder in ["usr/bin", "usr/lib/systemd", "etc/systemd/system"] {
        fs::create_dir_all(at(folder)).unwrap();
    }
    for (link, target) in [("bin", "usr/bin"), ("lib", "usr/lib")] {
        std::os::unix::fs::symlink(target, at(link)).unwrap();
    }
    let mut copy = Command::new("cp");
    copy.args(["-r", "/usr/lib/systemd/system"]).arg(at("usr/lib/systemd"));
    assert!(finished(copy).await.status.success());
    for program in ["baton-router", "baton-workerd", "sh", "kill", "systemctl"] {
        let path = at("usr/bin").join(program);
        fs::write(&path, "").unwrap();
        fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    fs::write(at("etc/passwd"), "root:x:0:0::/:/bin/sh\nbaton:x:900:900::/:/bin/sh\n").unwrap();
    fs::write(at("etc/group"), "root:x:0:\nbaton:x:900:\n").unwrap();
    for unit in UNITS {
        let own = top().join("config/systemd").join(unit);
        fs::copy(own, at("usr/lib/systemd/system").join(unit)).unwrap();
    }
    root
}

/// What `systemd-analyze` says, in whichever way.
async fn analyze(root: &Path, args: &[&str]) -> String {
    let mut command = Command::new("systemd-analyze");
    command.args(args).arg("--no-pager").arg(format!("--root={}", root.display()));
    let output = finished(command).await;
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8(text).unwrap()
}

fn is_here(test: &str) -> bool {
    let found = Path::new("/usr/bin/systemd-analyze").exists();
    if !found {
        skipped(test, "there is no systemd-analyze");
    }
    found
}

#[tokio::test]
async fn systemd_has_nothing_to_say_about_the_units() {
    if !is_here("systemd_has_nothing_to_say_about_the_units") {
        return;
    }
    let root = root().await;
    let units = UNITS.map(|unit| unit.replace('@', "@context-0"));
    let mut args = vec!["verify", "--man=no"];
    args.extend(units.iter().map(String::as_str));
    assert_eq!(analyze(root.path(), &args).await, "");
    // It would: a key it does not know is named.
    let broken = root.path().join("usr/lib/systemd/system/baton.target");
    fs::write(broken, "[Unit]\nDescriptoin=x\n").unwrap();
    let said = analyze(root.path(), &args).await;
    assert!(said.contains("Descriptoin"), "{said}");
}

#[tokio::test]
async fn the_services_are_exposed_no_more_than_they_need() {
    if !is_here("the_services_are_exposed_no_more_than_they_need") {
        return;
    }
    let root = root().await;
    for (unit, most) in [("baton-router.service", 1.5), ("baton-workerd@context-0.service", 2.5)] {
        let said = analyze(root.path(), &["security", "--offline=yes", unit]).await;
        let level = said.split(&format!("level for {unit}: ")).nth(1);
        let level =
            level.and_then(|rest| rest.split(' ').next()).unwrap_or_else(|| panic!("{said}"));
        assert!(level.parse::<f64>().unwrap() <= most, "{said}");
    }
}
