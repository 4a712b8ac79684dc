//! One worker: who and where it is, what it carries, whether it may be chosen.
//!
//! Description is immutable; counters are atomics that only guards move; health is decided by
//! [`crate::health`] and only published here. A guard holds its worker's counters, so counts never drift.
//! A reload that describes a worker anew makes another [`Worker`] with the same counters, and with the same health
//! where it is still the same server.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, Guard};
use baton_shared::config::net::Endpoint;
use baton_shared::id::WorkerId;
use baton_shared::role::Role;

use crate::client::{Address, Heads};
use crate::health::{Change, Health};

/// Which protocol a worker speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dialect {
    /// Not asked yet; treated as TensorRT-LLM main.
    Unknown,
    /// Ours: TensorRT-LLM main plus release and error codes.
    Baton,
    /// TensorRT-LLM up to 1.2.
    Trtllm12,
    /// TensorRT-LLM 1.3 before its last release candidates.
    Trtllm13,
    /// TensorRT-LLM main.
    TrtllmMain,
}

impl Dialect {
    /// For logs and the admin port.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Baton => "baton",
            Self::Trtllm12 => "trtllm-1.2",
            Self::Trtllm13 => "trtllm-1.3",
            Self::TrtllmMain => "trtllm-main",
        }
    }
}

/// One server of the table.
#[derive(Debug)]
pub struct Worker {
    /// The configured name, else the address.
    pub id: WorkerId,
    /// Small number of one server, never given to another one: what a request has tried.
    pub slot: usize,
    /// Where it is, as configured.
    pub endpoint: Endpoint,
    /// What goes into the `Host` header.
    pub authority: String,
    /// Request heads, rendered once.
    pub heads: Heads,
    /// Which lists it is in.
    pub role: Role,
    /// Share of the work, at least 1.
    pub weight: u32,
    /// Whether [`Worker::dialect`] was configured, and so is never asked.
    pub dialect_fixed: bool,
    /// What `Health` decided.
    pub health: Arc<Health>,
    dialect: Arc<AtomicU8>,
    addresses: Arc<ArcSwap<Vec<Address>>>,
    load: Arc<Load>,
}

/// What a worker carries now, and what became of it; shared with guards.
#[derive(Debug, Default)]
struct Load {
    requests: AtomicU32,
    tokens: AtomicU64,
    /// An operator wants no new requests there.
    drained: AtomicBool,
    history: Mutex<VecDeque<Past>>,
}

/// Changes of condition that are remembered of a worker.
const REMEMBERED: usize = 16;

/// One change of a worker's condition.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    /// When.
    pub at: SystemTime,
    /// From what to what, and why.
    pub change: Change,
}

/// One request on a worker; counts until dropped.
#[derive(Debug)]
#[must_use = "the request counts only while the guard lives"]
pub struct InFlight {
    load: Arc<Load>,
    tokens: u64,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.load.requests.fetch_sub(1, Ordering::Relaxed);
        self.load.tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// What a new [`Worker`] is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    /// Who.
    pub id: WorkerId,
    /// Where.
    pub endpoint: Endpoint,
    /// Which lists it is in.
    pub role: Role,
    /// At least 1.
    pub weight: u32,
    /// Configured dialect; `None` = ask the worker.
    pub dialect: Option<Dialect>,
}

impl Worker {
    /// A worker nothing is known of yet; `slot` must be unique in this process.
    pub fn new(spec: WorkerSpec, slot: usize) -> Self {
        let WorkerSpec { id, endpoint, role, weight, dialect } = spec;
        let addresses = match &endpoint {
            Endpoint::Tcp(at) => match at.host.parse() {
                Ok(ip) => vec![Address::Tcp(SocketAddr::new(ip, at.port))],
                Err(_) => Vec::new(),
            },
            Endpoint::Unix(path) => vec![Address::Unix(path.as_path().into())],
        };
        let authority = match &endpoint {
            Endpoint::Tcp(at) => at.to_string(),
            Endpoint::Unix(_) => "localhost".to_owned(),
        };
        Self {
            id,
            slot,
            endpoint,
            heads: Heads::new(&authority),
            authority,
            role,
            weight: weight.max(1),
            dialect_fixed: dialect.is_some(),
            health: Arc::default(),
            dialect: Arc::new(AtomicU8::new(dialect.unwrap_or(Dialect::Unknown) as u8)),
            addresses: Arc::new(ArcSwap::from_pointee(addresses)),
            load: Arc::default(),
        }
    }

