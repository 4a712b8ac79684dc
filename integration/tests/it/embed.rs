//! The example of embedding as somebody would run it: a foreign Pingora proxy with Baton's engine inside.

use std::net::SocketAddr;
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::{Behaviour, MockWorker};
use baton_integration::process::{Process, Program, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{READY, STOP};

const CHAT: &str = "/v1/chat/completions";

/// The example in front of a scripted worker of each role.
struct Scene {
    context: MockWorker,
    generation: MockWorker,
    proxy: Process,
    client: Client,
    _folder: TempDir,
}

async fn scene() -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let context = MockWorker::start(true, 4).await.unwrap();
    let generation = MockWorker::start(true, 4).await.unwrap();
    let listen: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let args = [listen, context.address, generation.address].map(|address| address.to_string());
    let proxy = Program::new("examples/embed", "embed", args).spawn(folder.path()).unwrap();
    let client = Client::new(listen);
    eventually(READY, "the example serves", || async { client.get("/hello").await.ok().map(drop) })
        .await;
    Scene { context, generation, proxy, client, _folder: folder }
}

fn chat(stream: bool) -> Value {
    let messages = json!([{"role": "user", "content": "hello"}]);
    json!({"model": "mock", "messages": messages, "max_tokens": 5, "stream": stream})
}

#[tokio::test]
async fn an_embedding_proxy_keeps_its_own_routes_and_hands_completions_to_both_workers() {
    let mut scene = scene().await;
    let client = scene.client;
    let own = client.get("/hello").await.unwrap();
    assert_eq!((own.status, own.json().unwrap()), (200, "hello".into()));
    assert_eq!(client.get("/elsewhere").await.unwrap().status, 404, "its own error, not ours");

    let answer = client.post(CHAT, &chat(false)).await.unwrap().ok().unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "A 0 1 2 3");
    let events = client.stream(CHAT, &chat(true)).await.unwrap().events().await.unwrap();
    let pieces = events.iter().filter_map(|one| one["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), "A 0 1 2 3");
    for (worker, kind) in [(&scene.context, "context_only"), (&scene.generation, "generation_only")]
    {
        let kinds = worker.requests().into_iter().map(|one| one.param("request_type").clone());
        assert_eq!(kinds.collect::<Vec<_>>(), [kind, kind]);
    }

    let wrong = client.post(CHAT, &json!([1])).await.unwrap();
    assert_eq!((wrong.status, wrong.error_code().unwrap()), (400, "invalid_request".into()));
    let wrong = client.get(CHAT).await.unwrap();
    assert_eq!((wrong.status, wrong.error_code().unwrap()), (405, "method_not_allowed".into()));
    assert_eq!(scene.proxy.terminate(STOP).unwrap().code(), Some(0));
}

#[tokio::test]
async fn an_embedding_proxy_ends_broken_answers_as_broken() {
    let scene = scene().await;
    scene.generation.behave(Behaviour::BreakAfter(2));
    let mut stream = scene.client.stream(CHAT, &chat(true)).await.unwrap();
    let mut events = Vec::new();
    let broken = loop {
        match stream.event().await {
            Ok(Some(event)) => events.push(event),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(broken, "the framing must not end well: {events:?}");
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "generation_aborted");
}

#[tokio::test]
async fn an_embedding_proxy_that_is_told_to_stop_finishes_its_streams() {
    let mut scene = scene().await;
    scene.generation.behave(Behaviour::Pace(Duration::from_millis(100)));
    let mut stream = scene.client.stream(CHAT, &chat(true)).await.unwrap();
    let first = stream.event().await.unwrap().unwrap();
    assert!(first.contains("\"A\""), "{first}");
    scene.proxy.signal("TERM").unwrap();
    let rest = stream.events().await.unwrap();
    assert_eq!(rest.len(), 4, "{rest:?}");
    assert_eq!(scene.proxy.wait(STOP).unwrap().code(), Some(0));
}
