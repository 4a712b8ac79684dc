//! What a service manager hears of a worker: what it is doing, in words, and beats for its watchdog (`WatchdogSec=`). A beat means
//! that the engine thread has shown itself lately; that HTTP still answers says nothing of it.

use std::sync::Arc;
use std::time::Duration;

use baton_shared::notify::Notifier;
use tokio::time::MissedTickBehavior;

use crate::engine::EngineHandle;
use crate::engine::status::EngineStatus;

/// Words are looked at this often, and said when they have changed.
const INTERVAL: Duration = Duration::from_secs(5);
/// So often is the engine looked at that has not begun.
const START_INTERVAL: Duration = Duration::from_millis(5);

/// Tells `notifier` about `engine`, from the moment it shows itself, which is `READY=1`. Ends with whoever waits for it. `limit` is how long
/// the watchdog waits for a beat, if there is one.
pub async fn report(notifier: Arc<Notifier>, engine: EngineHandle, limit: Option<Duration>) {
    while !engine.status().is_alive {
        tokio::time::sleep(START_INTERVAL).await;
    }
    notifier.say("READY=1");
    let interval = limit.map_or(INTERVAL, |limit| INTERVAL.min(limit / 4));
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut said, mut is_well) = (String::new(), true);
    loop {
        ticks.tick().await;
        let status = engine.status();
        let words = in_words(&status);
        if words != said {
            notifier.say(&format!("STATUS={words}"));
            said = words;
        }
        let Some(limit) = limit else { continue };
        let was_well = std::mem::replace(&mut is_well, beats(&status, limit));
        if is_well {
            notifier.say("WATCHDOG=1");
        } else if was_well {
            let age = status.heartbeat_age;
            tracing::warn!(?age, "the engine thread does not show itself: no heartbeat");
        }
    }
}

/// Whether the engine is well. It shows itself once a step, and once a second without one. After its end the process ends by itself.
fn beats(status: &EngineStatus, limit: Duration) -> bool {
    !status.is_alive || status.heartbeat_age <= limit / 2
}

fn in_words(status: &EngineStatus) -> String {
    let EngineStatus { running, waiting, pulling, leases, .. } = status;
    let doing = if status.is_draining { "draining" } else { "serving" };
    format!("{doing}: {running} running, {waiting} waiting, {pulling} pulling, {leases} leased")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(seconds: u64) -> EngineStatus {
        let heartbeat_age = Duration::from_secs(seconds);
        EngineStatus { is_alive: true, heartbeat_age, ..EngineStatus::default() }
    }

    #[test]
    fn the_heart_stops_when_the_engine_thread_stands_still_for_half_the_limit() {
        let limit = Duration::from_secs(30);
        assert!(beats(&after(0), limit) && beats(&after(15), limit));
        assert!(!beats(&after(16), limit));
    }

    #[test]
    fn the_heart_beats_while_an_ended_engines_answers_are_finished() {
        let ended = EngineStatus { is_alive: false, ..after(60) };
        assert!(beats(&ended, Duration::from_secs(30)));
    }

    #[test]
    fn an_operator_reads_what_a_worker_is_doing() {
        let busy = EngineStatus { running: 3, leases: 2, ..after(0) };
        assert_eq!(in_words(&busy), "serving: 3 running, 0 waiting, 0 pulling, 2 leased");
        let ending = EngineStatus { is_draining: true, ..busy };
        assert_eq!(in_words(&ending), "draining: 3 running, 0 waiting, 0 pulling, 2 leased");
    }
}
