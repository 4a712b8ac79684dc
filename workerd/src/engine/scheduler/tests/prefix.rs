//! What the prefix cache has is not computed or fetched again, and counts once.

use baton_shared::id::WorkerId;
use baton_shared::kv::record::Record;

use super::super::super::sequence::Source;
use super::*;

fn prompt(len: u32) -> Vec<u32> {
    (500..500 + len).collect()
}

#[test]
fn a_second_prompt_with_the_same_beginning_computes_only_the_rest() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.remember(&prompt(14));
    let again = bench.known(&prompt(18));
    assert_eq!(bench.admit(), [again]);
    assert_eq!(bench.admission.started, [(again, 12)]);
    let (step, seqs) = bench.plan().unwrap();
    assert_eq!((seqs, step.prompt_tokens), (vec![(12, 6, true)], 6));
    let table = &bench.plan.tables[..];
    assert_eq!((table.len(), bench.sequence(again).blocks.ids()), (5, table));
    assert_eq!(bench.scheduler.pool.cache_counts().reused, 3);
    assert_eq!(bench.scheduler.missed_blocks, 3 + 1, "the first looked for three in vain");
}

#[test]
fn the_last_token_is_computed_whatever_is_known() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.remember(&prompt(8));
    bench.known(&prompt(8));
    bench.admit();
    assert_eq!(bench.step(), [(4, 4, true)]);
    bench.known(&prompt(9));
    bench.admit();
    assert_eq!(bench.step(), [(8, 1, true), (8, 1, true)]);
}

#[test]
fn two_sequences_share_blocks_and_the_pool_counts_them_once() {
    let mut bench = Bench::new(LIMITS, 10);
    let first = bench.known(&prompt(16));
    bench.admit();
    bench.step();
    bench.step();
    assert_eq!(bench.scheduler.pool.free(), 6);
    // Three of the four blocks it needs are there: it must get one and leave two.
    let second = bench.known(&prompt(15));
    assert_eq!(bench.admit(), [second]);
    assert_eq!(bench.scheduler.pool.free(), 5);
    bench.scheduler.remove(first);
    assert_eq!(bench.scheduler.pool.free(), 6);
    let (one, _) = bench.plan().unwrap();
    bench.collect(&one);
    bench.scheduler.remove(second);
    assert_eq!(bench.scheduler.pool.free(), 10);
}

#[test]
fn salts_share_nothing() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.remember(&prompt(12));
    let salted = bench.ask(prompt(12), Some("a"), 100, Phase::Whole);
    let other = bench.ask(prompt(12), Some("b"), 100, Phase::Whole);
    assert_eq!(bench.admit(), [salted, other]);
    assert_eq!(bench.admission.started, [(salted, 0), (other, 0)]);
    while bench.sequence(other).computed < 12 {
        bench.step();
    }
    let again = bench.ask(prompt(12), Some("b"), 100, Phase::Whole);
    bench.admit();
    assert_eq!(bench.admission.started, [(again, 8)]);
}

#[test]
fn blocks_can_be_found_only_when_the_step_that_computes_them_was_collected() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.known(&prompt(8));
    bench.admit();
    let (first, _) = bench.plan().unwrap();
    let early = bench.known(&prompt(8));
    bench.admit();
    assert_eq!(bench.admission.started, [(early, 0)]);
    bench.collect(&first);
    let late = bench.known(&prompt(8));
    bench.admit();
    assert_eq!(bench.admission.started, [(late, 4)]);
}

#[test]
fn a_preempted_sequence_finds_its_own_blocks_unless_they_were_needed() {
    let limits = Limits { watermark: 0, ..LIMITS };
    let mut bench = Bench::new(limits, 5);
    let (old, young) = (bench.whole(4), bench.known(&prompt(9)));
    assert_eq!(bench.admit(), [old, young]);
    bench.step();
    bench.step();
    // Old takes the last free block, then one of young's.
    while bench.place(young) != Place::Waiting {
        bench.step();
    }
    assert_eq!(bench.scheduler.preemptions, 1);
    bench.scheduler.remove(old);
    bench.admit();
    let (step, seqs) = bench.plan().unwrap();
    // Its third block was taken: the first two are as they were.
    assert_eq!(seqs, [(8, 5, true)]);
    assert_eq!(step.prompt_tokens, 4, "what it had computed of its answer counts as lost");
}

