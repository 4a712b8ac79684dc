//! Which worker gets a request: pure functions over candidates, request features, what was tried, and what went where.
//!
//! Only usable workers are chosen: first those that were not tried, then those that are only in doubt, last those that
//! failed this very request. Load, weights and ties are each policy's business.

mod conversation;
mod least_loaded;
mod marks;
mod power_of_two;
mod prefix;
mod round_robin;
mod seen;
mod share;

use std::sync::Arc;
use std::time::Duration;

pub use self::marks::Marks;
pub use self::seen::Seen;
use self::share::Share;
use crate::config::{LoadMeasure, PolicyName, RouterConfig};
use crate::table::Phase;
use crate::table::worker::Worker;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In turn, by weight.
    RoundRobin,
    /// Least load for its weight; ties in turn.
    LeastLoaded(LoadMeasure),
    /// The less loaded of two at random.
    PowerOfTwo(LoadMeasure),
    /// Least load and unseen prompt for its weight; ties in turn.
    Prefix(LoadMeasure),
    /// The conversation's worker, else the least load for its weight.
    Conversation(LoadMeasure),
}

impl Policy {
    /// The policy of a validated configuration.
    pub fn new(name: PolicyName, load: LoadMeasure) -> Self {
        match name {
            PolicyName::RoundRobin => Self::RoundRobin,
            PolicyName::LeastLoaded => Self::LeastLoaded(load),
            PolicyName::PowerOfTwo => Self::PowerOfTwo(load),
            PolicyName::Prefix | PolicyName::KvCacheAware => Self::Prefix(load),
            PolicyName::Conversation => Self::Conversation(load),
        }
    }

    /// The policy of one phase.
    pub fn of(config: &RouterConfig, phase: Phase) -> Self {
        let pool = match phase {
            Phase::Context => &config.context,
            Phase::Generation => &config.generation,
        };
        Self::new(pool.policy, pool.load_measure(phase))
    }

    /// Whether it looks at [`Features::marks`] of a request that says so much of its conversation.
    pub fn reads_prompts(self, conversation: Option<u64>) -> bool {
        match self {
            Self::RoundRobin | Self::LeastLoaded(_) | Self::PowerOfTwo(_) => false,
            Self::Prefix(_) => true,
            Self::Conversation(_) => conversation.is_none(),
        }
    }
}

/// What a policy knows of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Prompt tokens: counted where ids are known, else estimated.
    pub prompt_tokens: u64,
    /// What the conversation it belongs to is known by, if its client says so: [`Features::conversation_of`].
    pub conversation: Option<u64>,
    /// The prompt's beginnings, if a policy asks for them.
    pub marks: Marks,
}

impl Features {
    /// Of a prompt of `bytes` bytes of text, at four bytes a token.
    pub fn of_text(bytes: usize) -> Self {
        Self { prompt_tokens: (bytes as u64).div_ceil(4), ..Self::default() }
    }

    /// Of a prompt of `count` token ids.
    pub fn of_tokens(count: usize) -> Self {
        Self { prompt_tokens: count as u64, ..Self::default() }
    }

    /// Takes down the prompt's beginnings, as they are in a cache where salts share nothing.
    pub fn read(&mut self, prompt: &[u8], salt: Option<&[u8]>) {
        self.marks = Marks::of(prompt, salt);
    }

    /// What a conversation of this id is known by.
    pub fn conversation_of(id: &[u8]) -> u64 {
        marks::conversation(id)
    }
}

/// How much of one prompt each worker saw: slot and bytes, the most first.
#[derive(Debug, Default)]
struct Matches(Vec<(usize, usize)>);

impl Matches {
    fn of(&self, slot: usize) -> Option<usize> {
        self.0.iter().find(|(other, _)| *other == slot).map(|(_, length)| *length)
    }
}

/// Workers that have had this request already, by slot. No allocation below four.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    first: [Option<(usize, Mark)>; 4],
    more: Vec<(usize, Mark)>,
}

/// What is held against a worker that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// It answered, and others said that its blocks cannot be read.
    Doubted,
    /// It did not answer well.
    Failed,
}

