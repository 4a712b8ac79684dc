//! Other tables in a running router: by file, by SIGHUP, by the admin port; and what else operators order there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use baton_integration::client::{Answer, Client};
use baton_integration::cluster::{Cluster, Member, Plan, overlay, set};
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::{Behaviour, MockWorker};
use baton_integration::process::free_port;
use baton_integration::scrape::Metrics;
use http::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use toml::{Table, toml};

use crate::support::{READY, STOP, note};

const PATIENCE: Duration = Duration::from_secs(20);
const PATH: &str = "/v1/completions";
const TOKEN: &str = "a-token-of-operators";

/// A real router before two scripted workers of each role.
struct Scene {
    contexts: Vec<MockWorker>,
    generations: Vec<MockWorker>,
    base: Table,
    router: Member,
    admin: Client,
    folder: TempDir,
}

impl Scene {
    async fn start(words: usize, over: Table) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut workers = [Vec::new(), Vec::new()];
        for role in &mut workers {
            for _ in 0..2 {
                role.push(MockWorker::start(true, words).await.unwrap());
            }
        }
        let [contexts, generations] = workers;
        let admin = format!("127.0.0.1:{}", free_port().unwrap());
        let mut base = toml! {
            [health]
            probe_interval = "200ms"
            [log]
            format = "text"
        };
        set(&mut base, &["server", "listen"], format!("127.0.0.1:{}", free_port().unwrap()));
        set(&mut base, &["server", "admin_listen"], admin.clone());
        set(&mut base, &["server", "threads"], 1);
        overlay(&mut base, &over);
        let table = with_servers(&base, &contexts, &generations, &[0, 1]);
        let plan = Plan { router: Some(table), ..Plan::default() };
        let cluster = Cluster::start(&plan, folder.path(), READY).await.unwrap();
        let router = cluster.router.unwrap();
        let admin = Client::new(admin.parse().unwrap());
        Self { contexts, generations, base, router, admin, folder }
    }

    /// A configuration with those servers of each role.
    fn table(&self, chosen: &[usize]) -> Table {
        with_servers(&self.base, &self.contexts, &self.generations, chosen)
    }

    /// Replaces the router's file as editors do.
    fn write(&self, text: &str) {
        let next = self.folder.path().join("next.toml");
        std::fs::write(&next, text).unwrap();
        std::fs::rename(next, self.folder.path().join("router.toml")).unwrap();
    }

    async fn order(&self, method: Method, path: &str, body: &str) -> Answer {
        let headers = [("content-type", "application/toml")];
        let body = body.to_owned().into();
        self.admin.send(method, path, &headers, body).await.unwrap().whole().await.unwrap()
    }

    async fn version(&self) -> u64 {
        let table = self.admin.get("/admin/table").await.unwrap().ok().unwrap();
        table["version"].as_u64().unwrap()
    }

    async fn reaches(&self, version: u64) {
        eventually(PATIENCE, "the next table is in use", || async {
            (self.version().await == version).then_some(())
        })
        .await;
    }

    async fn count(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let answer = self.admin.get("/metrics").await.unwrap();
        Metrics::parse(std::str::from_utf8(&answer.body).unwrap()).sum(name, labels)
    }

    async fn worker(&self, mock: &MockWorker) -> Value {
        let workers = self.admin.get("/admin/workers").await.unwrap().ok().unwrap();
        let id = mock.address.to_string();
        let list = workers["workers"].as_array().unwrap();
        list.iter().find(|worker| worker["id"] == id.as_str()).cloned().unwrap_or_default()
    }

    async fn ask(&self) {
        let answer = self.router.client().post(PATH, &request(false)).await.unwrap();
        assert_eq!(answer.status, 200);
    }

    fn stop(mut self) {
        self.router.stop(STOP).unwrap();
    }
}

fn with_servers(
    base: &Table,
    contexts: &[MockWorker],
    generations: &[MockWorker],
    chosen: &[usize],
) -> Table {
    let mut table = base.clone();
    for (role, mocks) in [("context", contexts), ("generation", generations)] {
        let servers = chosen.iter().map(|index| {
            let mut server = Table::new();
            server.insert("url".to_owned(), mocks[*index].address.to_string().into());
            toml::Value::Table(server)
        });
        set(&mut table, &[role, "servers"], servers.collect::<Vec<_>>());
    }
    table
}

