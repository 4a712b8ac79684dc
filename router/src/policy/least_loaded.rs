//! The least load for its weight; ties are broken in turn.

use std::cmp::Ordering;
use std::sync::Arc;

use super::share::Share;
use crate::table::worker::Worker;

/// Finds the least share, then takes the `turn`-th of those that have it.
pub(super) fn pick(
    candidates: &[Arc<Worker>],
    fits: &dyn Fn(&Worker) -> bool,
    share: &dyn Fn(&Worker) -> Share,
    turn: u64,
) -> Option<usize> {
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
