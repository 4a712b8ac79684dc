//! What the prefix cache has is neither computed nor fetched, and changes no token.

use super::*;

const REQUEST: u64 = 1 << 42;

/// Prompts that begin alike, and answers to them on an engine that caches nothing.
fn family(rig: &Rig) -> Vec<(Ask, Answer)> {
    let stem = prompt(5, 24);
    let asks = (0..12).map(|seed| {
        let own = prompt(100 + seed as u32, seed as usize % 7);
        let shared = stem[..stem.len() - seed as usize % 5].iter().copied();
        Ask { prompt: shared.chain(own).collect(), ..Ask::varied(seed, 1, 4 + seed as u32) }
    });
    asks.map(|ask| (ask.clone(), rig.answer(ask))).collect()
}

fn without_cache() -> Rig {
    Rig::new(EngineConfig { prefix_cache: false, ..EngineConfig::default() }, fake_with(0))
}

#[test]
fn prompts_that_begin_alike_are_answered_as_if_nothing_was_shared() {
    let alone = without_cache();
    let family = family(&alone);
    let computed: u64 = family.iter().map(|(ask, _)| ask.prompt.len() as u64).sum();
    let totals = alone.handle.status().totals;
    assert_eq!((totals.prompt_computed, totals.prompt_prefix), (computed, 0));
    for (lag, blocks, max_batch_tokens) in [(0, 64, 64), (1, 64, 5), (0, 14, 16), (1, 14, 16)] {
        let config = EngineConfig { max_batch_tokens, ..EngineConfig::default() };
        let rig = Rig::new(config, small_pool(blocks, lag));
        for round in 0..3 {
            let open: Vec<_> = family.iter().map(|(ask, _)| rig.submit(ask.clone())).collect();
            for (receiver, (_, expected)) in open.into_iter().zip(&family) {
                assert_eq!(Answer::of(receiver), *expected, "lag {lag}, round {round}");
            }
        }
        rig.until_free();
        let status = rig.handle.status();
        assert!(status.totals.prompt_prefix > computed, "{status:?}");
        let all = status.totals.prompt_computed + status.totals.prompt_prefix;
        assert!(status.totals.preemptions > 0 || all == 3 * computed, "{status:?}");
        assert!(status.cache.evicted > 0 || blocks == 64, "{status:?}");
    }
}

#[test]
fn a_context_worker_keeps_prefixes_and_a_generation_worker_fetches_only_the_rest() {
    for lag in [0, 1] {
        let (from, to) = (Rig::with_lag(lag), Rig::with_lag(lag));
        let family = family(&without_cache());
        let mut prompts = 0;
        for (request, (ask, expected)) in (REQUEST..).zip(&family) {
            let context = from.answer(ask.clone().context(request));
            let (record, first) =
                (from.record(request, &ask.prompt, context.lease()), context.tokens[0].clone());
            let receiver = to.submit(ask.clone().generation(request, vec![first.id], record));
            to.carry(&to.next_job(), &from);
            let mut answer = Answer::of(receiver);
            answer.tokens.insert(0, first);
            assert_eq!(answer, *expected, "lag {lag}");
            prompts += ask.prompt.len() as u64;
        }
        let (context, generation) = (from.handle.status().totals, to.handle.status().totals);
        assert_eq!(context.prompt_computed + context.prompt_prefix, prompts);
        assert_eq!(generation.prompt_pulled + generation.prompt_prefix, prompts);
        assert!(context.prompt_prefix > prompts / 2 && generation.prompt_prefix > prompts / 2);
        let block = from.kv.layout.block_bytes();
        let blocks: u64 = family.iter().map(|(ask, _)| ask.prompt.len().div_ceil(4) as u64).sum();
        let moved = blocks - generation.prompt_prefix / 4;
        assert_eq!(generation.pulled_bytes, moved * block);
        from.until_free();
        to.until_free();
    }
}

