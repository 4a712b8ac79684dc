use super::*;

const AGAIN: Next = Next::Again { busy: false };
const BUSY: Next = Next::Again { busy: true };
const RECORDS: [Record; 3] = [Record::Whole, Record::Doubtful, Record::Read];

fn pass(blame: Blame) -> Next {
    Next::ContextPass { blame }
}

impl Progress {
    /// Of a generation hop, with other workers to go to.
    fn generation(&mut self, trouble: Trouble, record: Record) -> Next {
        self.after(Phase::Generation, trouble, record, true)
    }

    /// Of a context hop, with other workers to go to.
    fn context(&mut self, trouble: Trouble) -> Next {
        self.after(Phase::Context, trouble, Record::Whole, true)
    }
}

#[test]
fn a_phase_is_tried_as_often_as_configured() {
    for phase in Phase::ALL {
        let mut progress = Progress::new(3);
        let mut after = |trouble| progress.after(phase, trouble, Record::Whole, true);
        assert_eq!(after(Trouble::Broken), AGAIN);
        assert_eq!(after(Trouble::Refused(Remedy::AnotherServerBlame)), AGAIN);
        assert_eq!(after(Trouble::TimedOut), Next::GiveUp(timed_out(phase)));
    }
}

#[test]
fn what_a_failed_generation_leaves_of_the_record_says_what_is_next() {
    use Remedy::{AnotherServer, AnotherServerBlame, GiveUp, NewContextPass, PassThrough};
    let give_up = Next::GiveUp(ErrorCode::GenerationFailed);
    let elsewhere = Remedy::NewContextPassElsewhere;
    let computed = pass(Blame::Generation);
    let gone = [pass(Blame::Nobody); 3];
    // First failure of a request; by what has become of its record: whole, doubtful, read.
    for (trouble, next) in [
        (Trouble::Unreachable, [AGAIN; 3]),
        (Trouble::Broken, [AGAIN, AGAIN, computed]),
        (Trouble::TimedOut, [AGAIN, AGAIN, computed]),
        (Trouble::Refused(AnotherServerBlame), [AGAIN, AGAIN, computed]),
        (Trouble::Refused(AnotherServer), [BUSY; 3]),
        (Trouble::Refused(NewContextPass), gone),
        (Trouble::Refused(elsewhere), [pass(Blame::Context); 3]),
        (Trouble::Refused(PassThrough), [Next::Forward; 3]),
        (Trouble::Refused(GiveUp), [give_up; 3]),
    ] {
        for (record, next) in RECORDS.into_iter().zip(next) {
            let mut progress = Progress::new(3);
            assert_eq!(progress.generation(trouble, record), next, "{trouble:?} {record:?}");
        }
    }
}

#[test]
fn a_doubtful_record_gets_one_more_reader_and_then_it_is_computed_again() {
    for second in [Record::Doubtful, Record::Read] {
        let mut progress = Progress::new(4);
        assert_eq!(progress.generation(Trouble::Broken, Record::Doubtful), AGAIN);
        assert_eq!(progress.generation(Trouble::Broken, second), pass(Blame::Generation));
        assert_eq!(progress.generation(Trouble::TimedOut, Record::Doubtful), AGAIN, "a new record");
        let end = Next::GiveUp(ErrorCode::GenerationFailed);
        assert_eq!(progress.generation(Trouble::Broken, Record::Doubtful), end);
    }
}

#[test]
fn a_doubtful_record_is_not_shown_to_workers_that_cannot_say_that_it_is_gone() {
    for record in RECORDS {
        assert_eq!(record.for_next(true), record);
    }
    let others = RECORDS.map(|record| record.for_next(false));
    assert_eq!(others, [Record::Whole, Record::Read, Record::Read]);
}

#[test]
fn passes_that_failed_generations_cost_take_no_try_from_the_context_phase() {
    let mut progress = Progress::new(3);
    assert_eq!(progress.context(Trouble::Broken), AGAIN);
    assert_eq!(progress.generation(Trouble::Broken, Record::Read), pass(Blame::Generation));
    assert_eq!(progress.context(Trouble::TimedOut), AGAIN);
    assert_eq!(progress.generation(Trouble::Broken, Record::Doubtful), AGAIN);
    let gone = Trouble::Refused(Remedy::NewContextPass);
    assert_eq!(
        progress.generation(gone, Record::Whole),
        pass(Blame::Nobody),
        "as was to be feared"
    );
    let end = Next::GiveUp(ErrorCode::GenerationFailed);
    assert_eq!(progress.generation(Trouble::Broken, Record::Read), end);
}

#[test]
fn lost_records_and_failed_passes_share_one_count_of_context_passes() {
    let (gone, unread) = (Remedy::NewContextPass, Remedy::NewContextPassElsewhere);
    let mut progress = Progress::new(3);
    assert_eq!(progress.context(Trouble::Broken), AGAIN);
    let next = progress.generation(Trouble::Refused(gone), Record::Whole);
    assert_eq!(next, pass(Blame::Nobody));
    let next = progress.generation(Trouble::Refused(unread), Record::Whole);
    assert_eq!(next, Next::GiveUp(ErrorCode::GenerationFailed));
}

#[test]
fn doubt_in_a_generation_worker_does_not_excuse_a_context_worker() {
    let mut progress = Progress::new(2);
    assert_eq!(progress.generation(Trouble::Broken, Record::Doubtful), AGAIN);
    let unread = Trouble::Refused(Remedy::NewContextPassElsewhere);
    assert_eq!(progress.generation(unread, Record::Whole), pass(Blame::Context));
    let end = Next::GiveUp(ErrorCode::GenerationFailed);
    assert_eq!(progress.generation(unread, Record::Whole), end);
}

#[test]
fn a_worker_that_cannot_be_reached_is_not_counted_while_there_are_others() {
    for phase in Phase::ALL {
        let mut progress = Progress::new(2);
        for _ in 0..100 {
            let next = progress.after(phase, Trouble::Unreachable, Record::Whole, true);
            assert_eq!(next, AGAIN);
        }
        let mut last = || progress.after(phase, Trouble::Unreachable, Record::Whole, false);
        assert_eq!([last(), last()], [AGAIN, Next::GiveUp(failed(phase))]);
    }
}

#[test]
fn load_is_not_counted_and_mistakes_are_not_repeated() {
    for phase in Phase::ALL {
        let mut progress = Progress::new(1);
        let mut after =
            |remedy| progress.after(phase, Trouble::Refused(remedy), Record::Whole, true);
        for _ in 0..100 {
            assert_eq!(after(Remedy::AnotherServer), BUSY);
        }
        assert_eq!(after(Remedy::GiveUp), Next::GiveUp(failed(phase)));
        assert_eq!(after(Remedy::PassThrough), Next::Forward);
    }
}
