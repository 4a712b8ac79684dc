//! An ordinary day: start, serve, stop, and how blocks travel between two services.

use std::fs;
use std::path::Path;

use baton_integration::files::demo_model;
use serde_json::{Value, json};

use super::host::{Host, MODEL, PUBLIC, SEEDS_MODEL, client, worker_port};

#[test]
fn a_target_starts_everything_serves_the_replaced_documentations_command_and_drains() {
    let test = "a_target_starts_everything_serves_the_replaced_documentations_command_and_drains";
    let demo = |path: &Path| {
        fs::copy(demo_model().unwrap(), path).unwrap();
    };
    let Some(host) = Host::boot_with(test, 2, 1, ("model.gguf", demo)) else { return };
    host.start();
    let answer = host.sh(&format!(
        r#"curl http://localhost:8000/v1/completions -H "Content-Type: application/json" -d '{{
            "model": "{SEEDS_MODEL}", "prompt": "NVIDIA is a great company because",
            "max_tokens": 16, "temperature": 0 }}' -w "\n""#
    ));
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 16, "{answer}");
    let status = host.show("baton-workerd@context-0", "StatusText");
    assert!(status.starts_with("serving: "), "{status}");
    reloaded(&host);
    drained(&host);
    story(&host);
    removed(&host);
}

/// A worker takes a new level of its log, and goes on.
fn reloaded(host: &Host) {
    let pid = host.show("baton-workerd@context-1", "MainPID");
    host.sh(
        "echo 'log.level = \"info,hyper=warn\"' | cat - /etc/baton/workerd/context-1.toml >/tmp/new
        cp /tmp/new /etc/baton/workerd/context-1.toml
        systemctl reload baton-workerd@context-1",
    );
    host.eventually("the worker has a new level", || {
        host.journal("baton-workerd@context-1").iter().any(|line| line.contains("new log level"))
    });
    assert_eq!(host.show("baton-workerd@context-1", "MainPID"), pid);
}

/// Stops everything while a stream runs, which comes to its end.
fn drained(host: &Host) {
    let request = json!({"model": MODEL, "prompt": "Once upon a time", "max_tokens": 200,
        "ignore_eos": true, "stream": true});
    host.inside(|| async move {
        let mut stream = client(PUBLIC).stream("/v1/completions", &request).await.unwrap();
        assert!(stream.event().await.unwrap().is_some());
        let stop = host.nested.run(&["systemctl", "stop", "--no-block", "baton.target"]).unwrap();
        assert!(stop.status.success());
        assert!(stream.events().await.unwrap().len() >= 100, "most of it came afterwards");
    });
    let mut units = vec!["baton.target", "baton-router.service", "baton-router.socket"];
    units.extend(host.workers.iter().map(String::as_str));
    for unit in units {
        host.eventually(&format!("{unit} has stopped"), || {
            host.show(unit, "ActiveState") == "inactive"
        });
        if unit.ends_with(".service") {
            assert_eq!(host.show(unit, "ExecMainStatus"), "0", "{unit}");
        }
    }
}

/// What systemd itself says of a service; in what order among the service's own lines is chance.
const SYSTEMDS: [&str; 4] = ["Starting ", "Started ", "Stopping ", "Stopped "];

/// The journal says in order what happened, and nothing else that an operator would have to look into.
fn story(host: &Host) {
    let own = ["loading the model", "model ready", "serving", "stopping: ", "ended"];
    for unit in &host.workers {
        follows(&host.journal(unit), &own);
        follows(&host.journal(unit), &SYSTEMDS);
    }
    let router = host.journal("baton-router.service");
    follows(&router, &["serving", "worker is usable", "draining"]);
    follows(&router, &SYSTEMDS);
    assert_eq!(host.sh("journalctl -q -p err -u 'baton*'"), "");
    for line in host.journal("baton*") {
        assert!(!line.contains("\"ERROR\"") && !line.contains("ailed"), "{line}");
    }
}

/// Takes the packages away under running daemons: these end, and what is left is the operator's.
fn removed(host: &Host) {
    host.sh("systemctl start baton.target && curl -fs http://localhost:8000/version");
    let packages = "baton-common baton-router baton-tools baton-workerd";
    host.sh(&format!("dpkg -r {packages}"));
    let (code, said) = host.attempt("pgrep -u baton; curl -s http://localhost:8000/version");
    assert_eq!((code, said.as_str()), (Some(7), ""), "nothing runs, nobody listens");
    host.sh("test -e /etc/baton/router.toml && test ! -e /usr/bin/baton-router");
    host.sh(&format!("dpkg -P {packages}"));
    let left = host.sh("find /etc/baton /usr/lib/baton /etc/systemd/system ! -type d 2>/dev/null |
        grep baton | grep -v '^/etc/baton/workerd/[cg]' || true");
    assert_eq!(left, "");
    assert_eq!(host.sh("systemctl list-units --all --plain --no-legend 'baton*'"), "");
}

/// Asserts that lines with these parts come one after the other.
fn follows(lines: &[String], parts: &[&str]) {
    let mut rest = lines.iter();
    for part in parts {
        assert!(rest.any(|line| line.contains(part)), "no `{part}` where it belongs: {lines:#?}");
    }
}

#[test]
fn services_of_one_user_hand_over_through_shared_memory_and_those_of_two_through_tcp() {
    let test = "services_of_one_user_hand_over_through_shared_memory_and_those_of_two_through_tcp";
    let Some(host) = Host::boot(test, 1, 1) else { return };
    host.start();
    let ways = || {
        host.inside(|| async {
            for number in 0..6 {
                let prompt = format!("{number} {}", "long enough to tell ".repeat(60));
                let request = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2});
                client(PUBLIC).post("/v1/completions", &request).await.unwrap().ok().unwrap();
            }
        });
        ["shared_memory", "network"].map(|way| {
            let name = "baton_worker_handover_peers_total";
            host.metric(worker_port(1), "/prometheus/metrics", name, &[("transport", way)])
        })
    };
    assert_eq!(ways(), [1.0, 0.0]);
    host.drop_in(
        "baton-workerd@.service",
        "DynamicUser=yes\nUser=baton-%i\nGroup=baton-%i\nCacheDirectory=\nCacheDirectory=baton-%i",
    );
    host.sh(&format!("systemctl restart {}", host.workers.join(" ")));
    host.ready();
    assert_eq!(ways(), [0.0, 1.0]);
}
