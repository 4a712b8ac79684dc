//! Blocks pinned for a peer: `Held → Pulled | Released | Expired`.
//!
//! Each lease owns an epoch word. It is raised *before* the blocks can be reused, so a reader that finds the old value
//! after its read has read what was promised. A word's value never returns, so no (slot, value) names two leases.
//! Time comes from the caller; who may be granted a lease at all is the scheduler's business.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

use baton_shared::id::{DisaggRequestId, LeaseId};
use tracing::Span;

use super::pool::{BlockState, Blocks};
use super::region::EpochPage;

/// Ids remembered at most of requests that were released before they were known.
pub const MAX_TOMBSTONES: usize = 65_536;

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Its reader said so, or it was moved to a sequence of ours.
    Pulled,
    /// Nobody will read it.
    Released,
    /// Nobody came in time.
    Expired,
}

/// Leases ended since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseEnds {
    /// Their reader said so, or they were moved to a sequence of ours.
    pub pulled: u64,
    /// Nobody will read them.
    pub released: u64,
    /// Nobody came in time.
    pub expired: u64,
}

/// What a record says of a lease, beside its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Names it.
    pub lease: LeaseId,
    /// Address of its epoch word.
    pub epoch_address: u64,
    /// What the word says while the lease is held.
    pub epoch: u64,
}

/// All leases held, and the tombstones.
#[derive(Debug)]
pub struct LeaseTable {
    epochs: EpochPage,
    free_slots: Vec<usize>,
    held: HashMap<LeaseId, Lease>,
    by_request: HashMap<DisaggRequestId, LeaseId>,
    /// In order of grant; ended leases stay until they come to the front.
    by_expiry: VecDeque<(Instant, LeaseId)>,
    tombstones: Tombstones,
    ends: LeaseEnds,
}

#[derive(Debug)]
struct Lease {
    request: DisaggRequestId,
    slot: usize,
    blocks: Blocks,
    /// Of the request it was granted for.
    span: Span,
}

#[derive(Debug, Default)]
struct Tombstones {
    known: HashSet<DisaggRequestId>,
    by_age: VecDeque<DisaggRequestId>,
}

impl LeaseTable {
    /// No leases yet; at most one a word of the page at a time.
    pub fn new(epochs: EpochPage) -> Self {
        Self {
            free_slots: (0..epochs.slots()).rev().collect(),
            epochs,
            held: HashMap::new(),
            by_request: HashMap::new(),
            by_expiry: VecDeque::new(),
            tombstones: Tombstones::default(),
            ends: LeaseEnds::default(),
        }
    }

    /// Leases held.
    pub fn count(&self) -> usize {
        self.held.len()
    }

    /// Released requests that are remembered, at most [`MAX_TOMBSTONES`].
    pub fn tombstones(&self) -> usize {
        self.tombstones.by_age.len()
    }

    /// Ended leases by how.
    pub fn ends(&self) -> LeaseEnds {
        self.ends
    }

    /// Whether a lease is held under this id.
    pub fn has_request(&self, request: DisaggRequestId) -> bool {
        self.by_request.contains_key(&request)
    }

    /// Keeps `blocks` until the lease ends, at `expires` at the latest; those of a later grant may not be earlier.
    /// Gives them back if every epoch word is taken or a lease is held under this id.
    pub fn grant(
        &mut self,
        request: DisaggRequestId,
        mut blocks: Blocks,
        expires: Instant,
    ) -> Result<Grant, Blocks> {
        if self.has_request(request) {
            return Err(blocks);
        }
        let Some(slot) = self.free_slots.pop() else { return Err(blocks) };
        blocks.become_state(BlockState::Leased);
        let lease = LeaseId::random();
        self.held.insert(lease, Lease { request, slot, blocks, span: Span::current() });
        self.by_request.insert(request, lease);
        self.by_expiry.push_back((expires, lease));
        let epoch_address = self.epochs.address(slot);
        Ok(Grant { lease, epoch_address, epoch: self.epochs.value(slot) })
    }