fn text(table: &Table) -> String {
    toml::to_string(table).unwrap()
}

fn request(stream: bool) -> Value {
    json!({"model": "mock", "prompt": "hello", "max_tokens": 5, "stream": stream})
}

fn words(count: usize) -> String {
    (0..count).fold("A".to_owned(), |text, word| format!("{text} {word}"))
}

/// One request to its end; the text it got.
async fn text_of(client: Client, stream: bool) -> anyhow::Result<String> {
    let piece = |value: &Value| value["choices"][0]["text"].as_str().unwrap_or("?").to_owned();
    if !stream {
        return client.post(PATH, &request(false)).await?.ok().map(|answer| piece(&answer));
    }
    let events = client.stream(PATH, &request(true)).await?.events().await?;
    Ok(events.iter().map(piece).collect())
}

/// `reloads` other tables of all sources while `streams` streams are running all the time and more requests come.
async fn through_reloads(reloads: u64, streams: usize) {
    const WORDS: usize = 50;
    let mut scene = Scene::start(WORDS, Table::new()).await;
    for mock in &scene.generations {
        mock.behave(Behaviour::Pace(Duration::from_millis(20)));
    }
    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for index in 0..streams + 4 {
        let (client, done, served) =
            (scene.router.client(), Arc::clone(&done), Arc::clone(&served));
        let is_stream = index < streams;
        clients.spawn(async move {
            while !done.load(Ordering::Acquire) {
                assert_eq!(text_of(client, is_stream).await.unwrap(), words(WORDS));
                served.fetch_add(1, Ordering::AcqRel);
            }
        });
    }
    eventually(PATIENCE, "all streams are running", || async {
        (scene.count("baton_router_in_flight", &[]).await >= streams as f64).then_some(())
    })
    .await;
    let memory = scene.router.process.memory().unwrap();
    // Workers come, go and come back; the last step replaces all of them.
    let tables: Vec<_> =
        [[0, 1].as_slice(), &[0], &[1, 0], &[1]].map(|chosen| scene.table(chosen)).into();
    for version in 2..reloads + 2 {
        let mut table = tables[version as usize % tables.len()].clone();
        set(&mut table, &["routing", "attempts"], 3 + version as i64 % 5);
        match version % 40 {
            0 => scene.write(&text(&table)),
            even if even % 2 == 0 => {
                scene.write(&text(&table));
                scene.router.process.signal("HUP").unwrap();
            }
            5 => {
                let answer = scene.order(Method::POST, "/admin/table/rollback", "").await;
                assert_eq!(answer.ok().unwrap()["version"], version);
            }
            _ => {
                let answer = scene.order(Method::PUT, "/admin/table", &text(&table)).await;
                assert_eq!(answer.ok().unwrap()["version"], version);
            }
        }
        scene.reaches(version).await;
    }
    done.store(true, Ordering::Release);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let served = served.load(Ordering::Acquire) as f64;
    assert_eq!(scene.count("baton_router_requests_total", &[("outcome", "ok")]).await, served);
    assert_eq!(scene.count("baton_router_requests_total", &[]).await, served, "none went wrong");
    assert_eq!(scene.count("baton_router_retries_total", &[]).await, 0.0, "nor was one repeated");
    let applied = scene.count("baton_router_reloads_total", &[("outcome", "applied")]).await;
    assert_eq!(applied, reloads as f64);
    assert_eq!(scene.count("baton_router_reloads_total", &[("outcome", "refused")]).await, 0.0);
    for mock in scene.contexts.iter().chain(&scene.generations) {
        assert_eq!(mock.cancelled(), 0);
    }
    let grown = scene.router.process.memory().unwrap().saturating_sub(memory);
    note(format_args!("{reloads} reloads, {served} requests, {} KiB more memory", grown >> 10));
    assert!(grown < 32 << 20, "memory grew by {grown} bytes");
    eventually(PATIENCE, "nothing is counted on any worker", || async {
        let busy = scene.count("baton_router_worker_in_flight", &[]).await;
        (busy == 0.0).then_some(())
    })
    .await;
    scene.stop();
}

#[tokio::test]
async fn streams_and_requests_go_on_through_reloads_from_every_source() {
    through_reloads(80, 20).await;
}

