//! Whether a worker may be chosen: pure transitions, and the cell that publishes their result.
//!
//! A worker is unproven until a probe succeeds. No connection, or its own 503 to a probe, takes it *down*
//! until the next good probe. Failing answers *eject* it for a time that doubles; afterwards it is half
//! open: one request at a time until one is served or a probe succeeds. Time is an argument.

pub mod get;
pub mod prober;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::config::HealthConfig;
use crate::table::worker::Worker;

/// How a request on a worker went, as far as its health is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered; also a 4xx or "no room now".
    Served,
    /// It is to blame: 5xx, reset, timeout, nonsense.
    Failed,
    /// No connection could be made.
    Refused,
}

/// What health hears of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// [`Outcome::Served`].
    Served,
    /// [`Outcome::Failed`].
    Failed,
    /// [`Outcome::Refused`], or a probe found no connection.
    Refused,
    /// A probe was answered 2xx.
    ProbeOk,
    /// A probe was answered 503: the worker itself says that it takes no work.
    ProbeNotReady,
    /// A probe was answered otherwise, or not in time.
    ProbeFailed,
}

impl From<Outcome> for Event {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Served => Self::Served,
            Outcome::Failed => Self::Failed,
            Outcome::Refused => Self::Refused,
        }
    }
}

/// Where a worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No probe has succeeded yet.
    Unproven,
    /// In use.
    Up,
    /// Unreachable or not ready; ends with a good probe.
    Down,
    /// Out of use because its answers failed.
    Ejected {
        /// On the table's clock.
        until: Duration,
    },
    /// An ejection is over; one request at a time.
    HalfOpen,
}

impl Condition {
    /// For logs, metrics and the admin port.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unproven => "unproven",
            Self::Up => "up",
            Self::Down => "down",
            Self::Ejected { .. } => "ejected",
            Self::HalfOpen => "half_open",
        }
    }

    /// Whether a request may be sent there at all.
    pub fn is_usable(self) -> bool {
        match self {
            Self::Up | Self::HalfOpen => true,
            Self::Unproven | Self::Down | Self::Ejected { .. } => false,
        }
    }
}

/// All that is remembered of a worker's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    condition: Condition,
    /// Failed requests in a row.
    failures: u32,
    /// Failed probes in a row.
    probe_failures: u32,
    /// Ejections since a request was last served.
    ejections: u32,
}

const NEW: Record =
    Record { condition: Condition::Unproven, failures: 0, probe_failures: 0, ejections: 0 };

/// The record after `event`; `may_eject` = enough other workers stay.
fn next(
    mut record: Record,
    event: Event,
    now: Duration,
    rules: &HealthConfig,
    may_eject: bool,
) -> Record {
    if let Condition::Ejected { until } = record.condition
        && now >= until
    {
        record.condition = Condition::HalfOpen;
    }
    match event {
        Event::Refused | Event::ProbeNotReady => record.condition = Condition::Down,
        Event::Served => match record.condition {
            // A worker that drains still finishes what it has.
            Condition::Down | Condition::Ejected { .. } => {}
            Condition::Unproven | Condition::Up | Condition::HalfOpen => {
                record = Record { condition: Condition::Up, ..NEW };
            }
        },
        Event::ProbeOk => {
            record.probe_failures = 0;
            match record.condition {
                Condition::Unproven | Condition::Down | Condition::HalfOpen => {
                    record.condition = Condition::Up;
                    record.failures = 0;
                }
                Condition::Up | Condition::Ejected { .. } => {}
            }
        }
        Event::Failed => {
            record.failures = record.failures.saturating_add(1);
            if record.failures >= rules.eject_after {
                eject(&mut record, now, rules, may_eject);
            }
        }
        Event::ProbeFailed => {
            record.probe_failures = record.probe_failures.saturating_add(1);
            if record.probe_failures >= rules.eject_after {
                eject(&mut record, now, rules, may_eject);
            }
        }
    }
    record
}

fn eject(record: &mut Record, now: Duration, rules: &HealthConfig, may_eject: bool) {
    match record.condition {
        Condition::Unproven | Condition::Down | Condition::Ejected { .. } => {}
        Condition::Up | Condition::HalfOpen if may_eject => {
            let doubled = rules.eject_time.0.saturating_mul(1 << record.ejections.min(20));
            let until = now.saturating_add(doubled.min(rules.eject_time_max.0));
            record.condition = Condition::Ejected { until };
            record.ejections = record.ejections.saturating_add(1);
            record.failures = 0;
        }
        Condition::Up | Condition::HalfOpen => record.condition = Condition::Up,
    }
}

