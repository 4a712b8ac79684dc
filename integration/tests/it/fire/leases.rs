//! Leases that are gone when their reader comes: computed again, and nobody is blamed.

use toml::toml;

use super::scene::{CONTEXTS, GENERATIONS, Scene, Way};

#[tokio::test]
async fn an_expired_lease_is_computed_again_and_nobody_is_blamed() {
    for way in Way::BOTH {
        let settings = toml! { [handover]
        lease_timeout = "1s"
        pull_timeout = "900ms" };
        let scene = Scene::start(way, settings).await;
        let request = scene.request(1, 70);
        let expected = scene.alone(&request).await;
        scene.arm(&GENERATIONS, "generation.confirmed", "hold").await;
        let asked = scene.ask(&request);
        scene.held(&GENERATIONS, "generation.confirmed").await;
        let lessor = scene.lessor().await;
        scene.until(lessor, "baton_worker_leases_ended_total", &[("end", "expired")], 1.0).await;
        scene.arm(&GENERATIONS, "generation.confirmed", "off").await;
        assert_eq!(asked.await.unwrap(), expected, "{way:?}");
        assert_eq!(scene.answered("kv_lease_gone").await, 1.0);
        assert_eq!((scene.retries("context").await, scene.retries("generation").await), (1.0, 0.0));
        assert_eq!(scene.blamed(), [0; 0]);
        scene.end().await;
    }
}

#[tokio::test]
async fn a_lease_of_an_earlier_start_is_computed_again() {
    for way in Way::BOTH {
        let mut scene = Scene::start(way, toml::Table::new()).await;
        let request = scene.request(2, 70);
        let expected = scene.alone(&request).await;
        scene.arm(&GENERATIONS, "generation.checked", "hold").await;
        let asked = scene.ask(&request);
        scene.held(&GENERATIONS, "generation.checked").await;
        let lessor = scene.lessor().await;
        scene.kill(lessor);
        scene.restart(lessor).await;
        scene.arm(&GENERATIONS, "generation.checked", "off").await;
        assert_eq!(asked.await.unwrap(), expected, "{way:?}");
        assert_eq!(scene.answered("kv_lease_gone").await, 1.0);
        assert_eq!((scene.retries("context").await, scene.retries("generation").await), (1.0, 0.0));
        // The one that died may have been seen dead by a probe; nobody else.
        assert!(scene.blamed().iter().all(|index| *index == lessor), "{:?}", scene.blamed());
        scene.end().await;
    }
}

#[tokio::test]
async fn a_lease_that_a_dying_worker_has_read_is_computed_again() {
    for way in Way::BOTH {
        let mut scene = Scene::start(way, toml::Table::new()).await;
        let request = scene.request(3, 70);
        let expected = scene.alone(&request).await;
        scene.arm(&GENERATIONS, "pull.notified", "hold").await;
        let asked = scene.ask(&request);
        let reader = scene.held(&GENERATIONS, "pull.notified").await;
        let pulled = |index| {
            scene.until(index, "baton_worker_leases_ended_total", &[("end", "pulled")], 1.0)
        };
        tokio::select! {
            () = pulled(CONTEXTS[0]) => {}
            () = pulled(CONTEXTS[1]) => {}
        }
        let other = GENERATIONS.into_iter().find(|index| *index != reader).unwrap();
        scene.arm(&[other], "pull.notified", "off").await;
        scene.kill(reader);
        assert_eq!(asked.await.unwrap(), expected, "{way:?}");
        assert_eq!(scene.answered("kv_lease_gone").await, 1.0);
        assert_eq!((scene.retries("context").await, scene.retries("generation").await), (1.0, 1.0));
        assert_eq!(scene.blamed(), [reader]);
        scene.restart(reader).await;
        scene.end().await;
    }
}

#[tokio::test]
async fn a_release_that_is_late_ends_the_lease_of_a_client_that_left() {
    for way in Way::BOTH {
        let scene = Scene::start(way, toml::Table::new()).await;
        let request = scene.request(4, 70);
        scene.arm(&GENERATIONS, "generation.checked", "hold").await;
        scene.arm(&CONTEXTS, "release", "hold").await;
        let asked = scene.ask(&request);
        scene.held(&GENERATIONS, "generation.checked").await;
        asked.abort();
        let lessor = scene.held(&CONTEXTS, "release").await;
        assert_eq!(scene.lessor().await, lessor, "who has the lease is asked to end it");
        scene.arm(&CONTEXTS, "release", "off").await;
        scene.arm(&GENERATIONS, "generation.checked", "off").await;
        scene.until(lessor, "baton_worker_leases_ended_total", &[("end", "released")], 1.0).await;
        assert_eq!(scene.sum(&[lessor], "baton_worker_tombstones", &[]).await, 1.0);
        scene.end().await;
    }
}
