//! What the last steps did, one entry each, until somebody asks: upstream's iteration statistics.
//!
//! Bounded: when nobody asks, the oldest are forgotten.

use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use crate::kv::pool::{BlockCounts, CacheCounts};

/// Steps remembered, as upstream's default.
pub const MOST: usize = 1_000;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iteration {
    /// Counts steps from 1.
    pub number: u64,
    /// When its tokens were told.
    pub at: SystemTime,
    /// From its plan to its tokens.
    pub latency: Duration,
    /// Requests admitted since the step before, and how long all of them together had waited.
    pub admitted: u32,
    /// See [`Self::admitted`].
    pub waited: Duration,
    /// Requests with a slot, after it.
    pub active: u32,
    /// Requests that wait.
    pub queued: u32,
    /// Requests that ended since the step before, however.
    pub completed: u32,
    /// Sequences it computed prompt tokens of.
    pub contexts: u32,
    /// Sequences it only computed a next token of.
    pub generations: u32,
    /// Sequences that lost their blocks to it.
    pub paused: u32,
    /// Prompt tokens it computed.
    pub context_tokens: u64,
    /// Blocks by state, after it.
    pub blocks: BlockCounts,
    /// The prefix cache, after it.
    pub cache: CacheCounts,
    /// Full blocks of prompts that were looked for in the prefix cache and not found, since start.
    pub missed: u64,
    /// Sequences one step may have.
    pub max_sequences: u32,
    /// Tokens one step may have.
    pub max_tokens: u32,
}

/// Hears of each step.
pub(super) type Listener = Box<dyn Fn(&Iteration) + Send + Sync>;

/// The last steps nobody asked for yet.
pub struct IterationLog {
    steps: Mutex<VecDeque<Iteration>>,
    listener: OnceLock<Listener>,
}

impl std::fmt::Debug for IterationLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IterationLog").finish_non_exhaustive()
    }
}

impl Default for IterationLog {
    fn default() -> Self {
        Self { steps: Mutex::new(VecDeque::with_capacity(MOST)), listener: OnceLock::new() }
    }
}

impl IterationLog {
    /// The first call counts.
    pub(super) fn listen(&self, listener: Listener) {
        self.listener.get_or_init(|| listener);
    }

    pub(super) fn add(&self, step: Iteration) {
        if let Some(listener) = self.listener.get() {
            listener(&step);
        }
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.len() == MOST {
            steps.pop_front();
        }
        steps.push_back(step);
    }

    /// All that nobody asked for yet, oldest first.
    pub fn take(&self) -> Vec<Iteration> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(number: u64) -> Iteration {
        Iteration {
            number,
            at: SystemTime::UNIX_EPOCH,
            latency: Duration::ZERO,
            admitted: 0,
            waited: Duration::ZERO,
            active: 0,
            queued: 0,
            completed: 0,
            contexts: 0,
            generations: 0,
            paused: 0,
            context_tokens: 0,
            blocks: BlockCounts::default(),
            cache: CacheCounts::default(),
            missed: 0,
            max_sequences: 1,
            max_tokens: 1,
        }
    }

    #[test]
    fn the_newest_steps_are_kept_and_given_out_once() {
        let log = IterationLog::default();
        (0..MOST as u64 + 5).for_each(|number| log.add(step(number)));
        let taken = log.take();
        assert_eq!((taken.len(), taken[0].number), (MOST, 5));
        assert!(log.take().is_empty());
    }
}
