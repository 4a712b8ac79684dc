//! How one snapshot becomes the next: workers that stay are the same ones, removed ones finish what they have, and
//! ones that come back go on counting where they were.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use baton_shared::id::{InvalidWorkerId, WorkerId};
use baton_shared::role::Role;

use super::worker::{Dialect, Worker, WorkerSpec};
use super::{RoutingTable, Table};
use crate::config::{DialectChoice, PoolConfig, RouterConfig, ServerEntry};

/// Most removed workers without a request that are remembered in case they come back.
const MOST_IDLE: usize = 256;

/// What only the writer needs.
#[derive(Debug)]
pub(super) struct Publisher(Mutex<Past>);

#[derive(Debug, Default)]
struct Past {
    /// The next worker's.
    slot: usize,
    /// Not listed any more, the latest last.
    removed: Vec<Arc<Worker>>,
}

impl Publisher {
    /// The first snapshot, of workers nothing is known of.
    pub(super) fn first(config: RouterConfig) -> Result<(Self, RoutingTable), InvalidWorkerId> {
        let mut past = Past::default();
        let table = past.build(Arc::new(config), None)?;
        Ok((Self(Mutex::new(past)), table))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Past> {
        // What a panic leaves behind is still a list of workers and a slot that nobody has.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Replaces the snapshot by one of `config`, which must be valid, and probes who is new. Its version.
    ///
    /// # Errors
    /// If a server's name is none, which validation would have found; nothing has changed then.
    pub(super) fn publish(&self, config: Arc<RouterConfig>) -> Result<u64, InvalidWorkerId> {
        let version = {
            let mut past = self.publisher.locked();
            let before = self.snapshot_full();
            let table = past.build(config, Some(&before))?;
            past.retire(&before, &table);
            let version = table.version;
            self.current.store(Arc::new(table));
            version
        };
        self.probe_wanted.notify_one();
        // Who waits for a worker looks at the new ones.
        self.recovered.notify_waiters();
        Ok(version)
    }

    /// Workers that are not listed any more and still have requests.
    pub fn leaving(&self) -> Vec<Arc<Worker>> {
        let past = self.publisher.locked();
        past.removed.iter().filter(|worker| worker.in_flight() > 0).cloned().collect()
    }

    /// Takes the worker of this name out of use, or back into use; what it has goes on. `None` = there is no such
    /// worker, else whether that changed anything.
    pub fn set_drained(&self, name: &str, drained: bool) -> Option<bool> {
        // A reload meanwhile would make another worker of it, but with the same mark.
        let table = self.snapshot_full();
        let worker = table.workers().find(|worker| worker.id.as_str() == name)?;
        let changed = worker.set_drained(drained);
        if changed {
            tracing::info!(
                worker = name,
                drained,
                "worker taken out of use or back by an operator"
            );
            self.recovered.notify_waiters();
        }
        Some(changed)
    }
}

impl Past {
    /// Makes a snapshot; a server in both lists becomes one worker of role both.
    fn build(
        &mut self,
        config: Arc<RouterConfig>,
        before: Option<&RoutingTable>,
    ) -> Result<RoutingTable, InvalidWorkerId> {
        let ids = |pool: &PoolConfig| -> Result<Vec<WorkerId>, InvalidWorkerId> {
            pool.servers.iter().map(ServerEntry::id).collect()
        };
        let (context_ids, generation_ids) = (ids(&config.context)?, ids(&config.generation)?);
        let mut workers: HashMap<WorkerId, Arc<Worker>> = HashMap::new();
        let mut take = |entry: &ServerEntry, id: &WorkerId| {
            let role = match (context_ids.contains(id), generation_ids.contains(id)) {
                (true, true) => Role::Both,
                (true, false) => Role::Context,
                (false, _) => Role::Generation,
            };
            let worker = workers.entry(id.clone()).or_insert_with(|| {
                let known =
                    before.and_then(|table| table.workers().find(|worker| worker.id == *id));
                self.worker(spec(entry, id, role), known)
            });
            Arc::clone(worker)
        };
        let mut pool = |pool: &PoolConfig, ids: &[WorkerId]| {
            pool.servers.iter().zip(ids).map(|(entry, id)| take(entry, id)).collect()
        };
        let context = pool(&config.context, &context_ids);
        let generation = pool(&config.generation, &generation_ids);
        let version = before.map_or(1, |table| table.version + 1);
        Ok(RoutingTable { version, config, context, generation })
    }

    fn worker(&mut self, spec: WorkerSpec, known: Option<&Arc<Worker>>) -> Arc<Worker> {
        let Self { slot, removed } = self;
        let mut next = || {
            *slot += 1;
            *slot - 1
        };
        if let Some(known) = known {
            if known.is_as(&spec) {
                return Arc::clone(known);
            }
            return Arc::new(known.revised(spec, next));
        }
        match removed.iter().find(|worker| worker.id == spec.id) {
            Some(known) => Arc::new(known.revived(spec, next)),
            None => Arc::new(Worker::new(spec, next())),
        }
    }

    /// Remembers who is in `before` and not in `after`, forgets who came back.
    fn retire(&mut self, before: &RoutingTable, after: &RoutingTable) {
        let is_listed = |worker: &Arc<Worker>| after.workers().any(|other| other.id == worker.id);
        self.removed.retain(|worker| !is_listed(worker));
        self.removed.extend(before.workers().filter(|worker| !is_listed(worker)).cloned());
        let mut idle = self.removed.iter().filter(|worker| worker.in_flight() == 0).count();
        self.removed.retain(|worker| {
            let forget = worker.in_flight() == 0 && idle > MOST_IDLE;
            idle -= usize::from(forget);
            !forget
        });
    }
}

fn spec(entry: &ServerEntry, id: &WorkerId, role: Role) -> WorkerSpec {
    WorkerSpec {
        id: id.clone(),
        endpoint: entry.url.clone(),
        role,
        weight: entry.weight,
        dialect: match entry.dialect {
            DialectChoice::Auto => None,
            DialectChoice::Baton => Some(Dialect::Baton),
            DialectChoice::Trtllm12 => Some(Dialect::Trtllm12),
            DialectChoice::Trtllm13 => Some(Dialect::Trtllm13),
            DialectChoice::TrtllmMain => Some(Dialect::TrtllmMain),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config, up};
    use super::*;
    use std::time::Duration;

    fn published(table: &Table, context: &[&str], generation: &[&str]) -> Arc<RoutingTable> {
        table.publish(Arc::new(config(context, generation))).unwrap();
        table.snapshot_full()
    }

    #[test]
    fn a_worker_that_stays_is_the_same_one() {
        let table = Table::new(config(&["a:1"], &["b:1"])).unwrap();
        up(&table);
        let before = table.snapshot_full();
        let after = published(&table, &["a:1", "c:1"], &["b:1"]);
        assert_eq!((before.version, after.version), (1, 2));
        assert!(Arc::ptr_eq(&before.context[0], &after.context[0]));
        assert!(Arc::ptr_eq(&before.generation[0], &after.generation[0]));
        assert!(after.context[0].usable(table.now()) && !after.context[1].usable(table.now()));
        let slots: Vec<_> = after.workers().map(|worker| worker.slot).collect();
        assert_eq!(slots, [0, 2, 1]);
    }

    #[test]
    fn a_worker_described_anew_keeps_counters_health_and_drain() {
        let table = Table::new(config(&["a:1"], &["b:1"])).unwrap();
        up(&table);
        let guard = table.snapshot().context[0].begin(7);
        assert_eq!(table.set_drained("a:1", true), Some(true));
        let mut heavier = config(&["a:1"], &["b:1", "a:1"]);
        heavier.context.servers[0].weight = 3;
        heavier.generation.servers[1].weight = 3;
        table.publish(Arc::new(heavier)).unwrap();
        let after = table.snapshot_full();
        let worker = &after.context[0];
        assert_eq!((worker.weight, worker.role, worker.slot), (3, Role::Both, 0));
        assert_eq!((worker.in_flight(), worker.queued_tokens()), (1, 7));
        assert!(worker.is_drained() && !worker.usable(table.now()));
        assert_eq!(table.set_drained("a:1", false), Some(true));
        assert!(worker.usable(table.now()), "its health was kept");
        drop(guard);
        assert_eq!(worker.in_flight(), 0);
    }

    #[test]
    fn a_named_worker_at_another_address_keeps_its_counters_and_proves_itself() {
        let named = |url: &str| {
            let mut config = config(&[url], &["b:1"]);
            config.context.servers[0].name = Some("ctx".to_owned());
            config
        };
        let table = Table::new(named("a:1")).unwrap();
        up(&table);
        let _guard = table.snapshot().context[0].begin(7);
        table.publish(Arc::new(named("c:1"))).unwrap();
        let after = table.snapshot_full();
        assert_eq!(after.context[0].in_flight(), 1);
        assert!(!after.context[0].usable(table.now()));
        assert_ne!(after.context[0].slot, 0, "to a request it is another server");
    }

    #[test]
    fn a_removed_worker_finishes_and_one_that_comes_back_counts_on() {
        let table = Table::new(config(&["a:1", "c:1"], &["b:1"])).unwrap();
        up(&table);
        let guard = table.snapshot().context[1].begin(7);
        published(&table, &["a:1"], &["b:1"]);
        let leaving = table.leaving();
        assert_eq!((leaving.len(), leaving[0].id.as_str()), (1, "c:1"));
        assert_eq!(table.set_drained("c:1", true), None, "it is not listed");
        let after = published(&table, &["a:1", "c:1"], &["b:1"]);
        assert!(table.leaving().is_empty());
        assert_eq!((after.context[1].in_flight(), after.context[1].slot), (1, 1));
        assert!(!after.context[1].usable(Duration::ZERO), "nobody knows what became of it");
        drop(guard);
        assert_eq!(after.context[1].in_flight(), 0);
    }

    #[test]
    fn idle_workers_that_left_are_forgotten_beyond_a_number() {
        let table = Table::new(config(&["a:1"], &["b:1"])).unwrap();
        for index in 0..MOST_IDLE + 10 {
            published(&table, &["a:1", &format!("c{index}:1")], &["b:1"]);
        }
        assert_eq!(table.publisher.locked().removed.len(), MOST_IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_worker_gets_one_of_a_new_table() {
        let table = Arc::new(Table::new(config(&["a:1"], &["b:1"])).unwrap());
        up(&table);
        table.set_drained("a:1", true);
        let waiting = {
            let table = Arc::clone(&table);
            let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
            let phase = super::super::Phase::Context;
            tokio::spawn(async move { table.wait_usable(phase, deadline).await })
        };
        tokio::task::yield_now().await;
        published(&table, &["b:1"], &["b:1"]);
        assert!(waiting.await.unwrap());
    }
}