#[tokio::test]
#[ignore = "long: `make test-long`"]
async fn two_hundred_streams_go_on_through_a_thousand_reloads() {
    through_reloads(1000, 200).await;
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_says_where_it_is_broken() {
    let mut scene = Scene::start(4, Table::new()).await;
    let path = scene.folder.path().join("router.toml").display().to_string();
    let good = text(&scene.table(&[0, 1]));
    let broken = format!("[routing]\nattempts = 0\n{good}");
    let mistake = "`routing.attempts` = `0`: must be at least 1";
    for by_signal in [false, true] {
        let refused = |source| [("source", source), ("outcome", "refused")];
        let source = if by_signal { "sighup" } else { "file" };
        scene.write(&broken);
        if by_signal {
            scene.router.process.signal("HUP").unwrap();
        }
        eventually(PATIENCE, "the file was refused", || async {
            let count = scene.count("baton_router_reloads_total", &refused(source)).await;
            (count >= 1.0).then_some(())
        })
        .await;
    }
    let log = scene.router.process.log();
    assert!(log.contains(&format!("{path}:2: {mistake}")), "{log}");
    let answer = scene.order(Method::PUT, "/admin/table", &broken).await;
    assert_eq!((answer.status, answer.error_code().unwrap().as_str()), (400, "invalid_request"));
    let message = answer.json().unwrap()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, format!("line 2: {mistake}"));
    let answer = scene.order(Method::PUT, "/admin/table", "[server]\nthreads = 2\n").await;
    let message = answer.json().unwrap()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("`server.") && message.contains("restart the router"), "{message}");
    assert_eq!(scene.version().await, 1);
    scene.ask().await;
    scene.write(&text(&scene.table(&[1])));
    scene.reaches(2).await;
    scene.ask().await;
    scene.stop();
}

#[tokio::test]
async fn a_section_that_is_put_may_leave_out_what_needs_a_restart() {
    let scene = Scene::start(4, Table::new()).await;
    let answer = scene.order(Method::PUT, "/admin/table", "[log]\naccess = true\n").await;
    let changes = answer.ok().unwrap()["changes"].clone();
    assert_eq!(changes, json!(["log.access: false -> true"]), "`log.format` is as it was");
    let answer = scene.order(Method::PUT, "/admin/table", "[server]\nthreads = 1\n").await;
    assert_eq!(answer.ok().unwrap(), json!({"version": 2, "changes": []}));
    scene.ask().await;
    eventually(PATIENCE, "the request is in the log", || async {
        scene.router.process.log().contains("baton_router::access").then_some(())
    })
    .await;
    scene.stop();
}

#[tokio::test]
async fn a_removed_worker_finishes_its_stream_and_counts_on_when_it_comes_back() {
    let scene = Scene::start(100, Table::new()).await;
    let answer = scene.order(Method::PUT, "/admin/table", &text(&scene.table(&[0]))).await;
    assert_eq!(answer.status, 200);
    scene.generations[0].behave(Behaviour::Pace(Duration::from_millis(20)));
    let mut stream = scene.router.client().stream(PATH, &request(true)).await.unwrap();
    stream.event().await.unwrap().unwrap();
    let gone = &scene.generations[0];
    scene.order(Method::PUT, "/admin/table", &text(&scene.table(&[1]))).await.ok().unwrap();
    let worker = scene.worker(gone).await;
    assert_eq!((&worker["removed"], &worker["in_flight"]), (&json!(true), &json!(1)));
    let name = gone.address.to_string();
    let metrics = scene.admin.get("/metrics").await.unwrap();
    assert!(!String::from_utf8_lossy(&metrics.body).contains(&name), "its series are gone");
    scene.ask().await;
    assert_eq!(scene.generations[1].requests().len(), 1);
    let answer = scene.order(Method::POST, "/admin/table/rollback", "").await.ok().unwrap();
    assert_eq!(answer["version"], 4);
    let worker = scene.worker(gone).await;
    assert_eq!((&worker["removed"], &worker["in_flight"]), (&json!(false), &json!(1)));
    // The first event was taken from it above.
    assert_eq!(stream.events().await.unwrap().len(), 100);
    assert_eq!(gone.cancelled(), 0);
    scene.stop();
}

