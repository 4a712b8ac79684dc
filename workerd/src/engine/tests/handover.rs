//! A context pass here and a generation pass there give what one worker gives; what becomes of leases and pulls.

use super::*;

const REQUEST: u64 = 1 << 41;

/// Context pass of an ask; the record and the first token.
fn context(rig: &Rig, ask: &Ask, request: u64) -> (Box<Record>, TokenOut) {
    let answer = rig.answer(ask.clone().context(request));
    let record = rig.record(request, &ask.prompt, answer.lease());
    (record, answer.tokens[0].clone())
}

fn generation(ask: &Ask, request: u64, first: &TokenOut, record: &Record) -> Ask {
    ask.clone().generation(request, vec![first.id], Box::new(record.clone()))
}

#[test]
fn two_workers_answer_as_one() {
    for lag in [0, 1] {
        let (from, to) = (Rig::with_lag(lag), Rig::with_lag(lag));
        let mut prompts = 0;
        for (seed, len) in (0..).zip([1, 3, 4, 5, 8, 33]) {
            let ask = Ask::varied(seed, len, 11);
            let whole = Rig::with_lag(0).answer(ask.clone());
            let (record, first) = context(&from, &ask, REQUEST + seed);
            let receiver = to.submit(generation(&ask, REQUEST + seed, &first, &record));
            to.carry(&to.next_job(), &from);
            let mut rest = Answer::of(receiver);
            rest.tokens.insert(0, first);
            assert_eq!(rest, whole, "prompt of {len}, lag {lag}");
            prompts += len as u64;
        }
        from.until_free();
        to.until_free();
        let (context, generation) = (from.handle.status().totals, to.handle.status().totals);
        assert_eq!((context.prompt_computed, context.leases_ended.pulled), (prompts, 6));
        assert_eq!((generation.prompt_computed, generation.prompt_pulled), (0, prompts));
        assert_eq!(generation.pulls, 6);
        let block_bytes = from.kv.layout.block_bytes();
        let blocks: u64 = [1, 3, 4, 5, 8, 33_u64].iter().map(|len| len.div_ceil(4)).sum();
        assert_eq!(generation.pulled_bytes, blocks * block_bytes);
    }
}

#[test]
fn a_worker_hands_over_to_itself_by_moving_references_once() {
    let rig = Rig::with_lag(1);
    let ask = Ask::varied(3, 8, 11);
    let (record, first) = context(&rig, &ask, REQUEST);
    let mut rest = rig.answer(generation(&ask, REQUEST, &first, &record));
    rest.tokens.insert(0, first.clone());
    assert_eq!(rest, Rig::with_lag(0).answer(ask.clone()));
    assert!(rig.jobs.lock().unwrap().posted.is_empty());
    let again = rig.answer(generation(&ask, REQUEST, &first, &record));
    assert_eq!(again.failure, Some(ErrorCode::KvLeaseGone));
    rig.until_free();
    assert_eq!(rig.handle.status().totals.prompt_computed, 8);
}

#[test]
fn a_preempted_generation_computes_its_prompt_itself() {
    let (from, to) = (Rig::with_lag(0), Rig::new(EngineConfig::default(), small_pool(12, 0)));
    let asks = [Ask::varied(1, 9, 25), Ask::varied(2, 10, 25), Ask::varied(3, 11, 25)];
    let mut receivers = Vec::new();
    for (request, ask) in (REQUEST..).zip(&asks) {
        let (record, first) = context(&from, ask, request);
        receivers.push((to.submit(generation(ask, request, &first, &record)), first));
    }
    to.script.hold();
    for _ in &asks {
        to.carry(&to.next_job(), &from);
    }
    to.script.let_go();
    for (ask, (receiver, first)) in asks.into_iter().zip(receivers) {
        let mut rest = Answer::of(receiver);
        rest.tokens.insert(0, first);
        assert_eq!(rest, Rig::with_lag(0).answer(ask));
    }
    let totals = to.handle.status().totals;
    assert!(totals.preemptions > 0 && totals.prompt_computed > 0);
    to.until_free();
}

