//! Clients that try to slip something past the router.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use baton_integration::process::free_port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::scripted::{scene, text};
use crate::systemd::{Scene, end};

/// Heads that two readers can take for requests of different length: whoever stands before us may have taken what follows
/// for a part of the first request's body, and checked nothing of it.
#[tokio::test]
async fn a_request_hidden_behind_an_ambiguous_length_is_never_served() {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let scene = Scene::new(&address.to_string()).await;
    let router = scene.start();
    scene.ready().await;
    let post = |version: &str, lines: &str| {
        format!("POST /v1/completions HTTP/{version}\r\nhost: r\r\n{lines}\r\n")
    };
    let body = r#"{"model": "mock", "prompt": "hidden"}"#;
    let close = format!("connection: close\r\ncontent-length: {}\r\n", body.len());
    let hidden = post("1.1", &close) + body;
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
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = format!("{}0\r\n\r\n{hidden}", post(version, &lines));
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = client.read_to_end(&mut answer);
        // Reset or closed is refused, too.
        let _ = tokio::time::timeout(crate::support::STOP, read).await.expect("the end");
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{lines}{answer}");
        assert!(answer.matches("HTTP/1.").count() <= 1, "{lines}{answer}");
        assert!(scene.workers[0].requests().is_empty(), "{lines}");
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
    let scene = scene(1, 1, over).await;
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
    assert_eq!(text(scene.client()).await, "A 0 1 2 3", "others are served");
    scene.stop();
}

/// An HTTP/2 connection whose client knows that it will ask later.
#[tokio::test]
async fn an_http2_connection_is_not_taken_for_one_whose_head_is_late() {
    let over = toml::toml! { [limits]
    head_timeout = "200ms" };
    let scene = scene(1, 1, over).await;
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
