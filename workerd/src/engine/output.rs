//! Per-request output buffer: the engine appends and wakes, never waits; a slow client stalls nobody.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use baton_shared::id::LeaseId;
use baton_shared::kv::record::LeasedBlocks;
use baton_shared::wire::error::ErrorCode;

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// Vocabulary id.
    pub id: u32,
    /// Natural-log probability; 0 where none was asked for.
    pub logprob: f32,
    /// 1 = most probable; 0 where none was asked for.
    pub rank: u32,
    /// `(token, log-probability)`, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a receiver sees, in this order: `Started`, `Token`…, for a context pass `ContextDone`, then `Finished`; or `Failed` at any point, last.
#[derive(Clone, Debug)]
pub enum OutputEvent {
    /// The request was admitted; for a generation pass: its blocks have arrived and were checked. Nothing may be sent to the client before.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
        /// Until there were blocks (and, but for a generation pass, a slot).
        waited: Duration,
    },
    /// The next token.
    Token(TokenOut),
    /// The context pass is over and this is what a reader may fetch (`Finished(Length)` follows, though the text did
    /// not end); `None`: the text ended with its first token (stop id, `max_tokens` 1, longest sequence).
    ContextDone(Option<LeasedBlocks>),
    /// The sequence ended by itself.
    Finished(FinishReason),
    /// It ended by an error.
    Failed {
        /// What the client is told.
        code: ErrorCode,
        /// In words.
        message: String,
    },
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id, which is the last `Token` sent.
    Stop,
    /// `max_tokens`, or the model's longest sequence.
    Length,
}

/// The two ends of one request's output. `capacity` events at most wait in between: what the request can produce
/// (`max_tokens` and a few), so that running over is a bug and ends the request.
pub fn channel(capacity: usize) -> (OutputSender, OutputReceiver) {
    let buffer = Arc::new(Buffer { capacity, state: Mutex::new(State::default()) });
    let span = tracing::Span::current();
    (OutputSender { buffer: Arc::clone(&buffer), span }, OutputReceiver { buffer })
}

/// What is run when a receiver is dropped, with the leases in what it left unread. Must be quick and not block.
pub type OnClose = Arc<dyn Fn(&[LeaseId]) + Send + Sync>;

/// The engine's end. Dropped before a last event (`Finished`, `Failed`), it sends `Failed` itself.
pub struct OutputSender {
    buffer: Arc<Buffer>,
    /// The request's, for what the engine has to say of it.
    span: tracing::Span,
}

/// The request's end. Dropping it cancels the request.
pub struct OutputReceiver {
    buffer: Arc<Buffer>,
}

struct Buffer {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    events: VecDeque<OutputEvent>,
    /// The last event was pushed.
    is_complete: bool,
    /// The receiver is gone, or does not fit any more.
    is_closed: bool,
    waker: Option<Waker>,
    on_close: Option<OnClose>,
}

impl OutputSender {
    /// Appends an event and wakes the receiver; never waits. False if nobody will see it.
    pub fn push(&self, event: OutputEvent) -> bool {
        let mut state = self.buffer.lock();
        if state.is_closed || state.is_complete {
            return false;
        }
        let overflows = state.events.len() >= self.buffer.capacity;
        let event = if overflows { overflow(self.buffer.capacity) } else { event };
        state.is_complete = matches!(event, OutputEvent::Finished(_) | OutputEvent::Failed { .. });
        state.is_closed = overflows;
        state.events.push_back(event);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        !overflows
    }

    /// Whose request this is, in logs.
    pub fn span(&self) -> &tracing::Span {
        &self.span
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.buffer.lock().is_closed
    }

    /// Sets what a dropped receiver runs; not run if it is gone already.
    pub fn on_close(&self, run: OnClose) {
        self.buffer.lock().on_close = Some(run);
    }
}

impl Drop for OutputSender {
    fn drop(&mut self) {
        self.push(OutputEvent::Failed {
            code: ErrorCode::Internal,
            message: "the engine gave the request up".to_owned(),
        });
    }
}

