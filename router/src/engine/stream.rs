//! Forwarding an event stream: bytes as they come, unparsed, while the client's and the worker's ends are watched.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use baton_shared::wire::error::ErrorCode;
use bytes::Bytes;
use tokio::time::{Instant, Sleep};

use super::downstream::Downstream;
use crate::client::{ClientError, Exchange};

/// The client and the timer are looked at after each wake that brought nothing from the worker, and at every event of
/// this many.
const LOOK_EVERY: u32 = 16;

/// How a stream ended.
#[derive(Debug)]
pub(super) enum End {
    /// As it should.
    Complete,
    /// The worker broke it off, for this reason; the client was told.
    Broken(String),
    /// The client left.
    ClientGone,
}

/// When a stream is given up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Longest time between two pieces.
    pub(super) idle: Duration,
    /// End of the whole request.
    pub(super) deadline: Instant,
}

enum Event {
    Piece(Bytes),
    End,
    Broken(ClientError),
    Gone,
    Timer,
}

/// Sends `first` and everything after it. The head must have been sent.
pub(super) async fn forward(
    downstream: &mut impl Downstream,
    exchange: &mut Exchange,
    first: Bytes,
    patience: Patience,
) -> End {
    let mut last = Instant::now();
    let due = |last: Instant| (last + patience.idle).min(patience.deadline);
    let mut timer = pin!(tokio::time::sleep_until(due(last)));
    let mut ends_event = first.ends_with(b"\n\n");
    if downstream.body(first, false).await.is_err() {
        return End::ClientGone;
    }
    let mut unwatched = LOOK_EVERY;
    loop {
        let broken = match next(downstream, exchange, timer.as_mut(), &mut unwatched).await {
            Event::Piece(piece) => {
                unwatched = unwatched.saturating_add(1);
                last = Instant::now();
                ends_event = piece.ends_with(b"\n\n");
                if downstream.body(piece, false).await.is_err() {
                    return End::ClientGone;
                }
                continue;
            }
            // The timer is only moved when it fires: cheaper than at every event.
            Event::Timer if Instant::now() < due(last) => {
                timer.as_mut().reset(due(last));
                unwatched = LOOK_EVERY;
                continue;
            }
            Event::End => {
                let ended = downstream.body(Bytes::new(), true).await;
                return if ended.is_ok() { End::Complete } else { End::ClientGone };
            }
            Event::Gone => return End::ClientGone,
            Event::Timer if Instant::now() >= patience.deadline => {
                "the request took longer than `routing.request_timeout`".to_owned()
            }
            Event::Timer => format!("the worker sent nothing for {:?}", patience.idle),
            Event::Broken(error) => error.to_string(),
        };
        let event = error_event(ends_event, &broken);
        // Best effort: the broken framing that follows says the same.
        let _ = downstream.body(event, false).await;
        return End::Broken(broken);
    }
}

/// The next thing that happens; `unwatched` counts events since the last look at client and timer. Both keep our waker
/// from that look, so a wake without bytes from the worker may come from either.
async fn next(
    downstream: &mut impl Downstream,
    exchange: &mut Exchange,
    mut timer: Pin<&mut Sleep>,
    unwatched: &mut u32,
) -> Event {
    let mut woken = false;
    poll_fn(|cx| {
        match exchange.poll_next(cx) {
            Poll::Ready(Ok(Some(piece))) => return Poll::Ready(Event::Piece(piece)),
            Poll::Ready(Ok(None)) => return Poll::Ready(Event::End),
            Poll::Ready(Err(error)) => return Poll::Ready(Event::Broken(error)),
            Poll::Pending => {}
        }
        if woken || *unwatched >= LOOK_EVERY {
            *unwatched = 0;
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Timer);
            }
            let client = pin!(downstream.core().read_body_or_idle(true));
            if let Poll::Ready(Err(_)) = client.poll(cx) {
                return Poll::Ready(Event::Gone);
            }
        }
        woken = true;
        Poll::Pending
    })
    .await
}

/// The event that tells a client why its stream ends here; it begins a new event if the last one was cut.
fn error_event(at_boundary: bool, why: &str) -> Bytes {
    let body = ErrorCode::GenerationAborted.body(why, None);
    let json = serde_json::to_string(&body).unwrap_or_default();
    let start = if at_boundary { "" } else { "\n\n" };
    Bytes::from(format!("{start}data: {json}\n\n"))
}
