//! Faults under load: some hundred requests while scripted workers fail, hang, die and cut connections.
//!
//! What is asserted of each: no client fails before its first byte while another server could serve it, an answer
//! that breaks off ends as the error table says, and no context worker is left holding blocks.

use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::{Behaviour, MockWorker};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use toml::{Table, toml};

use crate::scripted::{Scene, ask, ask_stream, refusal, scene, scene_of};
use crate::support::note;

const PATH: &str = "/v1/completions";
/// A request every so often: 100 a second.
const INTERVAL: Duration = Duration::from_millis(10);
/// Within which every request must have ended, retries included.
const DEADLINE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(10);

/// How a request ended for its client.
#[derive(Debug, PartialEq)]
pub enum End {
    /// With this text.
    Whole(String),
    /// A stream that said why it ends, without `[DONE]` and without a proper end of its body.
    BrokenOff,
    /// Anything else: what a client must never see.
    Failed(String),
}

pub async fn request(client: Client, stream: bool) -> End {
    let ended = async { if stream { streamed(client).await } else { whole(client).await } };
    match tokio::time::timeout(DEADLINE, ended).await {
        Ok(Ok(end)) => end,
        Ok(Err(error)) => End::Failed(format!("{error:#}")),
        Err(_) => End::Failed(format!("stream {stream}: no end within {DEADLINE:?}")),
    }
}

async fn whole(client: Client) -> anyhow::Result<End> {
    let answer = client.post(PATH, &ask()).await?.ok()?;
    Ok(End::Whole(answer["choices"][0]["text"].as_str().unwrap_or("?").to_owned()))
}

async fn streamed(client: Client) -> anyhow::Result<End> {
    let mut stream = client.stream(PATH, &ask_stream()).await?;
    anyhow::ensure!(stream.status == 200, "status {}", stream.status);
    let (mut text, mut error) = (String::new(), None);
    loop {
        match stream.event().await {
            Ok(Some(event)) if event == "[DONE]" => {
                anyhow::ensure!(error.is_none(), "[DONE] after {error:?}");
                return Ok(End::Whole(text));
            }
            Ok(Some(event)) => {
                let event: Value = serde_json::from_str(&event)?;
                match event["error"]["code"].as_str() {
                    Some(code) => error = Some(code.to_owned()),
                    None => text += event["choices"][0]["text"].as_str().unwrap_or("?"),
                }
            }
            Ok(None) => anyhow::bail!("a proper end without [DONE] after `{text}`, {error:?}"),
            Err(_) if error.as_deref() == Some("generation_aborted") => return Ok(End::BrokenOff),
            Err(why) => return Err(why.context(format!("cut after `{text}`, {error:?}"))),
        }
    }
}

/// Sends `count` requests, two of three streamed (so that round robin gives both kinds to every server), and calls `at` before each; how they ended.
pub async fn load(client: Client, count: usize, mut at: impl FnMut(usize)) -> Vec<End> {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut running = JoinSet::new();
    for index in 0..count {
        ticks.tick().await;
        at(index);
        running.spawn(request(client, index % 3 != 0));
    }
    running.join_all().await
}

pub fn words(count: usize) -> String {
    (0..count).fold("A".to_owned(), |text, word| format!("{text} {word}"))
}

/// That all got `words` more than the first token, but for those that broke off; how many these are.
pub fn judged(ends: &[End], expected: usize) -> usize {
    let failed: Vec<_> = ends.iter().filter(|end| matches!(end, End::Failed(_))).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), ends.len());
    let text = words(expected);
    for end in ends {
        assert!(matches!(end, End::BrokenOff) || *end == End::Whole(text.clone()), "{end:?}");
    }
    ends.iter().filter(|end| **end == End::BrokenOff).count()
}

/// That no lease is left and the router gave none up.
pub async fn nothing_is_left(scene: &Scene, what: &str) {
    let balance = scene.settled().await;
    note(format_args!("{what}: {balance:?}"));
    assert!(balance.issued > 0 && balance.pulled > 0, "{balance:?}");
    assert_eq!(scene.count("baton_router_orphaned_kv_total", &[]).await, 0.0);
}

fn every(nth: usize, what: Behaviour) -> Behaviour {
    Behaviour::Every(nth, Box::new(what))
}

#[tokio::test]
async fn no_client_sees_that_every_fifth_context_answer_is_a_503() {
    let scene = scene(2, 2, Table::new()).await;
    scene.contexts.iter().for_each(|one| one.behave(every(5, refusal(503, "overloaded"))));
    let ends = load(scene.client(), 300, |_| {}).await;
    assert_eq!(judged(&ends, 4), 0);
    assert!(scene.count("baton_router_retries_total", &[]).await >= 50.0);
    nothing_is_left(&scene, "contexts say 503").await;
    scene.stop();
}

#[tokio::test]
async fn no_client_sees_that_every_fifth_generation_answer_is_a_503() {
    let scene = scene(2, 2, Table::new()).await;
    scene.generations.iter().for_each(|one| one.behave(every(5, refusal(503, "overloaded"))));
    let ends = load(scene.client(), 300, |_| {}).await;
    assert_eq!(judged(&ends, 4), 0);
    let passes: usize = scene.contexts.iter().map(|one| one.requests().len()).sum();
    assert_eq!(passes, 300, "a refusal leaves the record to another server");
    nothing_is_left(&scene, "generations say 503").await;
    scene.stop();
}