#[test]
fn a_step_that_ends_after_a_preemption_says_nothing_of_the_new_blocks() {
    let limits = Limits { watermark: 0, ..LIMITS };
    let mut bench = Bench::new(limits, 4);
    let (old, young) = (bench.whole(3), bench.known(&prompt(12)));
    assert_eq!(bench.admit(), [old, young]);
    let (first, _) = bench.plan().unwrap();
    bench.collect(&first);
    let (second, seqs) = bench.plan().unwrap();
    assert_eq!(seqs, [(3, 1, true), (5, 7, true)]);
    // Old needs a second block: young gives all of its three, which the step under way still writes.
    assert!(bench.plan().is_none());
    bench.collect(&second);
    bench.scheduler.remove(young);
    bench.step();
    assert_eq!(bench.scheduler.pool.counts().used, 2);
}

#[test]
fn context_passes_of_one_prompt_count_its_blocks_once_against_the_lease_bound() {
    let limits = Limits { max_leased_blocks: 7, ..LIMITS };
    let mut bench = Bench::new(limits, 64);
    bench.remember(&prompt(20));
    let ask = |bench: &mut Bench, request| {
        bench.ask(prompt(21), None, 9, Phase::Context(DisaggRequestId(request)))
    };
    let (first, second) = (ask(&mut bench, 1), ask(&mut bench, 2));
    // Five blocks that both have, and one of each: exactly seven.
    assert_eq!(bench.admit(), [first, second]);
    let third = ask(&mut bench, 3);
    assert!(bench.admit().is_empty());
    bench.scheduler.remove(first);
    assert_eq!(bench.admit(), [third]);
    assert_eq!(bench.scheduler.pool.pledged(), 7);
}

#[test]
fn a_context_pass_may_have_what_is_kept_free_for_sequences_that_grow() {
    let mut bench = Bench::new(LIMITS, 10);
    let first = bench.context(20, 1);
    let second = bench.context(20, 2);
    assert_eq!(bench.admit(), [first, second]);
    assert_eq!(bench.scheduler.pool.free(), 0);
    bench.scheduler.remove(second);
    // One that grows leaves them free, and so does a context pass beside it.
    let whole = bench.whole(12);
    assert_eq!(bench.admit(), [whole]);
    let third = bench.context(4, 3);
    assert!(bench.admit().is_empty());
    bench.scheduler.remove(whole);
    assert_eq!(bench.admit(), [third]);
}

#[test]
fn a_pull_fetches_only_what_the_prefix_cache_does_not_have() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.remember(&prompt(12));
    let record = Box::new(Record {
        worker: "w".parse::<WorkerId>().unwrap(),
        address: "127.0.0.1:1".to_owned(),
        incarnation: Incarnation([1; 16]),
        request: DisaggRequestId(1),
        prompt_hash: [0; 32],
        fingerprint: [0; 32],
        prompt_tokens: 16,
        lease: None,
    });
    let phase = Phase::Generation { request: DisaggRequestId(1), first: vec![9], record };
    let id = bench.ask(prompt(16), None, 9, phase);
    assert!(bench.admit().is_empty());
    let [(pulling, Source::Remote(_))] = &bench.admission.pulls[..] else { panic!("one pull") };
    assert_eq!((*pulling, bench.place(id)), (id, Place::Pulling));
    assert_eq!((bench.sequence(id).found, bench.sequence(id).blocks.count()), (3, 5));
    // Its own blocks come in, and the next one finds all four of the prompt's.
    let blocks = bench.scheduler.take_blocks(id);
    bench.scheduler.ready(id, blocks);
    bench.admit();
    assert_eq!(bench.step(), [(16, 1, true)]);
    let again = bench.known(&prompt(17));
    bench.admit();
    assert_eq!(bench.admission.started, [(again, 16)]);
}
