//! What comes next after a hop went wrong: pure, by the table in `baton_shared::wire::error` and by what has become of
//! the record.
//!
//! Holds: a request ends when `attempts` of its context passes failed or were lost, or when `attempts` generation tries
//! failed by a generation worker's own fault. A pass that a failed generation costs is counted there alone, so a request
//! has less than twice `attempts` passes. Not counted: refusals for load, which the engine bounds by time, and workers
//! that cannot be reached while another one may do it.

use baton_shared::wire::error::{ErrorCode, Remedy};

use crate::table::Phase;

/// How a hop went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The worker answered something other than 2xx, and this is to be done about it.
    Refused(Remedy),
    /// No connection: the worker knows nothing of the request.
    Unreachable,
    /// A broken connection, or nonsense.
    Broken,
    /// No answer in time.
    TimedOut,
}

/// What has become of the record that a generation worker was to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// It can be read: nothing was sent, the request was turned away, or there is no record.
    Whole,
    /// The worker has the request and may have read it, as far as what came back tells: nothing, or an error of its own.
    Doubtful,
    /// A good answer had begun, so it was read; one record has one reader.
    Read,
}

impl Record {
    /// The same for the worker that is asked next. Where that cannot tell a record that is gone from a fault of its
    /// own, a doubtful one is not tried.
    pub fn for_next(self, tells_what_is_gone: bool) -> Self {
        match self {
            Self::Doubtful if !tells_what_is_gone => Self::Read,
            other => other,
        }
    }
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
        /// Who is to blame.
        blame: Blame,
    },
    /// The worker's answer is the client's.
    Forward,
    /// This error is.
    GiveUp(ErrorCode),
}

/// Whose fault it is that a record is worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Time's.
    Nobody,
    /// The context worker's: its blocks cannot be read.
    Context,
    /// The generation worker's: it read the blocks and did not answer.
    Generation,
}

/// What was tried for one request.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    attempts: u32,
    failed_passes: u32,
    failed_generations: u32,
    /// The record in force was in the hands of a generation worker that failed.
    doubted: bool,
}

impl Progress {
    /// Nothing tried yet; `attempts` counts the first try too.
    pub fn new(attempts: u32) -> Self {
        Self { attempts: attempts.max(1), failed_passes: 0, failed_generations: 0, doubted: false }
    }

    /// Decides after a hop of `phase` went wrong. `record`: what has become of it, in the generation phase;
    /// `others`: whether there are workers of this phase that have not failed the request.
    pub fn after(&mut self, phase: Phase, trouble: Trouble, record: Record, others: bool) -> Next {
        match trouble {
            Trouble::Refused(Remedy::PassThrough) => Next::Forward,
            Trouble::Refused(Remedy::GiveUp) => Next::GiveUp(failed(phase)),
            Trouble::Refused(Remedy::AnotherServer) => Next::Again { busy: true },
            Trouble::Refused(Remedy::NewContextPass) if phase == Phase::Generation => {
                self.lost(Blame::Nobody)
            }
            Trouble::Refused(Remedy::NewContextPassElsewhere) if phase == Phase::Generation => {
                self.lost(Blame::Context)
            }
            Trouble::Unreachable if others => Next::Again { busy: false },
            Trouble::Refused(
                Remedy::NewContextPass
                | Remedy::NewContextPassElsewhere
                | Remedy::AnotherServerBlame,
            )
            | Trouble::Unreachable
            | Trouble::Broken => self.failed(phase, record, failed(phase)),
            Trouble::TimedOut => self.failed(phase, record, timed_out(phase)),
        }
    }

    /// A worker of `phase` failed by its own fault.
    fn failed(&mut self, phase: Phase, record: Record, otherwise: ErrorCode) -> Next {
        let failed = match phase {
            Phase::Context => &mut self.failed_passes,
            Phase::Generation => &mut self.failed_generations,
        };
        *failed += 1;
        if *failed >= self.attempts {
            return Next::GiveUp(otherwise);
        }
        match (phase, record) {
            (Phase::Context, _) | (Phase::Generation, Record::Whole) => Next::Again { busy: false },
            // Reading it again costs little, computing it again may cost much: one more worker may try.
            (Phase::Generation, Record::Doubtful) if !self.doubted => {
                self.doubted = true;
                Next::Again { busy: false }
            }
            (Phase::Generation, Record::Doubtful | Record::Read) => {
                self.doubted = false;
                Next::ContextPass { blame: Blame::Generation }
            }
        }
    }

    /// The record is not there; the pass that made it was in vain.
    fn lost(&mut self, blame: Blame) -> Next {
        // A worker that was in doubt has read it; that one is counted already.
        let is_explained = self.doubted && blame == Blame::Nobody;
        self.doubted = false;
        self.failed_passes += u32::from(!is_explained);
        if self.failed_passes < self.attempts {
            Next::ContextPass { blame }
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
mod tests;
