//! Workers that stand still (SIGSTOP) in a hand-over: it costs one deadline, and then the blocks are free again.
//!
//! Over shared memory too: a read that follows a notification ends only with a word from the peer.

use std::time::{Duration, Instant};

use toml::{Table, toml};

use super::scene::{CONTEXTS, GENERATIONS, PATH, PATIENCE, Scene, Way};
use crate::support::{all_free, metrics};

/// Of requests that are read late.
const LATE: [u64; 2] = [1 << 42, (1 << 42) + 1];

fn settings() -> Table {
    toml! { [handover]
    lease_timeout = "10s"
    pull_timeout = "1s"
    quarantine_timeout = "3s" }
}

impl Scene {
    fn signal(&mut self, index: usize, name: &str) {
        self.running.cluster.workers[index].process.signal(name).unwrap();
    }
}

/// Over TCP the lease's word is asked of it after the blocks: a stop there costs a deadline, as below.
#[tokio::test]
async fn a_worker_that_stops_once_its_blocks_were_read_is_not_needed_any_more() {
    let mut scene = Scene::start(Way::Cma, settings()).await;
    scene.warm_up().await;
    let request = scene.request(1, 300);
    let expected = scene.alone(&request).await;
    scene.arm(&GENERATIONS, "pull.read", "hold").await;
    let asked = scene.ask(&request);
    scene.held(&GENERATIONS, "pull.read").await;
    let lessor = scene.lessor().await;
    scene.signal(lessor, "STOP");
    scene.arm(&GENERATIONS, "pull.read", "off").await;
    assert_eq!(asked.await.unwrap(), expected);
    assert_eq!((scene.retries("context").await, scene.retries("generation").await), (0.0, 0.0));
    scene.signal(lessor, "CONT");
    // The notification waited for it.
    scene.until(lessor, "baton_worker_leases_ended_total", &[("end", "pulled")], 3.0).await;
    scene.end().await;
}

#[tokio::test]
async fn a_stopped_worker_costs_one_deadline_and_its_readers_blocks_are_free_after_a_rebuild() {
    for way in Way::BOTH {
        a_stopped_worker_costs_one_deadline(way).await;
    }
}

async fn a_stopped_worker_costs_one_deadline(way: Way) {
    let mut scene = Scene::start(way, settings()).await;
    scene.warm_up().await;
    let request = scene.request(1, 2000);
    let expected = scene.alone(&request).await;
    // Records of both context workers, to be read by the one that will wait for the stopped one.
    let mut late = Vec::new();
    for (context, id) in CONTEXTS.into_iter().zip(LATE) {
        late.push(scene.hop(context, id, &scene.request(2, 300)).await);
    }
    scene.arm(&GENERATIONS, "pull.post", "hold").await;
    let asked = scene.ask(&request);
    let reader = scene.held(&GENERATIONS, "pull.post").await;
    let mut lessor = None;
    for index in CONTEXTS {
        if metrics(scene.worker(index)).await.sum("baton_worker_leases", &[]) == 2.0 {
            lessor = Some(index);
        }
    }
    let lessor = lessor.expect("one has the lease of this request too");
    let other = 1 - lessor;
    scene.signal(lessor, "STOP");
    let begun = Instant::now();
    scene.arm(&GENERATIONS, "pull.post", "off").await;
    assert_eq!(asked.await.unwrap(), expected);
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_secs(5), "{took:?}");
    assert_eq!(scene.answered("kv_transfer_timeout").await, 1.0);
    assert_eq!((scene.retries("context").await, scene.retries("generation").await), (1.0, 0.0));
    assert_eq!(scene.blamed(), [lessor]);
    // While its transfers have not ended, nothing more is read from the stopped one, at once.
    let client = scene.worker(reader).client();
    let suspect = client.post(PATH, &late[lessor]).await.unwrap();
    assert_eq!(
        (suspect.status, suspect.error_code().unwrap()),
        (503, "kv_peer_unreachable".into())
    );
    // The others are read as ever.
    assert_eq!(client.post(PATH, &late[other]).await.unwrap().status, 200);
    scene.until(reader, "baton_worker_handover_rebuilds_total", &[], 1.0).await;
    scene.until_free(reader).await;
    let again = scene.request(3, 300);
    for _ in 0..3 {
        assert_eq!(scene.ask(&again).await.unwrap(), scene.alone_at(other, &again).await);
    }
    match way {
        Way::Cma => {
            scene.signal(lessor, "CONT");
            // Its leases end by the releases that are posted, or by time.
            for id in LATE {
                let release = serde_json::json!({"disagg_request_id": id});
                let client = scene.worker(lessor).client();
                client.post("/v1/disagg/release", &release).await.unwrap();
            }
        }
        // UCX would end it as soon as it answers a connection that is gone.
        Way::Tcp => {
            scene.kill(lessor);
            scene.restart(lessor).await;
        }
    }
    all_free(&scene.running.cluster, PATIENCE).await;
    let again = scene.request(4, 300);
    assert_eq!(scene.ask(&again).await.unwrap(), scene.alone(&again).await);
    scene.running.stop();
}

#[tokio::test]
async fn a_stopped_worker_that_is_killed_in_mid_transfer_is_noticed_at_once() {
    let mut scene = Scene::start(
        Way::Tcp,
        toml! { [handover]
        pull_timeout = "8s" },
    )
    .await;
    scene.warm_up().await;
    let request = scene.request(1, 2000);
    let expected = scene.alone(&request).await;
    scene.arm(&GENERATIONS, "pull.post", "hold").await;
    let asked = scene.ask(&request);
    let reader = scene.held(&GENERATIONS, "pull.post").await;
    let lessor = scene.lessor().await;
    scene.signal(lessor, "STOP");
    scene.arm(&[reader], "pull.posted", "hold").await;
    scene.arm(&GENERATIONS, "pull.post", "off").await;
    scene.held(&[reader], "pull.posted").await;
    scene.arm(&[reader], "pull.posted", "off").await;
    scene.kill(lessor);
    let begun = Instant::now();
    assert_eq!(asked.await.unwrap(), expected);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(scene.answered("kv_peer_unreachable").await, 1.0);
    assert_eq!(scene.blamed(), [lessor]);
    scene.restart(lessor).await;
    all_free(&scene.running.cluster, PATIENCE).await;
    scene.running.stop();
}
