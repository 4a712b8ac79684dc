//! KV that nobody wants on context servers of TensorRT-LLM, which take no release call.

use std::time::Duration;

use baton_integration::cluster::set;
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::{Behaviour, MockWorker};
use toml::toml;

use crate::scripted::{Scene, ask, ask_stream, refusal, scene_like};

const PATIENCE: Duration = Duration::from_secs(10);
const REQUESTS: usize = 5;

/// Generation servers that have no room but for one token; requests whose records nobody reads.
async fn left_behind(setting: &str) -> Scene {
    let mut over = toml! { [routing]
    queue_timeout = "100ms" };
    set(&mut over, &["routing", "orphaned_kv"], setting);
    let scene = scene_like(false, 1, 2, 4, over).await;
    let full = Behaviour::by(|seen| match seen.body["max_tokens"].as_u64() {
        Some(1) => Behaviour::Serve,
        _ => refusal(503, "full"),
    });
    scene.generations.iter().for_each(|one| one.behave(full.clone()));
    for index in 0..REQUESTS {
        let request = if index % 2 == 0 { ask() } else { ask_stream() };
        let answer = scene.client().post("/v1/completions", &request).await.unwrap();
        assert_eq!((answer.status, answer.error_code().unwrap()), (503, "no_workers".into()));
    }
    assert_eq!(scene.ledger.balance().issued, REQUESTS);
    scene
}

fn for_one_token(scene: &Scene) -> usize {
    let count = |one: &MockWorker| {
        one.requests().iter().filter(|seen| seen.body["max_tokens"] == 1).count()
    };
    scene.generations.iter().map(count).sum()
}

#[tokio::test]
async fn a_record_that_nobody_wants_is_read_for_one_token() {
    let scene = left_behind("pull").await;
    eventually(PATIENCE, "every record is read", || async {
        (scene.ledger.balance().pulled == REQUESTS).then_some(())
    })
    .await;
    assert_eq!(for_one_token(&scene), REQUESTS);
    eventually(PATIENCE, "every record is counted as given back", || async {
        let given = scene.count("baton_router_releases_total", &[]).await;
        (given == REQUESTS as f64).then_some(())
    })
    .await;
    assert_eq!(scene.count("baton_router_orphaned_kv_total", &[]).await, 0.0);
    assert!(scene.contexts[0].released().is_empty(), "there is no such call");
    scene.stop();
}

#[tokio::test]
async fn a_record_that_nobody_wants_is_left_alone_and_counted_where_that_is_configured() {
    let scene = left_behind("count").await;
    eventually(PATIENCE, "every record is counted", || async {
        let orphaned = scene.count("baton_router_orphaned_kv_total", &[]).await;
        (orphaned == REQUESTS as f64).then_some(())
    })
    .await;
    assert_eq!((for_one_token(&scene), scene.ledger.balance().orphaned()), (0, REQUESTS));
    assert_eq!(scene.count("baton_router_releases_total", &[]).await, 0.0);
    scene.stop();
}

#[tokio::test]
async fn what_a_generation_server_may_have_begun_to_read_is_not_shown_to_another() {
    let scene = scene_like(false, 1, 2, 4, toml::Table::new()).await;
    scene.generations.iter().for_each(|one| one.behave(Behaviour::Hang));
    let client = scene.client();
    let asked = tokio::spawn(async move { client.post("/v1/completions", &ask()).await });
    eventually(PATIENCE, "a generation server has the record", || async {
        let count: usize = scene.generations.iter().map(|one| one.requests().len()).sum();
        (count == 1).then_some(())
    })
    .await;
    asked.abort();
    eventually(PATIENCE, "it is counted", || async {
        (scene.count("baton_router_orphaned_kv_total", &[]).await == 1.0).then_some(())
    })
    .await;
    assert_eq!(for_one_token(&scene), 0);
    scene.stop();
}