impl OutputReceiver {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<OutputEvent> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Self::next`] as a poll.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<OutputEvent>> {
        let mut state = self.buffer.lock();
        match state.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if state.is_complete => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<OutputEvent> {
        self.buffer.lock().events.pop_front()
    }
}

impl Drop for OutputReceiver {
    fn drop(&mut self) {
        let mut state = self.buffer.lock();
        state.is_closed = true;
        let unread = std::mem::take(&mut state.events);
        let run = state.on_close.take().filter(|_| !state.is_complete || !unread.is_empty());
        drop(state);
        let leases: Vec<LeaseId> = unread.iter().filter_map(lease_of).collect();
        if let Some(run) = run {
            run(&leases);
        }
    }
}

impl Buffer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for OutputSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputSender").field("is_closed", &self.is_closed()).finish()
    }
}

impl std::fmt::Debug for OutputReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputReceiver").field("waiting", &self.buffer.lock().events.len()).finish()
    }
}

fn overflow(capacity: usize) -> OutputEvent {
    OutputEvent::Failed {
        code: ErrorCode::Internal,
        message: format!("more than {capacity} output events wait to be read"),
    }
}

fn lease_of(event: &OutputEvent) -> Option<LeaseId> {
    match event {
        OutputEvent::ContextDone(Some(blocks)) => Some(blocks.lease),
        OutputEvent::ContextDone(None)
        | OutputEvent::Started { .. }
        | OutputEvent::Token(_)
        | OutputEvent::Finished(_)
        | OutputEvent::Failed { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32) -> OutputEvent {
        OutputEvent::Token(TokenOut { id, logprob: 0.0, rank: 0, top: Vec::new() })
    }

    fn context_done(lease: LeaseId) -> OutputEvent {
        OutputEvent::ContextDone(Some(LeasedBlocks {
            lease,
            expires_unix_ms: 0,
            ranks: Vec::new(),
        }))
    }

    #[tokio::test]
    async fn events_arrive_in_order_and_end_after_the_last() {
        let (sender, mut receiver) = channel(8);
        let reader = tokio::spawn(async move {
            let mut ids = Vec::new();
            while let Some(event) = receiver.next().await {
                if let OutputEvent::Token(token) = event {
                    ids.push(token.id);
                }
            }
            ids
        });
        for id in 0..3 {
            assert!(sender.push(token(id)));
            tokio::task::yield_now().await;
        }
        assert!(sender.push(OutputEvent::Finished(FinishReason::Stop)));
        assert!(!sender.push(token(9)), "nothing follows the last event");
        assert_eq!(reader.await.unwrap(), [0, 1, 2]);
    }

    #[tokio::test]
    async fn a_sender_that_goes_away_says_so() {
        let (sender, mut receiver) = channel(8);
        drop(sender);
        let event = receiver.next().await;
        assert!(matches!(event, Some(OutputEvent::Failed { code: ErrorCode::Internal, .. })));
        assert!(receiver.next().await.is_none());
    }

    #[test]
    fn a_dropped_receiver_closes_and_hands_over_the_leases_it_never_read() {
        let (sender, receiver) = channel(8);
        let seen = Arc::new(Mutex::new(Vec::<LeaseId>::new()));
        let into = Arc::clone(&seen);
        sender.on_close(Arc::new(move |leases: &[LeaseId]| into.lock().unwrap().extend(leases)));
        let lease = LeaseId::random();
        sender.push(context_done(lease));
        sender.push(OutputEvent::Finished(FinishReason::Length));
        drop(receiver);
        assert_eq!(*seen.lock().unwrap(), [lease]);
        assert!(sender.is_closed());
        assert!(!sender.push(token(1)));
    }

    #[test]
    fn a_receiver_that_read_everything_closes_quietly() {
        let (sender, mut receiver) = channel(8);
        sender.on_close(Arc::new(|_: &[LeaseId]| panic!("nothing was left")));
        sender.push(OutputEvent::Finished(FinishReason::Stop));
        assert!(receiver.try_next().is_some());
        drop(receiver);
    }

    #[tokio::test]
    async fn running_over_ends_the_request_instead_of_growing() {
        let (sender, mut receiver) = channel(2);
        assert!(sender.push(token(0)) && sender.push(token(1)));
        assert!(!sender.push(token(2)));
        assert!(sender.is_closed());
        receiver.next().await;
        receiver.next().await;
        assert!(matches!(receiver.next().await, Some(OutputEvent::Failed { .. })));
        assert!(receiver.next().await.is_none());
    }
}
