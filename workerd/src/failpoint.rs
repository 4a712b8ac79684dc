//! Named moments of a hand-over at which a test can hold, slow or end this process.
//!
//! Compiled in and inert: a passer reads one flag. They can be armed only where the environment says
//! `BATON_TEST=1`: by `BATON_FAILPOINTS` at start, by `PUT /test/failpoints` later. There, blocks whose
//! content is lost are overwritten too, so that whoever reads one too late reads what is no number.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_shared::config::ConfigError;

/// A moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Context side, engine thread: the prompt is computed, its blocks are about to be leased.
    ContextComputed,
    /// Context side, engine thread: the blocks are leased, nobody was told.
    ContextLeased,
    /// Context side, request's task: the answer is written, the connection does not have it yet.
    ContextAnswer,
    /// Context side, mover thread: a reader's notification is here, the engine was not told.
    LeaseRead,
    /// Context side, request's task: a release call is here, the engine was not told.
    Release,
    /// Generation side, request's task: the record is good, its worker was not asked who it is.
    GenerationChecked,
    /// Generation side, request's task: its worker said who it is, the engine was not told.
    GenerationConfirmed,
    /// Generation side, mover thread: a pull is here, its peer is perhaps not connected.
    PullAccepted,
    /// Generation side, mover thread: before each post of a pull.
    PullPost,
    /// Generation side, mover thread: after each post of a pull.
    PullPosted,
    /// Generation side, mover thread: the blocks are here, the epoch was not asked for.
    PullRead,
    /// Generation side, mover thread: the blocks are good, their owner was not told.
    PullFenced,
    /// Generation side, mover thread: the owner was told, the engine was not.
    PullNotified,
    /// Generation side, engine thread: the engine knows that the blocks are here, the request does not.
    GenerationPulled,
    /// Either side, engine thread: before each step.
    Step,
}

const POINTS: [(Point, &str); 15] = [
    (Point::ContextComputed, "context.computed"),
    (Point::ContextLeased, "context.leased"),
    (Point::ContextAnswer, "context.answer"),
    (Point::LeaseRead, "lease.read"),
    (Point::Release, "release"),
    (Point::GenerationChecked, "generation.checked"),
    (Point::GenerationConfirmed, "generation.confirmed"),
    (Point::PullAccepted, "pull.accepted"),
    (Point::PullPost, "pull.post"),
    (Point::PullPosted, "pull.posted"),
    (Point::PullRead, "pull.read"),
    (Point::PullFenced, "pull.fenced"),
    (Point::PullNotified, "pull.notified"),
    (Point::GenerationPulled, "generation.pulled"),
    (Point::Step, "step"),
];

/// What happens to who passes a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Off,
    /// It waits until the point is armed otherwise, at most [`LONGEST_HOLD`].
    Hold,
    /// It waits this long.
    Delay(Duration),
    /// The process ends at once, without a word.
    Abort,
    /// The thread or task panics.
    Panic,
}

/// No wait without an end, not even in a test.
const LONGEST_HOLD: Duration = Duration::from_secs(60);
/// How often who is held looks up.
const LOOK: Duration = Duration::from_millis(1);

/// How a point stands.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// What it does.
    pub action: Action,
    /// How often it was reached.
    pub reached: u64,
    /// How many are held there now.
    pub held: u64,
}

static ENABLED: AtomicBool = AtomicBool::new(false);
static STANDINGS: [Mutex<Standing>; POINTS.len()] =
    [const { Mutex::new(Standing { action: Action::Off, reached: 0, held: 0 }) }; POINTS.len()];

/// Why an arming was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownFailpoint {
    /// No such name.
    #[error("`{0}` is no failpoint; there are {names}", names = POINTS.map(|(_, name)| name).join(", "))]
    Name(String),
    /// No such action.
    #[error("`{0}` is nothing a failpoint does: use off, hold, delay(20ms), abort or panic")]
    Action(String),
}

/// Reads the environment; to be called once, at start. Whether this is a test.
///
/// # Errors
/// When failpoints are named outside a test, or one that does not exist.
pub fn enable(variable: impl Fn(&str) -> Option<String>) -> Result<bool, ConfigError> {
    let is_test = variable("BATON_TEST").is_some_and(|value| value == "1");
    let broken = |value: String, rule: &str| ConfigError {
        value: Some(value),
        ..ConfigError::new("$BATON_FAILPOINTS", rule)
    };
    if let Some(list) = variable("BATON_FAILPOINTS") {
        if !is_test {
            return Err(broken(list, "is for tests: set `BATON_TEST=1` too"));
        }
        for entry in list.split(',').filter(|entry| !entry.is_empty()) {
            let (name, action) = entry.split_once('=').unwrap_or((entry, ""));
            arm(name, action).map_err(|error| broken(list.clone(), &error.to_string()))?;
        }
    }
    ENABLED.store(is_test, Ordering::Release);
    Ok(is_test)
}

