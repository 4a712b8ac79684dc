//! Clients that try to slip something past the router.

use std::net::SocketAddr;

use baton_integration::process::free_port;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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
