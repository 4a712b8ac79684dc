//! Requests that leave, engines that stop or fail: everybody is answered, nothing is kept.

use super::*;

#[test]
fn clients_that_leave_free_everything() {
    for lag in [0, 1] {
        let config = EngineConfig { max_sequences: 3, ..EngineConfig::default() };
        let rig = Rig::new(config, small_pool(24, lag));
        rig.script.hold();
        let receivers: Vec<_> = (0..8).map(|seed| rig.submit(Ask::varied(seed, 9, 30))).collect();
        drop(receivers);
        rig.script.let_go();
        rig.until_free();
        assert_eq!(rig.handle.status().waiting, 0);
        let after = rig.answer(Ask::varied(1, 9, 5));
        assert_eq!(after, Rig::with_lag(0).answer(Ask::varied(1, 9, 5)));
    }
}

#[test]
fn clients_that_leave_at_any_moment_leave_nothing_behind() {
    for lag in [0, 1] {
        let queue_timeout = Duration::from_millis(5);
        let config = EngineConfig { queue_timeout, ..EngineConfig::default() };
        let rig = Rig::new(config, small_pool(40, lag));
        let mut open = Vec::new();
        for seed in 0..200 {
            let ask = Ask::varied(seed, 1 + seed as usize % 40, 3 + seed as u32 % 20);
            let ask = if seed % 3 == 0 { ask.context(1_000 + seed) } else { ask };
            open.push(rig.submit(ask));
            if seed % 2 == 0 {
                let mut leaving = open.swap_remove(seed as usize * 7 % open.len());
                for _ in 0..seed % 5 {
                    block_on(leaving.next());
                }
            }
            if open.len() > 20 {
                open.drain(..10);
            }
        }
        // Those who stay to read their leases must give them back themselves.
        for receiver in open {
            if let Some(Some(leased)) = Answer::of(receiver).leased {
                rig.handle.end_lease(leased.lease);
            }
        }
        for seed in 0..200 {
            rig.handle.release(DisaggRequestId(1_000 + seed));
        }
        rig.until_free();
    }
}

#[test]
fn a_client_that_left_before_its_lease_was_read_ends_the_lease() {
    let rig = Rig::with_lag(0);
    let receiver = rig.submit(Ask::varied(1, 9, 5).context(7));
    eventually(|| rig.blocks().leased == 3);
    drop(receiver);
    rig.until_free();
    assert_eq!(rig.handle.status().totals.leases_ended.released, 1);
}

#[test]
fn more_waiting_requests_than_the_queue_holds_are_refused() {
    let config = EngineConfig { max_queue: 2, max_sequences: 1, ..EngineConfig::default() };
    let rig = Rig::new(config, fake_with(0));
    rig.script.hold();
    let running = rig.submit(Ask::varied(0, 4, 4));
    eventually(|| rig.handle.status().waiting == 0);
    let waiting = [rig.submit(Ask::varied(1, 4, 4)), rig.submit(Ask::varied(2, 4, 4))];
    let (sender, _receiver) = output::channel(8);
    let refused = rig.handle.submit(Ask::varied(3, 4, 4).submission(sender));
    assert_eq!(refused, Err(SubmitError::QueueFull { limit: 2 }));
    rig.script.let_go();
    for receiver in waiting.into_iter().chain([running]) {
        assert_eq!(Answer::of(receiver).tokens.len(), 4);
    }
    assert_eq!(rig.handle.status().waiting, 0);
}

#[test]
fn a_panic_is_answered_and_ends_the_engine() {
    for lag in [0, 1] {
        let rig = Rig::with_lag(lag);
        rig.script.panic_at(2);
        rig.script.hold();
        let receivers: Vec<_> = (0..20).map(|seed| rig.submit(Ask::varied(seed, 5, 30))).collect();
        rig.script.let_go();
        for receiver in receivers {
            assert_eq!(Answer::of(receiver).failure, Some(ErrorCode::Internal));
        }
        let EngineEnd::Failed(reason) = rig.ended() else { panic!("it did fail") };
        assert!(reason.contains("panic"), "{reason}");
        assert!(!rig.handle.status().is_alive);
        let (sender, _receiver) = output::channel(8);
        let refused = rig.handle.submit(Ask::varied(3, 4, 4).submission(sender));
        assert_eq!(refused, Err(SubmitError::Unavailable));
    }
}

#[test]
fn a_failed_device_is_answered_and_ends_the_engine() {
    let rig = Rig::with_lag(1);
    rig.script.fail_at(1);
    assert_eq!(rig.answer(Ask::varied(1, 5, 30)).failure, Some(ErrorCode::Internal));
    assert!(matches!(rig.ended(), EngineEnd::Failed(_)));
}

#[test]
fn a_seat_that_is_never_taken_answers_too() {
    let (handle, seat) = engine(EngineConfig::default());
    let (sender, receiver) = output::channel(8);
    handle.submit(Ask::varied(0, 4, 4).submission(sender)).unwrap();
    drop(seat);
    assert_eq!(Answer::of(receiver).failure, Some(ErrorCode::Unavailable));
    assert!(matches!(block_on(handle.ended()), EngineEnd::Failed(_)));
}

#[test]
fn a_drain_finishes_what_runs_and_waits_for_what_is_leased() {
    let rig = Rig::with_lag(1);
    let leased = rig.answer(Ask::varied(1, 9, 5).context(7)).lease();
    rig.script.hold();
    let running = rig.submit(Ask::varied(2, 9, 6));
    rig.handle.drain();
    let (sender, _receiver) = output::channel(8);
    let refused = rig.handle.submit(Ask::varied(3, 4, 4).submission(sender));
    assert_eq!(refused, Err(SubmitError::Unavailable));
    rig.script.let_go();
    assert_eq!(Answer::of(running).tokens.len(), 6);
    let status = rig.handle.status();
    assert!(status.is_alive && status.is_draining);
    rig.handle.release(DisaggRequestId(7));
    assert_eq!(rig.ended(), EngineEnd::Drained);
    drop(leased);
}

#[test]
fn a_drain_ends_when_the_last_lease_expires() {
    let lease_timeout = Duration::from_millis(20);
    let rig = Rig::new(EngineConfig { lease_timeout, ..EngineConfig::default() }, fake_with(0));
    rig.answer(Ask::varied(1, 9, 5).context(7)).lease();
    rig.handle.drain();
    assert_eq!(rig.ended(), EngineEnd::Drained);
    assert_eq!(rig.handle.status().totals.leases_ended.expired, 1);
}

#[test]
fn an_idle_engine_shows_that_it_lives() {
    let rig = Rig::with_lag(0);
    eventually(|| rig.handle.status().is_alive);
    assert!(rig.handle.status().heartbeat_age < Duration::from_secs(5));
}