/// Whether failpoints can be armed in this process.
pub fn is_enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// From now on `action` happens at the point of that name.
///
/// # Errors
/// When there is no such point or action.
pub fn arm(name: &str, action: &str) -> Result<(), UnknownFailpoint> {
    let index = POINTS.iter().position(|(_, known)| *known == name);
    let index = index.ok_or_else(|| UnknownFailpoint::Name(name.to_owned()))?;
    let action = parse(action).ok_or_else(|| UnknownFailpoint::Action(action.to_owned()))?;
    lock(&STANDINGS[index]).action = action;
    Ok(())
}

/// The names of all points.
pub fn names() -> impl Iterator<Item = &'static str> {
    POINTS.into_iter().map(|(_, name)| name)
}

/// All points by name.
pub fn standings() -> impl Iterator<Item = (&'static str, Standing)> {
    POINTS.iter().zip(&STANDINGS).map(|((_, name), standing)| (*name, *lock(standing)))
}

/// A thread is at `point`.
pub fn reach(point: Point) {
    if !is_enabled() {
        return;
    }
    let Some(visit) = Visit::begin(point) else { return };
    while visit.goes_on() {
        std::thread::sleep(LOOK);
    }
}

/// A task is at `point`.
pub async fn arrive(point: Point) {
    if !is_enabled() {
        return;
    }
    let Some(visit) = Visit::begin(point) else { return };
    while visit.goes_on() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Somebody who waits at a point; counted until dropped.
struct Visit {
    standing: &'static Mutex<Standing>,
    since: Instant,
    delay: Option<Duration>,
}

impl Visit {
    /// Counts the passer; `None` if it may go on.
    fn begin(point: Point) -> Option<Self> {
        let standing = &STANDINGS[point as usize];
        let mut locked = lock(standing);
        locked.reached += 1;
        let delay = match locked.action {
            Action::Off => return None,
            Action::Hold => None,
            Action::Delay(delay) => Some(delay),
            Action::Abort => std::process::abort(),
            Action::Panic => {
                drop(locked);
                panic!("failpoint {point:?}");
            }
        };
        locked.held += 1;
        drop(locked);
        Some(Self { standing, since: Instant::now(), delay })
    }

    fn goes_on(&self) -> bool {
        let waited = self.since.elapsed();
        match self.delay {
            Some(delay) => waited < delay,
            None => lock(self.standing).action == Action::Hold && waited < LONGEST_HOLD,
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        lock(self.standing).held -= 1;
    }
}

/// Nothing in it can be left half done.
fn lock(standing: &Mutex<Standing>) -> MutexGuard<'_, Standing> {
    standing.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parse(action: &str) -> Option<Action> {
    Some(match action {
        "off" => Action::Off,
        "hold" => Action::Hold,
        "abort" => Action::Abort,
        "panic" => Action::Panic,
        other => {
            let milliseconds = other.strip_prefix("delay(")?.strip_suffix("ms)")?;
            Action::Delay(Duration::from_millis(milliseconds.parse().ok()?))
        }
    })
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Hold => f.write_str("hold"),
            Self::Delay(delay) => write!(f, "delay({}ms)", delay.as_millis()),
            Self::Abort => f.write_str("abort"),
            Self::Panic => f.write_str("panic"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_stands_in_the_table_at_its_own_place() {
        for (index, (point, _)) in POINTS.into_iter().enumerate() {
            assert_eq!(point as usize, index);
        }
    }

    #[test]
    fn outside_a_test_failpoints_are_refused() {
        let with = |pairs: &'static [(&str, &str)]| {
            enable(|name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(with(&[]), Ok(false));
        for test in [
            &[("BATON_FAILPOINTS", "step=off")][..],
            &[("BATON_TEST", "yes"), ("BATON_FAILPOINTS", "step=off")],
        ] {
            let error = with(test).unwrap_err().to_string();
            assert!(
                error.contains("$BATON_FAILPOINTS") && error.contains("BATON_TEST=1"),
                "{error}"
            );
        }
        let error = with(&[("BATON_TEST", "1"), ("BATON_FAILPOINTS", "stepp=off")]).unwrap_err();
        assert!(error.to_string().contains("`stepp` is no failpoint"), "{error}");
        assert!(!is_enabled());
    }

    #[test]
    fn actions_read_as_they_are_written() {
        let actions = [
            Action::Off,
            Action::Hold,
            Action::Delay(Duration::from_millis(20)),
            Action::Abort,
            Action::Panic,
        ];
        for action in actions {
            assert_eq!(parse(&action.to_string()), Some(action));
        }
        for wrong in ["", "hold ", "delay", "delay(1s)", "delay(-1ms)"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
