//! Clients that try to slip something past the router.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use baton_integration::process::{Process, free_port};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::scripted;
use crate::systemd::{Scene, end};

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"model": "mock", "prompt": "hidden"}"#;

/// A router, where it listens, and what was sent to its workers.
async fn scene() -> (Scene, Process, SocketAddr) {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let scene = Scene::new(&address.to_string()).await;
    let router = scene.start();
    scene.ready().await;
    (scene, router, address)
}

fn head(method: &str, path: &str, version: &str, lines: &str) -> String {
    format!("{method} {path} HTTP/{version}\r\nhost: r\r\n{lines}\r\n")
}

fn post(lines: &str) -> String {
    head("POST", PATH, "1.1", lines)
}

/// A request that would be served, were it one: the last on its connection.
fn hidden() -> String {
    post(&format!("connection: close\r\ncontent-length: {}\r\n", BODY.len())) + BODY
}

/// Everything that comes back for these bytes until the router closes the connection; reset is closed, too.
async fn answers(address: SocketAddr, request: String) -> String {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = client.read_to_end(&mut answer);
    let _ = tokio::time::timeout(crate::support::STOP, read).await.expect("the end");
    String::from_utf8(answer).unwrap()
}

/// What was `sent` had no answer, or one whose status begins so, and no worker saw any of it.
fn assert_turned_away(scene: &Scene, answer: &str, status: &str, sent: &str) {
    let refused = format!("HTTP/1.1 {status}");
    assert!(answer.is_empty() || answer.starts_with(&refused), "{sent}{answer}");
    assert!(answer.matches("HTTP/1.").count() <= 1, "{sent}{answer}");
    assert!(scene.workers[0].requests().is_empty(), "{sent}");
}

/// Heads that two readers can take for requests of different length: whoever stands before us may have taken what follows
/// for a part of the first request's body, and checked nothing of it.
#[tokio::test]
async fn a_request_hidden_behind_an_ambiguous_length_is_never_served() {
    let (scene, router, address) = scene().await;
    let hidden = hidden();
    let whole = hidden.len() + 5;
    for (version, lines) in [
        ("1.1", format!("content-length: {whole}\r\ntransfer-encoding: chunked\r\n")),
        ("1.1", format!("transfer-encoding: chunked\r\ncontent-length: {whole}\r\n")),
        ("1.1", format!("content-length: 5\r\ncontent-length: {whole}\r\n")),
        ("1.1", format!("content-length: 5, {whole}\r\n")),
        ("1.1", "content-length: +5\r\n".to_owned()),
        ("1.1", "content-length: 0x5\r\n".to_owned()),
        ("1.1", "content-length: 5 5\r\n".to_owned()),
        ("1.1", "content-length : 5\r\n".to_owned()),
        ("1.1", "transfer-encoding: xchunked\r\n".to_owned()),
        ("1.1", "transfer-encoding: chunked, identity\r\n".to_owned()),
        ("1.1", "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n".to_owned()),
        ("1.1", "transfer-encoding : chunked\r\n".to_owned()),
        ("1.1", "transfer-encoding:\x0bchunked\r\n".to_owned()),
        ("1.1", "x: y\r\n transfer-encoding: chunked\r\n".to_owned()),
        ("1.0", "connection: keep-alive\r\ntransfer-encoding: chunked\r\n".to_owned()),
    ] {
        let answer =
            answers(address, head("POST", PATH, version, &lines) + "0\r\n\r\n" + &hidden).await;
        assert_turned_away(&scene, &answer, "400 ", &lines);
    }
    end(router);
}

/// RFC 9112, 6.1 and 6.3: such bodies could be read, as chunks, but somebody else may have read them otherwise.
#[tokio::test]
async fn a_body_framed_in_more_than_one_way_is_refused_and_its_connection_closed() {
    let (scene, router, address) = scene().await;
    let chunked = format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len());
    for lines in [
        "transfer-encoding: identity, chunked\r\n".to_owned(),
        "transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n".to_owned(),
        "transfer-encoding: gzip, chunked\r\n".to_owned(),
        "transfer-encoding: chunked, chunked\r\n".to_owned(),
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n".to_owned(),
        "transfer-encoding: , chunked\r\n".to_owned(),
        "transfer-encoding: x;a=\", chunked\r\n".to_owned(),
        format!("content-length: {}\r\ntransfer-encoding: chunked\r\n", chunked.len()),
        format!("Transfer-Encoding: Chunked\r\nContent-Length: {}\r\n", BODY.len()),
        "transfer-encoding: chunked\ncontent-length: 5\r\n".to_owned(),
    ] {
        for path in [PATH, "/version"] {
            let method = if path == PATH { "POST" } else { "GET" };
            let answer =
                answers(address, head(method, path, "1.1", &lines) + &chunked + &hidden()).await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{lines}{answer}");
            assert!(answer.contains("Transfer-Encoding: chunked") || path != PATH, "{answer}");
            assert_eq!(answer.matches("HTTP/1.").count(), 1, "{lines}{answer}");
        }
        assert!(scene.workers[0].requests().is_empty(), "{lines}");
    }
    for lines in ["transfer-encoding: chunked\r\n", "Transfer-Encoding:  CHUNKED \r\n"] {
        let answer = answers(address, post(lines) + &chunked + &hidden()).await;
        assert_eq!(answer.matches("HTTP/1.1 200 ").count(), 2, "{lines}{answer}");
    }
    end(router);
}

