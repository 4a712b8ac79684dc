//! One pull: its parts, what of them is waiting and what is in flight. What happens to it is decided in `pulls`.

use std::collections::VecDeque;
use std::time::Instant;

use baton_shared::id::{Incarnation, LeaseId, WorkerId};
use baton_shared::kv::layout::CopyRun;
use baton_shared::wire::error::ErrorCode;

use super::super::{PeerAddress, PeerId, PullId, TransferId};
use super::route::Probe;
use crate::kv::region::Place;

/// One accepted job.
pub(super) struct Pull {
    pub id: PullId,
    pub worker: WorkerId,
    pub incarnation: Incarnation,
    pub lease: LeaseId,
    pub deadline: Instant,
    pub arrived: Instant,
    pub parts: Vec<Part>,
    pub stage: Stage,
    pub bytes: u64,
    pub descriptors: u64,
}

/// One rank's share of a pull.
pub(super) struct Part {
    pub address: PeerAddress,
    pub peer: PeerId,
    /// Where its pool is; epochs are in host memory.
    pub place: Place,
    pub epoch_address: u64,
    pub epoch: u64,
    pub slot: Option<usize>,
    pub waiting: VecDeque<Vec<CopyRun>>,
    pub running: Vec<Request>,
}

/// What is in flight.
pub(super) struct Request {
    pub id: TransferId,
    pub runs: Vec<CopyRun>,
    /// Whether it may tell which way that peer's bytes come.
    pub probe: Option<Probe>,
}

/// Where a pull stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Blocks,
    Epoch,
    /// Its failure was reported; requests are still in flight.
    Settling {
        since: Instant,
    },
    Over,
}

/// Why a pull ends without its blocks.
pub(super) struct Failure {
    pub code: ErrorCode,
    pub message: String,
}

impl Pull {
    pub fn is_live(&self) -> bool {
        match self.stage {
            Stage::Blocks | Stage::Epoch => true,
            Stage::Settling { .. } | Stage::Over => false,
        }
    }

    pub fn in_flight(&self) -> usize {
        self.parts.iter().map(|part| part.running.len()).sum()
    }

    pub fn has_read_all(&self) -> bool {
        self.parts.iter().all(|part| part.waiting.is_empty() && part.running.is_empty())
    }

    pub fn unreachable(&self, reason: &str) -> Failure {
        unreachable(&self.worker, reason)
    }
}

pub(super) fn unreachable(worker: &WorkerId, reason: &str) -> Failure {
    Failure {
        code: ErrorCode::KvPeerUnreachable,
        message: format!("cannot read the blocks of worker `{worker}`: {reason}"),
    }
}

/// Descriptors gathered to requests of at most `max` bytes; a longer one stands alone.
pub(super) fn requests(runs: Vec<CopyRun>, max: u64) -> VecDeque<Vec<CopyRun>> {
    let mut requests: VecDeque<Vec<CopyRun>> = VecDeque::new();
    let mut bytes = 0;
    for run in runs {
        match requests.back_mut() {
            Some(last) if bytes + run.len <= max => last.push(run),
            _ => {
                requests.push_back(vec![run]);
                bytes = 0;
            }
        }
        bytes += run.len;
    }
    requests
}