#[test]
fn a_text_that_ends_with_its_first_token_leases_nothing() {
    let rig = Rig::with_lag(1);
    let ask = Ask::varied(2, 6, 5);
    let first = rig.answer(ask.clone()).ids()[0];
    let stopped = Ask { stop_ids: vec![first], ..ask.clone() };
    for (ask, reason) in
        [(stopped, FinishReason::Stop), (Ask { max_tokens: 1, ..ask }, FinishReason::Length)]
    {
        let answer = rig.answer(ask.context(REQUEST));
        assert_eq!((answer.ids(), answer.leased), (vec![first], Some(None)));
        assert_eq!(answer.finish, Some(reason));
    }
    rig.until_free();
}

#[test]
fn an_unread_lease_expires_and_is_gone_for_its_reader() {
    let lease_timeout = Duration::from_millis(20);
    let from = Rig::new(EngineConfig { lease_timeout, ..EngineConfig::default() }, fake_with(0));
    let to = Rig::with_lag(0);
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    from.until_free();
    let receiver = to.submit(generation(&ask, REQUEST, &first, &record));
    to.carry(&to.next_job(), &from);
    let answer = Answer::of(receiver);
    assert_eq!((answer.failure, answer.starts), (Some(ErrorCode::KvLeaseGone), 0));
    eventually(|| to.handle.status().totals.pull_failures == [(ErrorCode::KvLeaseGone, 1)]);
    to.until_free();
}

#[test]
fn a_release_ends_what_is_leased_computing_or_to_come() {
    let rig = Rig::with_lag(0);
    context(&rig, &Ask::varied(1, 9, 5), REQUEST);
    rig.handle.release(DisaggRequestId(REQUEST));
    rig.until_free();
    rig.script.hold();
    let computing = rig.submit(Ask::varied(1, 9, 5).context(REQUEST + 1));
    eventually(|| rig.handle.status().waiting == 0);
    rig.handle.release(DisaggRequestId(REQUEST + 1));
    rig.handle.release(DisaggRequestId(REQUEST + 2));
    let late = rig.submit(Ask::varied(1, 9, 5).context(REQUEST + 2));
    rig.script.let_go();
    assert_eq!(Answer::of(late).failure, Some(ErrorCode::KvLeaseGone));
    drop(Answer::of(computing));
    rig.until_free();
}

#[test]
fn a_second_live_request_with_an_id_is_refused() {
    let rig = Rig::with_lag(0);
    let ask = Ask::varied(1, 9, 5).context(REQUEST);
    rig.answer(ask.clone()).lease();
    assert_eq!(rig.answer(ask).failure, Some(ErrorCode::DuplicateRequest));
    rig.script.hold();
    let ask = Ask::varied(1, 9, 5).context(REQUEST + 1);
    let (first, second) = (rig.submit(ask.clone()), rig.submit(ask));
    rig.script.let_go();
    assert_eq!(Answer::of(second).failure, Some(ErrorCode::DuplicateRequest));
    Answer::of(first).lease();
}

#[test]
fn blocks_of_a_cancelled_pull_are_free_only_after_the_movers_word() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    let receiver = to.submit(generation(&ask, REQUEST, &first, &record));
    let job = to.next_job();
    drop(receiver);
    eventually(|| to.jobs.lock().unwrap().cancelled == [job.id]);
    // A whole other request later, the blocks are still out of reach.
    to.answer(Ask::varied(2, 9, 5));
    assert_eq!(to.blocks().in_flight, 3);
    to.fail_pull(job.id, ErrorCode::KvLeaseGone, true);
    to.until_free();
}

