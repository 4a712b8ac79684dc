//! Pools that are full and deployments that do not fit: load blames nobody, mistakes are told.

use std::time::Duration;

use baton_integration::cluster::{Plan, set};
use baton_integration::eventually::eventually;
use serde_json::json;
use toml::toml;

use super::scene::{GENERATIONS, PATH, PATIENCE, Scene, Way, plan, worker};
use crate::support::{all_free, blocks, start_plan};
use crate::tiny;

/// A request that takes all of a worker's small pool until its client leaves.
async fn fill(scene: &Scene, index: usize) -> tokio::task::JoinHandle<()> {
    scene.arm(&[index], "step", "delay(500ms)").await;
    let client = scene.worker(index).client();
    let mut request = scene.request(99, 190);
    request["max_tokens"] = json!(60);
    request["stream"] = json!(true);
    let filling = tokio::spawn(async move {
        let mut stream = client.stream(PATH, &request).await.unwrap();
        while let Ok(Some(_)) = stream.event().await {}
    });
    eventually(PATIENCE, "the pool is nearly full", || async {
        (blocks(scene.worker(index), "free").await <= 2.0).then_some(())
    })
    .await;
    filling
}

#[tokio::test]
async fn a_full_generation_worker_leaves_the_record_and_its_lease_to_another() {
    for way in Way::BOTH {
        let settings = toml! { [kv]
        max_tokens = 256 };
        let scene = Scene::start(way, settings).await;
        let filling = fill(&scene, GENERATIONS[0]).await;
        let request = scene.request(1, 70);
        let expected = scene.alone(&request).await;
        // In turn: one of two goes to the full one.
        for _ in 0..2 {
            assert_eq!(scene.ask(&request).await.unwrap(), expected);
        }
        assert!(scene.answered("pool_exhausted").await >= 1.0);
        assert_eq!(scene.retries("context").await, 0.0, "the lease is untouched");
        assert!(scene.retries("generation").await >= 1.0);
        assert_eq!(scene.blamed(), [0; 0]);
        filling.abort();
        scene.arm(&[GENERATIONS[0]], "step", "off").await;
        scene.end().await;
    }
}

#[tokio::test]
async fn a_full_context_worker_is_passed_over() {
    for way in Way::BOTH {
        let settings = toml! { [kv]
        max_tokens = 256 };
        let scene = Scene::start(way, settings).await;
        // Leases that nobody reads hold what may be leased.
        let mut orphans = Vec::new();
        for id in 0..3 {
            let id = (1 << 42) + id;
            orphans.push(id);
            scene.hop(0, id, &scene.request(id, 60)).await;
        }
        let request = scene.request(1, 70);
        let expected = scene.alone_at(1, &request).await;
        for _ in 0..2 {
            assert_eq!(scene.ask(&request).await.unwrap(), expected);
        }
        let labels = [("phase", "context"), ("outcome", "pool_exhausted")];
        assert!(scene.sum(&[0], "baton_worker_requests_total", &labels).await >= 1.0);
        assert!(scene.retries("context").await >= 1.0);
        assert_eq!(scene.blamed(), [0; 0]);
        for id in orphans {
            let release = json!({"disagg_request_id": id});
            let answer =
                scene.worker(0).client().post("/v1/disagg/release", &release).await.unwrap();
            assert_eq!(answer.status, 200);
        }
        scene.end().await;
    }
}

#[tokio::test]
async fn when_everybody_is_full_the_client_is_told_when_to_come_back() {
    for way in Way::BOTH {
        let settings = toml! { [kv]
        max_tokens = 256 };
        let scene = Scene::start(way, settings).await;
        let mut filling = Vec::new();
        for index in GENERATIONS {
            filling.push(fill(&scene, index).await);
        }
        let answer = scene.client().post(PATH, &scene.request(1, 70)).await.unwrap();
        assert_eq!((answer.status, answer.error_code().unwrap()), (503, "no_workers".into()));
        assert!(answer.headers.contains_key("retry-after"));
        assert_eq!(scene.blamed(), [0; 0]);
        filling.iter().for_each(tokio::task::JoinHandle::abort);
        scene.arm(&GENERATIONS, "step", "off").await;
        all_free(&scene.running.cluster, PATIENCE).await;
        let request = scene.request(1, 70);
        assert_eq!(scene.ask(&request).await.unwrap(), scene.alone(&request).await);
        scene.end().await;
    }
}

#[tokio::test]
async fn workers_with_different_models_are_a_mistake_that_is_told_and_leaves_nothing() {
    for way in Way::BOTH {
        let (four, eight) = (tiny::model(4), tiny::model(8));
        let table = worker(way, &toml! { served_model_names = ["tiny"] });
        let running = start_plan(|| -> Plan {
            let mut plan = plan(&four, 1, 1, &table);
            let path = eight.path.to_string_lossy().into_owned();
            set(&mut plan.workers[1].1, &["model"], path);
            plan
        })
        .await;
        let request = json!({"model": "tiny", "prompt": "hello", "max_tokens": 4});
        let answer = running.cluster.client().post(PATH, &request).await.unwrap();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(
            (answer.status, answer.error_code().unwrap()),
            (502, "generation_failed".into())
        );
        assert!(text.contains("differ in model") && text.contains("fingerprint"), "{text}");
        all_free(&running.cluster, Duration::from_secs(3)).await;
        running.stop();
    }
}
