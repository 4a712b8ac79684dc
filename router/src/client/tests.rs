//! The client against servers that speak from a script, byte by byte.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{read_request, serve};
use super::*;

const HEAD: &[u8] = b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: ";

fn request(pieces: &[Bytes]) -> Request<'_> {
    Request { head: HEAD, lines: b"x-request-id: 1\r\n", pieces }
}

async fn fresh(address: &Address, pieces: &[Bytes]) -> Result<Exchange, ClientError> {
    Connection::open(address).await?.exchange(request(pieces)).await
}

/// What a server that answers with `answer`, written byte by byte, is understood to say.
async fn understood(answer: &'static [u8]) -> Result<(u16, Bytes), ClientError> {
    let address = serve(move |_, mut stream| async move {
        read_request(&mut stream).await;
        stream.set_nodelay(true).unwrap();
        for byte in answer {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut exchange = fresh(&address, &[]).await?;
    let body = exchange.whole(1 << 20).await?;
    Ok((exchange.head().status, body))
}

#[tokio::test]
async fn answers_are_understood_in_every_framing_however_they_are_cut() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"[..],
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n4;x=y\r\nello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nsome: trailer\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
    ] {
        let (status, body) = understood(answer).await.unwrap();
        assert_eq!((status, &body[..]), (200, &b"hello"[..]));
    }
}

#[tokio::test]
async fn broken_answers_are_errors() {
    for answer in [
        &b""[..],
        b"HTTP/1.1 200",
        b"garbage garbage garbage\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n;5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloworld\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
    ] {
        assert!(understood(answer).await.is_err(), "{}", String::from_utf8_lossy(answer));
    }
}

#[tokio::test]
async fn chunks_that_came_together_are_given_out_joined() {
    let address = serve(|_, mut stream| async move {
        read_request(&mut stream).await;
        let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n4\r\nfghi\r\n0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        read_request(&mut stream).await;
    })
    .await;
    let mut exchange = fresh(&address, &[]).await.unwrap();
    let mut all = Vec::new();
    let mut pieces = 0;
    while let Some(bytes) = poll_fn(|cx| exchange.poll_next(cx)).await.unwrap() {
        all.extend_from_slice(&bytes);
        pieces += 1;
    }
    assert_eq!((&all[..], pieces), (&b"abcdefghi"[..], 1));
}

#[tokio::test]
async fn a_finished_connection_is_used_again_and_a_broken_one_is_not() {
    let address = serve(|count, mut stream| async move {
        while let Some((_, body)) = read_request(&mut stream).await {
            let length = if body == b"spoil" { 3 } else { 2 };
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n#{count}x");
            stream.write_all(&answer.as_bytes()[..answer.len() - 3 + length]).await.unwrap();
        }
    })
    .await;
    let limit = Duration::from_secs(5);
    for _ in 0..3 {
        let answer = call(std::slice::from_ref(&address), request(&[]), limit, 99).await.unwrap();
        assert_eq!(answer.body, "#0");
    }
    let spoil = [Bytes::from_static(b"spoil")];
    let exchange = Connection::pooled(&address).unwrap().exchange(request(&spoil)).await.unwrap();
    drop(exchange); // not read to its end
    assert!(Connection::pooled(&address).is_none());
    assert_eq!(
        call(std::slice::from_ref(&address), request(&[]), limit, 99).await.unwrap().body,
        "#1"
    );
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_is_stale_and_another_is_made() {
    let address = serve(|count, mut stream| async move {
        read_request(&mut stream).await;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{count}");
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let limit = Duration::from_secs(5);
    assert_eq!(
        call(std::slice::from_ref(&address), request(&[]), limit, 99).await.unwrap().body,
        "0"
    );
    let pooled = Connection::pooled(&address).unwrap();
    assert!(matches!(pooled.exchange(request(&[])).await, Err(ClientError::Stale)));
    assert_eq!(
        call(std::slice::from_ref(&address), request(&[]), limit, 99).await.unwrap().body,
        "1"
    );
    assert_eq!(
        call(std::slice::from_ref(&address), request(&[]), limit, 99).await.unwrap().body,
        "2"
    );
}

#[tokio::test]
async fn a_fresh_connection_that_breaks_is_not_called_stale() {
    let address = serve(|_, stream| async move { drop(stream) }).await;
    let error = fresh(&address, &[]).await.unwrap_err();
    assert!(matches!(error, ClientError::Closed | ClientError::Io(_)), "{error}");
}

#[tokio::test]
async fn an_answer_counts_although_the_worker_did_not_read_our_body() {
    let big = [Bytes::from(vec![b'x'; 8 << 20])];
    for linger in [false, true] {
        let address = serve(move |_, mut stream| async move {
            stream.readable().await.unwrap();
            let answer = b"HTTP/1.1 503 Busy\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\nno";
            stream.write_all(answer).await.unwrap();
            if linger {
                // Neither reads nor closes: the client must not wait for its body to be taken.
                std::future::pending::<()>().await;
            }
        })
        .await;
        let mut exchange = fresh(&address, &big).await.unwrap();
        assert_eq!((exchange.head().status, exchange.head().retry_after), (503, Some(7)));
        assert_eq!(exchange.whole(99).await.unwrap(), "no");
        exchange.finish();
        assert!(Connection::pooled(&address).is_none(), "the request was cut short");
    }
}

#[tokio::test]
async fn many_big_and_small_pieces_arrive_in_order() {
    let pieces: Vec<Bytes> = (0..40u8)
        .map(|index| Bytes::from(vec![index; if index % 3 == 0 { 100_000 } else { 1 }]))
        .collect();
    let expected = pieces.concat();
    let address = serve(|_, mut stream| async move {
        let (_, body) = read_request(&mut stream).await.unwrap();
        let sum: u64 = body.iter().zip(1u64..).map(|(byte, at)| u64::from(*byte) * at).sum();
        let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{sum}");
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let sum: u64 = expected.iter().zip(1u64..).map(|(byte, at)| u64::from(*byte) * at).sum();
    let mut exchange = fresh(&address, &pieces).await.unwrap();
    assert_eq!(exchange.whole(99).await.unwrap(), sum.to_string());
}

#[tokio::test]
async fn an_answer_above_the_limit_is_refused_before_it_is_read() {
    for framing in ["content-length: 100\r\n\r\n", "\r\n"] {
        let address = serve(move |_, mut stream| async move {
            read_request(&mut stream).await;
            let answer = format!("HTTP/1.1 200 OK\r\n{framing}{}", "x".repeat(100));
            stream.write_all(answer.as_bytes()).await.unwrap();
        })
        .await;
        let mut exchange = fresh(&address, &[]).await.unwrap();
        assert!(matches!(exchange.whole(99).await, Err(ClientError::TooBig(99))));
    }
}

#[tokio::test]
async fn dropping_an_exchange_closes_the_connection() {
    let (closed, mut seen) = tokio::sync::mpsc::channel(1);
    let address = serve(move |_, mut stream| {
        let closed = closed.clone();
        async move {
            read_request(&mut stream).await;
            let rest = stream.read(&mut [0; 8]).await;
            closed.send(matches!(rest, Ok(0) | Err(_))).await.unwrap();
        }
    })
    .await;
    let waiting = tokio::time::timeout(Duration::from_millis(50), fresh(&address, &[])).await;
    assert!(waiting.is_err());
    assert_eq!(seen.recv().await, Some(true));
}

#[tokio::test]
async fn a_unix_socket_is_a_worker_address_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("worker.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_buf(&mut Vec::with_capacity(999)).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    });
    let address = Address::Unix(path.into());
    let answer = call(std::slice::from_ref(&address), request(&[]), Duration::from_secs(5), 99)
        .await
        .unwrap();
    assert_eq!(answer.body, "ok");
}

#[tokio::test]
async fn a_refused_connection_is_told_from_one_that_broke() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    drop(listener);
    assert!(matches!(Connection::open(&address).await, Err(ClientError::Connect(_))));
}
