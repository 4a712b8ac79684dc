//! Hand-over record v1: what a context worker tells the generation worker that takes over, inside
//! `encoded_opaque_state`. Binary, little-endian, length-prefixed, at most 1 MiB, closed by a tag.

use super::layout::KvLayout;
use crate::id::{BlockIndex, DisaggRequestId, Incarnation, LeaseId, WorkerId};
use std::ops::Range;

/// A record's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who computed.
    pub worker: WorkerId,
    /// Its HTTP address, `host:port`.
    pub address: String,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// The request both phases share.
    pub request: DisaggRequestId,
    /// SHA-256 of the prompt's token ids and cache salt ([`prompt_hash`]).
    pub prompt_hash: [u8; 32],
    /// What makes two caches the same (`kv::fingerprint`).
    pub fingerprint: [u8; 32],
    /// Prompt tokens whose keys and values are in the blocks.
    pub prompt_tokens: u32,
    /// The blocks; `None` = *complete*: the answer is known from `first_gen_tokens`, nothing to pull.
    pub lease: Option<LeasedBlocks>,
}

/// Blocks pinned for one reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeasedBlocks {
    /// Names the lease.
    pub lease: LeaseId,
    /// Unix milliseconds after which the blocks may be gone; advisory.
    pub expires_unix_ms: u64,
    /// One entry a rank.
    pub ranks: Vec<RankBlocks>,
}

/// One rank's part.
#[derive(Clone, PartialEq, Eq)]
pub struct RankBlocks {
    /// NIXL agent that serves reads.
    pub agent: String,
    /// Its metadata: whoever holds it can read the pool, so it is never logged.
    pub metadata: Vec<u8>,
    /// Address of the pool in that process.
    pub pool_base: u64,
    /// Device of the pool: `None` = host memory.
    pub device: Option<u32>,
    /// How the pool lies.
    pub layout: KvLayout,
    /// Address of the lease's epoch word.
    pub epoch_address: u64,
    /// What the word must still be after the blocks were read.
    pub epoch: u64,
    /// Blocks in prompt order, as runs of neighbours.
    pub blocks: Vec<Range<u32>>,
}

impl std::fmt::Debug for RankBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RankBlocks")
            .field("agent", &self.agent)
            .field("blocks", &self.blocks)
            .finish_non_exhaustive()
    }
}

/// Neighbouring block ids joined to runs, order kept.
pub fn runs_of(blocks: &[BlockIndex]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for &BlockIndex(block) in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}
