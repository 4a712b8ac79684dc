//! The heartbeat that systemd's watchdog waits for (`WatchdogSec=`). It is real: a beat follows an answer that came through
//! the public port, so that a router which does not serve any more is restarted, whatever its other threads do.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use baton_shared::config::net::Listen;
use baton_shared::notify::{Notifier, watchdog_limit};
use pingora_core::server::ShutdownWatch;
use pingora_core::services::background::BackgroundService;
use pingora_http::RequestHeader;
use tokio::time::MissedTickBehavior;

use crate::client::head::render;
use crate::client::{Address, ClientError, Connection, Request};

/// What is asked: answered by the proxy itself, without a worker.
const PATH: &str = "/version";
/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// By what the proxy knows our own questions: a header's value that nobody else knows, so that nobody keeps out of the
/// access log with it.
#[derive(Clone, Debug)]
pub struct Mark(Arc<str>);

impl Mark {
    const NAME: &str = "x-baton-heartbeat";

    /// Whether a request is one of those.
    pub fn is_on(&self, head: &RequestHeader) -> bool {
        head.uri.path() == PATH
            && head
                .headers
                .get(Self::NAME)
                .is_some_and(|value| value.as_bytes() == self.0.as_bytes())
    }

    fn line(&self) -> String {
        format!("{}: {}\r\n", Self::NAME, self.0)
    }
}

impl Default for Mark {
    fn default() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()).into())
    }
}

/// Beats while the public port answers, and through a drain, which has a deadline of its own.
#[derive(Debug)]
pub struct Watchdog {
    notifier: Arc<Notifier>,
    port: Address,
    interval: Duration,
    mark: Mark,
}

impl Watchdog {
    /// For the `public` address as bound, with questions that bear `mark`; `None` where nobody waits for a beat of this process (`$WATCHDOG_USEC`, `$WATCHDOG_PID`).
    pub fn wanted(notifier: &Arc<Notifier>, public: &str, mark: &Mark) -> Option<Self> {
        let limit = watchdog_limit(|name| std::env::var(name).ok())?;
        // An answer may take a third, and the next question comes a third after the last one.
        let (notifier, port) = (Arc::clone(notifier), reached_at(public)?);
        Some(Self { notifier, port, interval: limit / 3, mark: mark.clone() })
    }

    async fn ask(&self) -> Result<(), ClientError> {
        let head = render("GET", PATH, "localhost");
        let connection = Connection::open(&self.port).await?;
        let lines = self.mark.line();
        let request = Request { head: &head, lines: lines.as_bytes(), pieces: &[] };
        let mut exchange = connection.exchange(request).await?;
        exchange.whole(MAX_ANSWER).await.map(drop)
    }
}

#[async_trait]
impl BackgroundService for Watchdog {
    async fn start(&self, shutdown: ShutdownWatch) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let failure = match tokio::time::timeout(self.interval, self.ask()).await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer within {:?}", self.interval)),
            };
            match failure {
                // The port is closed by a drain.
                Some(error) if !*shutdown.borrow() => {
                    tracing::warn!(error, "the public port does not answer: no heartbeat");
                }
                _ => self.notifier.say("WATCHDOG=1"),
            }
        }
    }
}

/// Where we reach a port of ours.
fn reached_at(bound: &str) -> Option<Address> {
    match bound.parse().ok()? {
        Listen::Unix(path) => Some(Address::Unix(path.into())),
        Listen::Tcp(at) => {
            let ip = match at.host.parse().ok()? {
                IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                ip => ip,
            };
            Some(Address::Tcp(SocketAddr::new(ip, at.port)))
        }
        // Always bound as one of the others.
        Listen::Inherited(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::net::UnixDatagram;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::watch;

    use super::*;

    /// Beats until the port was asked `questions` times, of which it answers the first `answers`.
    async fn beats(questions: usize, answers: usize, draining: bool) -> usize {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let heard = UnixDatagram::bind(&path).unwrap();
        heard.set_nonblocking(true).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let watchdog = Watchdog {
            notifier: Arc::new(Notifier::new(Some(path.as_os_str())).unwrap()),
            port: Address::Tcp(port.local_addr().unwrap()),
            interval: Duration::from_millis(300),
            mark: Mark::default(),
        };
        let (_keep, shutdown) = watch::channel(draining);
        let beating = tokio::spawn(async move { watchdog.start(shutdown).await });
        let mut unanswered = Vec::new();
        for question in 0..questions {
            let (mut stream, _) = port.accept().await.unwrap();
            if question < answers {
                let read = stream.read(&mut [0; 4096]).await.unwrap();
                assert_ne!(read, 0);
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
                // Closed by the one who asked.
                let _ = stream.read(&mut [0; 1]).await;
            } else {
                unanswered.push(stream);
            }
        }
        beating.abort();
        let mut text = [0; 32];
        let mut count = 0;
        loop {
            match heard.recv(&mut text) {
                Ok(length) => assert_eq!(&text[..length], b"WATCHDOG=1"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return count,
                Err(error) => panic!("{error}"),
            }
            count += 1;
        }
    }

    #[tokio::test]
    async fn the_heart_stops_when_the_port_does_not_answer_any_more() {
        // The question after the last answer comes when that answer's beat was sent.
        assert_eq!(beats(4, 2, false).await, 2);
    }

    #[tokio::test]
    async fn the_heart_beats_through_a_drain_although_the_port_is_closed() {
        assert_eq!(beats(4, 0, true).await, 3);
    }

    #[test]
    fn only_our_own_questions_bear_the_mark() {
        let (mark, other) = (Mark::default(), Mark::default());
        let head = |path: &str, value: &str| {
            let mut head = RequestHeader::build("GET", path.as_bytes(), None).unwrap();
            head.insert_header(Mark::NAME, value).unwrap();
            head
        };
        assert!(mark.is_on(&head(PATH, &mark.0)));
        assert!(!mark.is_on(&head(PATH, &other.0)) && !mark.is_on(&head(PATH, "")));
        assert!(!mark.is_on(&head("/v1/completions", &mark.0)));
        assert!(!mark.is_on(&RequestHeader::build("GET", PATH.as_bytes(), None).unwrap()));
    }

    #[test]
    fn a_port_on_every_address_is_reached_on_loopback() {
        let tcp = |text: &str| Some(Address::Tcp(text.parse().unwrap()));
        assert_eq!(reached_at("0.0.0.0:80"), tcp("127.0.0.1:80"));
        assert_eq!(reached_at("[::]:80"), tcp("[::1]:80"));
        assert_eq!(reached_at("10.0.0.7:80"), tcp("10.0.0.7:80"));
        let unix = Address::Unix(std::path::Path::new("/run/x.sock").into());
        assert_eq!(reached_at("unix:/run/x.sock"), Some(unix));
    }
}