    /// The same worker described anew: it keeps its counters, and at the same address its health and what is known
    /// of it. `slot` is for a new address.
    pub(super) fn revised(&self, spec: WorkerSpec, slot: impl FnOnce() -> usize) -> Self {
        if spec.endpoint != self.endpoint {
            return Self { load: Arc::clone(&self.load), ..Self::new(spec, slot()) };
        }
        let asked_as_before = spec.dialect.is_none() && !self.dialect_fixed;
        let mut revised = Self {
            health: Arc::clone(&self.health),
            addresses: Arc::clone(&self.addresses),
            load: Arc::clone(&self.load),
            ..Self::new(spec, self.slot)
        };
        if asked_as_before {
            revised.dialect = Arc::clone(&self.dialect);
        }
        revised
    }

    /// A worker that was removed and is listed again: it keeps its counters, and has to prove itself.
    pub(super) fn revived(&self, spec: WorkerSpec, slot: impl FnOnce() -> usize) -> Self {
        self.load.drained.store(false, Ordering::Relaxed);
        let slot = if spec.endpoint == self.endpoint { self.slot } else { slot() };
        Self { load: Arc::clone(&self.load), ..Self::new(spec, slot) }
    }

    /// Whether `spec` would describe it as it is.
    pub(super) fn is_as(&self, spec: &WorkerSpec) -> bool {
        let dialect = self.dialect_fixed.then(|| self.dialect());
        self.id == spec.id
            && self.endpoint == spec.endpoint
            && self.role == spec.role
            && self.weight == spec.weight.max(1)
            && dialect == spec.dialect
    }

    /// Counts one request of `tokens` estimated prompt tokens until the guard is dropped.
    pub fn begin(&self, tokens: u64) -> InFlight {
        self.load.requests.fetch_add(1, Ordering::Relaxed);
        self.load.tokens.fetch_add(tokens, Ordering::Relaxed);
        InFlight { load: Arc::clone(&self.load), tokens }
    }

    /// Requests it serves for us now.
    pub fn in_flight(&self) -> u32 {
        self.load.requests.load(Ordering::Relaxed)
    }

    /// Estimated prompt tokens of those requests.
    pub fn queued_tokens(&self) -> u64 {
        self.load.tokens.load(Ordering::Relaxed)
    }

    /// Which protocol it speaks, as far as known.
    pub fn dialect(&self) -> Dialect {
        match self.dialect.load(Ordering::Relaxed) {
            d if d == Dialect::Baton as u8 => Dialect::Baton,
            d if d == Dialect::Trtllm12 as u8 => Dialect::Trtllm12,
            d if d == Dialect::Trtllm13 as u8 => Dialect::Trtllm13,
            d if d == Dialect::TrtllmMain as u8 => Dialect::TrtllmMain,
            _ => Dialect::Unknown,
        }
    }

    /// Stores what the worker said it speaks; without effect where the dialect is configured.
    pub fn learn_dialect(&self, dialect: Dialect) {
        if !self.dialect_fixed {
            self.dialect.store(dialect as u8, Ordering::Relaxed);
        }
    }

    /// Where to connect, to be tried in order; empty before a name was resolved.
    pub fn addresses(&self) -> Guard<Arc<Vec<Address>>> {
        self.addresses.load()
    }

    /// Replaces the addresses by what the name has now.
    pub fn set_resolved(&self, addresses: &[SocketAddr]) {
        let addresses: Vec<_> = addresses.iter().copied().map(Address::Tcp).collect();
        if **self.addresses.load() != addresses {
            self.addresses.store(Arc::new(addresses));
        }
    }
}

impl Worker {
    /// Whether it may be chosen at `now` (on the table's clock).
    pub fn usable(&self, now: Duration) -> bool {
        self.health.admits(now, self.in_flight()) && !self.is_drained()
    }

    /// Whether an operator took it out of use.
    pub fn is_drained(&self) -> bool {
        self.load.drained.load(Ordering::Relaxed)
    }

    /// Takes it out of use, or back into use; requests it has go on. Whether that changed anything.
    pub(super) fn set_drained(&self, drained: bool) -> bool {
        self.load.drained.swap(drained, Ordering::Relaxed) != drained
    }

    /// The last changes of its condition, oldest first.
    pub fn history(&self) -> Vec<Past> {
        self.past().iter().copied().collect()
    }

    /// Remembers a change.
    pub(super) fn remember(&self, change: Change) {
        let mut past = self.past();
        if past.len() == REMEMBERED {
            past.pop_front();
        }
        past.push_back(Past { at: SystemTime::now(), change });
    }

    fn past(&self) -> MutexGuard<'_, VecDeque<Past>> {
        // Whole entries come and go, so a poisoned list is as good as any.
        self.load.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