#[tokio::test]
async fn one_server_of_each_role_dies_under_load_and_only_running_streams_of_it_break_off() {
    let mut scene = scene_of(2, 2, 10, Table::new()).await;
    for mock in &scene.generations {
        mock.behave(Behaviour::Pace(Duration::from_millis(10)));
    }
    let client = scene.client();
    let mut dying = vec![scene.contexts.pop(), scene.generations.pop()];
    let ends = load(client, 400, |index| {
        if index == 100 {
            dying.clear();
        }
    })
    .await;
    let broken = judged(&ends, 10);
    let balance = scene.settled().await;
    note(format_args!("one of each role dies: {broken} streams broke off, {balance:?}"));
    assert!((1..20).contains(&broken), "{broken} broke off: only those of the dead server may");
    scene.stop();
}

#[tokio::test]
async fn requests_move_on_from_servers_that_hang_and_these_get_no_more() {
    let over = toml! {
        [routing]
        context_timeout = "1s"
        first_token_timeout = "1s"
        [health]
        probe_timeout = "300ms"
    };
    let scene = scene(2, 2, over).await;
    let ends = load(scene.client(), 300, |index| {
        if index == 50 {
            scene.contexts[0].behave(Behaviour::Freeze);
            scene.generations[0].behave(Behaviour::Freeze);
        }
    })
    .await;
    assert_eq!(judged(&ends, 4), 0);
    for (role, mock) in [("context", &scene.contexts[0]), ("generation", &scene.generations[0])] {
        let worker = mock.address.to_string();
        let labels = [("role", role), ("worker", worker.as_str())];
        assert_eq!(scene.count("baton_router_worker_up", &labels).await, 0.0, "{role}");
    }
    scene.contexts[0].behave(Behaviour::Serve);
    nothing_is_left(&scene, "one of each role hangs").await;
    scene.stop();
}

#[tokio::test]
async fn no_client_sees_connections_that_are_reset_in_mid_body() {
    let scene = scene(2, 2, Table::new()).await;
    scene.contexts[0].behave(every(3, Behaviour::Reset));
    scene.generations[0].behave(every(3, Behaviour::Reset));
    let mut ends = JoinSet::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    for _ in 0..300 {
        ticks.tick().await;
        ends.spawn(request(scene.client(), false));
    }
    assert_eq!(judged(&ends.join_all().await, 4), 0);
    nothing_is_left(&scene, "connections are reset").await;
    scene.stop();
}

#[tokio::test]
async fn streams_that_are_cut_half_way_end_as_the_table_says_and_the_others_whole() {
    let scene = scene(2, 2, Table::new()).await;
    scene.generations.iter().for_each(|one| one.behave(every(3, Behaviour::BreakAfter(2))));
    let ends = load(scene.client(), 300, |_| {}).await;
    let broken = judged(&ends, 4);
    assert!((10..=100).contains(&broken), "{broken} streams broke off");
    nothing_is_left(&scene, "streams are cut").await;
    scene.stop();
}

#[tokio::test]
async fn clients_that_leave_in_any_phase_leave_nothing_behind() {
    const CLIENTS: usize = 30;
    let scene = scene_of(2, 2, 50, Table::new()).await;
    let pace = Behaviour::Pace(Duration::from_millis(100));
    let phases = [
        ("while the context is computed", Behaviour::Hang, Behaviour::Serve),
        ("before the first token", Behaviour::Serve, Behaviour::Hang),
        ("in mid-stream", Behaviour::Serve, pace),
    ];
    for (phase, context, generation) in phases {
        scene.contexts.iter().for_each(|one| one.behave(context.clone()));
        scene.generations.iter().for_each(|one| one.behave(generation.clone()));
        let hanging =
            if matches!(context, Behaviour::Hang) { &scene.contexts } else { &scene.generations };
        let count = |of: fn(&MockWorker) -> usize| hanging.iter().map(of).sum::<usize>();
        let (asked, left) = (count(|one| one.requests().len()), count(MockWorker::cancelled));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let client = scene.client();
            clients.spawn(async move {
                let mut stream = client.stream(PATH, &ask_stream()).await.unwrap();
                while stream.event().await.is_ok_and(|event| event.is_some()) {}
            });
        }
        eventually(PATIENCE, &format!("all are served {phase}"), || async {
            (count(|one| one.requests().len()) == asked + CLIENTS).then_some(())
        })
        .await;
        clients.shutdown().await;
        eventually(PATIENCE, &format!("all are cancelled {phase}"), || async {
            (count(MockWorker::cancelled) == left + CLIENTS).then_some(())
        })
        .await;
    }
    nothing_is_left(&scene, "clients leave").await;
    let left = [("outcome", "client_gone")];
    assert_eq!(scene.count("baton_router_requests_total", &left).await, 3.0 * CLIENTS as f64);
    assert_eq!(scene.count("baton_router_requests_total", &[]).await, 3.0 * CLIENTS as f64);
    for outcome in ["refused", "failed", "timed_out", "busy", "rejected", "handover"] {
        let hops = scene.count("baton_router_hops_total", &[("outcome", outcome)]).await;
        assert_eq!(hops, 0.0, "{outcome}");
    }
    scene.contexts.iter().chain(&scene.generations).for_each(|one| one.behave(Behaviour::Serve));
    assert_eq!(request(scene.client(), true).await, End::Whole(words(50)));
    scene.stop();
}
