//! A thousand clients, each gone in a chosen phase of its request, a third of them between the two hops.
//!
//! Clients come in waves. A wave leaves at once as soon as it stands where it should: metrics and failpoints say so.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use baton_integration::cluster::{Member, Plan, overlay, set};
use baton_integration::eventually::eventually;
use baton_integration::relay::{Passage, Relay};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use toml::{Table, toml};

use super::{FREE_WITHIN, STEP_TOKENS};
use crate::support::{
    Running, all_free, blocks, complete, note, router_sum, start_behind_relays, sum, token_ids,
};
use crate::tiny::{self, Tiny};

const PATH: &str = "/v1/completions";
/// Of each role.
const WORKERS: usize = 2;
/// Sequences that a context worker computes at once; more wait.
const AT_ONCE: usize = 16;
/// A wave is in its place long before.
const PATIENCE: Duration = Duration::from_secs(20);
/// Steps so slow that a wave is together before its first prompt is computed, however busy the machine.
const GATHERING: &str = "delay(100ms)";
/// Steps while clients leave.
const LEAVING: &str = "delay(20ms)";
const MAX_TOMBSTONES: f64 = 65_536.0;

#[tokio::test]
async fn a_thousand_clients_that_leave_in_each_phase_leave_nothing_behind() {
    let mut scene = Scene::start().await;
    scene.leave_while_queued().await;
    scene.leave_in_the_context_computation().await;
    scene.leave_between_the_hops().await;
    scene.leave_while_the_context_answer_is_on_its_way().await;
    scene.leave_in_the_pull().await;
    scene.leave_in_mid_stream().await;
    assert_eq!(scene.left, 1000);
    scene.running.stop();
}

struct Scene {
    running: Running,
    relays: Vec<Relay>,
    model: Tiny,
    /// Requests sent so far.
    sent: u64,
    /// Clients that left before their answer was whole.
    left: usize,
}

/// Clients under way.
struct Wave {
    clients: JoinSet<()>,
    /// How many have seen the begin of their answer.
    answered: Arc<AtomicUsize>,
}

impl Scene {
    async fn start() -> Self {
        let model = tiny::model(4);
        let (running, relays) = start_behind_relays(|| plan(&model)).await;
        Self { running, relays, model, sent: 0, left: 0 }
    }

    fn contexts(&self) -> &[Member] {
        &self.running.cluster.workers[..WORKERS]
    }

    fn generations(&self) -> &[Member] {
        &self.running.cluster.workers[WORKERS..]
    }

    async fn leave_while_queued(&mut self) {
        for _ in 0..2 {
            arm(self.contexts(), "step", GATHERING).await;
            let wave = self.wave(84, 1500);
            eventually(PATIENCE, "most of them wait for a slot", || async {
                let waiting = sum(self.contexts(), "baton_worker_requests_waiting", &[]).await;
                (waiting >= 42.0).then_some(())
            })
            .await;
            arm(self.contexts(), "step", LEAVING).await;
            self.leave(wave, "queued").await;
        }
        arm(self.contexts(), "step", "off").await;
        self.is_as_before().await;
    }

    async fn leave_in_the_context_computation(&mut self) {
        for _ in 0..5 {
            arm(self.contexts(), "step", GATHERING).await;
            let clients = WORKERS * AT_ONCE;
            let wave = self.wave(clients, 1500);
            eventually(PATIENCE, "nearly all of them are computed", || async {
                let running = sum(self.contexts(), "baton_worker_requests_running", &[]).await;
                (running >= clients as f64 * 0.75).then_some(())
            })
            .await;
            arm(self.contexts(), "step", LEAVING).await;
            self.leave(wave, "in the context computation").await;
        }
        arm(self.contexts(), "step", "off").await;
        self.is_as_before().await;
    }

    /// The generation request has left the router and stands in a relay: when that opens, the worker sees a request
    /// of nobody, with a record whose lease was given back.
    async fn leave_between_the_hops(&mut self) {
        for _ in 0..3 {
            self.relays[WORKERS..].iter().for_each(|relay| relay.set(Passage::Held));
            let wave = self.wave(84, 100);
            eventually(PATIENCE, "all of them have a lease", || async {
                let leases = sum(self.contexts(), "baton_worker_leases", &[]).await;
                let sent = [("role", "generation")];
                let sent = router_sum(&self.running.cluster, IN_FLIGHT, &sent).await;
                (leases == 84.0 && sent == 84.0).then_some(())
            })
            .await;
            for member in self.generations() {
                assert_eq!(blocks(member, "used").await + blocks(member, "in_flight").await, 0.0);
            }
            self.leave(wave, "between the hops").await;
            self.relays[WORKERS..].iter().for_each(|relay| relay.set(Passage::Open));
            // Behind what is late: this one goes the same way.
            self.is_as_before().await;
        }
    }

    /// The context worker has given its answer away, the router does not have it.
    async fn leave_while_the_context_answer_is_on_its_way(&mut self) {
        arm(self.contexts(), "context.answer", "hold").await;
        let wave = self.wave(84, 100);
        self.held(self.contexts(), "context.answer", 84).await;
        self.relays[..WORKERS].iter().for_each(|relay| relay.set(Passage::Held));
        arm(self.contexts(), "context.answer", "off").await;
        self.held(self.contexts(), "context.answer", 0).await;
        self.depart(wave).await;
        self.relays[..WORKERS].iter().for_each(|relay| relay.set(Passage::Open));
        self.all_free("context answer on its way").await;
        self.is_as_before().await;
    }

