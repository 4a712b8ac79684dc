//! The least work before the first token: what a worker has to do already, and what of this prompt it has not seen.
//!
//! Approximate: a worker is taken to keep what was sent to it, until it is forgotten here. So prompts that begin
//! alike meet on one worker only while it has less ahead of them than computing them elsewhere would cost, and what
//! many prompts share ends up on many workers.

use super::seen::Seen;
use super::share::Share;
use super::{Features, Matches};
use crate::config::LoadMeasure;
use crate::table::worker::Worker;

/// What a running request counts as, in tokens, where load is requests: upstream's four blocks of 32 tokens
/// (`load_weight` 0.25).
const REQUEST: u64 = 128;

/// Who saw how much of this prompt.
pub(super) fn matches(features: &Features, seen: &Seen) -> Matches {
    let mut found = Matches::default();
    for (length, hash) in features.marks.longest_first() {
        for slot in seen.holders(hash) {
            if found.of(slot).is_none() {
                found.0.push((slot, length));
            }
        }
    }
    found
}

/// Queued work and unseen prompt, for the worker's weight.
pub(super) fn share(
    worker: &Worker,
    measure: LoadMeasure,
    features: &Features,
    matches: &Matches,
) -> Share {
    let ahead = match measure {
        LoadMeasure::Requests => u64::from(worker.in_flight()) * REQUEST,
        LoadMeasure::Tokens => worker.queued_tokens(),
    };
    let unseen = features.prompt_tokens.max(1) - seen_tokens(worker, features, matches);
    Share { load: ahead + unseen, weight: u64::from(worker.weight) }
}

/// Tokens of the prompt that `worker` has seen: one is always left to compute.
pub(super) fn seen_tokens(worker: &Worker, features: &Features, matches: &Matches) -> u64 {
    let (prompt, whole) = (features.prompt_tokens.max(1), features.marks.whole().max(1) as u64);
    let matched = matches.of(worker.slot).unwrap_or(0) as u64;
    // Lengths are at most a body's.
    (prompt * matched / whole).min(prompt - 1)
}
