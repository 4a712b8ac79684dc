//! The last requests, for operators who ask what just happened.
//!
//! Each serving thread writes into a ring of its own, so that requests share no lock, and over what the ring holds already, so
//! that nothing is allocated once it is full. Whoever reads takes the locks one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::ctx::{Outcome, RouterCtx};
use crate::dialect::Api;
use crate::table::worker::Worker;

/// Rings; with more serving threads than these, some share one.
const RINGS: usize = 16;
/// Requests a ring remembers.
const REMEMBERED: usize = 128;

/// A request that has ended.
#[derive(Clone, Debug)]
pub struct Past {
    /// When it ended.
    pub ended: SystemTime,
    /// Which endpoint it asked.
    pub api: Api,
    /// Its name in the logs of all daemons.
    pub request_id: String,
    /// How it ended; `None` = the router failed.
    pub outcome: Option<Outcome>,
    /// Length of the client's body, decoded.
    pub body_bytes: usize,
    /// The last context worker.
    pub context: Option<Arc<Worker>>,
    /// The last generation worker.
    pub generation: Option<Arc<Worker>>,
    /// Context requests sent.
    pub passes: u32,
    /// From the request's head to the first byte of the answer's body.
    pub first_byte: Option<Duration>,
    /// From the request's head to its end.
    pub took: Duration,
}

/// The last requests of one router.
#[derive(Debug)]
pub struct Recent([Mutex<Ring>; RINGS]);

#[derive(Debug, Default)]
struct Ring {
    past: Vec<Past>,
    next: usize,
}

impl Default for Recent {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Recent {
    /// A request of `cx` has ended.
    pub(super) fn add(&self, api: Api, cx: &RouterCtx) {
        let mut ring = lock(&self.0[own_ring()]);
        let next = ring.next;
        ring.next = (next + 1) % REMEMBERED;
        let mut request_id = match ring.past.get_mut(next) {
            Some(past) => std::mem::take(&mut past.request_id),
            None => String::new(),
        };
        request_id.clear();
        request_id.push_str(cx.request_id.as_str());
        let past = Past {
            ended: SystemTime::now(),
            api,
            request_id,
            outcome: cx.outcome,
            body_bytes: cx.body_bytes,
            context: cx.trail.context.clone(),
            generation: cx.trail.generation.clone(),
            passes: cx.trail.passes,
            first_byte: cx.first_byte,
            took: cx.started.elapsed(),
        };
        match ring.past.get_mut(next) {
            Some(place) => *place = past,
            None => ring.past.push(past),
        }
    }

    /// The last requests, the latest first: up to 128 of each serving thread.
    pub fn list(&self) -> Vec<Past> {
        let mut all: Vec<Past> = self.0.iter().flat_map(|ring| lock(ring).past.clone()).collect();
        all.sort_by_key(|past| std::cmp::Reverse(past.ended));
        all
    }
}

fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    // Whoever panicked left a ring that is in order: it is only written whole.
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The ring of this thread.
fn own_ring() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = THREADS.fetch_add(1, Ordering::Relaxed) % RINGS;
    }
    OWN.with(|own| *own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_requests_come_first_and_the_oldest_are_forgotten() {
        let recent = Recent::default();
        let mut ids = Vec::new();
        for status in 0..200 {
            let mut cx = RouterCtx::default();
            cx.outcome = Some(Outcome::Answered(status));
            ids.push(cx.request_id.to_string());
            recent.add(Api::Chat, &cx);
        }
        let list = recent.list();
        assert_eq!(list.len(), REMEMBERED);
        // Two that ended at the same tick of the clock may change places.
        let mut kept: Vec<_> = list.iter().map(|past| past.request_id.clone()).collect();
        let mut last = ids.split_off(200 - REMEMBERED);
        assert!(list.is_sorted_by(|one, next| one.ended >= next.ended));
        kept.sort();
        last.sort();
        assert_eq!(kept, last);
    }

    #[test]
    fn requests_of_every_thread_are_listed() {
        let recent = Recent::default();
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| recent.add(Api::Completions, &RouterCtx::default()));
            }
        });
        assert_eq!(recent.list().len(), 40);
    }
}
