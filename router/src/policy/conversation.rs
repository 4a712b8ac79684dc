//! A conversation stays on its worker. Known by its id; without one, by what was said before: the worker that saw
//! three quarters of this prompt has it. A new conversation, or one whose worker is gone, goes to the least loaded.
//!
//! As upstream's `conversation` router (1.3 and later); its `match_threshold` is the three quarters.

use std::sync::Arc;

use super::seen::Seen;
use super::{Features, prefix};
use crate::table::worker::Worker;

/// The worker of this conversation, if it has one that fits.
pub(super) fn pick(
    candidates: &[Arc<Worker>],
    fits: &dyn Fn(&Worker) -> bool,
    features: &Features,
    seen: &Seen,
) -> Option<usize> {
    let find = |slot: usize| candidates.iter().position(|w| w.slot == slot && fits(w));
    if let Some(id) = features.conversation {
        return seen.holders(id).find_map(find);
    }
    let matches = prefix::matches(features, seen);
    let enough = |length: usize| length * 4 >= features.marks.whole() * 3;
    matches.0.iter().filter(|(_, length)| enough(*length)).find_map(|(slot, _)| find(*slot))
}
