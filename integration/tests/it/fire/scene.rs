//! A cluster whose workers can be held at any moment of a hand-over, and what is looked at afterwards.

use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::cluster::{Member, Plan, overlay, set};
use baton_integration::eventually::eventually;
use baton_integration::scrape::Metrics;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use toml::{Table, toml};

use crate::support::{
    Outcome, READY, Running, all_free, all_usable, blocks, complete, metrics, start_plan, token_ids,
};
use crate::tiny::{self, Tiny};

/// Which way blocks travel between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Copied out of the peer's memory.
    Cma,
    /// Through a socket.
    Tcp,
}

impl Way {
    pub const BOTH: [Self; 2] = [Self::Cma, Self::Tcp];
}

/// Whatever is awaited comes within this, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Where clients ask.
pub const PATH: &str = "/v1/completions";
/// Places of the workers in the cluster.
pub const CONTEXTS: [usize; 2] = [0, 1];
pub const GENERATIONS: [usize; 2] = [2, 3];

/// Two context workers, two generation workers and the router.
pub struct Scene {
    pub running: Running,
    pub model: Tiny,
    /// Lines of the router's log until all were ready.
    started: usize,
}

/// Workers of a test: with failpoints, and blocks that travel `way`.
pub fn worker(way: Way, over: &Table) -> Table {
    let mut table = toml! {
        [log]
        level = "info,baton_workerd=debug"
    };
    if way == Way::Tcp {
        set(&mut table, &["nixl", "ucx"], toml! { TLS = "tcp,self" });
    }
    overlay(&mut table, over);
    table
}

/// A cluster whose router finds out soon what is wrong.
pub fn plan(model: &Tiny, contexts: usize, generations: usize, worker: &Table) -> Plan {
    let mut plan = Plan::local(&model.path, contexts, generations, worker).unwrap();
    plan.environment.push(("BATON_TEST".to_owned(), "1".to_owned()));
    let router = plan.router.as_mut().unwrap();
    overlay(
        router,
        &toml! {
            [routing]
            context_timeout = "8s"
            first_token_timeout = "12s"
            [context]
            policy = "round_robin"
            [generation]
            policy = "round_robin"
            [health]
            probe_interval = "200ms"
            [log]
            level = "info,baton_router=debug"
        },
    );
    plan
}

impl Scene {
    pub async fn start(way: Way, over: Table) -> Self {
        let model = tiny::model(4);
        let worker = worker(way, &over);
        let running = start_plan(|| plan(&model, 2, 2, &worker)).await;
        eventually(READY, "the router uses all workers", || async {
            all_usable(&running.cluster).await.then_some(())
        })
        .await;
        Self::of(running, model)
    }

    /// A cluster that runs.
    pub fn of(running: Running, model: Tiny) -> Self {
        let log = running.cluster.router.as_ref().unwrap().process.log();
        Self { running, model, started: log.lines().count() }
    }

    pub fn client(&self) -> Client {
        self.running.cluster.client()
    }

    pub fn worker(&self, index: usize) -> &Member {
        &self.running.cluster.workers[index]
    }

    /// A request of `length` tokens; different for each `seed`.
    pub fn request(&self, seed: u64, length: usize) -> Value {
        json!({"model": self.model.name, "prompt": token_ids(seed, length, self.model.vocab),
            "max_tokens": 6, "temperature": 0, "ignore_eos": true})
    }

    /// What one worker alone answers.
    pub async fn alone(&self, request: &Value) -> Outcome {
        self.alone_at(0, request).await
    }

    /// The same, from a certain worker.
    pub async fn alone_at(&self, index: usize, request: &Value) -> Outcome {
        complete(self.worker(index).client(), request, false).await
    }

    /// Waits until a worker has no block in use.
    pub async fn until_free(&self, index: usize) {
        eventually(PATIENCE, "its blocks are free", || async {
            let metrics = metrics(self.worker(index)).await;
            let busy = ["used", "leased", "in_flight", "quarantined"]
                .map(|state| metrics.sum("baton_worker_kv_blocks", &[("state", state)]));
            (busy.iter().sum::<f64>() == 0.0).then_some(())
        })
        .await;
    }

    /// Asks the router, meanwhile.
    pub fn ask(&self, request: &Value) -> JoinHandle<Outcome> {
        let (client, request) = (self.client(), request.clone());
        tokio::spawn(async move { complete(client, &request, false).await })
    }

