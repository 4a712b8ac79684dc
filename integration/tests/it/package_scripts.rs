//! What the packages' scripts ask of systemd, with commands in its place that write down what they were asked. A real
//! systemd has its own tests.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use baton_integration::files;
use tempfile::TempDir;

use crate::support::finished;

/// Where `systemctl` and the like only write down what they were asked: `$ACTIVE` are the active units, `$BROKEN` is
/// one that does not come back.
struct Stage(TempDir);

impl Stage {
    fn new() -> Self {
        let stage = Self(tempfile::tempdir().unwrap());
        let listing = "case \"$*\" in *list-units*) for unit in $ACTIVE; do echo \"$unit loaded active running\"; done ;; esac";
        stage.command("systemctl", listing);
        stage.command("deb-systemd-invoke", "[ \"$2\" != \"$BROKEN\" ]");
        stage.command("sleep", "");
        stage.command("getent", "");
        stage
    }

    fn command(&self, name: &str, then: &str) {
        let log = self.0.path().join("log");
        let text = format!("#!/bin/sh\necho \"{name} $*\" >>{}\n{then}\n", log.display());
        let file = self.0.path().join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs a package's script as on a system that runs systemd: what it asked for, and what it said.
    async fn run(
        &self,
        script: &str,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> (Vec<String>, String) {
        let folder = self.0.path();
        let text = std::fs::read_to_string(files::top().join("integration/packages").join(script));
        let running = folder.to_str().unwrap();
        let text = text.unwrap().replace("/run/systemd/system", running);
        // What it deletes is below here too.
        let text = text.replace("/etc/systemd", running).replace("/var/cache/baton", running);
        let (copy, log) = (folder.join("script"), folder.join("log"));
        std::fs::write(&copy, text).unwrap();
        std::fs::write(&log, "").unwrap();
        let path = format!("{}:{}", running, std::env::var("PATH").unwrap());
        let mut command = Command::new("sh");
        command.arg(copy).args(args).env("PATH", path).envs(env.iter().copied());
        let output = finished(command).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{script} {args:?}: {said}");
        let asked = std::fs::read_to_string(&log).unwrap();
        let asked = asked.lines().filter(|line| !line.contains("daemon-reload"));
        (asked.map(str::to_owned).collect(), said)
    }
}

const WORKERS: &str = "baton-workerd@context-0.service baton-workerd@context-1.service baton-workerd@generation-0.service";

#[tokio::test]
async fn an_installation_starts_and_enables_nothing() {
    let stage = Stage::new();
    for package in ["baton-common", "baton-router", "baton-workerd"] {
        let script = format!("{package}/postinst");
        let (asked, said) = stage.run(&script, &["configure", ""], &[("ACTIVE", WORKERS)]).await;
        let beyond: Vec<_> = asked.iter().filter(|line| !line.starts_with("getent")).collect();
        assert!(beyond.is_empty() && said.is_empty(), "{script}: {beyond:?} {said}");
    }
}

#[tokio::test]
async fn an_upgrade_restarts_a_running_router_and_running_workers_one_after_another() {
    let stage = Stage::new();
    let args = ["configure", "0.1.0-1"];
    let (asked, _) = stage.run("baton-router/postinst", &args, &[]).await;
    // The socket is not among them, and one that does not run is not started.
    assert_eq!(asked, ["deb-systemd-invoke try-restart baton-router.service"]);
    let (asked, said) = stage.run("baton-workerd/postinst", &args, &[("ACTIVE", WORKERS)]).await;
    assert!(said.is_empty(), "{said}");
    let steps: Vec<_> = asked.iter().filter(|line| !line.contains("list-units")).collect();
    let expected: Vec<_> = WORKERS
        .split(' ')
        .enumerate()
        .flat_map(|(index, unit)| {
            let pause = (index > 0).then(|| "sleep 5".to_owned());
            let restart = format!("deb-systemd-invoke try-restart {unit}");
            let look = format!("systemctl --system --quiet is-active {unit}");
            pause.into_iter().chain([restart, look])
        })
        .collect();
    assert_eq!(steps, expected.iter().collect::<Vec<_>>());
}

#[tokio::test]
async fn a_worker_that_does_not_come_back_leaves_the_others_as_they_are() {
    let stage = Stage::new();
    let broken = [("ACTIVE", WORKERS), ("BROKEN", "baton-workerd@context-1.service")];
    let (asked, said) =
        stage.run("baton-workerd/postinst", &["configure", "0.1.0-1"], &broken).await;
    assert!(asked.iter().any(|line| line.contains("context-1")), "{asked:?}");
    assert!(!asked.iter().any(|line| line.contains("generation-0")), "{asked:?}");
    assert!(said.contains("baton-workerd@context-1.service did not come back"), "{said}");
}

#[tokio::test]
async fn a_removal_stops_the_socket_before_the_router_and_a_purge_deletes_the_links_of_units() {
    let stage = Stage::new();
    let (asked, _) = stage.run("baton-router/prerm", &["remove"], &[]).await;
    assert_eq!(asked, ["deb-systemd-invoke stop baton-router.socket baton-router.service"]);
    let (asked, _) = stage.run("baton-workerd/prerm", &["remove"], &[]).await;
    assert_eq!(asked, ["deb-systemd-invoke stop baton-workerd@*.service"]);
    // An upgrade's old version has nothing to stop.
    for package in ["baton-router", "baton-workerd"] {
        let script = format!("{package}/prerm");
        assert!(stage.run(&script, &["upgrade", "0.1.0-2"], &[]).await.0.is_empty());
    }
    let wants = stage.0.path().join("system/baton.target.wants");
    std::fs::create_dir_all(&wants).unwrap();
    for name in ["baton-router.service", "baton-workerd@a.service", "other.service"] {
        std::fs::write(wants.join(name), "").unwrap();
    }
    let left = |folder: &Path| std::fs::read_dir(folder).unwrap().count();
    for (script, args, still) in [
        ("baton-router/postrm", "remove", 3),
        ("baton-router/postrm", "purge", 2),
        ("baton-workerd/postrm", "purge", 1),
    ] {
        stage.run(script, &[args], &[]).await;
        assert_eq!(left(&wants), still, "{script} {args}");
    }
}