#[tokio::test]
async fn a_drained_worker_gets_nothing_new_until_it_is_taken_back() {
    let scene = Scene::start(4, Table::new()).await;
    eventually(PATIENCE, "both are usable", || async {
        let up = scene.count("baton_router_worker_up", &[("role", "generation")]).await;
        (up == 2.0).then_some(())
    })
    .await;
    let drained = &scene.generations[0];
    let path = format!("/admin/workers/{}", drained.address);
    for changed in [true, false] {
        let answer = scene.order(Method::POST, &format!("{path}/drain"), "").await;
        assert_eq!(answer.ok().unwrap()["changed"], changed);
    }
    for _ in 0..6 {
        scene.ask().await;
    }
    assert_eq!((drained.requests().len(), scene.generations[1].requests().len()), (0, 6));
    let worker = scene.worker(drained).await;
    assert_eq!((&worker["drained"], &worker["condition"]), (&json!(true), &json!("up")));
    let history = worker["history"].as_array().unwrap();
    assert_eq!((&history[0]["from"], &history[0]["to"]), (&json!("unproven"), &json!("up")));
    assert_eq!(scene.count("baton_router_worker_up", &[("role", "generation")]).await, 1.0);
    scene.order(Method::POST, &format!("{path}/undrain"), "").await.ok().unwrap();
    for _ in 0..6 {
        scene.ask().await;
    }
    assert!(!drained.requests().is_empty());
    let none = scene.order(Method::POST, "/admin/workers/nobody:1/drain", "").await;
    assert_eq!(none.status, 404);
    scene.stop();
}

#[tokio::test]
async fn the_table_is_put_back_in_json_as_it_was_shown() {
    let scene = Scene::start(4, Table::new()).await;
    let shown = scene.admin.get("/admin/table").await.unwrap().ok().unwrap();
    assert_eq!((&shown["version"], &shown["source"]), (&json!(1), &json!("file")));
    let put = async |table: &Value| {
        let headers = [("content-type", "application/json")];
        let body = table.to_string().into();
        let stream = scene.admin.send(Method::PUT, "/admin/table", &headers, body).await.unwrap();
        stream.whole().await.unwrap()
    };
    assert_eq!(put(&shown["table"]).await.ok().unwrap(), json!({"version": 1, "changes": []}));
    let mut other = shown["table"].clone();
    other["routing"]["attempts"] = json!(7);
    let expected = json!({"version": 2, "changes": ["routing.attempts: 3 -> 7"]});
    assert_eq!(put(&other).await.ok().unwrap(), expected);
    other["routing"]["attempts"] = json!("many");
    assert_eq!(put(&other).await.status, 400);
    let shown = scene.admin.get("/admin/table").await.unwrap().ok().unwrap();
    assert_eq!((&shown["source"], &shown["earlier"]), (&json!("admin"), &json!(1)));
    scene.stop();
}

#[tokio::test]
async fn operators_need_the_token_and_pages_in_a_browser_are_not_obeyed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let mut over = Table::new();
    set(&mut over, &["server", "admin_token_file"], file.display().to_string());
    let scene = Scene::start(4, over).await;
    let bearer = format!("Bearer {TOKEN}");
    let send = async |method: Method, path: &str, headers: &[(&str, &str)]| {
        let stream = scene.admin.send(method, path, headers, "debug".into()).await.unwrap();
        stream.whole().await.unwrap().status
    };
    for open in ["/metrics", "/healthz", "/readyz"] {
        assert_eq!(send(Method::GET, open, &[]).await, 200, "{open}");
    }
    let wrong = [("authorization", "Bearer somebody-elses-token")];
    let right = [("authorization", bearer.as_str())];
    for (method, path) in [(Method::GET, "/admin/workers"), (Method::PUT, "/admin/log-level")] {
        assert_eq!(send(method.clone(), path, &[]).await, 401);
        assert_eq!(send(method.clone(), path, &wrong).await, 401);
        assert_eq!(send(method, path, &right).await, 200);
    }
    let page = [right[0], ("origin", "http://example.com")];
    assert_eq!(send(Method::POST, "/admin/table/rollback", &page).await, 401);
    assert_eq!(send(Method::POST, "/admin/workers", &right).await, 405);
    let log = scene.router.process.log();
    assert!(log.contains("log level set by an operator"), "{log}");
    assert!(!log.contains(TOKEN), "the token is not logged");
    scene.stop();
}