    /// One request over every pair of workers, so that all are connected.
    pub async fn warm_up(&self) {
        for context in CONTEXTS {
            for generation in GENERATIONS {
                let id = (1 << 41) + (context * 10 + generation) as u64;
                let request = self.hop(context, id, &self.request(id, 40)).await;
                let answer = self.worker(generation).client().post(PATH, &request).await.unwrap();
                assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
            }
        }
        all_free(&self.running.cluster, PATIENCE).await;
    }

    /// A context pass by hand; the generation request that would follow.
    pub async fn hop(&self, context: usize, id: u64, request: &Value) -> Value {
        let mut request = request.clone();
        request["disaggregated_params"] =
            json!({"request_type": "context_only", "disagg_request_id": id});
        let answer = self.worker(context).client().post(PATH, &request).await.unwrap();
        let answer = answer.ok().unwrap();
        request["prompt"] = answer["prompt_token_ids"].clone();
        request["disaggregated_params"] = answer["choices"][0]["disaggregated_params"].clone();
        request["disaggregated_params"]["request_type"] = json!("generation_only");
        request["disaggregated_params"]["ctx_usage"] = answer["usage"].clone();
        request
    }

    pub async fn arm(&self, workers: &[usize], point: &str, action: &str) {
        for index in workers {
            self.worker(*index).arm(point, action).await.unwrap();
        }
    }

    /// Waits until somebody is held at `point`; by which worker.
    pub async fn held(&self, workers: &[usize], point: &str) -> usize {
        eventually(PATIENCE, &format!("somebody is held at `{point}`"), || async {
            for index in workers {
                if self.worker(*index).standing(point).await.ok()?.held > 0 {
                    return Some(*index);
                }
            }
            None
        })
        .await
    }

    /// The context worker that keeps blocks for somebody.
    pub async fn lessor(&self) -> usize {
        eventually(PATIENCE, "a context worker has a lease", || async {
            for index in CONTEXTS {
                if blocks(self.worker(index), "leased").await > 0.0 {
                    return Some(index);
                }
            }
            None
        })
        .await
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self, index: usize) {
        let process = &mut self.running.cluster.workers[index].process;
        process.signal("KILL").unwrap();
        process.wait(PATIENCE).unwrap();
    }

    pub async fn restart(&mut self, index: usize) {
        self.running.cluster.restart(index).unwrap();
        self.running.cluster.workers[index].ready(READY).await.unwrap();
    }

    /// How many generation requests ended with `code`.
    pub async fn answered(&self, code: &str) -> f64 {
        let labels = [("phase", "generation"), ("outcome", code)];
        self.sum(&GENERATIONS, "baton_worker_requests_total", &labels).await
    }

    /// Sum over those of `workers` that live.
    pub async fn sum(&self, workers: &[usize], name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut sum = 0.0;
        for index in workers {
            if let Ok(metrics) =
                Metrics::of(self.worker(*index).address, "/prometheus/metrics").await
            {
                sum += metrics.sum(name, labels);
            }
        }
        sum
    }

    /// What the router counted.
    pub async fn router(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let answer = self.running.cluster.admin().get("/metrics").await.unwrap();
        Metrics::parse(std::str::from_utf8(&answer.body).unwrap()).sum(name, labels)
    }

    /// Second and later tries of the router in this role.
    pub async fn retries(&self, role: &str) -> f64 {
        self.router("baton_router_retries_total", &[("role", role)]).await
    }

    /// Workers that the router has taken out of use since all were ready.
    pub fn blamed(&self) -> Vec<usize> {
        let log = self.running.cluster.router.as_ref().unwrap().process.log();
        let lines = log.lines().skip(self.started);
        let lines: Vec<_> = lines.filter(|line| line.contains("worker is not usable")).collect();
        let is_blamed = |index: &usize| {
            let address = self.worker(*index).address.to_string();
            lines.iter().any(|line| line.contains(&address))
        };
        (0..self.running.cluster.workers.len()).filter(is_blamed).collect()
    }

    /// Nothing is left: blocks, leases, orphans. Then the end.
    pub async fn end(self) {
        all_free(&self.running.cluster, PATIENCE).await;
        assert_eq!(self.router("baton_router_orphaned_kv_total", &[]).await, 0.0, "orphaned KV");
        self.running.stop();
    }

    /// Waits until a worker's metric is at least `least`.
    pub async fn until(&self, index: usize, name: &str, labels: &[(&str, &str)], least: f64) {
        eventually(PATIENCE, &format!("{name} {labels:?} >= {least}"), || async {
            (metrics(self.worker(index)).await.sum(name, labels) >= least).then_some(())
        })
        .await;
    }
}