/// A change worth a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub(crate) from: Condition,
    pub(crate) to: Condition,
    pub(crate) event: Event,
}

impl Change {
    pub(crate) fn log(&self, worker: &Worker) {
        let (from, to) = (self.from.as_str(), self.to.as_str());
        let (worker, event) = (worker.id.as_str(), self.event);
        if self.to.is_usable() {
            tracing::info!(worker, from, to, ?event, "worker is usable");
        } else {
            tracing::warn!(worker, from, to, ?event, "worker is not usable");
        }
    }
}

const OPEN: u64 = 0;
const SHUT: u64 = u64::MAX;

/// A worker's health: a record that only `Health::apply` changes, and its result for the hot path.
#[derive(Debug)]
pub struct Health {
    record: Mutex<Record>,
    /// [`OPEN`], [`SHUT`], or the millisecond from which on the worker is half open.
    gate: AtomicU64,
    /// Up and nothing held against it: a served request changes nothing.
    spotless: AtomicBool,
    /// On the table's clock, milliseconds.
    next_probe: AtomicU64,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            record: Mutex::new(NEW),
            gate: AtomicU64::new(SHUT),
            spotless: AtomicBool::new(false),
            next_probe: AtomicU64::new(0),
        }
    }
}

impl Health {
    /// Where the worker stands at `now`.
    pub fn condition(&self, now: Duration) -> Condition {
        match self.locked().condition {
            Condition::Ejected { until } if now >= until => Condition::HalfOpen,
            other => other,
        }
    }

    /// Whether a worker that serves `in_flight` requests may get one more at `now`.
    pub fn admits(&self, now: Duration, in_flight: u32) -> bool {
        match self.gate.load(Ordering::Relaxed) {
            OPEN => true,
            SHUT => false,
            from => millis(now) >= from && in_flight == 0,
        }
    }

    /// How long after `now` an ejection ends; `None` where none runs.
    pub(crate) fn reopens_after(&self, now: Duration) -> Option<Duration> {
        match self.gate.load(Ordering::Relaxed) {
            OPEN | SHUT => None,
            from => Some(Duration::from_millis(from.saturating_sub(millis(now)))),
        }
    }

    /// Whether a served request would change nothing.
    pub(crate) fn is_spotless(&self) -> bool {
        self.spotless.load(Ordering::Relaxed)
    }

    /// Applies `event`; tells a change of condition.
    pub(crate) fn apply(
        &self,
        event: Event,
        now: Duration,
        rules: &HealthConfig,
        may_eject: impl FnOnce() -> bool,
    ) -> Option<Change> {
        // Asked before the lock is taken: it reads the gates of all workers, this one among them.
        let may_eject = matches!(event, Event::Failed | Event::ProbeFailed) && may_eject();
        let mut record = self.locked();
        let before = *record;
        *record = next(before, event, now, rules, may_eject);
        let gate = match record.condition {
            Condition::Up => OPEN,
            Condition::Unproven | Condition::Down => SHUT,
            Condition::Ejected { until } => millis(until).clamp(1, SHUT - 1),
            Condition::HalfOpen => millis(now).clamp(1, SHUT - 1),
        };
        self.gate.store(gate, Ordering::Relaxed);
        self.spotless
            .store(*record == Record { condition: Condition::Up, ..NEW }, Ordering::Relaxed);
        let same =
            std::mem::discriminant(&before.condition) == std::mem::discriminant(&record.condition);
        (!same).then_some(Change { from: before.condition, to: record.condition, event })
    }

    /// Asks for a probe as soon as possible.
    pub(crate) fn want_probe(&self) {
        self.next_probe.store(0, Ordering::Relaxed);
    }

    /// When the next probe is due.
    pub(crate) fn probe_due(&self) -> Duration {
        Duration::from_millis(self.next_probe.load(Ordering::Relaxed))
    }

