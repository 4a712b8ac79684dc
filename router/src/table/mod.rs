//! The routing table: one immutable snapshot behind one `ArcSwap`, published by one writer.
//!
//! A request takes a snapshot, chooses from it and keeps its worker; every retry takes the newest one.
//! Counters and health live in `Arc<Worker>` and outlast a snapshot. What replaces a snapshot is [`reload`]'s
//! business; only that and [`watch`] do I/O.

mod diff;
pub mod keys;
mod publish;
pub mod reload;
pub mod watch;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use baton_shared::id::InvalidWorkerId;
use baton_shared::role::Role;
use tokio::sync::Notify;

pub use self::diff::needs_restart;
use self::publish::Publisher;
use self::worker::Worker;
use crate::config::RouterConfig;
use crate::health::{Event, Outcome};
use crate::policy::{self, Features, Policy, Seen, Tried};

/// Which half of a request a worker is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Prompt and first token.
    Context,
    /// The rest.
    Generation,
}

impl Phase {
    /// Both, in the order of a request.
    pub const ALL: [Self; 2] = [Self::Context, Self::Generation];

    /// `context` or `generation`: the `role` label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Generation => "generation",
        }
    }
}

/// One published state of the table; never changes.
#[derive(Debug)]
pub struct RoutingTable {
    /// Rises with each publication, from 1.
    pub version: u64,
    /// What it was made from.
    pub config: Arc<RouterConfig>,
    /// Servers of the context phase, in configured order.
    pub context: Vec<Arc<Worker>>,
    /// Servers of the generation phase, in configured order.
    pub generation: Vec<Arc<Worker>>,
}

impl RoutingTable {
    /// The servers of one phase.
    pub fn pool(&self, phase: Phase) -> &[Arc<Worker>] {
        match phase {
            Phase::Context => &self.context,
            Phase::Generation => &self.generation,
        }
    }

    /// Every worker once, also when it is in both lists.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        let generation_only = self.generation.iter().filter(|w| w.role != Role::Both);
        self.context.iter().chain(generation_only)
    }

    /// The policy of one phase.
    pub fn policy(&self, phase: Phase) -> Policy {
        Policy::of(&self.config, phase)
    }

    /// Workers of a phase that may be chosen at `now`.
    pub fn usable(&self, phase: Phase, now: Duration) -> usize {
        self.pool(phase).iter().filter(|worker| worker.usable(now)).count()
    }

    /// Whether each phase has a usable worker at `now`.
    pub fn ready(&self, now: Duration) -> bool {
        Phase::ALL.into_iter().all(|phase| self.usable(phase, now) > 0)
    }

    /// Whether a failure may make `worker` unusable: enough others of each of its phases must stay.
    fn may_eject(&self, worker: &Worker, now: Duration) -> bool {
        let share = self.config.health.min_usable.fraction();
        Phase::ALL.into_iter().all(|phase| {
            let pool = self.pool(phase);
            if !pool.iter().any(|other| other.slot == worker.slot) {
                return true;
            }
            let left =
                pool.iter().filter(|other| other.slot != worker.slot && other.usable(now)).count();
            left as f64 >= share * pool.len() as f64
        })
    }
}

/// The handle everybody shares: the newest snapshot, and what is decided across requests.
#[derive(Debug)]
pub struct Table {
    current: ArcSwap<RoutingTable>,
    publisher: Publisher,
    started: Instant,
    turns: [AtomicU64; 2],
    /// What went where, for the policies that ask; outlasts snapshots.
    seen: [Seen; 2],
    /// A worker became usable.
    recovered: Notify,
    /// The prober has something to do now.
    probe_wanted: Notify,
}

impl Table {
    /// A table of the configured servers, none of them proven yet. Errors name the entry at fault.
    pub fn new(config: RouterConfig) -> Result<Self, InvalidWorkerId> {
        let (publisher, table) = Publisher::first(config)?;
        Ok(Self {
            current: ArcSwap::from_pointee(table),
            publisher,
            started: Instant::now(),
            turns: [AtomicU64::new(0), AtomicU64::new(0)],
            seen: Default::default(),
            recovered: Notify::new(),
            probe_wanted: Notify::new(),
        })
    }

    /// The newest snapshot; cheap, for use within one call.
    pub fn snapshot(&self) -> Guard<Arc<RoutingTable>> {
        self.current.load()
    }

    /// The newest snapshot, to keep.
    pub fn snapshot_full(&self) -> Arc<RoutingTable> {
        self.current.load_full()
    }

    /// Time since the table was made: the clock of health and policies.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Chooses a worker of `phase` from the newest snapshot; `None` = none is usable.
    pub fn pick(&self, phase: Phase, features: &Features, tried: &Tried) -> Option<Arc<Worker>> {
        let table = self.snapshot();
        let turn = self.turns[phase as usize].fetch_add(1, Ordering::Relaxed);
        let (policy, pool, seen) =
            (table.policy(phase), table.pool(phase), &self.seen[phase as usize]);
        let choice = policy::pick(policy, pool, features, seen, tried, self.now(), turn)?;
        let worker = pool.get(choice.index)?;
        policy::remember(policy, features, seen, worker);
        Some(Arc::clone(worker))
    }

    /// Prompt tokens that the worker which [`Self::pick`] would choose now has seen; 0 where its policy remembers no
    /// prompts.
    pub fn seen_tokens(&self, phase: Phase, features: &Features) -> u64 {
        let table = self.snapshot();
        let (policy, pool, seen) =
            (table.policy(phase), table.pool(phase), &self.seen[phase as usize]);
        let (turn, tried) = (self.turns[phase as usize].load(Ordering::Relaxed), Tried::default());
        let choice = policy::pick(policy, pool, features, seen, &tried, self.now(), turn);
        let worker = choice.and_then(|choice| pool.get(choice.index));
        worker.map_or(0, |worker| policy::seen_tokens(policy, features, seen, worker))
    }