#[test]
fn blocks_of_an_abandoned_pull_are_quarantined_until_it_is_settled() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    let receiver = to.submit(generation(&ask, REQUEST, &first, &record));
    let job = to.next_job();
    to.fail_pull(job.id, ErrorCode::KvTransferTimeout, false);
    assert_eq!(Answer::of(receiver).failure, Some(ErrorCode::KvTransferTimeout));
    eventually(|| to.blocks().quarantined == 3);
    assert!(to.jobs.lock().unwrap().cancelled.is_empty());
    to.tell(MoverEvent::Settled { id: job.id });
    to.until_free();
}

#[test]
fn a_mover_without_room_is_answered_pool_exhausted() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    to.jobs.lock().unwrap().is_full = true;
    let answer = to.answer(generation(&ask, REQUEST, &first, &record));
    assert_eq!(answer.failure, Some(ErrorCode::PoolExhausted));
    to.until_free();
}

#[test]
fn context_passes_beyond_the_lease_bound_wait_and_others_overtake_them() {
    let queue_timeout = Duration::from_millis(50);
    let config = EngineConfig { queue_timeout, ..EngineConfig::default() };
    let rig = Rig::new(config, small_pool(12, 0));
    // Half of 12 blocks may be leased: two passes of 3 blocks.
    for request in 0..2 {
        context(&rig, &Ask::varied(11 + request, 9, 5), REQUEST + request);
    }
    let third = rig.submit(Ask::varied(13, 9, 5).context(REQUEST + 2));
    assert_eq!(rig.answer(Ask::varied(2, 9, 5)).tokens.len(), 5);
    assert_eq!(Answer::of(third).failure, Some(ErrorCode::PoolExhausted));
    let fourth = rig.submit(Ask::varied(14, 9, 5).context(REQUEST + 3));
    rig.handle.release(DisaggRequestId(REQUEST));
    Answer::of(fourth).lease();
    let never = rig.answer(Ask::varied(1, 25, 5).context(REQUEST + 4));
    assert_eq!(never.failure, Some(ErrorCode::ContextLengthExceeded));
}

#[test]
fn a_generation_pass_without_room_is_answered_pool_exhausted_and_leaves_the_lease() {
    let queue_timeout = Duration::from_millis(30);
    let config = EngineConfig { queue_timeout, ..EngineConfig::default() };
    let (from, to) = (Rig::with_lag(0), Rig::new(config, small_pool(4, 0)));
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    to.answer(Ask::varied(2, 8, 5).context(REQUEST + 1)).lease();
    let answer = to.answer(generation(&ask, REQUEST, &first, &record));
    assert_eq!(answer.failure, Some(ErrorCode::PoolExhausted));
    assert_eq!(from.blocks().leased, 3);
    assert!(to.jobs.lock().unwrap().posted.is_empty());
}

#[test]
fn a_record_that_does_not_fit_its_request_is_refused() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask::varied(1, 9, 5);
    let (record, first) = context(&from, &ask, REQUEST);
    let mut without_lease = record.clone();
    without_lease.lease = None;
    let mut of_another_prompt = record.clone();
    of_another_prompt.prompt_tokens = 8;
    for (first, record) in [
        (vec![], record.clone()),
        (vec![97], record),
        (vec![first.id], without_lease),
        (vec![first.id], of_another_prompt),
    ] {
        let answer = to.answer(ask.clone().generation(REQUEST, first, record));
        assert_eq!(answer.failure, Some(ErrorCode::KvStateInvalid));
    }
}

#[test]
fn a_generation_pass_with_nothing_left_to_say_pulls_nothing() {
    let (from, to) = (Rig::with_lag(0), Rig::with_lag(0));
    let ask = Ask::varied(1, 9, 1);
    let (record, first) = context(&from, &Ask { max_tokens: 5, ..ask.clone() }, REQUEST);
    let answer = to.answer(generation(&ask, REQUEST, &first, &record));
    assert_eq!((answer.starts, answer.finish), (1, Some(FinishReason::Length)));
    assert!(answer.tokens.is_empty() && to.jobs.lock().unwrap().posted.is_empty());
}
