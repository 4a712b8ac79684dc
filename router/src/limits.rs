//! How many requests are served at once. The guard is the count: whoever holds one is being served, and a
//! drain waits until nobody does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts requests in flight.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    count: AtomicUsize,
    idle: Notify,
}

/// One request being served; counts until dropped.
#[derive(Debug)]
#[must_use = "the request counts only while the guard lives"]
pub struct Admitted {
    shared: Arc<Shared>,
}

impl InFlight {
    /// Requests now.
    pub fn count(&self) -> usize {
        self.shared.count.load(Ordering::Acquire)
    }

    /// Counts one more request, unless `max` are served already.
    pub fn admit(&self, max: usize) -> Option<Admitted> {
        let more = |count: usize| (count < max).then_some(count + 1);
        let admitted = self.shared.count.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more);
        admitted.ok().map(|_| Admitted { shared: Arc::clone(&self.shared) })
    }

    /// Resolves when no request is served.
    pub async fn idle(&self) {
        loop {
            let idle = self.shared.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            idle.await;
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.shared.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_are_admitted_and_an_ended_request_makes_room() {
        let in_flight = InFlight::default();
        let first = in_flight.admit(2).unwrap();
        let _second = in_flight.admit(2).unwrap();
        assert!(in_flight.admit(2).is_none());
        drop(first);
        assert!(in_flight.admit(2).is_some());
        assert_eq!(in_flight.count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_is_reached_when_the_last_request_ends() {
        let in_flight = InFlight::default();
        in_flight.idle().await;
        let guard = in_flight.admit(1).unwrap();
        let waiting = tokio::spawn({
            let in_flight = in_flight.clone();
            async move { in_flight.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(guard);
        waiting.await.unwrap();
    }
}
