//! What goes wrong: connections that stall or break between router and workers, workers that are slow at some moment.
//!
//! One relay at a time, in turn, so that each request could go elsewhere and each release call comes through in time.

use std::convert::Infallible;
use std::time::Duration;

use baton_integration::cluster::Member;
use baton_integration::relay::{Passage, Relay};
use baton_workerd::failpoint;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// How long a fault lasts.
const SPELL: Duration = Duration::from_millis(100);
/// Goes on until it is dropped; [`calm`] ends what is left then.
pub async fn rage(seed: u64, relays: &[Relay], workers: &[Member]) -> Infallible {
    let mut random = StdRng::seed_from_u64(seed);
    let mut spells = tokio::time::interval(SPELL);
    let points: Vec<_> = failpoint::names().collect();
    loop {
        for relay in relays {
            let passages = [
                Passage::Cut,
                Passage::Held,
                Passage::Slow(Duration::from_micros(100)),
                Passage::Open,
            ];
            relay.set(*passages.choose(&mut random).unwrap());
            let worker = workers.choose(&mut random).unwrap();
            let point = *points.choose(&mut random).unwrap();
            let delay = format!("delay({}ms)", random.random_range(1..=10));
            worker.arm(point, &delay).await.unwrap();
            spells.tick().await;
            relay.set(Passage::Open);
            worker.arm(point, "off").await.unwrap();
        }
    }
}

/// Everything passes again, nobody is slow.
pub async fn calm(relays: &[Relay], workers: &[Member]) {
    relays.iter().for_each(|relay| relay.set(Passage::Open));
    for worker in workers {
        for point in failpoint::names() {
            worker.arm(point, "off").await.unwrap();
        }
    }
}
