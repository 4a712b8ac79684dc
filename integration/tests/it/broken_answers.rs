//! Generation servers that break off, under load: no client sees it before its first byte, whatever has become of the
//! record they were given.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_integration::mock_worker::{Behaviour, MockWorker, Seen};
use toml::Table;

use crate::router_load::{judged, load, nothing_is_left};
use crate::scripted::{Scene, refusal, scene};
use crate::support::note;

/// A request fails where its last try does: of `routing.attempts` tries, 3, two may.
const MOST: usize = 2;

/// Breaks each fifth answer of all servers together, unless its request has met that so often already.
#[derive(Clone, Debug, Default)]
struct Breaker(Arc<Mutex<Books>>);

#[derive(Debug, Default)]
struct Books {
    answers: usize,
    broken: HashMap<String, usize>,
}

impl Breaker {
    fn behaviour(&self, what: impl Fn(&Seen) -> Behaviour + Send + Sync + 'static) -> Behaviour {
        let books = Arc::clone(&self.0);
        Behaviour::by(move |seen| {
            let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
            books.answers += 1;
            let id = seen.headers["x-request-id"].to_str().unwrap_or_default().to_owned();
            if !books.answers.is_multiple_of(5) || books.broken.get(&id) >= Some(&MOST) {
                return Behaviour::Serve;
            }
            *books.broken.entry(id).or_default() += 1;
            what(seen)
        })
    }

    fn broken(&self) -> usize {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        books.broken.values().sum()
    }
}

fn asked(workers: &[MockWorker]) -> usize {
    workers.iter().map(|one| one.requests().len()).sum()
}

/// How many answers broke of `count` requests, none of which failed.
async fn break_off(
    scene: &Scene,
    count: usize,
    what: impl Fn(&Seen) -> Behaviour + Clone + Send + Sync + 'static,
) -> usize {
    let breaker = Breaker::default();
    scene.generations.iter().for_each(|one| one.behave(breaker.behaviour(what.clone())));
    let ends = load(scene.client(), count, |_| {}).await;
    assert_eq!(judged(&ends, 4), 0);
    let broken = breaker.broken();
    note(format_args!("{broken} answers broke off"));
    assert!(broken * 5 >= count, "{broken} answers broke off");
    broken
}

#[tokio::test]
async fn no_client_sees_that_every_fifth_generation_answer_breaks_after_its_head() {
    let scene = scene(2, 2, Table::new()).await;
    let count = Arc::new(AtomicUsize::new(0));
    let broken = break_off(&scene, 300, move |seen| {
        // A stream's first byte would be the client's; of a whole answer half may have come.
        let is_odd = count.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        let half = seen.body["stream"] != true && is_odd;
        if half { Behaviour::Reset } else { Behaviour::Headed }
    })
    .await;
    // Nobody is asked for a record that was read: each break costs one pass and one answer.
    assert_eq!(asked(&scene.contexts), 300 + broken);
    assert_eq!(asked(&scene.generations), 300 + broken);
    nothing_is_left(&scene, "answers break after their head").await;
    scene.stop();
}

#[tokio::test]
async fn no_client_sees_that_every_fifth_generation_server_closes_after_it_read_the_record() {
    let scene = scene(2, 2, Table::new()).await;
    let broken = break_off(&scene, 300, |_| Behaviour::Swallow).await;
    let passes = asked(&scene.contexts);
    assert!((301..=300 + broken).contains(&passes), "{passes} passes for {broken} breaks");
    nothing_is_left(&scene, "records are swallowed").await;
    scene.stop();
}

#[tokio::test]
async fn a_server_that_fails_before_it_read_the_record_leaves_it_to_the_next() {
    for what in [Behaviour::Close, refusal(500, "internal_error")] {
        let scene = scene(2, 2, Table::new()).await;
        let broken = break_off(&scene, 150, move |_| what.clone()).await;
        let passes = asked(&scene.contexts);
        assert!(passes < 150 + broken / 2, "{passes} passes for {broken} breaks");
        nothing_is_left(&scene, "servers fail before they read").await;
        scene.stop();
    }
}
