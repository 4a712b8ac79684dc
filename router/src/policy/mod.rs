//! Which worker gets a request: pure functions over candidates, request features and what was tried.
//!
//! Only usable workers are chosen; one that was tried already only when no other usable one is left. Load,
//! weights and ties are each policy's business.

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
    first: [Option<usize>; 4],
    more: Vec<usize>,
}

impl Tried {
    /// Remembers `worker`.
    pub fn add(&mut self, worker: &Worker) {
        match self.first.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(worker.slot),
            None => self.more.push(worker.slot),
        }
    }

    /// Whether `worker` was tried.
    pub fn contains(&self, worker: &Worker) -> bool {
        self.first.contains(&Some(worker.slot)) || self.more.contains(&worker.slot)
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
    let index = fresh.or_else(|| choose(&|worker| worker.usable(now)))?;
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