    /// Ends a lease and frees its blocks; false if it is not held (any more).
    pub fn end(&mut self, lease: LeaseId, how: LeaseEnd) -> bool {
        self.take(lease, how).is_some()
    }

    /// Ends a lease and gives its blocks to the caller, no longer readable by anybody else.
    pub fn take(&mut self, lease: LeaseId, how: LeaseEnd) -> Option<Blocks> {
        let Lease { request, slot, mut blocks, span } = self.held.remove(&lease)?;
        self.by_request.remove(&request);
        self.epochs.bump(slot);
        self.free_slots.push(slot);
        blocks.become_state(BlockState::Used);
        let count = match how {
            LeaseEnd::Pulled => &mut self.ends.pulled,
            LeaseEnd::Released => &mut self.ends.released,
            LeaseEnd::Expired => &mut self.ends.expired,
        };
        *count += 1;
        span.in_scope(|| match how {
            LeaseEnd::Pulled => tracing::debug!(%request, "blocks were fetched"),
            LeaseEnd::Released => tracing::debug!(%request, "blocks are not wanted any more"),
            LeaseEnd::Expired => tracing::warn!(%request, "nobody fetched the blocks in time"),
        });
        Some(blocks)
    }

    /// Blocks of a lease held under this request and name.
    pub fn blocks(&self, request: DisaggRequestId, lease: LeaseId) -> Option<&Blocks> {
        let held = self.held.get(&lease)?;
        (held.request == request).then_some(&held.blocks)
    }

    /// Ends the lease under this id if there is one, and leaves a tombstone.
    pub fn release(&mut self, request: DisaggRequestId) -> bool {
        self.tombstones.add(request);
        match self.by_request.get(&request) {
            Some(lease) => self.end(*lease, LeaseEnd::Released),
            None => false,
        }
    }

    /// Whether this id was released already.
    pub fn is_released(&self, request: DisaggRequestId) -> bool {
        self.tombstones.known.contains(&request)
    }

    /// Ends what nobody read in time; how many.
    pub fn expire(&mut self, now: Instant) -> usize {
        let mut expired = 0;
        while let Some((expires, lease)) = self.by_expiry.front().copied() {
            if self.held.contains_key(&lease) && expires > now {
                break;
            }
            self.by_expiry.pop_front();
            expired += usize::from(self.end(lease, LeaseEnd::Expired));
        }
        expired
    }

    /// When [`Self::expire`] may have something to do.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.by_expiry.front().map(|(expires, _)| *expires)
    }
}

/// An engine that ends, by a panic too, gives its blocks back: whoever reads them then must not take them for good.
impl Drop for LeaseTable {
    fn drop(&mut self) {
        self.held.values().for_each(|lease| self.epochs.bump(lease.slot));
    }
}

