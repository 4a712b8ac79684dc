//! Generation side, pure: whether a record fits a request and this worker, and what to copy then. The record's tag
//! was checked before (`kv::record`); whether its lease still holds is found out by the [`super::mover`].

use baton_shared::id::{BlockIndex, DisaggRequestId, WorkerId};
use baton_shared::kv::layout::{self, CopyRun, KvLayout, LayoutMismatch};
use baton_shared::kv::record::{LeasedBlocks, RankBlocks, Record, prompt_hash};
use baton_shared::wire::error::ErrorCode;

use crate::kv::region::KvRegion;

/// Longest descriptor, in bytes: what one request of a transport may be.
pub const MAX_DESCRIPTOR: u64 = 16 << 20;

/// What this worker is, for comparison.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a> {
    /// This worker's name.
    pub worker: &'a WorkerId,
    /// What makes two caches the same.
    pub fingerprint: [u8; 32],
    /// How its pool lies.
    pub layout: &'a KvLayout,
    /// Token ids are `0..vocab`.
    pub vocab: u32,
}

/// A generation request, as far as its record must fit it.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// `disagg_request_id`.
    pub request: DisaggRequestId,
    /// The prompt's token ids.
    pub prompt: &'a [u32],
    /// `cache_salt`.
    pub salt: Option<&'a str>,
    /// `first_gen_tokens`.
    pub first: &'a [u32],
}

/// Whether the record belongs to this request and its blocks can be ours.
///
/// # Errors
/// `kv_state_invalid` for a record of another request or tokens outside the vocabulary, `kv_incompatible`, with both
/// sides named, for blocks this worker cannot use; each with a message.
pub fn check(
    record: &Record,
    local: &Local<'_>,
    claim: &Claim<'_>,
) -> Result<(), (ErrorCode, String)> {
    belongs(record, local, claim).map_err(|message| (ErrorCode::KvStateInvalid, message))?;
    fits(record, local).map_err(|reason| {
        let message = format!(
            "cached keys and values of worker `{}` cannot be used by worker `{}`: {reason}",
            record.worker, local.worker
        );
        (ErrorCode::KvIncompatible, message)
    })
}

fn belongs(record: &Record, local: &Local<'_>, claim: &Claim<'_>) -> Result<(), String> {
    if record.request != claim.request {
        return Err(format!(
            "hand-over record is of request {}, not of `disagg_request_id` {}",
            record.request, claim.request
        ));
    }
    let same_length = record.prompt_tokens as usize == claim.prompt.len();
    if !same_length || record.prompt_hash != prompt_hash(claim.prompt, claim.salt) {
        return Err("hand-over record is of another prompt or cache salt".to_owned());
    }
    if claim.first.is_empty() {
        return Err("`first_gen_tokens` is empty".to_owned());
    }
    match claim.first.iter().find(|&&token| token >= local.vocab) {
        Some(token) => {
            Err(format!("`first_gen_tokens` holds {token}, the vocabulary ends at {}", local.vocab))
        }
        None => Ok(()),
    }
}

fn fits(record: &Record, local: &Local<'_>) -> Result<(), String> {
    if record.fingerprint != local.fingerprint {
        return Err(format!(
            "model, tokenizer, KV dtype or `model_revision` differ (fingerprint {} there, {} here)",
            short(&record.fingerprint),
            short(&local.fingerprint)
        ));
    }
    let Some(leased) = &record.lease else { return Ok(()) };
    let [rank] = leased.ranks.as_slice() else {
        return Err(format!("it has {} ranks there and 1 here", leased.ranks.len()));
    };
    layout::same_shape(&rank.layout, local.layout).map_err(|error| error.to_string())?;
    for (what, theirs, ours) in [
        ("layers", &rank.layout.layers, &local.layout.layers),
        ("KV heads", &rank.layout.heads, &local.layout.heads),
    ] {
        if theirs != ours {
            return Err(format!("its pool holds {what} {theirs:?} there and {ours:?} here"));
        }
    }
    Ok(())
}

