//! What goes wrong in a trial: at most one worker of each role is struck, so that the other one could serve everybody.

use std::time::Duration;

use baton_workerd::failpoint;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::fire::scene::{CONTEXTS, GENERATIONS};

/// What happens to one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT after this.
    Stop(Duration),
    /// SIGTERM: it finishes and ends.
    End,
    /// The router's connections to it break, for this long.
    Cut(Duration),
    /// Nothing passes between the router and it, for this long.
    Hold(Duration),
    /// A failpoint does something, for this long.
    At(&'static str, &'static str, Duration),
}

impl Fault {
    /// Whether the worker may end by this.
    pub fn may_end(self) -> bool {
        match self {
            Self::Kill | Self::End | Self::At(_, "abort" | "panic", _) => true,
            Self::Stop(_) | Self::Cut(_) | Self::Hold(_) | Self::At(..) => false,
        }
    }
}

/// A fault, where and when.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// Place of the worker in the cluster.
    pub worker: usize,
    /// Counted from when the requests are sent.
    pub after: Duration,
    pub fault: Fault,
}

const ACTIONS: [&str; 4] = ["abort", "panic", "hold", "delay(30ms)"];
/// Requests of a trial are sent within this; strikes fall within it too.
pub const SPREAD: Duration = Duration::from_millis(120);

/// What happens in trial number `trial`.
pub fn draw(random: &mut StdRng, trial: usize) -> Vec<Strike> {
    let (context, generation) =
        [(true, false), (false, true), (true, true)][random.random_range(0..3)];
    let is_of_generation =
        |name: &&str| name.starts_with("generation.") || name.starts_with("pull.");
    let context_points: Vec<_> =
        failpoint::names().filter(|name| !is_of_generation(name)).collect();
    let is_of_generation = |name: &&str| is_of_generation(name) || *name == "step";
    let generation_points: Vec<_> = failpoint::names().filter(is_of_generation).collect();
    let mut strikes = Vec::new();
    for (is_struck, workers, points) in
        [(context, CONTEXTS, context_points), (generation, GENERATIONS, generation_points)]
    {
        if is_struck {
            // Every point with every action comes in turn.
            let point = points[trial % points.len()];
            let action = ACTIONS[trial / points.len() % ACTIONS.len()];
            let fault = fault(random, point, action);
            let worker = *workers.choose(random).expect("a role has workers");
            strikes.push(Strike { worker, after: within(random, Duration::ZERO, SPREAD), fault });
        }
    }
    strikes
}

fn fault(random: &mut StdRng, point: &'static str, action: &'static str) -> Fault {
    let long = within(random, Duration::from_millis(20), Duration::from_millis(1500));
    match random.random_range(0..10) {
        0 => Fault::Kill,
        1 => Fault::Stop(long),
        2 => Fault::End,
        3 => Fault::Cut(long),
        4 => Fault::Hold(long),
        _ => Fault::At(point, action, long),
    }
}

fn within(random: &mut StdRng, least: Duration, most: Duration) -> Duration {
    Duration::from_micros(random.random_range(least.as_micros() as u64..most.as_micros() as u64))
}
