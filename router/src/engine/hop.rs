//! One exchange with one worker: what it was asked, what it said, and what that means for its health, the metrics
//! and the plan.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::Guard;
use baton_shared::wire::auth::DISAGG_HEADER;
use baton_shared::wire::error::{Remedy, remedy};
use bytes::Bytes;

use super::plan::Trouble;
use super::reply::Reply;
use crate::client::{Address, Answer, ClientError, Exchange};
use crate::dialect::WorkerError;
use crate::dialect::trtllm::ContextAnswer;
use crate::health::Outcome;
use crate::metrics::{HopOutcome, Metrics};
use crate::table::Phase;
use crate::table::keys::LiveKeys;
use crate::table::worker::{InFlight, Worker};

/// Longest answer of a worker that refuses, in bytes.
const MAX_REFUSAL: usize = 1 << 20;
/// Longest text of a worker that is repeated in an error of ours, in characters.
const MAX_QUOTE: usize = 1000;

/// Where a worker can be reached, in the order to try; to be kept over a wait.
pub(super) fn addresses(worker: &Worker) -> Arc<Vec<Address>> {
    Guard::into_inner(worker.addresses())
}

/// The header lines of a generation request, `lines` among them: with state in the body it is signed as upstream does.
pub(super) fn generation_lines(keys: &LiveKeys, lines: &str, answer: &ContextAnswer) -> String {
    let mut lines = lines.to_owned();
    if keys.authenticate() {
        let (endpoint, state) = answer.signed_state();
        if let Some(value) = keys.sign_disagg(endpoint.as_deref(), state.as_deref()) {
            lines.push_str(&format!("{DISAGG_HEADER}: {value}\r\n"));
        }
    }
    lines
}

/// Counts one exchange: on the worker while it lasts, in the metrics when it ends. Dropped = cancelled.
#[derive(Debug)]
pub(super) struct Hop {
    metrics: Arc<Metrics>,
    phase: Phase,
    started: Instant,
    outcome: HopOutcome,
    _load: InFlight,
}

impl Hop {
    pub(super) fn begin(metrics: &Arc<Metrics>, phase: Phase, load: InFlight) -> Self {
        let metrics = Arc::clone(metrics);
        let outcome = HopOutcome::Cancelled;
        Self { metrics, phase, started: Instant::now(), outcome, _load: load }
    }

    /// The worker's answer is there, or its first event.
    pub(super) fn begun(&self) {
        self.metrics.hop_begun(self.phase, self.started.elapsed());
    }

    pub(super) fn end(mut self, outcome: HopOutcome) {
        self.outcome = outcome;
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        self.metrics.hop(self.phase, self.outcome, self.started.elapsed());
    }
}

/// A hop that went wrong.
#[derive(Debug)]
pub(super) struct Fault {
    /// For the plan.
    pub(super) trouble: Trouble,
    /// For the worker's health.
    pub(super) health: Outcome,
    /// For the metrics.
    pub(super) counted: HopOutcome,
    /// What happened, to be logged and to be told to the client if this was the last try.
    pub(super) message: String,
    /// The worker's own answer, if it is for the client.
    pub(super) reply: Option<Reply>,
    /// When the worker wants to be asked again, in seconds.
    pub(super) retry_after: Option<u32>,
    /// Whether the worker answered, and so knows that the request is over.
    pub(super) answered: bool,
}

impl Fault {
    fn of(trouble: Trouble, health: Outcome, counted: HopOutcome, message: String) -> Self {
        Self { trouble, health, counted, message, reply: None, retry_after: None, answered: false }
    }

    /// Whether the worker did nothing with the request: it never got it, or turned it away.
    pub(super) fn is_turned_away(&self) -> bool {
        match self.trouble {
            Trouble::Refused(remedy) => remedy != Remedy::AnotherServerBlame,
            Trouble::Unreachable => true,
            Trouble::Broken | Trouble::TimedOut => false,
        }
    }

    /// There was no usable answer.
    pub(super) fn broken(error: &ClientError) -> Self {
        let (trouble, health, counted) = match error {
            ClientError::Connect(_) => {
                (Trouble::Unreachable, Outcome::Refused, HopOutcome::Refused)
            }
            ClientError::Stale
            | ClientError::Io(_)
            | ClientError::Closed
            | ClientError::Malformed(_)
            | ClientError::TooBig(_)
            | ClientError::TimedOut(_) => (Trouble::Broken, Outcome::Failed, HopOutcome::Failed),
        };
        Self::of(trouble, health, counted, error.to_string())
    }

    /// There was an answer, but it makes no sense.
    pub(super) fn nonsense(why: impl std::fmt::Display) -> Self {
        let message = format!("unusable answer: {why}");
        Self::of(Trouble::Broken, Outcome::Failed, HopOutcome::Failed, message)
    }

    /// There was no answer in time.
    pub(super) fn late(limit: Duration) -> Self {
        let message = format!("no answer within {limit:?}");
        Self::of(Trouble::TimedOut, Outcome::Failed, HopOutcome::TimedOut, message)
    }

    /// The worker said something other than 2xx.
    pub(super) fn refused(answer: Answer) -> Self {
        let Answer { head, body } = answer;
        let said = WorkerError::parse(&body);
        let remedy = remedy(head.status, said.code.as_deref());
        let (health, counted) = match remedy {
            Remedy::PassThrough => (Outcome::Served, HopOutcome::Rejected),
            Remedy::AnotherServer => (Outcome::Served, HopOutcome::Busy),
            Remedy::AnotherServerBlame => (Outcome::Failed, HopOutcome::Failed),
            Remedy::NewContextPass | Remedy::NewContextPassElsewhere | Remedy::GiveUp => {
                (Outcome::Served, HopOutcome::Handover)
            }
        };
        let mut message = format!("status {}", head.status);
        if let Some(text) = &said.message {
            message.push_str(": ");
            message.extend(text.chars().take(MAX_QUOTE));
        }
        Self {
            reply: Some(Reply::forwarded(head.status, &head.content_type, body)),
            retry_after: head.retry_after,
            answered: true,
            ..Self::of(Trouble::Refused(remedy), health, counted, message)
        }
    }
}

/// The exchange, if the worker said 2xx.
pub(super) async fn accepted(exchange: Exchange) -> Result<Exchange, Fault> {
    if (200..300).contains(&exchange.head().status) {
        return Ok(exchange);
    }
    Err(match exchange.into_answer(MAX_REFUSAL).await {
        Ok(answer) => Fault::refused(answer),
        Err(error) => Fault::broken(&error),
    })
}

/// The whole body; the connection goes back.
pub(super) async fn whole(exchange: Exchange, max: usize) -> Result<Bytes, Fault> {
    let answer = exchange.into_answer(max).await.map_err(|error| Fault::broken(&error))?;
    Ok(answer.body)
}
