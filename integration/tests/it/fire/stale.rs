//! Memory that means something else by the time it is read, and records that outlive their worker.

use std::time::Duration;

use baton_integration::process::free_port;
use toml::toml;

use super::scene::{PATH, Scene, Way, plan, worker};
use crate::support::{all_free, start_plan};
use crate::tiny;

#[tokio::test]
async fn a_reader_that_slept_while_its_lease_expired_finds_it_gone() {
    for way in Way::BOTH {
        let settings = toml! { [handover]
        lease_timeout = "4s"
        pull_timeout = "3900ms" };
        let mut scene = Scene::start(way, settings).await;
        scene.warm_up().await;
        let request = scene.hop(0, 1 << 42, &scene.request(1, 300)).await;
        // So that the pull's own deadline is behind the lease's.
        tokio::time::sleep(Duration::from_secs(2)).await;
        scene.arm(&[2], "pull.posted", "hold").await;
        let client = scene.worker(2).client();
        let asked = tokio::spawn(async move { client.post(PATH, &request).await.unwrap() });
        scene.held(&[2], "pull.posted").await;
        scene.running.cluster.workers[2].process.signal("STOP").unwrap();
        scene.until(0, "baton_worker_leases_ended_total", &[("end", "expired")], 1.0).await;
        // The blocks that are freed are overwritten; some of them are used again.
        scene.alone(&scene.request(9, 2000)).await;
        scene.running.cluster.workers[2].process.signal("CONT").unwrap();
        scene.arm(&[2], "pull.posted", "off").await;
        let answer = asked.await.unwrap();
        let code = answer.error_code().unwrap();
        assert_eq!((answer.status, code.as_str()), (503, "kv_lease_gone"), "{way:?}");
        scene.end().await;
    }
}

/// A context worker with few ports and a fixed HTTP port, and two readers of which one is connected to it.
async fn restarted() -> (Scene, serde_json::Value) {
    let model = tiny::model(4);
    let running = start_plan(|| {
        let first = free_port().unwrap().min(60_000);
        let over: toml::Table =
            toml::from_str(&format!("[nixl]\nport_range = \"{first}-{}\"", first + 7)).unwrap();
        let mut plan = plan(&model, 1, 2, &worker(Way::Tcp, &toml::Table::new()));
        baton_integration::cluster::overlay(&mut plan.workers[0].1, &over);
        plan
    })
    .await;
    let scene = Scene::of(running, model);
    let connected = scene.hop(0, 1 << 42, &scene.request(1, 300)).await;
    assert_eq!(scene.worker(1).client().post(PATH, &connected).await.unwrap().status, 200);
    let old = scene.hop(0, (1 << 42) + 1, &scene.request(2, 300)).await;
    (scene, old)
}

#[tokio::test]
async fn a_record_replayed_after_its_worker_restarted_harms_nobody() {
    let (mut scene, old) = restarted().await;
    scene.kill(0);
    scene.restart(0).await;
    for round in 0..3 {
        for reader in [1, 2] {
            let answer = scene.worker(reader).client().post(PATH, &old).await.unwrap();
            let code = answer.error_code().unwrap();
            let is_gone = code == "kv_lease_gone";
            // Who was connected to the dead one finds its connection broken first.
            let is_broken = code == "kv_peer_unreachable" && reader == 1 && round == 0;
            assert!(answer.status == 503 && (is_gone || is_broken), "{reader} {round} {code}");
        }
    }
    assert!(scene.running.cluster.workers[0].process.ended().unwrap().is_none(), "it lives");
    let request = scene.request(3, 300);
    assert_eq!(scene.ask(&request).await.unwrap(), scene.alone(&request).await);
    all_free(&scene.running.cluster, super::scene::PATIENCE).await;
    scene.running.stop();
}
