//! Context side, pure: what a worker tells the one that takes over. Which blocks are leased, and until when, is
//! decided by `kv::lease`; who signs the record, by the caller.

use baton_shared::id::{BlockIndex, DisaggRequestId, Incarnation, LeaseId, WorkerId};
use baton_shared::kv::record::{LeasedBlocks, RankBlocks, Record, prompt_hash, runs_of};

use super::PeerAddress;
use crate::kv::region::KvRegion;

/// Who offers; fixed at start.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The worker's name.
    pub worker: WorkerId,
    /// Its HTTP address, `host:port`, as peers reach it.
    pub address: String,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// What makes two caches the same.
    pub fingerprint: [u8; 32],
}

/// A lease as it is put into a record.
#[derive(Clone, Copy, Debug)]
pub struct OfferedLease {
    /// Names it.
    pub lease: LeaseId,
    /// Unix milliseconds after which the blocks may be gone.
    pub expires_unix_ms: u64,
    /// Address of its epoch word in this process.
    pub epoch_address: u64,
    /// The word's value now.
    pub epoch: u64,
}

/// The pinned `blocks`, in prompt order, of the one rank of an instance that `serve` answers for.
pub fn leased_blocks(
    lease: OfferedLease,
    serve: &PeerAddress,
    pool: &KvRegion,
    blocks: &[BlockIndex],
) -> LeasedBlocks {
    LeasedBlocks {
        lease: lease.lease,
        expires_unix_ms: lease.expires_unix_ms,
        ranks: vec![RankBlocks {
            agent: serve.agent.clone(),
            metadata: serve.metadata.clone(),
            pool_base: pool.region.base(),
            device: pool.region.place().device(),
            layout: pool.layout.clone(),
            epoch_address: lease.epoch_address,
            epoch: lease.epoch,
            blocks: runs_of(blocks),
        }],
    }
}

/// The record of a prompt; without `lease` it is *complete*: the first token was the last.
pub fn record(
    identity: &Identity,
    request: DisaggRequestId,
    prompt: &[u32],
    salt: Option<&str>,
    lease: Option<LeasedBlocks>,
) -> Record {
    Record {
        worker: identity.worker.clone(),
        address: identity.address.clone(),
        incarnation: identity.incarnation,
        request,
        prompt_hash: prompt_hash(prompt, salt),
        fingerprint: identity.fingerprint,
        prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
        lease,
    }
}