impl Tombstones {
    fn add(&mut self, request: DisaggRequestId) {
        if self.known.insert(request) {
            self.by_age.push_back(request);
        }
        if self.by_age.len() > MAX_TOMBSTONES
            && let Some(oldest) = self.by_age.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kv::pool::BlockPool;

    #[test]
    fn a_table_that_goes_raises_the_words_of_its_leases_before_their_blocks_are_free() {
        let (mut table, epochs, pool) = table();
        let read = epochs.clone();
        let granted = |table: &mut LeaseTable, id| {
            let blocks = pool.allocate(2).unwrap();
            table.grant(DisaggRequestId(id), blocks, Instant::now()).unwrap()
        };
        let grants = [granted(&mut table, 1), granted(&mut table, 2)];
        let slot = |grant: &Grant| {
            (0..epochs.slots()).find(|slot| epochs.address(*slot) == grant.epoch_address).unwrap()
        };
        let words = grants.map(|grant| (slot(&grant), grant.epoch));
        pool.on_lost(Box::new(move |_| {
            assert!(words.iter().all(|(slot, epoch)| read.value(*slot) != *epoch));
        }));
        drop(table);
        assert_eq!(pool.free(), 8);
    }

    fn table() -> (LeaseTable, EpochPage, BlockPool) {
        let epochs = EpochPage::new(8).unwrap();
        (LeaseTable::new(epochs.clone()), epochs, BlockPool::new(8))
    }

    fn request(id: u64) -> DisaggRequestId {
        DisaggRequestId(id)
    }

    #[test]
    fn every_end_raises_the_epoch_frees_the_blocks_and_happens_once() {
        for how in [LeaseEnd::Pulled, LeaseEnd::Released, LeaseEnd::Expired] {
            let (mut table, epochs, pool) = table();
            let blocks = pool.allocate(3).unwrap();
            let grant = table.grant(request(1), blocks, Instant::now()).unwrap();
            assert_eq!((pool.counts().leased, table.count()), (3, 1));
            assert_eq!(grant.epoch_address, epochs.address(0));
            assert_eq!(epochs.value(0), grant.epoch);
            assert!(table.end(grant.lease, how));
            assert!(epochs.value(0) > grant.epoch);
            assert_eq!((pool.free(), table.count()), (8, 0));
            assert!(!table.end(grant.lease, how));
        }
    }

    #[test]
    fn no_slot_and_value_name_two_leases() {
        let (mut table, _, pool) = table();
        let mut seen = HashSet::new();
        for round in 0..50 {
            let grants = [0, 1, 2].map(|id| {
                let blocks = pool.allocate(1).unwrap();
                table.grant(request(round * 3 + id), blocks, Instant::now()).unwrap()
            });
            for grant in grants {
                assert!(seen.insert((grant.epoch_address, grant.epoch)));
                table.end(grant.lease, LeaseEnd::Pulled);
            }
        }
    }

    #[test]
    fn leases_expire_when_their_time_has_come_and_not_before() {
        let (mut table, _, pool) = table();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for id in 0..3 {
            table.grant(request(id), pool.allocate(1).unwrap(), at(id + 1)).unwrap();
        }
        assert!(table.release(request(0)));
        assert_eq!(table.expire(at(1)), 0);
        assert_eq!(table.next_expiry(), Some(at(2)));
        assert_eq!(table.expire(at(2)), 1);
        assert_eq!(table.expire(at(9)), 1);
        assert_eq!(table.next_expiry(), None);
        let ends = LeaseEnds { pulled: 0, released: 1, expired: 2 };
        assert_eq!((table.ends(), pool.free()), (ends, 8));
    }

    #[test]
    fn an_id_has_one_lease_at_a_time() {
        let (mut table, _, pool) = table();
        let first = table.grant(request(5), pool.allocate(1).unwrap(), Instant::now()).unwrap();
        let second = table.grant(request(5), pool.allocate(1).unwrap(), Instant::now());
        assert!(second.is_err());
        table.end(first.lease, LeaseEnd::Pulled);
        assert!(table.grant(request(5), pool.allocate(1).unwrap(), Instant::now()).is_ok());
    }

    #[test]
    fn a_taken_lease_gives_its_blocks_to_one_taker() {
        let (mut table, _, pool) = table();
        let grant = table.grant(request(5), pool.allocate(2).unwrap(), Instant::now()).unwrap();
        assert!(table.blocks(request(6), grant.lease).is_none());
        assert_eq!(table.blocks(request(5), grant.lease).unwrap().count(), 2);
        let blocks = table.take(grant.lease, LeaseEnd::Pulled).unwrap();
        assert_eq!((blocks.count(), pool.counts().used), (2, 2));
        assert!(table.take(grant.lease, LeaseEnd::Pulled).is_none());
    }

    #[test]
    fn a_release_before_its_request_is_remembered_and_the_oldest_forgotten() {
        let (mut table, _, _) = table();
        for id in 0..=MAX_TOMBSTONES as u64 {
            assert!(!table.release(request(id)));
        }
        assert!(!table.is_released(request(0)));
        assert!(table.is_released(request(1)));
        assert!(table.is_released(request(MAX_TOMBSTONES as u64)));
    }
}
