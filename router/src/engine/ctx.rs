//! What is known of one request while it is served and when it has ended: its identity, where it went, how it went.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_shared::telemetry::{RequestId, TraceParent};
use http::HeaderName;
use pingora_core::protocols::http::ServerSession;
use pingora_error::{BError, Error, ErrorType, Result};

use super::downstream;
use super::reply::REQUEST_ID;
use crate::table::worker::Worker;

const TRACE: HeaderName = HeaderName::from_static("traceparent");
/// The first of the lines that every worker gets.
const ID_LINE: &str = "x-request-id: ";

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a whole answer of this status.
    Answered(u16),
    /// The answer broke off after its head.
    Aborted,
    /// The client left.
    ClientGone,
}

impl Outcome {
    /// For logs and the admin port, with the status if there is one.
    pub fn describe(outcome: Option<Self>) -> (&'static str, Option<u16>) {
        match outcome {
            Some(Self::Answered(status)) => ("answered", Some(status)),
            Some(Self::Aborted) => ("aborted", None),
            Some(Self::ClientGone) => ("client_gone", None),
            None => ("failed", None),
        }
    }
}

/// What is known of one request; for logs, and kept by the proxy between its phases.
#[derive(Debug)]
pub struct RouterCtx {
    /// When its head was read.
    pub started: Instant,
    /// The client's, or ours.
    pub request_id: RequestId,
    /// Set when it has ended.
    pub outcome: Option<Outcome>,
    /// Time to the first byte of the answer's body.
    pub first_byte: Option<Duration>,
    /// Length of the client's body, decoded.
    pub body_bytes: usize,
    /// Where it went.
    pub trail: Trail,
    trace: TraceParent,
}

/// Which workers had a request.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    /// The last context worker.
    pub context: Option<Arc<Worker>>,
    /// The last generation worker.
    pub generation: Option<Arc<Worker>>,
    /// Context requests sent.
    pub passes: u32,
}

impl Default for RouterCtx {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            request_id: RequestId::mint(),
            outcome: None,
            first_byte: None,
            body_bytes: 0,
            trail: Trail::default(),
            trace: TraceParent::fresh(),
        }
    }
}

impl RouterCtx {
    /// Takes over the client's request id and trace, if it has sane ones.
    pub fn begin(&mut self, session: &ServerSession) {
        self.started = Instant::now();
        if let Some(id) = downstream::header(session, REQUEST_ID).and_then(RequestId::accept) {
            self.request_id = id;
        }
        if let Some(parent) = downstream::header(session, TRACE).and_then(TraceParent::parse) {
            self.trace = parent.child();
        }
    }

    /// A whole answer of `status` was sent, or not.
    pub(super) fn sent(&mut self, sent: Result<()>, status: u16) -> Result<Outcome> {
        let outcome = if sent.is_ok() { Outcome::Answered(status) } else { Outcome::ClientGone };
        self.outcome = Some(outcome);
        sent.map(|()| outcome)
    }

    /// The client left; `when` is for the log.
    pub(super) fn gone(&mut self, when: &'static str) -> BError {
        self.outcome = Some(Outcome::ClientGone);
        Error::explain(ErrorType::ConnectionClosed, when).into_down()
    }

    /// Header lines that every worker gets.
    pub(super) fn lines(&self) -> String {
        let (id, trace) = (self.request_id.as_str(), self.trace.to_string());
        [ID_LINE, id, "\r\ntraceparent: ", &trace, "\r\n"].concat()
    }
}

/// Whose request [`RouterCtx::lines`] are of; for logs.
pub(super) fn request_id(lines: &str) -> &str {
    let id = lines.strip_prefix(ID_LINE).and_then(|rest| rest.split('\r').next());
    id.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_a_request_say_whose_they_are() {
        let cx = RouterCtx::default();
        assert_eq!(request_id(&cx.lines()), cx.request_id.as_str());
        assert_eq!(request_id(""), "");
    }
}
