//! Chaos: two context workers, two generation workers and the router, struck at random and at every failpoint.
//!
//! Holds in every trial, as one worker of each role is left alone: no request fails before its first byte, none has a
//! wrong token, all end in time, nobody ends with a peer (over TCP this does not hold: see [`Arena::revive`]), and afterwards
//! every block is free. Freed blocks are
//! overwritten, so that a token computed from one is wrong. `BATON_CHAOS_SEED` and `BATON_CHAOS_TRIALS` repeat a run.

mod faults;
mod judge;
mod pair;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use baton_integration::cluster::{Cluster, Member, Plan, overlay};
use baton_integration::relay::{Passage, Relay};
use baton_integration::scrape::Metrics;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use toml::toml;

use self::faults::{Fault, SPREAD, Strike};
use self::judge::{Question, Verdict};
use crate::fire::scene::{Way, plan, worker};
use crate::support::{READY, Running, STOP, all_usable, start_behind_relays, start_plan};
use crate::tiny::{self, Tiny};

/// Requests of a trial.
const REQUESTS: usize = 6;
/// A worker that was left alone has no block in use this long after the last request: releases take 2 s at most.
const FREE: Duration = Duration::from_millis(2500);
/// A worker that was struck keeps leases until they expire.
const FREE_AFTER_STRIKE: Duration = Duration::from_secs(8);

/// The cluster of the trials.
struct Arena {
    cluster: Cluster,
    relays: Vec<Relay>,
    questions: Vec<Question>,
    random: StdRng,
    endings: BTreeMap<&'static str, usize>,
    _folder: tempfile::TempDir,
}

/// What is done to a worker at a moment of a trial.
#[derive(Clone, Debug)]
enum Act {
    Signal(&'static str),
    Pass(Passage),
    Arm(&'static str, &'static str),
}

fn chaos_plan(model: &Tiny, way: Way) -> Plan {
    let settings = toml! {
        [handover]
        lease_timeout = "4s"
        pull_timeout = "700ms"
        quarantine_timeout = "1s"
        [kv]
        max_tokens = 8192
    };
    let mut plan = plan(model, 2, 2, &worker(way, &settings));
    overlay(
        plan.router.as_mut().expect("a router"),
        &toml! {
            [routing]
            context_timeout = "2s"
            first_token_timeout = "2s"
            idle_timeout = "3s"
            queue_timeout = "8s"
            [health]
            probe_interval = "100ms"
            probe_timeout = "300ms"
            eject_time = "200ms"
            eject_time_max = "500ms"
        },
    );
    plan
}

impl Arena {
    async fn open(way: Way, seed: u64) -> Self {
        let model = tiny::model(4);
        let mut random = StdRng::seed_from_u64(seed);
        let mut reference = Plan::local(&model.path, 0, 1, &toml::Table::new()).unwrap();
        reference.router = None;
        let reference = start_plan(|| reference.clone()).await;
        let client = reference.cluster.workers[0].client();
        let questions = judge::questions(&mut random, 42, &model, client).await;
        reference.stop();
        let (Running { cluster, folder }, relays) =
            start_behind_relays(|| chaos_plan(&model, way)).await;
        let endings = BTreeMap::new();
        let mut arena = Self { cluster, relays, questions, random, endings, _folder: folder };
        arena.until_usable(&[], "start").await;
        arena
    }

    async fn trial(&mut self, trial: usize) {
        let strikes = faults::draw(&mut self.random, trial);
        let what = format!("trial {trial}, {strikes:?}");
        let asked: Vec<_> = (0..REQUESTS).map(|_| self.send()).collect();
        self.strike(&strikes).await;
        for task in asked {
            match task.await {
                Ok(Ok(verdict)) => *self.endings.entry(name(verdict)).or_default() += 1,
                Ok(Err(wrong)) => panic!("{what}: {wrong}"),
                Err(gone) if gone.is_cancelled() => {}
                Err(error) => panic!("{what}: {error}"),
            }
        }
        self.heal(&strikes, &what).await;
        self.until_free(&strikes, &what).await;
    }

