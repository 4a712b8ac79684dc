//! KV that a context worker keeps for a request: given back unless a generation worker took it.
//!
//! A [`Lease`] is held from the moment a context request is sent. Dropping it, however the request ends (a record
//! left behind, a client gone, a panic), posts the release call from a bounded number of background tasks. A worker
//! that has no such call keeps what it holds until it expires there: that is counted.

use std::sync::Arc;
use std::time::Duration;

use baton_shared::id::DisaggRequestId;
use baton_shared::wire::auth::RELEASE_HEADER;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::hop;
use crate::client::{self, Request, Target};
use crate::dialect::takes_release;
use crate::metrics::Metrics;
use crate::table::keys::LiveKeys;
use crate::table::worker::{Dialect, Worker};

/// Most release calls on their way; beyond, a lease is left to its expiry and counted.
const MOST: usize = 1024;
/// When tries start, counted from the first.
const TRIES: [Duration; 3] =
    [Duration::ZERO, Duration::from_millis(300), Duration::from_millis(1000)];
/// When the last try must have ended, counted likewise.
const DEADLINE: Duration = Duration::from_secs(2);
/// Longest answer to a release call.
const MAX_ANSWER: usize = 64 << 10;

/// Posts release calls.
#[derive(Debug)]
pub(super) struct Releaser {
    keys: LiveKeys,
    metrics: Arc<Metrics>,
    free: Arc<Semaphore>,
}

impl Releaser {
    pub(super) fn new(keys: LiveKeys, metrics: Arc<Metrics>) -> Self {
        Self { keys, metrics, free: Arc::new(Semaphore::new(MOST)) }
    }

    /// Resolves when no release call is on its way.
    pub(super) async fn idle(&self) {
        // Closed never, so this only ever waits.
        drop(self.free.acquire_many(MOST as u32).await);
    }

    fn release(self: &Arc<Self>, worker: Arc<Worker>, id: DisaggRequestId) {
        let runtime = tokio::runtime::Handle::try_current();
        let slot = Arc::clone(&self.free).try_acquire_owned();
        let (Ok(runtime), Ok(slot)) = (runtime, slot) else {
            self.metrics.orphaned_kv();
            return;
        };
        let releaser = Arc::clone(self);
        runtime.spawn(async move {
            let _slot = slot;
            let work = releaser.tries(&worker, id);
            let released = tokio::time::timeout(DEADLINE, work).await.unwrap_or(false);
            if released {
                releaser.metrics.released();
            } else {
                releaser.metrics.orphaned_kv();
                tracing::warn!(worker = %worker.id, %id, "lease not given back, it stays until it expires");
            }
        });
    }

    async fn tries(&self, worker: &Worker, id: DisaggRequestId) -> bool {
        let start = tokio::time::Instant::now();
        let body = format!("{{\"disagg_request_id\":{id}}}");
        let lines = if self.keys.authenticate() {
            format!("{RELEASE_HEADER}: {}\r\n", self.keys.sign_release(body.as_bytes()))
        } else {
            String::new()
        };
        let pieces = [Bytes::from(body)];
        for wait in TRIES {
            tokio::time::sleep_until(start + wait).await;
            let head = worker.heads.get(Target::Release);
            let request = Request { head, lines: lines.as_bytes(), pieces: &pieces };
            let addresses = hop::addresses(worker);
            match client::call(&addresses, request, Duration::from_millis(600), MAX_ANSWER).await {
                Ok(answer) if answer.head.status < 300 => return true,
                // A worker of another kind does not know the call, and will not later.
                Ok(answer) if answer.head.status == 404 && worker.dialect() != Dialect::Baton => {
                    return false;
                }
                Ok(answer) => {
                    tracing::debug!(worker = %worker.id, status = answer.head.status, "release refused");
                }
                Err(error) => tracing::debug!(worker = %worker.id, %error, "release failed"),
            }
        }
        false
    }
}

/// What a context worker may hold for one request.
#[derive(Debug)]
pub(super) struct Lease {
    releaser: Arc<Releaser>,
    /// Who holds it.
    pub(super) worker: Arc<Worker>,
    id: Option<DisaggRequestId>,
}

impl Lease {
    /// Nothing was sent yet.
    pub(super) fn new(releaser: &Arc<Releaser>, worker: &Arc<Worker>) -> Self {
        Self { releaser: Arc::clone(releaser), worker: Arc::clone(worker), id: None }
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

    /// The worker holds nothing any more, or never did.
    pub(super) fn settle(&mut self) {
        self.id = None;
    }

    fn give_back(&mut self) {
        let Some(id) = self.id.take() else { return };
        if takes_release(self.worker.dialect()) {
            self.releaser.release(Arc::clone(&self.worker), id);
        } else {
            self.releaser.metrics.orphaned_kv();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.give_back();
    }
}
