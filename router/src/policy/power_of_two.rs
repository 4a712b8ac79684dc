//! Two at random, by weight; of these the one with the least load for its weight. So routers side by side that see the
//! same loads do not all run to the same worker.

use std::sync::Arc;

use super::share::Share;
use crate::table::worker::Worker;

/// `turn` is what is random here: scattered well, and another for each request.
pub(super) fn pick(
    candidates: &[Arc<Worker>],
    fits: &dyn Fn(&Worker) -> bool,
    share: &dyn Fn(&Worker) -> Share,
    turn: u64,
) -> Option<usize> {
    let first = draw(candidates, fits, scatter(turn))?;
    let other = |worker: &Worker| worker.slot != candidates[first].slot && fits(worker);
    let Some(second) = draw(candidates, &other, scatter(!turn)) else { return Some(first) };
    let is_less = share(&candidates[second]).cmp(share(&candidates[first])).is_lt();
    Some(if is_less { second } else { first })
}

/// The worker at place `number` of a circle in which each one that fits has `weight` places.
fn draw(candidates: &[Arc<Worker>], fits: &dyn Fn(&Worker) -> bool, number: u64) -> Option<usize> {
    super::round_robin::pick(candidates, fits, number)
}

/// Splitmix64's last step: every bit of the result depends on every bit of `number`.
fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