#[tokio::test]
async fn a_request_hidden_in_broken_chunks_is_never_served() {
    let (scene, router, address) = scene().await;
    let length = BODY.len();
    for chunks in [
        format!("0x{length:x}\r\n{BODY}\r\n0\r\n\r\n"),
        format!("+{length:x}\r\n{BODY}\r\n0\r\n\r\n"),
        format!("-{length:x}\r\n{BODY}\r\n0\r\n\r\n"),
        format!("{length:x}\n{BODY}\r\n0\r\n\r\n"),
        format!("{length:x}\r\n{BODY}0\r\n\r\n"),
        format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", length - 1),
        format!("1{length:016x}\r\n{BODY}\r\n0\r\n\r\n"),
        format!("ffffffffffffffff\r\n{BODY}\r\n0\r\n\r\n"),
        format!("fffffffffffffffffff\r\n{BODY}\r\n0\r\n\r\n"),
    ] {
        let answer =
            answers(address, post("transfer-encoding: chunked\r\n") + &chunks + &hidden()).await;
        assert_turned_away(&scene, &answer, "4", &chunks);
    }
    end(router);
}

/// Where nobody looks at a body it is a body all the same, and not the next request.
#[tokio::test]
async fn the_body_of_a_request_that_needs_none_is_not_taken_for_a_request() {
    let (scene, router, address) = scene().await;
    let inner = hidden();
    let last = head("GET", "/version", "1.1", "connection: close\r\n");
    for (method, path, status) in [
        ("GET", "/version", 200),
        ("HEAD", "/version", 200),
        ("GET", "/v1/models", 200),
        ("POST", "/version", 405),
        ("PUT", PATH, 405),
        ("GET", PATH, 405),
        ("DELETE", "/nothing", 404),
    ] {
        let sized = format!("content-length: {}\r\n", inner.len());
        let chunks = format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len());
        for (lines, body) in [(sized.as_str(), &inner), ("transfer-encoding: chunked\r\n", &chunks)]
        {
            let answer = answers(address, head(method, path, "1.1", lines) + body + &last).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{method} {path}: {answer}"
            );
            let served = scene.workers.iter().map(|worker| worker.requests().len()).sum::<usize>();
            assert_eq!(served, 0, "{method} {path} {lines}");
        }
    }
    end(router);
}

/// Of the router before these clients.
const HEAD_TIMEOUT: Duration = Duration::from_secs(1);

/// Writes a byte at a time until the router closes; how long that took.
async fn trickle(mut client: TcpStream, mut bytes: impl Iterator<Item = u8>) -> Duration {
    let begun = Instant::now();
    loop {
        // A write fails after the router has closed, if not this one then the next.
        if let Some(byte) = bytes.next()
            && client.write_all(&[byte]).await.is_err()
        {
            return begun.elapsed();
        }
        let read = tokio::time::timeout(Duration::from_millis(50), client.read(&mut [0; 64])).await;
        match read {
            Ok(Ok(0) | Err(_)) => return begun.elapsed(),
            Ok(Ok(_)) => panic!("an answer to half a request"),
            Err(_) => assert!(begun.elapsed() < crate::support::STOP, "it is never cut"),
        }
    }
}

#[tokio::test]
async fn a_client_that_trickles_its_head_or_says_nothing_is_cut() {
    let over = toml::toml! { [limits]
    head_timeout = "1s" };
    let scene = scripted::scene(1, 1, over).await;
    let connect = || async { TcpStream::connect(scene.router.address).await.unwrap() };
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: r\r\nx: ".bytes().chain(std::iter::repeat(b'a'));
    let (slow, mut begun) = (connect().await, connect().await);
    begun.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: r\r\n").await.unwrap();
    slow.set_nodelay(true).unwrap();
    let cut = tokio::join!(
        trickle(slow, head),
        trickle(begun, b"y: ".iter().copied().chain(std::iter::repeat(b'a'))),
        trickle(connect().await, std::iter::empty()),
    );
    for took in [cut.0, cut.1, cut.2] {
        assert!(took >= HEAD_TIMEOUT / 2, "{took:?}");
    }
    assert_eq!(scripted::text(scene.client()).await, "A 0 1 2 3", "others are served");
    scene.stop();
}

/// An HTTP/2 connection whose client knows that it will ask later.
#[tokio::test]
async fn an_http2_connection_is_not_taken_for_one_whose_head_is_late() {
    let over = toml::toml! { [limits]
    head_timeout = "200ms" };
    let scene = scripted::scene(1, 1, over).await;
    let mut client = TcpStream::connect(scene.router.address).await.unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    client.write_all(&settings).await.unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(600), async {
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).await
    });
    assert!(quiet.await.is_err(), "it is closed");
    client.write_all(&[0, 0, 8, 6, 0, 0, 0, 0, 0]).await.unwrap();
    client.write_all(b"anybody?").await.unwrap();
    let mut seen = Vec::new();
    while !seen.windows(8).any(|bytes| bytes == b"anybody?") {
        let read = client.read_buf(&mut seen);
        assert_ne!(read.await.unwrap(), 0, "closed without an answer");
    }
    scene.stop();
}
