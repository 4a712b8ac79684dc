//! What the policies compare: the load a worker would have with this request, for its weight.

use std::cmp::Ordering;

use super::Features;
use crate::config::LoadMeasure;
use crate::table::worker::Worker;

/// Load a worker would have with this request, and its weight: compared as fractions, without rounding.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) load: u64,
    pub(super) weight: u64,
}

impl Share {
    /// As `measure` says, this request included.
    pub(super) fn of(worker: &Worker, measure: LoadMeasure, features: &Features) -> Self {
        let load = match measure {
            LoadMeasure::Requests => u64::from(worker.in_flight()) + 1,
            LoadMeasure::Tokens => worker.queued_tokens() + features.prompt_tokens.max(1),
        };
        Self { load, weight: u64::from(worker.weight) }
    }

    pub(super) fn cmp(self, other: Self) -> Ordering {
        let left = u128::from(self.load) * u128::from(other.weight);
        let right = u128::from(other.load) * u128::from(self.weight);
        left.cmp(&right)
    }
}
