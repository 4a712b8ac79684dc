//! What holds of every policy, and what of each.

use super::*;
use crate::config::HealthConfig;
use crate::health::Event;
use crate::table::worker::WorkerSpec;
use baton_shared::config::net::Endpoint;
use baton_shared::role::Role;

const NOW: Duration = Duration::from_secs(1);

fn worker(slot: usize, weight: u32) -> Arc<Worker> {
    let endpoint: Endpoint = format!("w:{}", slot + 1).parse().unwrap();
    let id = endpoint.to_string().parse().unwrap();
    let spec = WorkerSpec { id, endpoint, role: Role::Context, weight, dialect: None };
    let worker = Arc::new(Worker::new(spec, slot));
    set(&worker, Event::ProbeOk);
    worker
}

fn set(worker: &Worker, event: Event) {
    worker.health.apply(event, NOW, &HealthConfig::default(), || true);
}

fn workers(weights: &[u32]) -> Vec<Arc<Worker>> {
    weights.iter().enumerate().map(|(slot, weight)| worker(slot, *weight)).collect()
}

fn pick_at(policy: Policy, pool: &[Arc<Worker>], tried: &Tried, turn: u64) -> Option<usize> {
    let features = Features::of_tokens(10);
    pick(policy, pool, &features, &Seen::default(), tried, NOW, turn).map(|choice| choice.index)
}

const ALL: [Policy; 9] = [
    Policy::RoundRobin,
    Policy::LeastLoaded(LoadMeasure::Requests),
    Policy::LeastLoaded(LoadMeasure::Tokens),
    Policy::PowerOfTwo(LoadMeasure::Requests),
    Policy::PowerOfTwo(LoadMeasure::Tokens),
    Policy::Prefix(LoadMeasure::Requests),
    Policy::Prefix(LoadMeasure::Tokens),
    Policy::Conversation(LoadMeasure::Requests),
    Policy::Conversation(LoadMeasure::Tokens),
];

#[test]
fn an_unusable_worker_is_never_chosen() {
    for policy in ALL {
        let pool = workers(&[1, 1, 1]);
        set(&pool[1], Event::Refused);
        for turn in 0..20 {
            assert_ne!(pick_at(policy, &pool, &Tried::default(), turn), Some(1));
        }
        pool.iter().for_each(|worker| set(worker, Event::Refused));
        assert_eq!(pick_at(policy, &pool, &Tried::default(), 0), None);
    }
}

