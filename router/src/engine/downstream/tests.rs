//! Request bodies over real connections.

use std::io::Write;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::engine::testing::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn request(lines: &str, body: &[u8]) -> Vec<u8> {
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: r\r\nconnection: close\r\n{lines}\r\n");
    [head.as_bytes(), body].concat()
}

fn sized(lines: &str, body: &[u8]) -> Vec<u8> {
    request(&format!("content-length: {}\r\n{lines}", body.len()), body)
}

async fn small_limits() -> (Scripted, Scripted, Scene) {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&generation], |config| {
        config.limits.max_body = "64KiB".parse().unwrap();
        config.limits.body_timeout = "200ms".parse().unwrap();
    })
    .await;
    (context, generation, scene)
}

#[tokio::test]
async fn bodies_arrive_whole_in_every_framing_and_coding() {
    let (context, _generation, scene) = small_limits().await;
    let body = json!({"prompt": "x".repeat(40_000)});
    let text = body.to_string();
    let chunks: String =
        text.as_bytes().chunks(999).map(|c| chunk(std::str::from_utf8(c).unwrap())).collect();
    let chunked =
        request("transfer-encoding: chunked\r\n", format!("{chunks}0\r\n\r\n").as_bytes());
    let packed = sized("content-encoding: gzip\r\n", &gzip(text.as_bytes()));
    for request in [sized("", text.as_bytes()), chunked, packed] {
        assert_eq!(scene.raw(&request).await.status, 200);
        assert_eq!(context.asks().last().unwrap().body["prompt"], body["prompt"]);
    }
}

#[tokio::test]
async fn bodies_above_the_limit_are_refused_and_the_refusal_can_be_read() {
    let (context, _generation, scene) = small_limits().await;
    let long = vec![b' '; 8 << 20];
    let chunked =
        [format!("{:x}\r\n", long.len()).as_bytes(), &long[..], b"\r\n0\r\n\r\n"].concat();
    let chunked = request("transfer-encoding: chunked\r\n", &chunked);
    let bomb = sized("content-encoding: gzip\r\n", &gzip(&long));
    for request in [sized("", &long), chunked, bomb] {
        let read = scene.raw(&request).await;
        assert_eq!((read.status, read.code()), (413, "body_too_large".to_owned()));
        assert!(read.head.contains("\r\nconnection: close"), "{}", read.head);
    }
    assert!(context.asks().is_empty());
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_refused_with_its_reason() {
    let (context, _generation, scene) = small_limits().await;
    for (request, status, code) in [
        (sized("content-encoding: br\r\n", b"{}"), 415, "unsupported_encoding"),
        (sized("content-encoding: gzip\r\n", b"{}"), 400, "invalid_request"),
        (sized("content-encoding: gzip\r\n", &gzip(b"{}")[..8]), 400, "invalid_request"),
        (request("transfer-encoding: chunked\r\n", b"x\r\n"), 400, "invalid_request"),
        (request("content-length: 10\r\n", b"{}"), 408, "body_timeout"),
        (sized("", b"{\"prompt\": "), 400, "invalid_request"),
        (sized("", b"{\"str\\u0065am\": true}"), 400, "invalid_request"),
    ] {
        let read = scene.raw(&request).await;
        assert_eq!((read.status, read.code().as_str()), (status, code), "{}", read.rest);
    }
    assert!(context.asks().is_empty());
}

#[tokio::test]
async fn a_client_that_waits_for_100_gets_it_or_its_refusal_at_once() {
    let (_context, _generation, scene) = small_limits().await;
    let mut client = scene.connect().await;
    let head = request("expect: 100-continue\r\ncontent-length: 2\r\n", b"");
    client.write_all(&head).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        client.read_buf(&mut seen).await.unwrap();
    }
    assert!(seen.starts_with(b"HTTP/1.1 100 "));
    client.write_all(b"{}").await.unwrap();
    assert_eq!(read_all(&mut client).await.status, 200);
    let before = std::time::Instant::now();
    let refused =
        scene.raw(&request("expect: 100-continue\r\ncontent-length: 999999\r\n", b"")).await;
    assert_eq!(refused.status, 413);
    assert!(before.elapsed() < super::LINGER, "nothing is coming, so nobody waits for it");
}

#[tokio::test]
async fn what_comes_while_a_worker_is_awaited_is_the_next_request() {
    let (context, _generation, scene) = small_limits().await;
    let one = String::from_utf8(sized("", b"{}")).unwrap();
    let kept = one.replace("connection: close\r\n", "");
    let read = scene.raw(format!("{kept}\r\n{kept}{one}").as_bytes()).await;
    assert_eq!(read.status, 200);
    assert_eq!(read.rest.matches("HTTP/1.1 200").count(), 2, "three answers in order");
    assert_eq!(context.asks().len(), 3);
}

#[tokio::test]
async fn another_method_is_refused_and_says_which_is_right() {
    let (_context, _generation, scene) = small_limits().await;
    let read =
        scene.raw(b"GET /v1/completions HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n").await;
    assert_eq!((read.status, read.code()), (405, "method_not_allowed".to_owned()));
    assert!(read.head.contains("\r\nallow: post"), "{}", read.head);
}
