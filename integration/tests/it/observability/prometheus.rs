//! A real Prometheus with the shipped configuration scrapes a real cluster under load: every query has data.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::files;
use baton_integration::process::free_port;
use baton_shared::metric::Metric;
use http::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use toml::Table;

use super::boards;
use super::rules::{has_prometheus, promtool, values};
use crate::support::{READY, Running, start, token_ids};
use crate::tiny::{self, Tiny};

/// Scrapes of each target until the queries are asked: rates need two, and more that differ.
const SCRAPES: f64 = 8.0;
/// These come in a few seconds.
const PATIENCE: Duration = Duration::from_secs(120);
const SHIPPED: &str = "config/prometheus";
const PATH: &str = "/v1/completions";

/// A running Prometheus; ended on drop.
struct Prometheus {
    child: Child,
    client: Client,
    _folder: TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Nothing of it is kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// With the shipped files, but for the addresses and the time between two scrapes.
    async fn start(running: &Running) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = files::top().join(SHIPPED);
        let text = std::fs::read_to_string(shipped.join("prometheus.yml")).unwrap();
        let workers = running.cluster.workers.iter();
        let workers: Vec<_> = workers.map(|worker| format!("\"{}\"", worker.address)).collect();
        let mut written = text;
        for (of, to) in [
            ("\"localhost:9000\"", format!("\"{}\"", admin(running))),
            ("\"localhost:8001\", \"localhost:8002\", \"localhost:8003\"", workers.join(", ")),
            ("scrape_interval: 15s", "scrape_interval: 500ms".to_owned()),
            ("evaluation_interval: 15s", "evaluation_interval: 500ms".to_owned()),
        ] {
            assert_eq!(written.matches(of).count(), 1, "{of}");
            written = written.replace(of, &to);
        }
        std::fs::write(folder.path().join("prometheus.yml"), written).unwrap();
        std::fs::create_dir(folder.path().join("rules")).unwrap();
        for name in ["recording.yml", "alerts.yml"] {
            let name = Path::new("rules").join(name);
            std::fs::copy(shipped.join(&name), folder.path().join(&name)).unwrap();
        }
        promtool(folder.path(), "check config prometheus.yml").await;
        let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new("prometheus")
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"])
            .arg(format!("--web.listen-address={address}"))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let prometheus = Self { child, client: Client::new(address), _folder: folder };
        eventually(READY, "Prometheus is ready", || async {
            let answer = prometheus.client.get("/-/ready").await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
        prometheus
    }

    /// The series that a query gives now.
    async fn ask(&self, query: &str) -> Vec<Value> {
        let path = format!("/api/v1/query?query={}", encoded(query));
        let answer = self.client.get(&path).await.unwrap().json().unwrap();
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// The numbers among them.
    async fn numbers(&self, query: &str) -> Vec<f64> {
        let series = self.ask(query).await;
        let value = |one: &Value| one["value"][1].as_str().unwrap().parse::<f64>().unwrap();
        series.iter().map(value).filter(|value| value.is_finite()).collect()
    }
}

/// Percent-encoded.
fn encoded(text: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric();
    let one = |byte: u8| {
        if keep(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
    };
    text.bytes().map(one).collect()
}

fn admin(running: &Running) -> String {
    let text = std::fs::read_to_string(running.folder.path().join("router.toml")).unwrap();
    let table: Table = toml::from_str(&text).unwrap();
    table["server"]["admin_listen"].as_str().unwrap().to_owned()
}

/// One of everything: answers, streamed and whole, one twice; mistakes; a client that leaves.
async fn load(client: Client, model: &Tiny, round: u64) {
    let ask = |seed: u64, more: Value| {
        let prompt = token_ids(seed, 100, model.vocab);
        let mut ask = json!({"model": model.name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true});
        ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ask
    };
    for seed in [round, 7] {
        client.post(PATH, &ask(seed, json!({}))).await.unwrap().ok().unwrap();
    }
    let stream = ask(round + 1000, json!({"stream": true}));
    client.stream(PATH, &stream).await.unwrap().events().await.unwrap();
    let wrong = client.post(PATH, &ask(round, json!({"prompt": 5}))).await.unwrap();
    assert_eq!(wrong.status, 400);
    let long = ask(round + 2000, json!({"stream": true, "max_tokens": 200}));
    let mut left = client.stream(PATH, &long).await.unwrap();
    assert!(left.piece().await.unwrap().is_some());
    drop(left);
}

/// A reload that is taken, and one that is not.
async fn reload(admin: Client) {
    let put = async |text: &'static str| {
        let headers = [("content-type", "application/toml")];
        let answer = admin.send(Method::PUT, "/admin/table", &headers, text.into()).await.unwrap();
        answer.whole().await.unwrap().status
    };
    assert_eq!(put("[routing]\nattempts = 4\n").await, 200);
    assert_eq!(put("[routing]\nattempts = 0\n").await, 400);
}

/// Whether a query is about metrics that this machine's workers do not have.
fn is_elsewhere(query: &str) -> bool {
    let only = |row: &&Metric| row.only.is_some();
    let tables = [baton_router::metrics::TABLE.concat(), baton_workerd::metrics::TABLE.concat()];
    tables.concat().iter().filter(only).any(|row| query.contains(row.name))
}

async fn check_metrics(running: &Running) {
    let router = running.cluster.admin().get("/metrics").await.unwrap().body;
    let worker = running.cluster.workers[1].client().get("/prometheus/metrics").await.unwrap().body;
    for (name, text) in [("router.prom", router), ("worker.prom", worker)] {
        std::fs::write(running.folder.path().join(name), text).unwrap();
        promtool(running.folder.path(), &format!("check metrics < {name}")).await;
    }
}

#[tokio::test]
async fn every_query_of_every_board_and_rule_has_data_when_a_cluster_is_under_load() {
    if !has_prometheus("every_query_of_every_board_and_rule_has_data").await {
        return;
    }
    let model = tiny::model(4);
    let running = start(&model.path, 2, 1, Table::new()).await;
    let prometheus = Prometheus::start(&running).await;
    let client = running.cluster.client();
    let (begun, mut round) = (Instant::now(), 0);
    loop {
        assert!(begun.elapsed() < PATIENCE, "Prometheus does not scrape");
        load(client, &model, round).await;
        if round == 2 {
            reload(running.cluster.admin()).await;
        }
        round += 1;
        let scrapes = prometheus.numbers("count_over_time(up[5m])").await;
        if round > 2 && scrapes.len() == 4 && scrapes.iter().all(|count| *count >= SCRAPES) {
            break;
        }
    }
    check_metrics(&running).await;

    let mut without = Vec::new();
    for boards::Query { place, text } in boards::queries() {
        if !is_elsewhere(&text) && prometheus.numbers(&text).await.is_empty() {
            without.push(format!("{place}: {text}"));
        }
    }
    for (selector, label) in boards::variables() {
        let series = prometheus.ask(&selector).await;
        let has_label = series.iter().all(|one| one["metric"][&label].is_string());
        assert!(has_label && !series.is_empty(), "{selector} by {label}: {series:?}");
    }
    let rules = |name: &str| {
        std::fs::read_to_string(files::top().join(SHIPPED).join("rules").join(name)).unwrap()
    };
    for name in values(&rules("recording.yml"), "record: ") {
        if prometheus.numbers(name).await.is_empty() {
            without.push(name.to_owned());
        }
    }
    assert!(without.is_empty(), "no data:\n{}", without.join("\n"));

    let answer = prometheus.client.get("/api/v1/rules").await.unwrap().json().unwrap();
    let groups = answer["data"]["groups"].as_array().unwrap();
    let rules: Vec<_> =
        groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    assert!(rules.len() > 30, "{}", rules.len());
    assert!(rules.iter().all(|rule| rule["health"] == "ok"), "{rules:#?}");
    let active: Vec<_> = rules
        .iter()
        .filter(|rule| rule["alerts"].as_array().is_some_and(|alerts| !alerts.is_empty()))
        .map(|rule| rule["name"].as_str().unwrap())
        .collect();
    assert!(active.contains(&"BatonReloadRefused"), "{active:?}");
    for quiet in ["BatonRouterDown", "BatonWorkerDown", "BatonNoUsableWorkers", "BatonRouterErrors"]
    {
        assert!(!active.contains(&quiet), "{active:?}");
    }
    drop(prometheus);
    running.stop();
}