    /// Sends a request a little later; some clients leave.
    fn send(&mut self) -> JoinHandle<Result<Verdict, String>> {
        let question = self.questions.choose(&mut self.random).expect("there are some").clone();
        let (client, stream) = (self.cluster.client(), self.random.random());
        let after = SPREAD.mul_f64(self.random.random());
        let task = tokio::spawn(async move {
            tokio::time::sleep(after).await;
            judge::ask(client, &question, stream).await
        });
        if self.random.random_range(0..8) == 0 {
            let (leaves, handle) =
                (SPREAD.mul_f64(self.random.random::<f64>() * 2.0), task.abort_handle());
            tokio::spawn(async move {
                tokio::time::sleep(leaves).await;
                handle.abort();
            });
        }
        task
    }

    /// Does what is to be done, when it is to be done.
    async fn strike(&mut self, strikes: &[Strike]) {
        let mut acts: Vec<(Duration, usize, Act)> = Vec::new();
        for Strike { worker, after, fault } in strikes {
            let mut act = |at: Duration, act| acts.push((*after + at, *worker, act));
            match *fault {
                Fault::Kill => act(Duration::ZERO, Act::Signal("KILL")),
                Fault::End => act(Duration::ZERO, Act::Signal("TERM")),
                Fault::Stop(long) => {
                    act(Duration::ZERO, Act::Signal("STOP"));
                    act(long, Act::Signal("CONT"));
                }
                Fault::Cut(long) => {
                    act(Duration::ZERO, Act::Pass(Passage::Cut));
                    act(long, Act::Pass(Passage::Open));
                }
                Fault::Hold(long) => {
                    act(Duration::ZERO, Act::Pass(Passage::Held));
                    act(long, Act::Pass(Passage::Open));
                }
                Fault::At(point, action, long) => {
                    act(Duration::ZERO, Act::Arm(point, action));
                    act(long, Act::Arm(point, "off"));
                }
            }
        }
        acts.sort_by_key(|(at, _, _)| *at);
        let begun = tokio::time::Instant::now();
        for (at, worker, act) in acts {
            tokio::time::sleep_until(begun + at).await;
            self.act(worker, act).await;
        }
    }

    async fn act(&mut self, worker: usize, act: Act) {
        match act {
            Act::Signal(name) => self.cluster.workers[worker].process.signal(name).unwrap(),
            Act::Pass(passage) => self.relays[worker].set(passage),
            // One that has ended meanwhile cannot be armed, nor need it be.
            Act::Arm(point, action) => drop(self.cluster.workers[worker].arm(point, action).await),
        }
    }

    /// Waits for those that end by a signal, and starts what has ended again.
    async fn heal(&mut self, strikes: &[Strike], what: &str) {
        for Strike { worker, fault, .. } in strikes {
            let process = &mut self.cluster.workers[*worker].process;
            match fault {
                Fault::Kill => drop(process.wait(STOP).unwrap()),
                Fault::End => {
                    let status = process.wait(STOP).unwrap();
                    assert!(status.success(), "{what}: {} ended with {status}", process.name());
                }
                Fault::Stop(_) | Fault::Cut(_) | Fault::Hold(_) | Fault::At(..) => {}
            }
        }
        self.until_usable(strikes, what).await;
        let router = self.cluster.router.as_mut().expect("a router");
        assert!(router.process.ended().unwrap().is_none(), "{what}: the router ended");
    }

    /// Starts a worker again if it has ended, which only one that was struck may.
    async fn revive(&mut self, index: usize, strikes: &[Strike], what: &str) {
        let process = &mut self.cluster.workers[index].process;
        let Some(status) = process.ended().unwrap() else { return };
        let is_meant = |strike: &Strike| strike.worker == index && strike.fault.may_end();
        let (name, log) = (process.name().to_owned(), process.log());
        assert!(strikes.iter().any(is_meant), "{what}: {name} ended with {status}\n{log}");
        self.cluster.restart(index).unwrap();
        self.cluster.workers[index].ready(READY).await.unwrap();
    }

