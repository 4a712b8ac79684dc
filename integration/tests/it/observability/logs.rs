//! Logs: one id through all daemons, the journal's priorities, a level that can be changed.

use std::os::unix::fs::MetadataExt;

use baton_integration::client::Client;
use baton_integration::cluster::{Member, Plan, set};
use baton_integration::eventually::eventually;
use baton_integration::process::{Program, free_port};
use http::Method;
use serde_json::{Value, json};
use toml::toml;

use crate::support::{READY, Running, all_free, start_plan, token_ids};
use crate::tiny::{self, Tiny};

/// Lines of a daemon that carry this id, by their message.
fn messages(member: &Member, id: &str) -> Vec<String> {
    let is_its = |line: &Value| line["request_id"] == id || line["span"]["request_id"] == id;
    member
        .process
        .log()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("not JSON: {line}"))
        })
        .filter(is_its)
        .map(|line| line["message"].as_str().unwrap().to_owned())
        .collect()
}

/// Waits for a line of that id.
async fn says(member: &Member, id: &str, message: &str) {
    let what = format!("{} says `{message}` of {id}", member.process.name());
    eventually(READY, &what, || async {
        messages(member, id).iter().any(|have| have == message).then_some(())
    })
    .await;
}

/// Everything told, in JSON.
async fn talkative(model: &Tiny) -> Running {
    start_plan(|| {
        let worker = toml! {
            [log]
            level = "baton_workerd=debug"
            format = "json"
        };
        let mut plan = Plan::local(&model.path, 1, 1, &worker).unwrap();
        let router = plan.router.as_mut().unwrap();
        set(router, &["log", "level"], "info,baton_router=debug");
        set(router, &["log", "format"], "json");
        set(router, &["log", "access"], true);
        plan
    })
    .await
}

async fn ask(
    client: Client,
    id: &str,
    model: &Tiny,
    more: Value,
) -> baton_integration::client::Stream {
    let mut ask = json!({"model": model.name, "prompt": token_ids(3, 100, model.vocab), "max_tokens": 6,
        "temperature": 0, "ignore_eos": true});
    ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let headers = [("x-request-id", id), ("traceparent", TRACE)];
    client.send(Method::POST, "/v1/completions", &headers, ask.to_string().into()).await.unwrap()
}

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn one_id_goes_through_router_workers_and_hand_over() {
    let model = tiny::model(4);
    let running = talkative(&model).await;
    let client = running.cluster.client();
    let answer = ask(client, "needle-1", &model, json!({})).await;
    assert_eq!(answer.headers["x-request-id"], "needle-1");
    answer.whole().await.unwrap().ok().unwrap();
    let [context, generation] = [0, 1].map(|index| &running.cluster.workers[index]);
    let router = running.cluster.router.as_ref().unwrap();
    says(router, "needle-1", "request").await;
    for message in ["blocks leased", "answered", "blocks were fetched"] {
        says(context, "needle-1", message).await;
    }
    for message in ["blocks fetched", "answered"] {
        says(generation, "needle-1", message).await;
    }
    for worker in [context, generation] {
        let log = worker.process.log();
        let own = log.lines().filter(|line| line.contains("needle-1"));
        assert!(
            own.into_iter().all(|line| line.contains("4bf92f3577b34da6a3ce929d0e0e4736")),
            "{log}"
        );
    }
    running.stop();
}

#[tokio::test]
async fn what_becomes_of_an_abandoned_hand_over_is_told_under_its_id() {
    let model = tiny::model(4);
    let mut running = talkative(&model).await;
    let client = running.cluster.client();
    // The generation worker hears nothing, so that its client can leave between the two passes.
    running.cluster.workers[1].process.signal("STOP").unwrap();
    let router = running.cluster.router.as_ref().unwrap();
    let context = &running.cluster.workers[0];
    tokio::select! {
        answer = ask(client, "needle-2", &model, json!({})) => panic!("{}", answer.status),
        () = says(context, "needle-2", "blocks leased") => {}
    }
    says(router, "needle-2", "lease given back").await;
    for message in ["a router releases the blocks", "blocks are not wanted any more"] {
        says(context, "needle-2", message).await;
    }
    running.cluster.workers[1].process.signal("CONT").unwrap();
    all_free(&running.cluster, READY).await;
    running.stop();
}

#[tokio::test]
async fn a_workers_level_follows_its_file_at_sighup_and_nothing_else_does() {
    let model = tiny::model(4);
    let worker = toml! {
        [log]
        format = "json"
    };
    let mut running = start_plan(|| {
        let mut plan = Plan::local(&model.path, 0, 1, &worker).unwrap();
        plan.router = None;
        plan
    })
    .await;
    let file = running.folder.path().join("generation-0.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        std::fs::write(&file, text.replace(from, to)).unwrap();
    };
    let member = &mut running.cluster.workers[0];
    changed("format = \"json\"", "format = \"json\"\nlevel = \"loud\"");
    member.process.signal("HUP").unwrap();
    heard(member, "configuration refused, the old one stays").await;
    changed("format = \"json\"", "format = \"text\"\nlevel = \"debug\"");
    member.process.signal("HUP").unwrap();
    heard(member, "new log level").await;
    heard(member, "all but `log.level` is read at the start only: restart the worker").await;
    member.client().get("/health").await.unwrap();
    heard(member, "answered").await;
    running.stop();
}

async fn heard(member: &Member, message: &str) {
    eventually(READY, message, || async { member.process.log().contains(message).then_some(()) })
        .await;
}

#[tokio::test]
async fn in_the_journal_each_line_has_its_priority_and_is_one_json_object() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("router.log");
    let file = std::fs::File::create(&log).unwrap().metadata().unwrap();
    let mut program = Program::new("baton-router", "router", ["--config", "router.toml"]);
    program.env.push(("JOURNAL_STREAM".into(), format!("{}:{}", file.dev(), file.ino())));
    let [public, admin] = [(), ()].map(|()| free_port().unwrap());
    let text = format!(
        "[server]\nlisten = \"127.0.0.1:{public}\"\nadmin_listen = \"127.0.0.1:{admin}\"\n\
         [[context.servers]]\nurl = \"localhost:1\"\n[[generation.servers]]\nurl = \"localhost:2\"\n"
    );
    std::fs::write(folder.path().join("router.toml"), text).unwrap();
    let mut router = program.spawn(folder.path()).unwrap();
    let line = eventually(READY, "a line", || async {
        router.log().lines().find(|line| line.starts_with('<')).map(str::to_owned)
    })
    .await;
    let line: Value = serde_json::from_str(line.strip_prefix("<6>").expect("info is 6")).unwrap();
    assert_eq!(line["level"], "INFO");
    router.terminate(READY).unwrap();
}