    /// Waits until some worker of `phase` is usable, at most until `deadline`. `false` = still none.
    pub async fn wait_usable(&self, phase: Phase, deadline: tokio::time::Instant) -> bool {
        self.wait_usable_where(phase, deadline, |_| true).await
    }

    /// The same, of those workers that fit.
    pub async fn wait_usable_where(
        &self,
        phase: Phase,
        deadline: tokio::time::Instant,
        fits: impl Fn(&Worker) -> bool,
    ) -> bool {
        let is_there = |table: &RoutingTable, now| {
            table.pool(phase).iter().any(|worker| worker.usable(now) && fits(worker))
        };
        loop {
            let recovered = self.recovered.notified();
            tokio::pin!(recovered);
            recovered.as_mut().enable();
            let now = self.now();
            let table = self.snapshot_full();
            if is_there(&table, now) {
                return true;
            }
            // An ejection ends by time alone, without a notification.
            let reopens =
                table.pool(phase).iter().filter_map(|w| w.health.reopens_after(now)).min();
            let look = reopens.map_or(deadline, |wait| {
                deadline.min(tokio::time::Instant::now() + wait.max(Duration::from_millis(10)))
            });
            if tokio::time::timeout_at(look, recovered).await.is_err()
                && tokio::time::Instant::now() >= deadline
            {
                return is_there(&table, self.now());
            }
        }
    }

    /// Tells health how a request on `worker` went.
    pub fn report(&self, worker: &Worker, outcome: Outcome) {
        if outcome == Outcome::Served && worker.health.is_spotless() {
            return;
        }
        self.record(worker, outcome.into());
        if outcome != Outcome::Served {
            worker.health.want_probe();
            self.probe_wanted.notify_one();
        }
    }

    /// Applies one event to a worker's health; logs a change and wakes who waits for a worker.
    pub(crate) fn record(&self, worker: &Worker, event: Event) {
        let table = self.snapshot();
        let now = self.now();
        let may_eject = || table.may_eject(worker, now);
        let change = worker.health.apply(event, now, &table.config.health, may_eject);
        if let Some(change) = change {
            change.log(worker);
            worker.remember(change);
            if worker.health.condition(now).is_usable() {
                self.recovered.notify_waiters();
            }
        }
    }

    /// Resolves when [`Table::report`] wants a probe before its time.
    pub(crate) async fn probe_wanted(&self) {
        self.probe_wanted.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ServerEntry;

    pub(super) fn config(context: &[&str], generation: &[&str]) -> RouterConfig {
        let servers =
            |urls: &[&str]| urls.iter().map(|url| ServerEntry::new(url.parse().unwrap())).collect();
        let mut config = RouterConfig::default();
        config.context.servers = servers(context);
        config.generation.servers = servers(generation);
        config
    }

    pub(super) fn up(table: &Table) {
        for worker in table.snapshot_full().workers() {
            table.record(worker, Event::ProbeOk);
        }
    }

    #[test]
    fn a_server_in_both_lists_is_one_worker() {
        let table = Table::new(config(&["a:1", "b:1"], &["b:1", "c:1"])).unwrap();
        let snapshot = table.snapshot();
        assert!(Arc::ptr_eq(&snapshot.context[1], &snapshot.generation[0]));
        assert_eq!(snapshot.context[1].role, Role::Both);
        let names: Vec<_> = snapshot.workers().map(|w| w.id.as_str()).collect();
        assert_eq!(names, ["a:1", "b:1", "c:1"]);
    }

    #[test]
    fn no_worker_is_chosen_before_it_was_proven() {
        let table = Table::new(config(&["a:1"], &["b:1"])).unwrap();
        assert!(!table.snapshot().ready(table.now()));
        assert!(table.pick(Phase::Context, &Features::default(), &Tried::default()).is_none());
        up(&table);
        assert!(table.snapshot().ready(table.now()));
        assert!(table.pick(Phase::Context, &Features::default(), &Tried::default()).is_some());
    }

    #[test]
    fn failing_answers_leave_half_of_the_workers_in_use_and_refused_connections_none() {
        let table = Table::new(config(&["a:1", "b:1"], &["c:1"])).unwrap();
        up(&table);
        let snapshot = table.snapshot_full();
        table.report(&snapshot.context[0], Outcome::Failed);
        table.report(&snapshot.context[1], Outcome::Failed);
        table.report(&snapshot.generation[0], Outcome::Failed);
        assert_eq!(snapshot.usable(Phase::Context, table.now()), 1);
        assert_eq!(snapshot.usable(Phase::Generation, table.now()), 1);
        table.report(&snapshot.context[1], Outcome::Refused);
        assert_eq!(snapshot.usable(Phase::Context, table.now()), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_a_worker_until_its_deadline() {
        let table = Arc::new(Table::new(config(&["a:1"], &["b:1"])).unwrap());
        let soon = tokio::time::Instant::now() + Duration::from_secs(5);
        assert!(!table.wait_usable(Phase::Context, soon).await);
        let waiting = {
            let table = Arc::clone(&table);
            let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
            tokio::spawn(async move { table.wait_usable(Phase::Context, deadline).await })
        };
        tokio::task::yield_now().await;
        up(&table);
        assert!(waiting.await.unwrap());
    }
}
