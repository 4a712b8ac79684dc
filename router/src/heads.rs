//! How long a client may take for the head of a request.
//!
//! Pingora bounds each read of a head but not the whole of it, and waits for ever for a connection's first bytes: a
//! client that sends nothing, or a byte now and then, would keep its connection. So a connection on which no head has
//! come in time is dropped from outside. While a request is served nobody looks at the clock.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use pingora_core::protocols::Stream;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::engine::KEEP_ALIVE;

/// What an HTTP/2 client sends first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// When the next head is due on one connection.
#[derive(Debug)]
pub(crate) struct HeadClock {
    /// `None` = a request is being served.
    due: Cell<Option<Instant>>,
    limit: Duration,
}

impl HeadClock {
    /// Of a new connection, on which a head may take as long as `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { due: Cell::new(Some(Instant::now() + limit)), limit }
    }

    /// A head has come.
    pub(crate) fn came(&self) {
        self.due.set(None);
    }

    /// Its request has ended; the client may be silent for a while before the next.
    pub(crate) fn ended(&self) {
        self.due.set(Some(Instant::now() + KEEP_ALIVE + self.limit));
    }

    /// When; `None` = a request is being served.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due.get()
    }
}

/// Whether the connection is to be an HTTP/2 one; `None` if its first bytes do not come in time.
pub(crate) async fn is_http2(stream: &mut Stream, timer: Pin<&mut Sleep>) -> Option<bool> {
    let mut preface = [0; PREFACE.len()];
    tokio::select! {
        biased;
        peeked = stream.try_peek(&mut preface) => Some(peeked.ok()? && preface == PREFACE),
        () = timer => None,
    }
}

/// Runs `serving` until a head is overdue by the clock of its connection, which it moves.
pub(crate) async fn watched<T>(
    serving: impl Future<Output = Option<T>>,
    clock: impl Fn() -> Option<Instant>,
    mut timer: Pin<&mut Sleep>,
) -> Option<T> {
    let mut serving = pin!(serving);
    poll_fn(|cx| {
        if let Poll::Ready(done) = serving.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        // The timer is only looked at between requests, and only moved when it has fired.
        while let Some(due) = clock() {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= due {
                tracing::debug!("a connection is closed: no head of a request came in time");
                return Poll::Ready(None);
            }
            timer.as_mut().reset(due);
        }
        Poll::Pending
    })
    .await
}

/// A timer for a connection of `clock`.
pub(crate) fn timer(clock: &HeadClock) -> Sleep {
    sleep_until(Instant::now() + clock.limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// How long a connection lasts that is served by `serving`.
    async fn lasts(serving: impl AsyncFnOnce(&HeadClock)) -> (Duration, bool) {
        let begun = Instant::now();
        let clock = HeadClock::new(LIMIT);
        let timer = pin!(timer(&clock));
        let serving = async {
            serving(&clock).await;
            Some(())
        };
        let ended = watched(serving, || clock.due(), timer).await;
        (begun.elapsed(), ended.is_some())
    }

    async fn wait(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_no_head_comes_in_time_is_dropped() {
        let (took, is_whole) = lasts(async |_| std::future::pending().await).await;
        assert!(!is_whole && (5..=6).contains(&took.as_secs()), "{took:?}");
        // Bytes that wake it do not help.
        let trickle = async |_: &HeadClock| loop {
            wait(1).await;
        };
        let (took, is_whole) = lasts(trickle).await;
        assert!(!is_whole && (5..=6).contains(&took.as_secs()), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_served_may_take_as_long_as_it_takes() {
        let long = async |clock: &HeadClock| {
            wait(4).await;
            clock.came();
            wait(1000).await;
        };
        assert!(lasts(long).await.1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_kept_connection_has_the_time_of_silence_and_that_of_a_head_for_each_request() {
        let thrice = async |clock: &HeadClock| {
            for _ in 0..3 {
                wait(4).await;
                clock.came();
                wait(50).await;
                clock.ended();
                wait(76).await;
            }
            clock.came();
            clock.ended();
            std::future::pending().await
        };
        let (took, is_whole) = lasts(thrice).await;
        let most = 3 * (4 + 50 + 76) + KEEP_ALIVE.as_secs() + LIMIT.as_secs();
        assert!(!is_whole && (most..=most + 1).contains(&took.as_secs()), "{took:?}");
    }
}
