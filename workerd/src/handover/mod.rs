//! KV hand-over: how blocks move between workers.
//!
//! [`offer`] and [`pull`] are the pure halves (context side, generation side); [`mover`] is the one thread that
//! talks to a [`Transport`]; [`nixl`] and [`local`] are the transports.

#[cfg(test)]
mod conformance;
pub mod local;
pub mod mover;
pub mod nixl;
pub mod offer;
pub mod pull;

use std::time::{Duration, Instant};

use baton_shared::id::{Incarnation, LeaseId, WorkerId};
use baton_shared::kv::layout::CopyRun;
use baton_shared::kv::record::RankBlocks;
use baton_shared::wire::error::ErrorCode;

use crate::kv::region::{Place, Region};

/// How a peer's agent is reached. Its metadata is a secret: it travels only inside records.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The agent's name, unique for each incarnation.
    pub agent: String,
    /// What the transport needs to connect; trusted (it was under the record's tag).
    pub metadata: Vec<u8>,
}

impl std::fmt::Debug for PeerAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerAddress").field("agent", &self.agent).finish_non_exhaustive()
    }
}

/// A connected peer, of one transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerId(pub u32);

/// A posted request, of one transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TransferId(pub u64);

/// A registered region, of one transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registration(pub u32);

/// Direction of a one-sided transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Peer's memory to ours.
    Read,
    /// Our memory to the peer's.
    Write,
}

/// Where the memory at both ends of a transfer is. A transport registers, and names, memory by place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Ours.
    pub near: Place,
    /// The peer's: a device's ordinal is the one it has there.
    pub far: Place,
}

impl Ends {
    /// Host memory at both.
    pub const HOST: Self = Self { near: Place::Host, far: Place::Host };
}

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferState {
    /// Bytes may still arrive.
    Running,
    /// All bytes are there; nothing more is written.
    Done,
    /// It failed; nothing more is written.
    Failed(String),
}

/// Why a transport refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The peer cannot be reached or died.
    #[error("peer `{peer}` cannot be reached: {reason}")]
    Unreachable {
        /// Its agent name.
        peer: String,
        /// The transport's words.
        reason: String,
    },
    /// The transport itself does not work.
    #[error("{call} failed: {reason}")]
    Broken {
        /// What was called.
        call: &'static str,
        /// The transport's words.
        reason: String,
    },
}

/// Moves bytes between registered regions. Called on the mover thread only. Addresses in [`CopyRun`] are absolute
/// here: `source` in the peer's process, `target` in ours (for [`Op::Read`]; the other way round for `Write`).
pub trait Transport {
    /// Lets peers read and write a region, and us use it as a local end. Before the first [`Self::address`]. A device's
    /// context ([`Region::make_current`]) has been current on this thread since before the transport was opened.
    fn register(&mut self, region: &Region) -> Result<Registration, TransportError>;
    /// How peers reach us; after registering.
    fn address(&mut self) -> Result<PeerAddress, TransportError>;
    /// Cached for each agent name.
    fn connect(&mut self, peer: &PeerAddress) -> Result<PeerId, TransportError>;
    /// Starts a transfer, all of whose runs have the same two [`Ends`]. Its memory stays in use until `poll` gives an
    /// end. It waits for no work of a device: what is read has been written before, for good.
    fn post(
        &mut self,
        op: Op,
        peer: PeerId,
        ends: Ends,
        runs: &[CopyRun],
    ) -> Result<TransferId, TransportError>;
    /// Sends a short message (below 1 kB), after all transfers to that peer that have ended.
    fn notify(&mut self, peer: PeerId, message: &[u8]) -> Result<(), TransportError>;
    /// A dead incarnation, with no transfer under way.
    fn forget(&mut self, peer: PeerId);
    /// Where a transfer stands; after an end was given the id is gone.
    fn poll(&mut self, id: TransferId) -> TransferState;
    /// Ends every transfer (each is gone, nothing is written afterwards) and forgets every peer.
    fn rebuild(&mut self) -> Result<(), TransportError>;
    /// Messages that arrived: the sender's name is its own claim.
    fn notifications(&mut self, out: &mut Vec<(String, Vec<u8>)>) -> Result<(), TransportError>;
}

/// Names one pull, of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PullId(pub u64);

/// Blocks to fetch: given to the mover by the engine, whose target blocks are `InFlight` meanwhile.
#[derive(Clone, Debug)]
pub struct PullJob {
    /// Which.
    pub id: PullId,
    /// Who computed the blocks.
    pub worker: WorkerId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// The lease to be read and then ended by a notification.
    pub lease: LeaseId,
    /// For each rank: where it is, and what to copy (absolute addresses, neighbours merged).
    pub ranks: Vec<(RankBlocks, Vec<CopyRun>)>,
    /// After this the pull is abandoned.
    pub deadline: Instant,
}

/// What the mover thread tells the engine.
#[derive(Clone, Debug)]
pub enum MoverEvent {
    /// All bytes arrived and the lease was still whole; its owner has been notified.
    Pulled {
        /// Which.
        id: PullId,
        /// Bytes moved, without the epoch word.
        bytes: u64,
        /// Descriptors posted, without the epoch word's.
        descriptors: u64,
        /// From the job's arrival.
        elapsed: Duration,
    },
    /// It failed. With `settled` the target blocks may be reused now, else [`Self::Settled`] follows one day.
    PullFailed {
        /// Which.
        id: PullId,
        /// `KvLeaseGone`, `KvPeerUnreachable` or `KvTransferTimeout`; `Internal` if the mover itself has ended,
        /// `ClientGone` if the pull was cancelled.
        code: ErrorCode,
        /// In words.
        message: String,
        /// Whether nothing can be written to the target blocks any more.
        settled: bool,
    },
    /// An abandoned pull's transfers have ended: its target blocks may be reused.
    Settled {
        /// Which.
        id: PullId,
    },
    /// A reader says it is done with this lease.
    LeaseRead(LeaseId),
    /// The mover met a bug and has ended: no block will be moved any more.
    Lost,
}
