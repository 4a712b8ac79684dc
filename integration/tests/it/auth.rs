//! A cluster with a key: records and releases are signed, and another key is not believed.

use std::net::SocketAddr;

use baton_integration::client::Client;
use baton_integration::process::free_port;
use baton_shared::wire::auth::Keys;
use serde_json::json;
use toml::toml;

use crate::support::{all_free, complete, start};
use crate::systemd::{Scene, end};
use crate::tiny;
use baton_integration::cluster::{Cluster, Plan, set};
use std::time::Duration;

use crate::support::{READY, STOP};

#[tokio::test]
async fn records_under_another_key_are_refused_and_the_right_key_serves() {
    let folder = tempfile::tempdir().unwrap();
    let key = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let ours = key("ours", "a-key-that-is-long-enough-1\n");
    let other = key("other", "a-key-that-is-long-enough-2\n");
    let model = tiny::model(4);
    for (generation, expected) in [(&ours, 200), (&other, 502)] {
        let mut plan = Plan::local(&model.path, 1, 1, &toml::Table::new()).unwrap();
        let path = ["auth", "internal_request_auth_key_file"];
        set(&mut plan.workers[0].1, &path, ours.clone());
        set(&mut plan.workers[1].1, &path, generation.clone());
        set(plan.router.as_mut().unwrap(), &path, ours.clone());
        let run = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(&plan, run.path(), READY).await.unwrap();
        let request = json!({"model": model.name, "prompt": "hello", "max_tokens": 4});
        let answer = cluster.client().post("/v1/completions", &request).await.unwrap();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, expected, "{text}");
        // A release without a signature changes nothing.
        let release = json!({"disagg_request_id": 1});
        let contexts = Client::new(cluster.workers[0].address);
        let answer = contexts.post("/v1/disagg/release", &release).await.unwrap();
        assert_eq!((answer.status, answer.error_code().unwrap()), (401, "unauthorized".into()));
        // The lease that was left behind is released by the router, signed.
        all_free(&cluster, Duration::from_secs(4)).await;
        cluster.stop(STOP).unwrap();
    }
}

#[tokio::test]
async fn a_cluster_without_a_key_serves_on_loopback() {
    let model = tiny::model(4);
    let running = start(
        &model.path,
        1,
        1,
        toml! { [auth]
        allow_unauthenticated_peers = true },
    )
    .await;
    let request =
        json!({"model": model.name, "prompt": "hello", "max_tokens": 4, "ignore_eos": true});
    assert_eq!(complete(running.cluster.client(), &request, false).await.usage[1], 4);
    running.stop();
}

#[tokio::test]
async fn keys_are_rotated_without_a_refused_request() {
    let folder = tempfile::tempdir().unwrap();
    let key = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (first, second) = ("a-key-that-is-long-enough-1\n", "a-key-that-is-long-enough-2\n");
    let old = key("old", first);
    let both = key("both", &format!("{first}{second}"));
    let turned = key("turned", &format!("{second}{first}"));
    let new = key("new", second);
    let model = tiny::model(4);
    // Daemon after daemon learns the new key, signs with it, and forgets the old one.
    for [context, generation, router] in [
        [&old, &both, &old],
        [&both, &both, &turned],
        [&turned, &both, &turned],
        [&turned, &new, &turned],
        [&new, &new, &new],
    ] {
        let mut plan = Plan::local(&model.path, 1, 1, &toml::Table::new()).unwrap();
        let path = ["auth", "internal_request_auth_key_file"];
        set(&mut plan.workers[0].1, &path, context.clone());
        set(&mut plan.workers[1].1, &path, generation.clone());
        set(plan.router.as_mut().unwrap(), &path, router.clone());
        let run = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(&plan, run.path(), READY).await.unwrap();
        let request =
            json!({"model": model.name, "prompt": "hello", "max_tokens": 4, "ignore_eos": true});
        assert_eq!(complete(cluster.client(), &request, false).await.usage[1], 4);
        all_free(&cluster, Duration::from_secs(4)).await;
        cluster.stop(STOP).unwrap();
    }
}

#[tokio::test]
async fn hand_overs_carry_upstreams_signature_only_where_there_is_a_key() {
    const HEADER: &str = "x-trtllm-disagg-auth";
    for key in [None, Some("a-key-that-is-long-enough-1\n")] {
        let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
        let scene = Scene::new(&address.to_string()).await;
        let folder = tempfile::tempdir().unwrap();
        if let Some(key) = key {
            let file = folder.path().join("key");
            std::fs::write(&file, key).unwrap();
            let file = file.display();
            scene.configure(&format!("[auth]\ninternal_request_auth_key_file = \"{file}\"\n"));
        }
        let router = scene.start();
        scene.ready().await;
        let request = json!({"model": "mock", "prompt": "hello", "max_tokens": 4});
        let answer = Client::new(address).post("/v1/completions", &request).await.unwrap();
        assert_eq!(answer.status, 200);
        let [context, generation] =
            scene.workers.each_ref().map(|worker| worker.requests().pop().unwrap().headers);
        assert!(!context.contains_key(HEADER), "a context request carries nothing to be signed");
        let signature = generation.get(HEADER).map(|value| value.to_str().unwrap().to_owned());
        let expected = key.map(|key| {
            let file = folder.path().join("key");
            let keys = Keys::parse(key.as_bytes(), &file).unwrap();
            keys.sign_disagg(None, Some("QmF0b24=")).unwrap()
        });
        assert_eq!(signature, expected);
        end(router);
    }
}
