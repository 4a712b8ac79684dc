//! What ends or stands still comes back by itself.

use serde_json::json;

use super::host::{Host, MODEL, client, worker_port};
use super::load::Load;

#[test]
fn what_is_killed_is_back_by_itself_and_no_request_fails_before_its_first_byte() {
    let test = "what_is_killed_is_back_by_itself_and_no_request_fails_before_its_first_byte";
    let Some(host) = Host::boot(test, 2, 2) else { return };
    host.start();
    let load = Load::start(host.nested.network());
    load.goes_on(20);
    for unit in &host.workers {
        let pid = host.pid(unit);
        host.sh(&format!("kill -9 {pid}"));
        host.is_back(unit, &pid);
        load.goes_on(20);
    }
    let tally = load.stop();
    assert!(tally.failed.is_empty(), "{tally:?}");
    // The router takes with it what it has at that moment; nobody else notices, as its socket stays.
    let (load, open_since) = (Load::start(host.nested.network()), host.open_since());
    load.goes_on(20);
    let pid = host.pid("baton-router.service");
    host.sh(&format!("kill -9 {pid}"));
    host.is_back("baton-router.service", &pid);
    load.goes_on(20);
    let tally = load.stop();
    let lost = [tally.failed, tally.broken].concat();
    assert!(lost.len() <= super::load::CLIENTS, "one of each client at most: {lost:?}");
    assert!(lost.iter().all(|error| !error.contains("refused")), "{lost:?}");
    assert_eq!(host.open_since(), open_since);
}

#[test]
fn what_stands_still_is_restarted_by_its_watchdog() {
    let Some(host) = Host::boot("what_stands_still_is_restarted_by_its_watchdog", 1, 1) else {
        return;
    };
    host.drop_in("baton-workerd@.service", "WatchdogSec=5s\nEnvironment=BATON_TEST=1");
    host.drop_in("baton-router.service", "WatchdogSec=5s");
    host.start();
    for unit in ["baton-router.service", host.workers[0].as_str()] {
        let pid = host.pid(unit);
        host.sh(&format!("kill -STOP {pid}"));
        host.is_back(unit, &pid);
        assert_eq!(host.show(unit, "NRestarts"), "1", "{unit}");
    }
    // The process answers, its engine thread does not come back from a step.
    let (unit, port) = (&host.workers[1], worker_port(1));
    let pid = host.pid(unit);
    host.inside(|| async {
        let hold = serde_json::to_vec(&json!({"step": "hold"})).unwrap();
        let worker = client(port);
        let armed = worker.send(http::Method::PUT, "/test/failpoints", &[], hold.into()).await;
        assert_eq!(armed.unwrap().status, 200);
        let request = json!({"model": MODEL, "prompt": "hello", "max_tokens": 2});
        assert!(worker.post("/v1/completions", &request).await.is_err(), "it was ended");
    });
    host.is_back(unit, &pid);
    assert_eq!(host.show(unit, "NRestarts"), "1");
    let said = host.journal(unit).join("\n");
    assert!(said.contains("the engine thread does not show itself: no heartbeat"), "{said}");
    assert!(said.contains("Watchdog timeout"), "{said}");
}
