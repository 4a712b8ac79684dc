//! New configurations and new versions, good and bad, under load.

use std::net::Ipv4Addr;

use super::host::{ADMIN, Host, PUBLIC, client, worker_port};
use super::load::Load;

const ROUTER: &str = "baton-router.service";
const FILE: &str = "/etc/baton/router.toml";

#[test]
fn a_reload_fails_no_request_and_one_with_a_broken_file_fails_itself() {
    let test = "a_reload_fails_no_request_and_one_with_a_broken_file_fails_itself";
    let Some(host) = Host::boot(test, 1, 1) else { return };
    host.start();
    let version = || host.metric(ADMIN, "/metrics", "baton_router_table_version", &[]);
    let pid = host.pid(ROUTER);
    let load = Load::start(host.nested.network());
    for round in 1..=3 {
        load.goes_on(10);
        let before = version();
        host.sh(&format!(
            "sed -i '/max_in_flight/d; /^.limits/d' {FILE}
            printf '[limits]\\nmax_in_flight = {}\\n' >> {FILE}
            systemctl reload {ROUTER}",
            1000 + round
        ));
        host.eventually("the new table is in use", || version() > before);
    }
    let before = version();
    host.sh(&format!("sed -i s/max_in_flight/max_in_fligth/ {FILE}"));
    let (code, _) = host.attempt(&format!("systemctl reload {ROUTER}"));
    assert_ne!(code, Some(0), "a reload with a broken file");
    let status = host.attempt(&format!("systemctl status {ROUTER}")).1;
    assert!(status.contains("router.toml:") && status.contains("max_in_fligth"), "{status}");
    // What passes the check, but not in a running router.
    host.sh(&format!(
        "sed -i 's/max_in_fligth/max_in_flight/; s/^threads = 1/threads = 2/' {FILE}
        systemctl reload {ROUTER}"
    ));
    host.eventually("the status says why", || {
        let status = host.show(ROUTER, "StatusText");
        status.contains("refused") && status.contains("`server.threads`")
    });
    load.goes_on(10);
    assert_eq!((version(), host.pid(ROUTER)), (before, pid), "the old one is in use");
    load.nobody_failed();
}

#[test]
fn a_wrong_configuration_ends_a_unit_once_with_the_reason_in_its_status() {
    let test = "a_wrong_configuration_ends_a_unit_once_with_the_reason_in_its_status";
    let Some(host) = Host::boot(test, 1, 1) else { return };
    host.start();
    let worker = host.workers[0].as_str();
    for (unit, file) in [(ROUTER, FILE), (worker, "/etc/baton/workerd/context-0.toml")] {
        host.sh(&format!("cp {file} /tmp/good && printf '[nonsense]\\n' >> {file}"));
        let (code, _) = host.attempt(&format!("systemctl restart {unit}"));
        assert_ne!(code, Some(0), "{unit}");
        let pid = host.show(unit, "ExecMainPID");
        if unit == ROUTER {
            let socket = || host.show("baton-router.socket", "ActiveState");
            host.eventually("the socket is closed", || socket() == "inactive");
            // A connection would have started it again.
            let refused =
                host.inside(|| tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, PUBLIC)));
            assert!(refused.is_err());
        }
        let status = host.attempt(&format!("systemctl status {unit}")).1;
        assert!(status.contains("nonsense") && status.contains(file), "{status}");
        let state = ["ActiveState", "NRestarts", "ExecMainStatus", "ExecMainPID"];
        let state = state.map(|property| host.show(unit, property));
        assert_eq!(state, ["failed", "0", "78", &pid], "{unit}: {status}");
        host.sh(&format!("cp /tmp/good {file} && systemctl start {unit}"));
        host.ready();
    }
    assert_eq!(host.show("baton-router.socket", "ActiveState"), "active");
    let answer = host.inside(|| async { client(worker_port(0)).get("/health").await.unwrap() });
    assert_eq!(answer.status, 200);
}

#[test]
fn new_packages_of_router_and_workers_restart_them_and_fail_no_request() {
    let Some(host) =
        Host::boot("new_packages_of_router_and_workers_restart_them_and_fail_no_request", 2, 2)
    else {
        return;
    };
    host.start();
    let (load, open_since) = (Load::start(host.nested.network()), host.open_since());
    load.goes_on(20);
    let units: Vec<_> = host.workers.iter().map(String::as_str).chain([ROUTER]).collect();
    let before: Vec<_> = units.iter().map(|unit| host.pid(unit)).collect();
    host.upgrade("baton-router");
    load.goes_on(20);
    host.upgrade("baton-workerd");
    for (unit, pid) in units.iter().zip(&before) {
        host.is_back(unit, pid);
        assert_eq!(host.show(unit, "NRestarts"), "0", "{unit}: by the package, and well");
    }
    assert_eq!(host.open_since(), open_since);
    load.goes_on(20);
    load.nobody_failed();
}