impl Tried {
    /// Remembers `worker`: it has this request, and has failed it unless something else is said later.
    pub fn add(&mut self, worker: &Worker) {
        self.mark(worker, Some(Mark::Failed));
    }

    /// It answered, but what it handed over could not be read.
    pub fn doubt(&mut self, worker: &Worker) {
        self.mark(worker, Some(Mark::Doubted));
    }

    /// Nothing is held against it.
    pub fn forget(&mut self, worker: &Worker) {
        self.mark(worker, None);
    }

    /// Whether `worker` was tried.
    pub fn contains(&self, worker: &Worker) -> bool {
        self.of(worker).is_some()
    }

    /// Whether `worker` has failed this request.
    pub fn has_failed(&self, worker: &Worker) -> bool {
        self.of(worker) == Some(Mark::Failed)
    }

    fn of(&self, worker: &Worker) -> Option<Mark> {
        let mut marks = self.first.iter().flatten().chain(&self.more);
        marks.find(|(slot, _)| *slot == worker.slot).map(|(_, mark)| *mark)
    }

    fn mark(&mut self, worker: &Worker, mark: Option<Mark>) {
        let is_other = |(slot, _): &(usize, Mark)| *slot != worker.slot;
        self.more.retain(is_other);
        for place in &mut self.first {
            *place = place.filter(is_other);
        }
        let Some(mark) = mark else { return };
        match self.first.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some((worker.slot, mark)),
            None => self.more.push((worker.slot, mark)),
        }
    }
}

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Position among the candidates.
    pub index: usize,
    /// Whether it had been tried before.
    pub again: bool,
}

/// Chooses among `candidates`; `turn` rises by one with each call of the same pool. `None` = none usable.
pub fn pick(
    policy: Policy,
    candidates: &[Arc<Worker>],
    features: &Features,
    seen: &Seen,
    tried: &Tried,
    now: Duration,
    turn: u64,
) -> Option<Choice> {
    let matches = match policy {
        Policy::Prefix(_) => prefix::matches(features, seen),
        _ => Matches::default(),
    };
    let choose = |fits: &dyn Fn(&Worker) -> bool| {
        let least = |measure| {
            let share = |worker: &Worker| Share::of(worker, measure, features);
            least_loaded::pick(candidates, fits, &share, turn)
        };
        match policy {
            Policy::RoundRobin => round_robin::pick(candidates, fits, turn),
            Policy::LeastLoaded(measure) => least(measure),
            Policy::PowerOfTwo(measure) => {
                let share = |worker: &Worker| Share::of(worker, measure, features);
                power_of_two::pick(candidates, fits, &share, turn)
            }
            Policy::Prefix(measure) => {
                let share = |worker: &Worker| prefix::share(worker, measure, features, &matches);
                least_loaded::pick(candidates, fits, &share, turn)
            }
            Policy::Conversation(measure) => {
                conversation::pick(candidates, fits, features, seen).or_else(|| least(measure))
            }
        }
    };
    let fresh = choose(&|worker| worker.usable(now) && !tried.contains(worker));
    let index = fresh
        .or_else(|| choose(&|worker| worker.usable(now) && !tried.has_failed(worker)))
        .or_else(|| choose(&|worker| worker.usable(now)))?;
    Some(Choice { index, again: fresh.is_none() })
}

/// Prompt tokens that `worker` has seen, as far as `policy` remembers prompts.
pub fn seen_tokens(policy: Policy, features: &Features, seen: &Seen, worker: &Worker) -> u64 {
    if !policy.reads_prompts(features.conversation) {
        return 0;
    }
    prefix::seen_tokens(worker, features, &prefix::matches(features, seen))
}

/// Remembers that the request goes to `worker`, for the policies that ask.
pub fn remember(policy: Policy, features: &Features, seen: &Seen, worker: &Worker) {
    match (policy, features.conversation) {
        (Policy::Conversation(_), Some(id)) => seen.remember(id, worker.slot),
        (Policy::Prefix(_) | Policy::Conversation(_), _) => {
            for (_, hash) in features.marks.longest_first() {
                seen.remember(hash, worker.slot);
            }
        }
        (Policy::RoundRobin | Policy::LeastLoaded(_) | Policy::PowerOfTwo(_), _) => {}
    }
}

#[cfg(test)]
mod tests;
