//! KV that a context worker keeps for a request: given back unless a generation worker took it.
//!
//! A [`Lease`] is held from the moment a context request is sent. Dropping it, however the request ends (a record
//! left behind, a client gone, a panic), gives back what it stands for, from a bounded number of background tasks: by the
//! release call or, where the worker has none, by having the record read for nobody, if that is configured and nobody may
//! have begun to read it. What stays with a living worker until it expires there is counted.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use baton_shared::id::DisaggRequestId;
use baton_shared::wire::auth::RELEASE_HEADER;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::ctx::request_id;
use super::hop;
use super::orphan::Orphan;
use super::plan::Record;
use crate::client::{self, ClientError, Request, Target};
use crate::config::OrphanedKv;
use crate::dialect::takes_release;
use crate::dialect::trtllm::{ClientRequest, ContextAnswer};
use crate::metrics::Metrics;
use crate::table::Table;
use crate::table::keys::LiveKeys;
use crate::table::worker::{Dialect, Worker};

/// Most release calls on their way; beyond, a lease is left to its expiry and counted.
const MOST: u32 = 1024;
/// As much as so many release calls: a record read for nobody holds a whole request.
const PULL: u32 = 16;
/// When tries start, counted from the first.
const TRIES: [Duration; 3] =
    [Duration::ZERO, Duration::from_millis(300), Duration::from_millis(1000)];
/// When the last try must have ended, counted likewise.
const DEADLINE: Duration = Duration::from_secs(2);
/// Longest answer to a release call.
const MAX_ANSWER: usize = 64 << 10;

/// Gives leases back.
#[derive(Debug)]
pub(super) struct Releaser {
    table: Arc<Table>,
    keys: LiveKeys,
    metrics: Arc<Metrics>,
    free: Arc<Semaphore>,
}

/// What came of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The worker has its blocks back.
    Given,
    /// Nothing listens where the worker was: it is gone, and its memory with it.
    Gone,
    /// The worker keeps them until they expire there.
    Orphaned,
}

impl Releaser {
    pub(super) fn new(table: Arc<Table>, keys: LiveKeys, metrics: Arc<Metrics>) -> Self {
        Self { table, keys, metrics, free: Arc::new(Semaphore::new(MOST as usize)) }
    }

    /// Resolves when nothing is being given back.
    pub(super) async fn idle(&self) {
        // Closed never, so this only ever waits.
        drop(self.free.acquire_many(MOST).await);
    }

    /// `lines` are those of the request that the lease was for.
    fn release(self: &Arc<Self>, worker: Arc<Worker>, id: DisaggRequestId, lines: String) {
        let releaser = Arc::clone(self);
        self.spawn(1, async move {
            let work = releaser.tries(&worker, id, &lines);
            let end = tokio::time::timeout(DEADLINE, work).await.unwrap_or(End::Orphaned);
            releaser.ended(&worker, id, &lines, end);
        });
    }

    fn pull(self: &Arc<Self>, worker: Arc<Worker>, id: DisaggRequestId, orphan: Orphan) {
        let releaser = Arc::clone(self);
        self.spawn(PULL, async move {
            let is_read = orphan.pull(&releaser.table, &releaser.keys).await;
            let end = if is_read { End::Given } else { End::Orphaned };
            releaser.ended(&worker, id, &orphan.lines, end);
        });
    }

    /// In the background; if there is no room for work that weighs as much as so many release calls, the lease stays.
    fn spawn(&self, weight: u32, work: impl Future<Output = ()> + Send + 'static) {
        let runtime = tokio::runtime::Handle::try_current();
        let slot = Arc::clone(&self.free).try_acquire_many_owned(weight);
        let (Ok(runtime), Ok(slot)) = (runtime, slot) else {
            self.metrics.orphaned_kv();
            return;
        };
        runtime.spawn(async move {
            let _slot = slot;
            work.await;
        });
    }

    fn ended(&self, worker: &Worker, id: DisaggRequestId, lines: &str, end: End) {
        let request_id = request_id(lines);
        match end {
            End::Given => {
                self.metrics.released();
                tracing::debug!(request_id, worker = %worker.id, %id, "lease given back");
            }
            End::Gone => {
                tracing::debug!(request_id, worker = %worker.id, %id, "lease gone with its worker");
            }
            End::Orphaned => {
                self.metrics.orphaned_kv();
                tracing::warn!(request_id, worker = %worker.id, %id, "lease not given back, it stays until it expires");
            }
        }
    }

