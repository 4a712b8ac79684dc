//! Which worker gets a request: pure functions over candidates, request features and what was tried.
//!
//! Only usable workers are chosen: first those that were not tried, then those that are only in doubt, last those that
//! failed this very request. Load, weights and ties are each policy's business.

mod least_loaded;
mod round_robin;

use std::sync::Arc;
use std::time::Duration;

use crate::config::{LoadMeasure, PolicyName};
use crate::table::worker::Worker;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In turn, by weight.
    RoundRobin,
    /// Least load for its weight; ties in turn.
    LeastLoaded(LoadMeasure),
}

impl Policy {
    /// The policy of a validated configuration.
    pub fn new(name: PolicyName, load: LoadMeasure) -> Self {
        match name {
            PolicyName::RoundRobin => Self::RoundRobin,
            // The others are refused when the configuration is read.
            PolicyName::LeastLoaded
            | PolicyName::PowerOfTwo
            | PolicyName::Prefix
            | PolicyName::Conversation => Self::LeastLoaded(load),
        }
    }
}

/// What a policy knows of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Prompt tokens: counted where ids are known, else estimated.
    pub prompt_tokens: u64,
}

impl Features {
    /// Of a prompt of `bytes` bytes of text, at four bytes a token.
    pub fn of_text(bytes: usize) -> Self {
        Self { prompt_tokens: (bytes as u64).div_ceil(4) }
    }

    /// Of a prompt of `count` token ids.
    pub fn of_tokens(count: usize) -> Self {
        Self { prompt_tokens: count as u64 }
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
    tried: &Tried,
    now: Duration,
    turn: u64,
) -> Option<Choice> {
    let choose = |fits: &dyn Fn(&Worker) -> bool| match policy {
        Policy::RoundRobin => round_robin::pick(candidates, fits, turn),
        Policy::LeastLoaded(measure) => {
            least_loaded::pick(candidates, fits, measure, features, turn)
        }
    };
    let fresh = choose(&|worker| worker.usable(now) && !tried.contains(worker));
    let index = fresh
        .or_else(|| choose(&|worker| worker.usable(now) && !tried.has_failed(worker)))
        .or_else(|| choose(&|worker| worker.usable(now)))?;
    Some(Choice { index, again: fresh.is_none() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HealthConfig;
    use crate::health::Event;
    use crate::table::worker::WorkerSpec;
    use baton_shared::config::net::Endpoint;
    use baton_shared::role::Role;

    const NOW: Duration = Duration::from_secs(1);

    fn worker(slot: usize, weight: u32) -> Arc<Worker> {
        let endpoint: Endpoint = format!("w:{}", slot + 1).parse().unwrap();
        let id = endpoint.to_string().parse().unwrap();
        let spec = WorkerSpec { id, endpoint, role: Role::Context, weight, dialect: None };
        let worker = Arc::new(Worker::new(spec, slot));
        set(&worker, Event::ProbeOk);
        worker
    }

    fn set(worker: &Worker, event: Event) {
        worker.health.apply(event, NOW, &HealthConfig::default(), || true);
    }

    fn workers(weights: &[u32]) -> Vec<Arc<Worker>> {
        weights.iter().enumerate().map(|(slot, weight)| worker(slot, *weight)).collect()
    }

    fn pick_at(policy: Policy, pool: &[Arc<Worker>], tried: &Tried, turn: u64) -> Option<usize> {
        pick(policy, pool, &Features::of_tokens(10), tried, NOW, turn).map(|choice| choice.index)
    }

    const ALL: [Policy; 3] = [
        Policy::RoundRobin,
        Policy::LeastLoaded(LoadMeasure::Requests),
        Policy::LeastLoaded(LoadMeasure::Tokens),
    ];

    #[test]
    fn an_unusable_worker_is_never_chosen() {
        for policy in ALL {
            let pool = workers(&[1, 1, 1]);
            set(&pool[1], Event::Refused);
            for turn in 0..20 {
                assert_ne!(pick_at(policy, &pool, &Tried::default(), turn), Some(1));
            }
            pool.iter().for_each(|worker| set(worker, Event::Refused));
            assert_eq!(pick_at(policy, &pool, &Tried::default(), 0), None);
        }
    }

    #[test]
    fn a_tried_worker_comes_last_but_comes() {
        for policy in ALL {
            let pool = workers(&[1, 1, 1, 1, 1, 1]);
            let mut tried = Tried::default();
            let mut seen = Vec::new();
            for turn in 0..6 {
                let choice = pick(policy, &pool, &Features::default(), &tried, NOW, turn).unwrap();
                assert!(!choice.again);
                tried.add(&pool[choice.index]);
                seen.push(choice.index);
            }
            seen.sort_unstable();
            assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
            let again = pick(policy, &pool, &Features::default(), &tried, NOW, 6).unwrap();
            assert!(again.again);
        }
    }

    #[test]
    fn a_worker_in_doubt_comes_before_one_that_failed_and_after_one_that_was_not_tried() {
        for policy in ALL {
            let pool = workers(&[1, 1, 1]);
            let mut tried = Tried::default();
            tried.add(&pool[0]);
            tried.add(&pool[1]);
            tried.doubt(&pool[1]);
            for turn in 0..6 {
                assert_eq!(pick_at(policy, &pool, &tried, turn), Some(2));
            }
            set(&pool[2], Event::Refused);
            for turn in 0..6 {
                assert_eq!(pick_at(policy, &pool, &tried, turn), Some(1));
            }
            set(&pool[1], Event::Refused);
            assert_eq!(pick_at(policy, &pool, &tried, 0), Some(0));
            tried.forget(&pool[0]);
            assert!(!tried.contains(&pool[0]) && tried.contains(&pool[1]));
        }
    }

    #[test]
    fn work_is_shared_by_weight() {
        for policy in ALL {
            let pool = workers(&[1, 3]);
            let mut guards = Vec::new();
            let mut counts = [0u32; 2];
            for turn in 0..400 {
                let index = pick_at(policy, &pool, &Tried::default(), turn).unwrap();
                counts[index] += 1;
                guards.push(pool[index].begin(10));
            }
            assert_eq!(counts, [100, 300], "{policy:?}");
        }
    }

    #[test]
    fn an_empty_pool_has_no_choice() {
        for policy in ALL {
            assert_eq!(pick_at(policy, &[], &Tried::default(), 3), None);
        }
    }

    #[test]
    fn guards_take_back_what_they_counted() {
        let worker = worker(0, 1);
        let guard = worker.begin(7);
        assert_eq!((worker.in_flight(), worker.queued_tokens()), (1, 7));
        drop(guard);
        assert_eq!((worker.in_flight(), worker.queued_tokens()), (0, 0));
    }

    #[test]
    fn least_loaded_follows_tokens_or_requests_as_told() {
        let pool = workers(&[1, 1]);
        let _long = pool[0].begin(1000);
        let _short = (pool[1].begin(1), pool[1].begin(1));
        let choose = |measure| pick_at(Policy::LeastLoaded(measure), &pool, &Tried::default(), 0);
        assert_eq!(choose(LoadMeasure::Tokens), Some(1));
        assert_eq!(choose(LoadMeasure::Requests), Some(0));
    }
}
