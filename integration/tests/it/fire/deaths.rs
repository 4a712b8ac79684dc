//! Workers that die in a hand-over: the request goes on elsewhere, the dead one is blamed, the others live.

use std::time::{Duration, Instant};

use super::scene::{CONTEXTS, GENERATIONS, PATIENCE, Scene, Way};

/// Kills the context worker whose lease is about to be read while the reader is held at `point`.
async fn context_dies_at(point: &str, way: Way) {
    let mut scene = Scene::start(way, toml::Table::new()).await;
    scene.warm_up().await;
    let request = scene.request(1, 300);
    let expected = scene.alone(&request).await;
    scene.arm(&GENERATIONS, point, "hold").await;
    let asked = scene.ask(&request);
    scene.held(&GENERATIONS, point).await;
    let lessor = scene.lessor().await;
    scene.kill(lessor);
    let begun = Instant::now();
    scene.arm(&GENERATIONS, point, "off").await;
    assert_eq!(asked.await.unwrap(), expected, "{point} {way:?}");
    // Refused connections and broken ones show at once.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(scene.answered("kv_peer_unreachable").await, 1.0, "{point} {way:?}");
    assert_eq!((scene.retries("context").await, scene.retries("generation").await), (1.0, 0.0));
    assert_eq!(scene.blamed(), [lessor], "{point} {way:?}");
    scene.restart(lessor).await;
    let again = scene.request(2, 300);
    for _ in 0..4 {
        assert_eq!(scene.ask(&again).await.unwrap(), scene.alone(&again).await);
    }
    // The release could not reach the dead one, whose memory is gone too: nothing is orphaned that lives.
    crate::support::all_free(&scene.running.cluster, PATIENCE).await;
    scene.running.stop();
}

#[tokio::test]
async fn a_context_worker_that_died_before_it_is_asked_is_replaced() {
    for way in Way::BOTH {
        context_dies_at("generation.checked", way).await;
    }
}

#[tokio::test]
async fn a_context_worker_that_died_before_it_is_read_is_replaced() {
    for way in Way::BOTH {
        context_dies_at("pull.post", way).await;
    }
}

#[tokio::test]
async fn a_context_worker_that_died_before_its_epoch_is_read_is_replaced() {
    for way in Way::BOTH {
        context_dies_at("pull.read", way).await;
    }
}

#[tokio::test]
async fn what_was_read_before_its_worker_died_is_used() {
    for way in Way::BOTH {
        let mut scene = Scene::start(way, toml::Table::new()).await;
        let request = scene.request(3, 300);
        let expected = scene.alone(&request).await;
        scene.arm(&GENERATIONS, "pull.fenced", "hold").await;
        let asked = scene.ask(&request);
        scene.held(&GENERATIONS, "pull.fenced").await;
        let lessor = scene.lessor().await;
        scene.kill(lessor);
        scene.arm(&GENERATIONS, "pull.fenced", "off").await;
        assert_eq!(asked.await.unwrap(), expected, "{way:?}");
        assert_eq!((scene.retries("context").await, scene.retries("generation").await), (0.0, 0.0));
        scene.restart(lessor).await;
        scene.end().await;
    }
}

#[tokio::test]
async fn a_reader_that_dies_in_its_pull_leaves_the_record_to_another() {
    for way in Way::BOTH {
        let mut scene = Scene::start(way, toml::Table::new()).await;
        scene.warm_up().await;
        let request = scene.request(4, 300);
        let expected = scene.alone(&request).await;
        scene.arm(&GENERATIONS, "pull.posted", "hold").await;
        let asked = scene.ask(&request);
        let reader = scene.held(&GENERATIONS, "pull.posted").await;
        let other = GENERATIONS.into_iter().find(|index| *index != reader).unwrap();
        scene.arm(&[other], "pull.posted", "off").await;
        scene.kill(reader);
        assert_eq!(asked.await.unwrap(), expected, "{way:?}");
        assert_eq!((scene.retries("context").await, scene.retries("generation").await), (0.0, 1.0));
        assert_eq!(scene.blamed(), [reader], "{way:?}");
        scene.restart(reader).await;
        scene.end().await;
    }
}

#[tokio::test]
async fn a_lease_whose_reader_died_ends_by_time() {
    for way in Way::BOTH {
        let settings = toml::toml! { [handover]
        lease_timeout = "2s"
        pull_timeout = "1900ms" };
        let mut scene = Scene::start(way, settings).await;
        let request = scene.hop(0, 1 << 42, &scene.request(5, 300)).await;
        scene.arm(&[2], "pull.posted", "hold").await;
        let client = scene.worker(2).client();
        let asked = tokio::spawn(async move { client.post(super::scene::PATH, &request).await });
        scene.held(&[2], "pull.posted").await;
        scene.kill(2);
        assert!(asked.await.unwrap().is_err(), "its connection broke");
        assert_eq!(scene.lessor().await, 0);
        scene.until(0, "baton_worker_leases_ended_total", &[("end", "expired")], 1.0).await;
        scene.restart(2).await;
        scene.end().await;
    }
}

/// A panic on either thread that matters ends the worker with an answer to everybody; the router goes elsewhere.
async fn panics_at(way: Way, workers: [usize; 2], point: &str) {
    let mut scene = Scene::start(way, toml::Table::new()).await;
    let request = scene.request(6, 70);
    let expected = scene.alone(&request).await;
    scene.arm(&workers, point, "hold").await;
    let asked = scene.ask(&request);
    let broken = scene.held(&workers, point).await;
    let other = workers.into_iter().find(|index| *index != broken).unwrap();
    scene.arm(&[other], point, "off").await;
    // Who is held passes; the next one meets the panic.
    scene.arm(&[broken], point, "off").await;
    assert_eq!(asked.await.unwrap(), expected, "{point}");
    scene.arm(&[broken], point, "panic").await;
    for seed in 0..4 {
        let request = scene.request(seed, 70);
        assert_eq!(scene.ask(&request).await.unwrap(), scene.alone_at(other, &request).await);
    }
    let process = &mut scene.running.cluster.workers[broken].process;
    let status = process.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1), "{point}: {}", process.log());
    scene.restart(broken).await;
    scene.end().await;
}

#[tokio::test]
async fn a_bug_in_an_engine_costs_its_worker_and_no_request() {
    for way in Way::BOTH {
        panics_at(way, CONTEXTS, "context.computed").await;
        panics_at(way, GENERATIONS, "generation.pulled").await;
    }
}

#[tokio::test]
async fn a_bug_in_a_mover_costs_its_worker_and_no_request() {
    for way in Way::BOTH {
        panics_at(way, GENERATIONS, "pull.accepted").await;
        panics_at(way, CONTEXTS, "lease.read").await;
    }
}
