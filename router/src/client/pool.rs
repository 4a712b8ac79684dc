//! Idle connections to workers, a pool for each thread.
//!
//! A connection stays with the thread that used it last, so taking and returning one contends with nobody. Nobody
//! watches idle connections: a worker's close shows at the next use, which the caller repeats on a fresh one. The
//! pools are known to [`sweep`], so that a thread without traffic, or a removed worker, keeps nothing open.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Address;
use super::stream::Stream;

/// Longest a connection waits for its next use: below the 5 s after which TensorRT-LLM's server closes it.
const MAX_IDLE: Duration = Duration::from_secs(4);
/// Most idle connections to one address a thread keeps.
const MAX_KEPT: usize = 256;
/// A returned connection triggers a sweep when the last is this many milliseconds ago.
const SWEEP_EVERY_MS: u64 = 2000;

/// Addresses are the operator's: a quick hash does.
type Pool = Mutex<HashMap<Address, Vec<Idle>, foldhash::fast::RandomState>>;

struct Idle {
    stream: Stream,
    since: Instant,
}

static POOLS: Mutex<Vec<Weak<Pool>>> = Mutex::new(Vec::new());
static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static LAST_SWEEP_MS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static MINE: OnceCell<Arc<Pool>> = const { OnceCell::new() };
}

/// The youngest idle connection of this thread to `address`.
pub(super) fn take(address: &Address) -> Option<Stream> {
    MINE.with(|mine| {
        let mut pool = lock(mine.get()?);
        let idle = pool.get_mut(address)?.pop()?;
        (idle.since.elapsed() < MAX_IDLE).then_some(idle.stream)
    })
}

/// Keeps a connection for the next exchange of this thread; closes it when there are enough.
pub(super) fn put(address: Address, stream: Stream) {
    let now = Instant::now();
    MINE.with(|mine| {
        let mut pool = lock(mine.get_or_init(register));
        let kept = pool.entry(address).or_default();
        if kept.len() < MAX_KEPT {
            kept.push(Idle { stream, since: now });
        }
    });
    let now_ms = u64::try_from(now.duration_since(*START).as_millis()).unwrap_or(u64::MAX);
    let last = LAST_SWEEP_MS.load(Ordering::Relaxed);
    let due = now_ms.saturating_sub(last) >= SWEEP_EVERY_MS;
    if due
        && LAST_SWEEP_MS
            .compare_exchange(last, now_ms, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    {
        sweep();
    }
}

/// Closes connections that have been idle too long, of all threads. To be called every few seconds.
pub fn sweep() {
    let mut pools = lock(&POOLS);
    pools.retain(|pool| {
        let Some(pool) = pool.upgrade() else { return false };
        lock(&pool).retain(|_, kept| {
            kept.retain(|idle| idle.since.elapsed() < MAX_IDLE);
            !kept.is_empty()
        });
        true
    });
}

fn register() -> Arc<Pool> {
    let pool = Arc::<Pool>::default();
    lock(&POOLS).push(Arc::downgrade(&pool));
    pool
}

/// Nothing here can be left half-done by a panic, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
