//! What comes next after a hop went wrong: pure, by the table in `baton_shared::wire::error`.
//!
//! Holds: at most `attempts` context passes a request, and at most `attempts` generation tries that failed by a
//! generation worker's own fault. Refusals for load are not counted; the engine bounds them by time.

use baton_shared::wire::error::{ErrorCode, Remedy};

use crate::table::Phase;

/// How a hop went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The worker answered something other than 2xx, and this is to be done about it.
    Refused(Remedy),
    /// No connection, a broken one, or nonsense.
    Broken,
    /// No answer in time.
    TimedOut,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The same phase again (a generation try keeps its record), on another worker if there is one.
    Again {
        /// Only load was in the way: when every worker has said so, wait before asking the first again.
        busy: bool,
    },
    /// A new context pass; the record is left behind.
    ContextPass {
        /// The context worker is to blame.
        blame_context: bool,
    },
    /// The worker's answer is the client's.
    Forward,
    /// This error is.
    GiveUp(ErrorCode),
}

/// What was tried for one request.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    attempts: u32,
    passes: u32,
    failed_generations: u32,
}

impl Progress {
    /// Nothing tried yet; `attempts` counts the first try too.
    pub fn new(attempts: u32) -> Self {
        Self { attempts: attempts.max(1), passes: 0, failed_generations: 0 }
    }

    /// Decides after a hop of `phase` went wrong.
    pub fn after(&mut self, phase: Phase, trouble: Trouble) -> Next {
        match trouble {
            Trouble::Refused(Remedy::PassThrough) => Next::Forward,
            Trouble::Refused(Remedy::GiveUp) => Next::GiveUp(failed(phase)),
            Trouble::Refused(Remedy::AnotherServer) => Next::Again { busy: true },
            Trouble::Refused(
                remedy @ (Remedy::NewContextPass | Remedy::NewContextPassElsewhere),
            ) => {
                let blame_context = remedy == Remedy::NewContextPassElsewhere;
                match phase {
                    Phase::Context => self.again(phase, failed(phase)),
                    Phase::Generation => self.context_pass(blame_context),
                }
            }
            Trouble::Refused(Remedy::AnotherServerBlame) | Trouble::Broken => {
                self.again(phase, failed(phase))
            }
            Trouble::TimedOut => self.again(phase, timed_out(phase)),
        }
    }

    /// The same phase again, if it may still be tried.
    fn again(&mut self, phase: Phase, otherwise: ErrorCode) -> Next {
        let tries = match phase {
            Phase::Context => &mut self.passes,
            Phase::Generation => &mut self.failed_generations,
        };
        *tries += 1;
        if *tries < self.attempts { Next::Again { busy: false } } else { Next::GiveUp(otherwise) }
    }

    /// The pass that succeeded was in vain.
    fn context_pass(&mut self, blame_context: bool) -> Next {
        self.passes += 1;
        if self.passes < self.attempts {
            Next::ContextPass { blame_context }
        } else {
            Next::GiveUp(ErrorCode::GenerationFailed)
        }
    }
}

/// 502 for a phase.
pub fn failed(phase: Phase) -> ErrorCode {
    match phase {
        Phase::Context => ErrorCode::ContextFailed,
        Phase::Generation => ErrorCode::GenerationFailed,
    }
}

/// 504 for a phase.
pub fn timed_out(phase: Phase) -> ErrorCode {
    match phase {
        Phase::Context => ErrorCode::ContextTimeout,
        Phase::Generation => ErrorCode::GenerationTimeout,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGAIN: Next = Next::Again { busy: false };

    #[test]
    fn a_phase_is_tried_as_often_as_configured() {
        for phase in Phase::ALL {
            let mut progress = Progress::new(3);
            assert_eq!(progress.after(phase, Trouble::Broken), AGAIN);
            assert_eq!(progress.after(phase, Trouble::Refused(Remedy::AnotherServerBlame)), AGAIN);
            assert_eq!(progress.after(phase, Trouble::TimedOut), Next::GiveUp(timed_out(phase)));
        }
    }

    #[test]
    fn lost_records_and_failed_passes_share_one_count_of_context_passes() {
        let mut progress = Progress::new(3);
        assert_eq!(progress.after(Phase::Context, Trouble::Broken), AGAIN);
        assert_eq!(
            progress.after(Phase::Generation, Trouble::Refused(Remedy::NewContextPass)),
            Next::ContextPass { blame_context: false }
        );
        assert_eq!(
            progress.after(Phase::Generation, Trouble::Refused(Remedy::NewContextPassElsewhere)),
            Next::GiveUp(ErrorCode::GenerationFailed)
        );
    }

    #[test]
    fn a_dead_peer_blames_the_context_worker() {
        let mut progress = Progress::new(2);
        assert_eq!(
            progress.after(Phase::Generation, Trouble::Refused(Remedy::NewContextPassElsewhere)),
            Next::ContextPass { blame_context: true }
        );
    }

    #[test]
    fn load_is_not_counted_and_mistakes_are_not_repeated() {
        for phase in Phase::ALL {
            let mut progress = Progress::new(1);
            for _ in 0..100 {
                let busy = Trouble::Refused(Remedy::AnotherServer);
                assert_eq!(progress.after(phase, busy), Next::Again { busy: true });
            }
            let mistake = Trouble::Refused(Remedy::GiveUp);
            assert_eq!(progress.after(phase, mistake), Next::GiveUp(failed(phase)));
            let clients = Trouble::Refused(Remedy::PassThrough);
            assert_eq!(progress.after(phase, clients), Next::Forward);
        }
    }
}
