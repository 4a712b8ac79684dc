//! A real router before scripted workers.

use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::cluster::{Cluster, Member, Plan, overlay, set};
use baton_integration::eventually::eventually;
use baton_integration::ledger::{Balance, Ledger};
use baton_integration::mock_worker::{Behaviour, MockWorker};
use baton_integration::process::free_port;
use baton_integration::scrape::Metrics;
use serde_json::{Value, json};
use tempfile::TempDir;
use toml::{Table, toml};

use crate::support::{READY, STOP};

/// The router, its workers, and what these hold for whom.
pub struct Scene {
    pub contexts: Vec<MockWorker>,
    pub generations: Vec<MockWorker>,
    pub ledger: Ledger,
    pub router: Member,
    pub admin: std::net::SocketAddr,
    pub folder: TempDir,
}

/// Workers that generate four words, `A 0 1 2 3`; round robin unless `over` says otherwise.
pub async fn scene(contexts: usize, generations: usize, over: Table) -> Scene {
    scene_of(contexts, generations, 4, over).await
}

/// The same with another number of words.
pub async fn scene_of(contexts: usize, generations: usize, words: usize, over: Table) -> Scene {
    scene_like(true, contexts, generations, words, over).await
}

/// The same, of workers that call themselves Baton's or TensorRT-LLM's.
pub async fn scene_like(
    baton: bool,
    contexts: usize,
    generations: usize,
    words: usize,
    over: Table,
) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let ledger = Ledger::default();
    let mut workers = [Vec::new(), Vec::new()];
    let mut servers = [Vec::new(), Vec::new()];
    for (role, count) in [contexts, generations].into_iter().enumerate() {
        for _ in 0..count {
            let mock = MockWorker::start_with(baton, words, Some(ledger.clone())).await.unwrap();
            let server = toml::Value::Table(
                [("url".to_owned(), mock.address.to_string().into())].into_iter().collect(),
            );
            servers[role].push(server);
            workers[role].push(mock);
        }
    }
    let admin = format!("127.0.0.1:{}", free_port().unwrap());
    let mut table = toml! {
        [routing]
        queue_timeout = "300ms"
        [context]
        policy = "round_robin"
        [generation]
        policy = "round_robin"
        [health]
        probe_interval = "200ms"
        [log]
        format = "text"
    };
    set(&mut table, &["server", "listen"], format!("127.0.0.1:{}", free_port().unwrap()));
    set(&mut table, &["server", "admin_listen"], admin.clone());
    set(&mut table, &["server", "threads"], 1);
    let [context, generation] = servers;
    set(&mut table, &["context", "servers"], context);
    set(&mut table, &["generation", "servers"], generation);
    overlay(&mut table, &over);
    let plan = Plan { router: Some(table), ..Plan::default() };
    let cluster = Cluster::start(&plan, folder.path(), READY).await.unwrap();
    let [contexts, generations] = workers;
    Scene {
        contexts,
        generations,
        ledger,
        router: cluster.router.unwrap(),
        admin: admin.parse().unwrap(),
        folder,
    }
}

impl Scene {
    pub fn client(&self) -> Client {
        self.router.client()
    }

    /// What the router has counted.
    pub async fn count(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        Metrics::of(self.admin, "/metrics").await.unwrap().sum(name, labels)
    }

    /// Waits until nothing is in flight and every lease was pulled or released.
    pub async fn settled(&self) -> Balance {
        eventually(Duration::from_secs(10), "nothing is in flight", || async {
            (self.count("baton_router_in_flight", &[]).await == 0.0).then_some(())
        })
        .await;
        eventually(Duration::from_secs(10), "every lease is pulled or released", || async {
            (self.ledger.balance().orphaned() == 0).then_some(())
        })
        .await;
        self.ledger.balance()
    }

    pub fn stop(mut self) {
        self.router.stop(STOP).unwrap();
    }
}

/// A request of `model` `mock`.
pub fn ask() -> Value {
    json!({"model": "mock", "prompt": "hello", "max_tokens": 5, "temperature": 0, "user": "someone"})
}

/// The same, streamed.
pub fn ask_stream() -> Value {
    let mut request = ask();
    request["stream"] = json!(true);
    request
}

/// An error in OpenAI's form.
pub fn refusal(status: u16, code: &str) -> Behaviour {
    let error = json!({"message": "scripted", "type": "server_error", "param": null, "code": code});
    Behaviour::Refuse(status, json!({"error": error}))
}

/// The text of an answer that must come.
pub async fn text(client: Client) -> String {
    let answer = client.post("/v1/completions", &ask()).await.unwrap().ok().unwrap();
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}