    async fn tries(&self, worker: &Worker, id: DisaggRequestId, lines: &str) -> End {
        let start = tokio::time::Instant::now();
        let body = format!("{{\"disagg_request_id\":{id}}}");
        let lines = if self.keys.authenticate() {
            format!("{lines}{RELEASE_HEADER}: {}\r\n", self.keys.sign_release(body.as_bytes()))
        } else {
            lines.to_owned()
        };
        let pieces = [Bytes::from(body)];
        let mut end = End::Orphaned;
        for wait in TRIES {
            tokio::time::sleep_until(start + wait).await;
            let head = worker.heads.get(Target::Release);
            let request = Request { head, lines: lines.as_bytes(), pieces: &pieces };
            let addresses = hop::addresses(worker);
            let answer =
                client::call(&addresses, request, Duration::from_millis(600), MAX_ANSWER).await;
            end = match answer {
                Ok(answer) if answer.head.status < 300 => return End::Given,
                // A worker of another kind does not know the call, and will not later.
                Ok(answer) if answer.head.status == 404 && worker.dialect() != Dialect::Baton => {
                    return End::Orphaned;
                }
                Ok(answer) => {
                    tracing::debug!(worker = %worker.id, status = answer.head.status, "release refused");
                    End::Orphaned
                }
                // A worker that stops listens for as long as it holds leases.
                Err(ClientError::Connect(error))
                    if error.kind() == ErrorKind::ConnectionRefused =>
                {
                    End::Gone
                }
                Err(error) => {
                    tracing::debug!(worker = %worker.id, %error, "release failed");
                    End::Orphaned
                }
            };
        }
        end
    }
}

/// What leases of one request have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms<'a> {
    pub(super) releaser: &'a Arc<Releaser>,
    /// What happens where there is no release call.
    pub(super) orphans: OrphanedKv,
    pub(super) request: &'a ClientRequest,
    /// Header lines that go to every worker.
    pub(super) lines: &'a str,
}

/// What a context worker may hold for one request.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    terms: Terms<'a>,
    /// Who holds it.
    pub(super) worker: Arc<Worker>,
    id: Option<DisaggRequestId>,
    /// By what it can be read.
    answer: Option<&'a ContextAnswer>,
    /// Whether it can be read still.
    pub(super) record: Record,
}

impl<'a> Lease<'a> {
    /// Nothing was sent yet.
    pub(super) fn new(terms: Terms<'a>, worker: &Arc<Worker>) -> Self {
        let worker = Arc::clone(worker);
        Self { terms, worker, id: None, answer: None, record: Record::Whole }
    }

    /// From now on the worker may hold something by this id. What it may hold by an earlier one is given back: it got
    /// the request and perhaps answered it, though nothing of that came through.
    pub(super) fn sent(&mut self, id: DisaggRequestId) {
        self.give_back();
        self.id = Some(id);
    }

    /// The worker calls what it holds by another id than it was sent.
    pub(super) fn renamed(&mut self, id: DisaggRequestId) {
        self.id = Some(id);
    }

    /// It can be read by this answer.
    pub(super) fn answered(&mut self, answer: &'a ContextAnswer) {
        self.answer = Some(answer);
    }

    /// The worker holds nothing any more, or never did.
    pub(super) fn settle(&mut self) {
        self.id = None;
    }

    fn give_back(&mut self) {
        let Some(id) = self.id.take() else { return };
        let Terms { releaser, orphans, request, lines } = self.terms;
        if takes_release(self.worker.dialect()) {
            return releaser.release(Arc::clone(&self.worker), id, lines.to_owned());
        }
        // A second reader of what somebody reads already would wait in vain.
        match (orphans, self.record, self.answer) {
            (OrphanedKv::Pull, Record::Whole, Some(answer)) => {
                let (request, answer) = (request.clone(), answer.clone());
                let orphan = Orphan { request, answer, lines: lines.to_owned() };
                releaser.pull(Arc::clone(&self.worker), id, orphan);
            }
            _ => releaser.metrics.orphaned_kv(),
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use baton_shared::id::IdMint;
    use baton_shared::wire::auth::Keys;

    use super::*;
    use crate::config::{RouterConfig, ServerEntry};

    /// Counts of leases that could not be given back and that were, after one of a worker at `url` was let go.
    async fn counted(url: &str) -> [bool; 2] {
        let mut config = RouterConfig::default();
        config.context.servers = vec![ServerEntry::new(url.parse().unwrap())];
        config.generation.servers = config.context.servers.clone();
        let table = Arc::new(Table::new(config).unwrap());
        let metrics = Arc::new(Metrics::new());
        let keys = LiveKeys::from(Keys::none());
        let releaser = Arc::new(Releaser::new(Arc::clone(&table), keys, Arc::clone(&metrics)));
        let worker = Arc::clone(&table.snapshot_full().context[0]);
        releaser.release(worker, IdMint::new(1, 1).next(1), String::new());
        releaser.idle().await;
        let text = metrics.render(&table.snapshot(), table.now(), 0);
        ["orphaned_kv", "releases"]
            .map(|name| text.lines().any(|line| line == format!("baton_router_{name}_total 1")))
    }

    #[tokio::test]
    async fn nothing_is_orphaned_on_a_worker_that_is_gone() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = listener.local_addr().unwrap().to_string();
        drop(listener);
        assert_eq!(counted(&url).await, [false, false]);
    }

    #[tokio::test]
    async fn what_a_worker_that_does_not_answer_holds_is_orphaned() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = listener.local_addr().unwrap().to_string();
        assert_eq!(counted(&url).await, [true, false]);
    }
}