/// What each rank's blocks become here, as absolute addresses: `target` are our blocks for the prompt's blocks from
/// number `skip` on (those before are here already). Neighbours are merged, no run exceeds [`MAX_DESCRIPTOR`].
///
/// # Errors
/// [`LayoutMismatch`] if `skip` and `target` together are not the lease's blocks, or a block does not exist.
pub fn copy_runs(
    leased: &LeasedBlocks,
    pool: &KvRegion,
    skip: usize,
    target: &[BlockIndex],
) -> Result<Vec<(RankBlocks, Vec<CopyRun>)>, LayoutMismatch> {
    let base = pool.region.base();
    let of_rank = |rank: &RankBlocks| {
        let mut left = u32::try_from(skip).unwrap_or(u32::MAX);
        let mut wanted = Vec::with_capacity(rank.blocks.len());
        for run in &rank.blocks {
            let skipped = left.min(run.end - run.start);
            left -= skipped;
            wanted.push(run.start + skipped..run.end);
        }
        let runs = layout::intersect(&rank.layout, &wanted, &pool.layout, target)?;
        let runs = runs.into_iter().flat_map(|run| {
            split(CopyRun {
                source: rank.pool_base + run.source,
                target: base + run.target,
                len: run.len,
            })
        });
        Ok((rank.clone(), runs.collect()))
    };
    leased.ranks.iter().map(of_rank).collect()
}

/// Pieces of at most [`MAX_DESCRIPTOR`] bytes.
fn split(run: CopyRun) -> impl Iterator<Item = CopyRun> {
    (0..run.len.div_ceil(MAX_DESCRIPTOR)).map(move |piece| {
        let start = piece * MAX_DESCRIPTOR;
        CopyRun {
            source: run.source + start,
            target: run.target + start,
            len: MAX_DESCRIPTOR.min(run.len - start),
        }
    })
}

