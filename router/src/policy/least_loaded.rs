//! The least load for its weight, this request included; ties are broken in turn.

use std::cmp::Ordering;
use std::sync::Arc;

use super::Features;
use crate::config::LoadMeasure;
use crate::table::worker::Worker;

/// Load a worker would have with this request, and its weight: compared as fractions, without rounding.
#[derive(Clone, Copy)]
struct Share {
    load: u64,
    weight: u64,
}

impl Share {
    fn cmp(self, other: Self) -> Ordering {
        let left = u128::from(self.load) * u128::from(other.weight);
        let right = u128::from(other.load) * u128::from(self.weight);
        left.cmp(&right)
    }
}

/// Finds the least share, then takes the `turn`-th of those that have it.
pub(super) fn pick(
    candidates: &[Arc<Worker>],
    fits: &dyn Fn(&Worker) -> bool,
    measure: LoadMeasure,
    features: &Features,
    turn: u64,
) -> Option<usize> {
    let share = |worker: &Worker| {
        let load = match measure {
            LoadMeasure::Requests => u64::from(worker.in_flight()) + 1,
            LoadMeasure::Tokens => worker.queued_tokens() + features.prompt_tokens.max(1),
        };
        Share { load, weight: u64::from(worker.weight) }
    };
    let shares = || {
        let fitting = candidates.iter().enumerate().filter(|(_, worker)| fits(worker));
        fitting.map(|(index, worker)| (index, share(worker)))
    };
    let least = shares().map(|(_, share)| share).min_by(|a, b| a.cmp(*b))?;
    let tied = |(_, share): &(usize, Share)| share.cmp(least) != Ordering::Greater;
    let ties = shares().filter(tied).count() as u64;
    let nth = turn.checked_rem(ties).unwrap_or(0);
    // Loads move between the passes; if the tie is gone, anyone that fits will do.
    shares()
        .filter(tied)
        .nth(usize::try_from(nth).unwrap_or(0))
        .or_else(|| shares().next())
        .map(|(index, _)| index)
}
