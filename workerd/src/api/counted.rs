//! Counts how requests end: a request that is dropped before it ends was left by its client.

use std::sync::Arc;
use std::time::Instant;

use baton_shared::wire::error::ErrorCode;

use super::request::{Endpoint, Part};
use super::worker::Worker;

/// One request under way; counted when it is dropped.
pub struct Counted {
    worker: Arc<Worker>,
    endpoint: Endpoint,
    part: &'static str,
    arrived: Instant,
    outcome: Option<Result<(), ErrorCode>>,
}

impl Counted {
    /// A request that has `arrived`.
    pub fn new(worker: Arc<Worker>, endpoint: Endpoint, arrived: Instant) -> Self {
        Self { worker, endpoint, part: Part::Whole.as_str(), arrived, outcome: None }
    }

    /// Which part of a request it turned out to be.
    pub fn is_part(&mut self, part: &Part) {
        self.part = part.as_str();
    }

    /// It was answered.
    pub fn succeeded(&mut self) {
        self.outcome = Some(Ok(()));
    }

    /// It was answered with an error.
    pub fn failed(&mut self, code: ErrorCode) {
        self.outcome = Some(Err(code));
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or(Err(ErrorCode::ClientGone));
        let took = self.arrived.elapsed();
        self.worker.metrics.request_ended(self.endpoint.as_str(), self.part, outcome, took);
    }
}