/// Enough of a fingerprint to tell two apart.
fn short(fingerprint: &[u8; 32]) -> String {
    fingerprint.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::PeerAddress;
    use super::super::offer::{self, Identity, OfferedLease};
    use super::*;
    use crate::kv::fake_device::FakeDevice;
    use crate::kv::region::Region;
    use baton_shared::id::{Incarnation, LeaseId};
    use baton_shared::kv::layout::KvDtype;
    use baton_shared::wire::auth::Keys;

    const REQUEST: DisaggRequestId = DisaggRequestId(1 << 41);
    const PROMPT: [u32; 70] = [5; 70];

    fn pool(blocks: u32, layers: u32) -> KvRegion {
        let layout = KvLayout::block_major(KvDtype::Bf16, 32, 64, blocks, 0..layers, 0..3);
        let region = Region::host(usize::try_from(layout.bytes()).unwrap()).unwrap();
        KvRegion { region, layout }
    }

    fn identity() -> Identity {
        Identity {
            worker: "ctx-a".parse().unwrap(),
            address: "127.0.0.1:8001".to_owned(),
            incarnation: Incarnation([1; 16]),
            fingerprint: [9; 32],
        }
    }

    fn offered(pool: &KvRegion, blocks: &[u32]) -> Record {
        let serve = PeerAddress { agent: "ctx-a/0/serve/1".to_owned(), metadata: vec![1, 2] };
        let lease = OfferedLease {
            lease: LeaseId([3; 16]),
            expires_unix_ms: 1,
            epoch_address: 64,
            epoch: 7,
        };
        let blocks: Vec<_> = blocks.iter().copied().map(BlockIndex).collect();
        let leased = offer::leased_blocks(lease, &serve, pool, &blocks);
        offer::record(&identity(), REQUEST, &PROMPT, Some("salt"), Some(leased))
    }

    fn answer(
        record: &Record,
        pool: &KvRegion,
        claim: Claim<'_>,
    ) -> Result<(), (ErrorCode, String)> {
        let worker = "gen-a".parse().unwrap();
        let local =
            Local { worker: &worker, fingerprint: [9; 32], layout: &pool.layout, vocab: 100 };
        check(record, &local, &claim)
    }

    const CLAIM: Claim<'static> =
        Claim { request: REQUEST, prompt: &PROMPT, salt: Some("salt"), first: &[42] };

    #[test]
    fn a_record_of_this_request_and_model_fits() {
        let pool = pool(16, 2);
        let record = offered(&pool, &[2, 3, 9]);
        assert_eq!(answer(&record, &pool, CLAIM), Ok(()));
        let complete = Record { lease: None, ..record };
        assert_eq!(answer(&complete, &pool, CLAIM), Ok(()));
    }

    #[test]
    fn a_pool_in_device_memory_is_offered_as_such_and_fits_one_in_host_memory() {
        let KvRegion { region, layout } = pool(16, 2);
        let device = FakeDevice::region(2, region.bytes());
        let theirs = KvRegion { region: device, layout: layout.clone() };
        let ours = KvRegion { region, layout };
        let text = offered(&theirs, &[2, 3, 9]).encode_text(&Keys::none()).unwrap();
        let record = Record::decode_text(&text, &Keys::none()).unwrap();
        let rank = &record.lease.as_ref().unwrap().ranks[0];
        assert_eq!((rank.device, rank.pool_base), (Some(2), theirs.region.base()));
        assert_eq!(answer(&record, &ours, CLAIM), Ok(()));
        let record = offered(&ours, &[2, 3, 9]);
        assert_eq!(record.lease.as_ref().unwrap().ranks[0].device, None);
        assert_eq!(answer(&record, &theirs, CLAIM), Ok(()));
    }

    #[test]
    fn a_record_of_another_request_prompt_or_salt_is_invalid() {
        let pool = pool(16, 2);
        let record = offered(&pool, &[2, 3, 9]);
        let mut other = PROMPT;
        other[69] = 6;
        for claim in [
            Claim { request: DisaggRequestId(1), ..CLAIM },
            Claim { prompt: &other, ..CLAIM },
            Claim { prompt: &PROMPT[..69], ..CLAIM },
            Claim { salt: None, ..CLAIM },
            Claim { first: &[], ..CLAIM },
            Claim { first: &[99, 100], ..CLAIM },
        ] {
            let (code, message) = answer(&record, &pool, claim).unwrap_err();
            assert_eq!(code, ErrorCode::KvStateInvalid, "{message}");
        }
    }

    #[test]
    fn blocks_of_another_model_or_shape_are_incompatible_and_both_sides_are_named() {
        let ours = pool(16, 2);
        let mut revision = offered(&ours, &[2, 3, 9]);
        revision.fingerprint = [8; 32];
        let layers = offered(&pool(16, 3), &[2, 3, 9]);
        let mut tokens = offered(&ours, &[2, 3, 9]);
        tokens.lease.as_mut().unwrap().ranks[0].layout =
            KvLayout::block_major(KvDtype::Bf16, 16, 64, 16, 0..2, 0..3);
        let mut ranks = offered(&ours, &[2, 3, 9]);
        let second = ranks.lease.as_ref().unwrap().ranks[0].clone();
        ranks.lease.as_mut().unwrap().ranks.push(second);
        for (record, reason) in [
            (revision, "fingerprint 080808080808 there, 090909090909 here"),
            (layers, "layers 0..3 there and 0..2 here"),
            (tokens, "`block_tokens` is 16 there and 32 here"),
            (ranks, "2 ranks there"),
        ] {
            let (code, message) = answer(&record, &ours, CLAIM).unwrap_err();
            assert_eq!(code, ErrorCode::KvIncompatible);
            assert!(message.contains("`ctx-a`") && message.contains("`gen-a`"), "{message}");
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn copies_are_absolute_merged_split_and_skip_what_is_here() {
        // 12 MiB a block.
        let (theirs, ours) = (pool(5, 512), pool(5, 512));
        let block = theirs.layout.block_bytes();
        assert_eq!(block, 12 << 20);
        let record = offered(&theirs, &[1, 2, 4]);
        let leased = record.lease.unwrap();
        let (their_base, our_base) = (theirs.region.base(), ours.region.base());
        let target = [3, 4, 0].map(BlockIndex);
        let runs = &copy_runs(&leased, &ours, 0, &target).unwrap()[0].1;
        let at = |source: u64, target: u64, len| CopyRun {
            source: their_base + source,
            target: our_base + target,
            len,
        };
        let first = MAX_DESCRIPTOR;
        assert_eq!(
            runs[..],
            [
                at(block, 3 * block, first),
                at(block + first, 3 * block + first, 2 * block - first),
                at(4 * block, 0, block),
            ]
        );
        let runs = &copy_runs(&leased, &ours, 1, &target[1..]).unwrap()[0].1;
        assert_eq!(runs[..], [at(2 * block, 4 * block, block), at(4 * block, 0, block)]);
        let nothing = &copy_runs(&leased, &ours, 3, &[]).unwrap()[0].1;
        assert!(nothing.is_empty());
        assert!(copy_runs(&leased, &ours, 1, &target).is_err());
    }
}