#[test]
fn a_tried_worker_comes_last_but_comes() {
    for policy in ALL {
        let pool = workers(&[1, 1, 1, 1, 1, 1]);
        let mut tried = Tried::default();
        let mut seen = Vec::new();
        for turn in 0..6 {
            let choice =
                pick(policy, &pool, &Features::default(), &Seen::default(), &tried, NOW, turn)
                    .unwrap();
            assert!(!choice.again);
            tried.add(&pool[choice.index]);
            seen.push(choice.index);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        let again =
            pick(policy, &pool, &Features::default(), &Seen::default(), &tried, NOW, 6).unwrap();
        assert!(again.again);
    }
}

#[test]
fn a_worker_in_doubt_comes_before_one_that_failed_and_after_one_that_was_not_tried() {
    for policy in ALL {
        let pool = workers(&[1, 1, 1]);
        let mut tried = Tried::default();
        tried.add(&pool[0]);
        tried.add(&pool[1]);
        tried.doubt(&pool[1]);
        for turn in 0..6 {
            assert_eq!(pick_at(policy, &pool, &tried, turn), Some(2));
        }
        set(&pool[2], Event::Refused);
        for turn in 0..6 {
            assert_eq!(pick_at(policy, &pool, &tried, turn), Some(1));
        }
        set(&pool[1], Event::Refused);
        assert_eq!(pick_at(policy, &pool, &tried, 0), Some(0));
        tried.forget(&pool[0]);
        assert!(!tried.contains(&pool[0]) && tried.contains(&pool[1]));
    }
}

#[test]
fn work_is_shared_by_weight() {
    for policy in ALL {
        let pool = workers(&[1, 3]);
        let mut guards = Vec::new();
        let mut counts = [0u32; 2];
        for turn in 0..400 {
            let index = pick_at(policy, &pool, &Tried::default(), turn).unwrap();
            counts[index] += 1;
            guards.push(pool[index].begin(10));
        }
        assert_eq!(counts, [100, 300], "{policy:?}");
    }
}

#[test]
fn an_empty_pool_has_no_choice() {
    for policy in ALL {
        assert_eq!(pick_at(policy, &[], &Tried::default(), 3), None);
    }
}

#[test]
fn guards_take_back_what_they_counted() {
    let worker = worker(0, 1);
    let guard = worker.begin(7);
    assert_eq!((worker.in_flight(), worker.queued_tokens()), (1, 7));
    drop(guard);
    assert_eq!((worker.in_flight(), worker.queued_tokens()), (0, 0));
}

#[test]
fn least_loaded_follows_tokens_or_requests_as_told() {
    let pool = workers(&[1, 1]);
    let _long = pool[0].begin(1000);
    let _short = (pool[1].begin(1), pool[1].begin(1));
    let choose = |measure| pick_at(Policy::LeastLoaded(measure), &pool, &Tried::default(), 0);
    assert_eq!(choose(LoadMeasure::Tokens), Some(1));
    assert_eq!(choose(LoadMeasure::Requests), Some(0));
}

#[test]
fn equal_loads_are_taken_in_turn() {
    for measure in [LoadMeasure::Requests, LoadMeasure::Tokens] {
        let pool = workers(&[1, 1, 1]);
        let _busy = pool[1].begin(10);
        let choose =
            |turn| pick_at(Policy::LeastLoaded(measure), &pool, &Tried::default(), turn).unwrap();
        let chosen: Vec<_> = (0..6).map(choose).collect();
        let count = |index| chosen.iter().filter(|one| **one == index).count();
        assert_eq!([0, 1, 2].map(count), [3, 0, 3], "{chosen:?}");
        assert!(chosen.windows(2).all(|two| two[0] != two[1]), "{chosen:?}");
    }
}

/// Picks and remembers as the table does, and counts the request until the guard is dropped.
fn send(
    policy: Policy,
    pool: &[Arc<Worker>],
    features: &Features,
    seen: &Seen,
    turn: u64,
) -> (usize, crate::table::worker::InFlight) {
    let choice = pick(policy, pool, features, seen, &Tried::default(), NOW, turn).unwrap();
    remember(policy, features, seen, &pool[choice.index]);
    (choice.index, pool[choice.index].begin(features.prompt_tokens))
}

fn prompt(text: &str) -> Features {
    Features { marks: Marks::of(text.as_bytes(), None), ..Features::of_text(text.len()) }
}

fn in_conversation(id: &str) -> Features {
    Features {
        conversation: Some(Features::conversation_of(id.as_bytes())),
        ..Features::of_tokens(10)
    }
}

#[test]
fn power_of_two_takes_the_less_loaded_and_never_the_most_loaded_of_three() {
    let pool = workers(&[1, 1, 1]);
    let _busy = (pool[1].begin(1), pool[1].begin(1), pool[2].begin(1));
    let policy = Policy::PowerOfTwo(LoadMeasure::Requests);
    let mut counts = [0u32; 3];
    for turn in 0..3000 {
        counts[pick_at(policy, &pool, &Tried::default(), turn).unwrap()] += 1;
    }
    assert_eq!(counts[1], 0);
    // Worker 0 is among the two in two of three draws, and then it wins.
    assert!((1900..2100).contains(&counts[0]), "{counts:?}");
}

#[test]
fn power_of_two_draws_by_weight() {
    let pool = workers(&[1, 2, 5]);
    let policy = Policy::PowerOfTwo(LoadMeasure::Requests);
    let (mut counts, mut guards) = ([0u32; 3], Vec::new());
    for turn in 0..8000 {
        let index = pick_at(policy, &pool, &Tried::default(), turn).unwrap();
        counts[index] += 1;
        guards.push(pool[index].begin(1));
    }
    for (count, expected) in counts.into_iter().zip([1000, 2000, 5000]) {
        assert!(count.abs_diff(expected) * 20 <= expected, "{counts:?}");
    }
}

#[test]
fn prompts_that_begin_alike_meet_on_one_worker() {
    for measure in [LoadMeasure::Requests, LoadMeasure::Tokens] {
        let (pool, seen) = (workers(&[1, 1, 1]), Seen::default());
        let system = |number: usize| format!("You are assistant {number}. ").repeat(200);
        let mut homes = Vec::new();
        for turn in 0..30 {
            let number = turn % 3;
            let features = prompt(&format!("{}question {turn}", system(number)));
            let (index, _) = send(Policy::Prefix(measure), &pool, &features, &seen, turn as u64);
            match homes.get(number) {
                None => homes.push(index),
                Some(home) => assert_eq!(index, *home, "{measure:?}"),
            }
        }
    }
}

#[test]
fn a_shared_prefix_spreads_when_its_worker_has_more_to_do_than_it_saves() {
    for measure in [LoadMeasure::Requests, LoadMeasure::Tokens] {
        let (pool, seen) = (workers(&[1, 1, 1, 1]), Seen::default());
        let features = prompt(&"The same for everyone. ".repeat(400));
        let mut guards = Vec::new();
        let mut counts = [0u32; 4];
        for turn in 0..400 {
            let (index, guard) = send(Policy::Prefix(measure), &pool, &features, &seen, turn);
            counts[index] += 1;
            guards.push(guard);
        }
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(most - least <= 20, "{measure:?}: {counts:?}");
    }
}

#[test]
fn prompts_of_different_salts_share_no_prefix() {
    let text = "The same for everyone. ".repeat(400);
    let salted = |salt: &str| {
        let mut features = Features::of_text(text.len());
        features.read(text.as_bytes(), Some(salt.as_bytes()));
        features
    };
    for policy in
        [Policy::Prefix(LoadMeasure::Requests), Policy::Conversation(LoadMeasure::Requests)]
    {
        let (pool, seen) = (workers(&[1, 1, 1]), Seen::default());
        let (first, _busy) = send(policy, &pool, &salted("a"), &seen, 0);
        let (other, _busy) = send(policy, &pool, &salted("b"), &seen, 0);
        assert_ne!(first, other, "it goes where the load is least");
        for turn in 0..3 {
            assert_eq!(send(policy, &pool, &salted("a"), &seen, turn).0, first);
            assert_eq!(send(policy, &pool, &salted("b"), &seen, turn).0, other);
        }
        assert_eq!(seen_tokens(policy, &salted("b"), &seen, &pool[first]), 0);
        assert_eq!(seen_tokens(policy, &salted("a"), &seen, &pool[first]), 2299);
    }
}

#[test]
fn a_policy_that_remembers_no_prompts_has_seen_none() {
    let (pool, seen) = (workers(&[1]), Seen::default());
    let features = prompt(&"The same for everyone. ".repeat(400));
    drop(send(Policy::Prefix(LoadMeasure::Requests), &pool, &features, &seen, 0));
    for policy in ALL {
        let expected = if policy.reads_prompts(None) { 2299 } else { 0 };
        assert_eq!(seen_tokens(policy, &features, &seen, &pool[0]), expected, "{policy:?}");
    }
}

#[test]
fn a_short_match_does_not_outweigh_load() {
    let (pool, seen) = (workers(&[1, 1]), Seen::default());
    let policy = Policy::Prefix(LoadMeasure::Tokens);
    let same = "x".repeat(128);
    let (first, _busy) =
        send(policy, &pool, &prompt(&format!("{same}{}", "y".repeat(4000))), &seen, 0);
    let (second, _) =
        send(policy, &pool, &prompt(&format!("{same}{}", "z".repeat(4000))), &seen, 1);
    assert_ne!(first, second);
}

#[test]
fn a_conversation_stays_on_its_worker_while_that_is_usable_and_then_moves_for_good() {
    let (pool, seen) = (workers(&[1, 1, 1]), Seen::default());
    let policy = Policy::Conversation(LoadMeasure::Requests);
    let features = in_conversation("c-1");
    let (home, _busy) = send(policy, &pool, &features, &seen, 0);
    for turn in 1..20 {
        // Load does not move it, nor do other conversations.
        assert_eq!(send(policy, &pool, &features, &seen, turn).0, home);
        drop(send(policy, &pool, &in_conversation(&format!("other-{turn}")), &seen, turn));
    }
    set(&pool[home], Event::Refused);
    let (next, _) = send(policy, &pool, &features, &seen, 20);
    assert_ne!(next, home);
    set(&pool[home], Event::ProbeOk);
    for turn in 21..30 {
        assert_eq!(send(policy, &pool, &features, &seen, turn).0, next);
    }
}

#[test]
fn a_conversation_that_failed_on_its_worker_is_tried_elsewhere() {
    let (pool, seen) = (workers(&[1, 1]), Seen::default());
    let policy = Policy::Conversation(LoadMeasure::Requests);
    let features = in_conversation("c");
    let (home, _) = send(policy, &pool, &features, &seen, 0);
    let mut tried = Tried::default();
    tried.add(&pool[home]);
    let choice = pick(policy, &pool, &features, &seen, &tried, NOW, 1).unwrap();
    assert_eq!((choice.index, choice.again), (1 - home, false));
}

#[test]
fn a_conversation_without_an_id_is_known_by_what_was_said_before() {
    let (pool, seen) = (workers(&[1, 1, 1]), Seen::default());
    let policy = Policy::Conversation(LoadMeasure::Requests);
    let mut text =
        "[{\"role\":\"user\",\"content\":\"".to_owned() + &"Once upon a time ".repeat(40);
    let (home, _busy) = send(policy, &pool, &prompt(&text), &seen, 0);
    for turn in 1..10 {
        text.push_str(&format!("and then came number {turn}, who said hello. "));
        assert_eq!(send(policy, &pool, &prompt(&text), &seen, turn).0, home, "turn {turn}");
    }
    // Less than three quarters are known of this one: it goes where the load is least.
    let much_more = format!("{text}{}", "but this is another story ".repeat(200));
    assert_ne!(send(policy, &pool, &prompt(&much_more), &seen, 10).0, home);
}

#[test]
fn new_conversations_go_to_the_least_loaded() {
    let (pool, seen) = (workers(&[1, 3]), Seen::default());
    let policy = Policy::Conversation(LoadMeasure::Requests);
    let mut guards = Vec::new();
    let mut counts = [0u32; 2];
    for turn in 0..400 {
        let (index, guard) = send(policy, &pool, &in_conversation(&turn.to_string()), &seen, turn);
        counts[index] += 1;
        guards.push(guard);
    }
    assert_eq!(counts, [100, 300]);
}

#[test]
fn what_a_removed_worker_saw_does_not_lead_to_another_one() {
    let (pool, seen) = (workers(&[1, 1, 1]), Seen::default());
    for policy in [Policy::Conversation(LoadMeasure::Requests), Policy::Prefix(LoadMeasure::Tokens)]
    {
        let text = format!("{policy:?} ").repeat(100);
        let features = Features { conversation: Some(7), ..prompt(&text) };
        let (home, _) = send(policy, &pool, &features, &seen, 0);
        let rest: Vec<_> = pool
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != home)
            .map(|(_, w)| Arc::clone(w))
            .collect();
        assert!(pick(policy, &rest, &features, &seen, &Tried::default(), NOW, 1).is_some());
        assert!(pick(policy, &[], &features, &seen, &Tried::default(), NOW, 1).is_none());
    }
}
