//! Clients that leave, and workers that stop.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Sends a request and gives the open connection.
async fn begin(worker: &Running, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(worker.address).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: w\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

fn long() -> Value {
    completion(json!({"max_tokens": 150, "ignore_eos": true}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_its_answer_is_made_frees_everything() {
    let worker = Running::start(&LocalNet::new()).await;
    let bodies = [long(), with(long(), json!({"stream": true})), context(&long(), 1 << 41)];
    for (body, count) in bodies.into_iter().zip(1..) {
        worker.script.hold();
        let stream = begin(&worker, &body).await;
        worker.until("the request runs", |status| status.running == 1).await;
        drop(stream);
        worker.until_counted("client_gone", count).await;
        worker.script.let_go();
        worker.until_all_free().await;
        worker.until("no lease is held", |status| status.leases == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_it_waits_frees_its_place() {
    let engine = EngineConfig { max_queue: 64, max_sequences: 1, ..EngineConfig::default() };
    let worker = Running::shaped(&LocalNet::new(), Shape { engine, ..Shape::default() }).await;
    worker.script.hold();
    let first = begin(&worker, &long()).await;
    worker.until("the first request runs", |status| status.running == 1).await;
    let second = begin(&worker, &long()).await;
    worker.until("the second request waits", |status| status.waiting == 1).await;
    drop(second);
    worker.until_counted("client_gone", 1).await;
    worker.script.let_go();
    worker.until("nobody waits", |status| status.waiting == 0).await;
    drop(first);
    worker.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_within_a_stream_frees_everything() {
    let worker = Running::start(&LocalNet::new()).await;
    let mut stream = begin(&worker, &with(long(), json!({"stream": true}))).await;
    let mut piece = [0; 16];
    assert!(stream.read(&mut piece).await.unwrap() > 0);
    drop(stream);
    worker.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back() {
    let engine = EngineConfig { max_queue: 1, max_sequences: 1, ..EngineConfig::default() };
    let worker = Running::shaped(&LocalNet::new(), Shape { engine, ..Shape::default() }).await;
    worker.script.hold();
    let running = begin(&worker, &long()).await;
    worker.until("the first request runs", |status| status.running == 1).await;
    let waiting = begin(&worker, &long()).await;
    worker.until("the second request waits", |status| status.waiting == 1).await;
    let refused = worker.post("/v1/completions", &long()).await;
    assert_eq!(refused.error(), (429, "queue_full".to_owned()));
    worker.script.let_go();
    drop((running, waiting));
    worker.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_worker_finishes_what_runs_and_refuses_the_rest() {
    let mut worker = Running::start(&LocalNet::new()).await;
    worker.script.hold();
    let address = worker.address;
    let body = long().to_string().into_bytes();
    let running =
        tokio::spawn(
            async move { Ok(exchange(address, "POST", "/v1/completions", body, &[]).await) },
        );
    worker.until("the request runs", |status| status.running == 1).await;
    worker.shutdown.take().unwrap().send(()).unwrap();
    worker.until("the engine drains", |status| status.is_draining).await;
    assert_eq!(worker.get("/health").await.error(), (503, "unavailable".to_owned()));
    assert_eq!(worker.get("/server_info").await.status, 200);
    let refused = worker.post("/v1/completions", &long()).await;
    assert_eq!(refused.error(), (503, "unavailable".to_owned()));
    worker.script.let_go();
    let answer = in_time(running).await;
    assert_eq!(answer.json()["usage"]["completion_tokens"], 150);
    let end = tokio::time::timeout(PATIENCE, worker.ended).await.unwrap().unwrap();
    assert_eq!(end, EngineEnd::Drained);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_worker_keeps_its_leases_until_they_are_released() {
    let mut worker = Running::start(&LocalNet::new()).await;
    let request = context(&completion(json!({"max_tokens": 8, "ignore_eos": true})), 1 << 41);
    assert_eq!(worker.post("/v1/completions", &request).await.status, 200);
    worker.shutdown.take().unwrap().send(()).unwrap();
    worker.until("the engine drains", |status| status.is_draining).await;
    assert!(!worker.ended.is_finished());
    let release = json!({"disagg_request_id": 1u64 << 41});
    assert_eq!(worker.post("/v1/disagg/release", &release).await.status, 200);
    let end = tokio::time::timeout(PATIENCE, worker.ended).await.unwrap().unwrap();
    assert_eq!(end, EngineEnd::Drained);
}

impl Running {
    /// Waits until so many requests with this outcome were counted.
    async fn until_counted(&self, outcome: &str, count: u64) {
        let wanted = format!("outcome=\"{outcome}\"");
        self.until("the request is counted", |status| {
            let metrics = self.worker.metrics.render(status, self.worker.mover.figures());
            let series = metrics.lines().filter(|line| line.contains(&wanted));
            let counts = series.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            counts.sum::<u64>() == count
        })
        .await;
    }
}