    /// Sets when the next probe is due.
    pub(crate) fn set_probe_due(&self, at: Duration) {
        self.next_probe.store(millis(at), Ordering::Relaxed);
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Record> {
        // A record is replaced whole, so one that a panic left behind is still a record.
        self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn run(start: Record, events: &[(u64, Event)], rules: &HealthConfig) -> Record {
        events
            .iter()
            .fold(start, |record, (at, event)| next(record, *event, seconds(*at), rules, true))
    }

    fn ejected(until: u64) -> Condition {
        Condition::Ejected { until: seconds(until) }
    }

    #[test]
    fn only_a_good_probe_proves_a_worker() {
        let rules = HealthConfig::default();
        assert_eq!(run(NEW, &[(0, Event::ProbeFailed)], &rules).condition, Condition::Unproven);
        assert_eq!(run(NEW, &[(0, Event::Refused)], &rules).condition, Condition::Down);
        assert_eq!(run(NEW, &[(0, Event::ProbeOk)], &rules).condition, Condition::Up);
    }

    #[test]
    fn ejections_double_up_to_the_longest_and_a_served_request_forgets_them() {
        let rules = HealthConfig {
            eject_time_max: baton_shared::config::units::Seconds::new(3),
            ..HealthConfig::default()
        };
        let once = run(NEW, &[(0, Event::ProbeOk), (10, Event::Failed)], &rules);
        assert_eq!(once.condition, ejected(11));
        let twice = run(once, &[(11, Event::Failed)], &rules);
        assert_eq!(twice.condition, ejected(13));
        let thrice = run(twice, &[(13, Event::Failed)], &rules);
        assert_eq!(thrice.condition, ejected(16));
        let served = run(thrice, &[(16, Event::Served), (17, Event::Failed)], &rules);
        assert_eq!(served.condition, ejected(18));
    }

    #[test]
    fn a_good_probe_ends_neither_a_running_ejection_nor_the_memory_of_it() {
        let rules = HealthConfig::default();
        let out =
            run(NEW, &[(0, Event::ProbeOk), (10, Event::Failed), (10, Event::ProbeOk)], &rules);
        assert_eq!(out.condition, ejected(11));
        let back = run(out, &[(12, Event::ProbeOk)], &rules);
        assert_eq!(back.condition, Condition::Up);
        assert_eq!(run(back, &[(13, Event::Failed)], &rules).condition, ejected(15));
    }

    #[test]
    fn failures_count_in_a_row_and_probes_do_not_hide_failing_requests() {
        let rules = HealthConfig { eject_after: 3, ..HealthConfig::default() };
        let two =
            [(0, Event::ProbeOk), (1, Event::Failed), (1, Event::ProbeOk), (2, Event::Failed)];
        let record = run(NEW, &two, &rules);
        assert_eq!(record.condition, Condition::Up);
        assert_eq!(run(record, &[(3, Event::Failed)], &rules).condition, ejected(4));
        let served = run(record, &[(3, Event::Served), (4, Event::Failed)], &rules);
        assert_eq!(served.condition, Condition::Up);
    }

    #[test]
    fn a_refused_connection_or_a_503_takes_down_at_once_until_a_good_probe() {
        let rules = HealthConfig { eject_after: 100, ..HealthConfig::default() };
        for event in [Event::Refused, Event::ProbeNotReady] {
            let down = run(NEW, &[(0, Event::ProbeOk), (1, event), (2, Event::Served)], &rules);
            assert_eq!(down.condition, Condition::Down);
            assert_eq!(run(down, &[(3, Event::ProbeOk)], &rules).condition, Condition::Up);
        }
    }

    #[test]
    fn nothing_is_ejected_where_too_few_would_stay() {
        let rules = HealthConfig::default();
        let up = run(NEW, &[(0, Event::ProbeOk)], &rules);
        let record = next(up, Event::Failed, seconds(1), &rules, false);
        assert_eq!(record.condition, Condition::Up);
    }

    #[test]
    fn a_half_open_worker_gets_one_request_at_a_time() {
        let (health, rules) = (Health::default(), HealthConfig::default());
        assert!(!health.admits(seconds(0), 0));
        health.apply(Event::ProbeOk, seconds(0), &rules, || true);
        assert!(health.admits(seconds(0), 7) && health.is_spotless());
        health.apply(Event::Failed, seconds(10), &rules, || true);
        assert!(!health.admits(seconds(10), 0));
        assert_eq!(health.reopens_after(seconds(10)), Some(seconds(1)));
        assert!(health.admits(seconds(11), 0) && !health.admits(seconds(11), 1));
        assert_eq!(health.condition(seconds(11)), Condition::HalfOpen);
        health.apply(Event::Served, seconds(11), &rules, || true);
        assert!(health.admits(seconds(11), 1));
    }
}