#[test]
fn a_prompt_that_is_there_as_a_whole_is_not_fetched_but_its_lease_ends() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask { prompt: prompt(5, 8), ..Ask::varied(2, 1, 6) };
    let expected = to.answer(ask.clone());
    let context = from.answer(ask.clone().context(REQUEST));
    let (record, first) =
        (from.record(REQUEST, &ask.prompt, context.lease()), context.tokens[0].clone());
    let receiver = to.submit(ask.generation(REQUEST, vec![first.id], record));
    let job = to.next_job();
    assert!(job.ranks.iter().all(|(_, runs)| runs.is_empty()), "{:?}", job.ranks);
    to.carry(&job, &from);
    let mut answer = Answer::of(receiver);
    answer.tokens.insert(0, first);
    assert_eq!(answer, expected);
    let totals = to.handle.status().totals;
    assert_eq!((totals.prompt_pulled, totals.prompt_prefix, totals.pulled_bytes), (0, 8, 0));
    from.until_free();
    assert_eq!(from.handle.status().totals.leases_ended.pulled, 1);
    to.until_free();
}

#[test]
fn what_was_read_too_late_is_neither_used_nor_cached() {
    let lease_timeout = Duration::from_millis(20);
    let from = Rig::new(EngineConfig { lease_timeout, ..EngineConfig::default() }, fake_with(0));
    let to = Rig::with_lag(0);
    let ask = Ask::varied(1, 9, 5);
    let context = from.answer(ask.clone().context(REQUEST));
    let (record, first) =
        (from.record(REQUEST, &ask.prompt, context.lease()), context.tokens[0].clone());
    from.until_free();
    let receiver = to.submit(ask.clone().generation(REQUEST, vec![first.id], record));
    to.carry(&to.next_job(), &from);
    assert_eq!(Answer::of(receiver).failure, Some(ErrorCode::KvLeaseGone));
    to.until_free();
    assert_eq!(to.handle.status().cache.cached, 0);
    assert_eq!(to.answer(ask.clone()), without_cache().answer(ask));
    assert_eq!(to.handle.status().totals.prompt_prefix, 0);
}

#[test]
fn blocks_a_pull_found_are_free_when_it_is_cancelled_and_those_it_writes_are_not() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask { prompt: prompt(5, 20), ..Ask::varied(2, 1, 6) };
    to.answer(Ask { prompt: prompt(5, 12), ..ask.clone() });
    to.until_free();
    let context = from.answer(ask.clone().context(REQUEST));
    let (record, first) =
        (from.record(REQUEST, &ask.prompt, context.lease()), context.tokens[0].clone());
    let receiver = to.submit(ask.generation(REQUEST, vec![first.id], record));
    let job = to.next_job();
    // Of the six for 20 tokens and the next, three were found.
    eventually(|| (to.blocks().used, to.blocks().in_flight) == (3, 3));
    drop(receiver);
    eventually(|| (to.blocks().used, to.blocks().in_flight) == (0, 3));
    to.fail_pull(job.id, ErrorCode::KvTransferTimeout, false);
    eventually(|| to.blocks().quarantined == 3);
    to.tell(MoverEvent::Settled { id: job.id });
    to.until_free();
    from.handle.release(DisaggRequestId(REQUEST));
    from.until_free();
}

#[test]
fn a_cache_that_is_switched_off_finds_nothing_and_tells_nothing() {
    let config = EngineConfig { prefix_cache: false, event_buffer: 8, ..EngineConfig::default() };
    let rig = Rig::new(config, fake_with(1));
    let ask = Ask::varied(2, 20, 3);
    assert_eq!(rig.answer(ask.clone()), rig.answer(ask));
    rig.until_free();
    let status = rig.handle.status();
    assert_eq!((status.totals.prompt_computed, status.totals.prompt_prefix), (40, 0));
    assert_eq!((status.cache.cached, rig.handle.take_events().len()), (0, 0));
}