    async fn leave_in_the_pull(&mut self) {
        for _ in 0..4 {
            arm(self.generations(), "pull.post", "hold").await;
            let wave = self.wave(42, 1000);
            eventually(PATIENCE, "all of them are pulling", || async {
                let pulling = sum(self.generations(), "baton_worker_requests_pulling", &[]).await;
                (pulling == 42.0).then_some(())
            })
            .await;
            arm(self.generations(), "pull.post", "delay(10ms)").await;
            self.leave(wave, "in the pull").await;
        }
        arm(self.generations(), "pull.post", "off").await;
        self.is_as_before().await;
    }

    async fn leave_in_mid_stream(&mut self) {
        arm(self.generations(), "step", LEAVING).await;
        for _ in 0..4 {
            let wave = self.wave(42, 100);
            eventually(PATIENCE, "all streams have begun", || async {
                let running = sum(self.generations(), "baton_worker_requests_running", &[]).await;
                let begun = wave.answered.load(Ordering::Relaxed);
                (running == 42.0 && begun == 21).then_some(())
            })
            .await;
            self.leave(wave, "in mid-stream").await;
        }
        arm(self.generations(), "step", "off").await;
        self.is_as_before().await;
    }

    /// So many clients ask at once for a long answer, every second one for a stream.
    fn wave(&mut self, clients: usize, prompt_tokens: usize) -> Wave {
        let client = self.running.cluster.client();
        let mut wave = Wave { clients: JoinSet::new(), answered: Arc::default() };
        for index in 0..clients {
            self.sent += 1;
            let mut request = self.request(self.sent, prompt_tokens);
            request["stream"] = json!(index % 2 == 0);
            request["max_tokens"] = json!(400);
            let answered = Arc::clone(&wave.answered);
            wave.clients.spawn(async move {
                let mut answer = client.stream(PATH, &request).await.unwrap();
                if answer.status != 200 {
                    let answer = answer.whole().await.unwrap();
                    panic!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
                }
                answer.event().await.unwrap();
                answered.fetch_add(1, Ordering::Relaxed);
                while answer.event().await.unwrap().is_some() {}
            });
        }
        wave
    }

    fn request(&self, seed: u64, prompt_tokens: usize) -> Value {
        json!({"model": self.model.name, "prompt": token_ids(seed, prompt_tokens, self.model.vocab),
            "max_tokens": 6, "temperature": 0, "ignore_eos": true})
    }

    /// The wave leaves; nothing of it may be left.
    async fn leave(&mut self, wave: Wave, phase: &str) {
        self.depart(wave).await;
        self.all_free(phase).await;
    }

    async fn depart(&mut self, mut wave: Wave) {
        wave.clients.abort_all();
        while let Some(ended) = wave.clients.join_next().await {
            let error = ended.expect_err("nobody's answer is whole yet");
            assert!(error.is_cancelled(), "{error}");
            self.left += 1;
        }
    }

    async fn all_free(&self, phase: &str) {
        let free_after = all_free(&self.running.cluster, FREE_WITHIN).await;
        note(format_args!("{phase}: free after {free_after:?}"));
    }

    async fn held(&self, members: &[Member], point: &str, clients: u64) {
        eventually(PATIENCE, &format!("{clients} are held at `{point}`"), || async {
            let mut held = 0;
            for member in members {
                held += member.standing(point).await.unwrap().held;
            }
            (held == clients).then_some(())
        })
        .await;
    }

    /// Nothing is orphaned, what is remembered is bounded, and answers are as good as ever.
    async fn is_as_before(&mut self) {
        let cluster = &self.running.cluster;
        assert_eq!(router_sum(cluster, "baton_router_orphaned_kv_total", &[]).await, 0.0);
        let tombstones = sum(&cluster.workers, "baton_worker_tombstones", &[]).await;
        assert!(tombstones <= MAX_TOMBSTONES.min(self.sent as f64), "{tombstones} tombstones");
        self.sent += 1;
        let request = self.request(self.sent, 100);
        let alone = complete(cluster.workers[0].client(), &request, false).await;
        assert_eq!(complete(cluster.client(), &request, true).await, alone);
        all_free(cluster, FREE_WITHIN).await;
    }
}

const IN_FLIGHT: &str = "baton_router_worker_in_flight";

/// Steps are small, slots of context workers are few, and the holds of this test are nobody's death.
fn plan(model: &Tiny) -> Plan {
    let mut worker = Table::new();
    set(&mut worker, &["engine", "max_batch_tokens"], STEP_TOKENS);
    let mut plan = Plan::local(&model.path, WORKERS, WORKERS, &worker).unwrap();
    for (_, context) in &mut plan.workers[..WORKERS] {
        set(context, &["engine", "max_sequences"], AT_ONCE as i64);
    }
    plan.environment.push(("BATON_TEST".to_owned(), "1".to_owned()));
    let router = toml! {
        [context]
        policy = "round_robin"
        [generation]
        policy = "round_robin"
        [health]
        probe_timeout = "30s"
    };
    overlay(plan.router.as_mut().unwrap(), &router);
    plan
}

async fn arm(members: &[Member], point: &str, action: &str) {
    for member in members {
        member.arm(point, action).await.unwrap();
    }
}