    /// Waits until the router would send requests to all workers. One that met a panic may end meanwhile.
    async fn until_usable(&mut self, strikes: &[Strike], what: &str) {
        let begun = Instant::now();
        while !all_usable(&self.cluster).await {
            for index in 0..self.cluster.workers.len() {
                self.revive(index, strikes, what).await;
            }
            assert!(begun.elapsed() < READY, "{what}: the router does not use all workers");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until no worker has a block in use.
    async fn until_free(&mut self, strikes: &[Strike], what: &str) {
        for index in 0..self.cluster.workers.len() {
            let is_struck = strikes.iter().any(|strike| strike.worker == index);
            let patience = if is_struck { FREE_AFTER_STRIKE } else { FREE };
            let begun = Instant::now();
            while !is_free(&self.cluster.workers[index]).await {
                self.revive(index, strikes, what).await;
                assert!(begun.elapsed() < patience, "{what}: worker {index} keeps blocks");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        self.until_usable(strikes, what).await;
    }
}

async fn is_free(member: &Member) -> bool {
    let Ok(metrics) = Metrics::of(member.address, "/prometheus/metrics").await else {
        return false;
    };
    let busy = |state| metrics.sum("baton_worker_kv_blocks", &[("state", state)]);
    ["used", "leased", "in_flight", "quarantined"].map(busy).iter().sum::<f64>() == 0.0
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Right => "right",
        Verdict::BrokenOff => "broken off after the first byte",
    }
}

/// So many trials with this seed.
#[derive(Clone, Copy, Debug)]
struct Run {
    way: Way,
    trials: usize,
    seed: u64,
}

impl Run {
    /// As many as `trials` with a seed of its own, unless the environment says otherwise.
    fn new(way: Way, trials: usize) -> Self {
        let given = |name| std::env::var(name).ok().map(|value: String| value.parse().unwrap());
        let seed = given("BATON_CHAOS_SEED").unwrap_or_else(rand::random);
        Self { way, trials: given("BATON_CHAOS_TRIALS").map_or(trials, |n| n as usize), seed }
    }

    /// How its requests ended. Now and then it says how far it is, past the test runner.
    async fn go(self) -> BTreeMap<&'static str, usize> {
        let mut arena = Arena::open(self.way, self.seed).await;
        for trial in 0..self.trials {
            arena.trial(trial).await;
            if trial % 100 == 99 {
                let line = format!("{self:?}: {} trials, {:?}\n", trial + 1, arena.endings);
                std::io::stderr().write_all(line.as_bytes()).unwrap();
            }
        }
        let right = arena.endings.get(name(Verdict::Right)).copied().unwrap_or_default();
        assert!(right > self.trials * REQUESTS / 2, "most are answered: {:?}", arena.endings);
        arena.cluster.stop(STOP).unwrap();
        arena.endings
    }
}

#[tokio::test]
async fn whatever_dies_no_request_is_lost_and_nothing_is_left_behind() {
    let run = Run::new(Way::Cma, 45);
    println!("{run:?}");
    let begun = Instant::now();
    println!("{:?} in {:?}", run.go().await, begun.elapsed());
}

#[tokio::test]
async fn whatever_dies_no_request_is_lost_and_nothing_is_left_behind_over_tcp() {
    let run = Run::new(Way::Tcp, 15);
    println!("{run:?}");
    let begun = Instant::now();
    println!("{:?} in {:?}", run.go().await, begun.elapsed());
}

#[tokio::test]
#[ignore = "an hour: `make test-long`"]
async fn two_thousand_trials_lose_no_request() {
    for run in [Run::new(Way::Cma, 1600), Run::new(Way::Tcp, 400)] {
        let begun = Instant::now();
        println!("{run:?}");
        println!("{:?} in {:?}", run.go().await, begun.elapsed());
    }
}
