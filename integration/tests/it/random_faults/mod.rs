//! Thousands of requests while something goes wrong at any time: whole answers are right all the same, and memory,
//! file descriptors and blocks stay as they were.
//!
//! `BATON_TEST_SEED` repeats the choices of an earlier run; what they meet depends on the machine.

mod deeds;
mod faults;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_integration::cluster::{Member, Plan, overlay};
use baton_integration::eventually::eventually;
use baton_integration::relay::Relay;
use tokio::task::JoinSet;
use toml::toml;

use self::deeds::{Deeds, Tally};
use crate::support::{Running, all_free, note, router_sum, start_behind_relays, sum};
use crate::tiny;

/// Of each role.
const WORKERS: usize = 2;
/// Requests under way at a time.
const AT_ONCE: u64 = 24;
/// Idle connections are closed by then.
const SETTLING: Duration = Duration::from_secs(20);
/// More descriptors than before any load are connections between workers that met later, and probes.
const LOOSE: usize = 8;
/// Orphaned is what is leased this long after the end of the load.
const ORPHANED_AFTER: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_thousand_requests_with_random_faults_leave_memory_descriptors_and_blocks_flat() {
    Trial { warm_up: 300, requests: 1_000, growth: 16 << 20 }.run().await;
}

#[tokio::test]
#[ignore = "long: `make test-long`"]
async fn ten_thousand_requests_with_random_faults_leave_memory_descriptors_and_blocks_flat() {
    Trial { warm_up: 2_000, requests: 10_000, growth: 16 << 20 }.run().await;
}

struct Trial {
    /// Requests before the first measurement.
    warm_up: u64,
    /// Requests in all.
    requests: u64,
    /// Most bytes that a process may grow by after it.
    growth: u64,
}

struct Scene {
    running: Running,
    relays: Vec<Relay>,
    deeds: Arc<Deeds>,
    seed: u64,
}

impl Trial {
    async fn run(self) {
        let scene = Scene::start().await;
        let descriptors = scene.of_each(|member| member.process.descriptors().unwrap());
        let mut tally = scene.load(0..self.warm_up).await;
        scene.nothing_is_held().await;
        let memory = scene.of_each(|member| member.process.memory().unwrap());
        let begun = Instant::now();
        tally.add(scene.load(self.warm_up..self.requests).await);
        let rate = (self.requests - self.warm_up) as f64 / begun.elapsed().as_secs_f64();
        note(format_args!("{rate:.0} requests/s, {tally:?}"));
        scene.nothing_is_held().await;
        for (member, before) in scene.members().zip(memory) {
            let (name, after) = (member.process.name(), member.process.memory().unwrap());
            let text = format!("`{name}`: {} KiB -> {} KiB", before >> 10, after >> 10);
            note(&text);
            assert!(after <= before + self.growth, "{text}");
        }
        for (member, before) in scene.members().zip(descriptors) {
            let what = format!("idle connections of `{}` are closed", member.process.name());
            let after = eventually(SETTLING, &what, || async {
                let now = member.process.descriptors().unwrap();
                (now <= before + LOOSE).then_some(now)
            })
            .await;
            note(format_args!("`{}`: {before} -> {after} descriptors", member.process.name()));
        }
        tally.is_good();
        scene.running.stop();
    }
}

impl Scene {
    async fn start() -> Self {
        let seed = std::env::var("BATON_TEST_SEED").map_or_else(
            |_| rand::random(),
            |text| text.parse().expect("`BATON_TEST_SEED` is a whole number"),
        );
        note(format_args!("BATON_TEST_SEED={seed}"));
        let model = tiny::model(4);
        let (running, relays) = start_behind_relays(|| plan(&model.path)).await;
        let deeds = Arc::new(Deeds::new(seed, &running.cluster, &model).await);
        Self { running, relays, deeds, seed }
    }

    /// These requests, some at a time, and faults until the last has ended.
    async fn load(&self, requests: std::ops::Range<u64>) -> Tally {
        let next = Arc::new(AtomicU64::new(requests.start));
        let mut clients = JoinSet::new();
        for _ in 0..AT_ONCE {
            let (deeds, next) = (Arc::clone(&self.deeds), Arc::clone(&next));
            clients.spawn(async move {
                let mut tally = Tally::default();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= requests.end {
                        return tally;
                    }
                    deeds.act(index, &mut tally).await;
                }
            });
        }
        let all = async {
            let mut tally = Tally::default();
            while let Some(ended) = clients.join_next().await {
                tally.add(ended.unwrap());
            }
            tally
        };
        let seed = self.seed ^ requests.start;
        let tally = tokio::select! {
            tally = all => tally,
            never = faults::rage(seed, &self.relays, &self.running.cluster.workers) => match never {},
        };
        faults::calm(&self.relays, &self.running.cluster.workers).await;
        tally
    }

    /// No block is in use, nothing is orphaned.
    async fn nothing_is_held(&self) {
        let cluster = &self.running.cluster;
        let free_after = all_free(cluster, ORPHANED_AFTER).await;
        note(format_args!("free after {free_after:?}"));
        assert_eq!(router_sum(cluster, "baton_router_orphaned_kv_total", &[]).await, 0.0);
        assert_eq!(sum(&cluster.workers, "baton_worker_leases", &[]).await, 0.0);
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        self.running.cluster.workers.iter().chain(&self.running.cluster.router)
    }

    fn of_each<T>(&self, figure: impl Fn(&Member) -> T) -> Vec<T> {
        self.members().map(figure).collect()
    }
}

/// A router that tries again soon: nobody is away for long here.
fn plan(model: &std::path::Path) -> Plan {
    // Small: the warm-up touches all of it, so it does not grow into memory later.
    let worker = toml! { [kv]
    pool = "16MiB" };
    let mut plan = Plan::local(model, WORKERS, WORKERS, &worker).unwrap();
    plan.environment.push(("BATON_TEST".to_owned(), "1".to_owned()));
    let router = toml! {
        [health]
        probe_interval = "100ms"
        eject_time = "50ms"
        eject_time_max = "200ms"
    };
    overlay(plan.router.as_mut().unwrap(), &router);
    plan
}
