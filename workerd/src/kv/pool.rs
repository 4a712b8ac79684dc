//! The blocks of one instance: who may use which, and what the free ones still hold.
//!
//! Blocks are handed out as [`Blocks`], which give themselves back when they are dropped: a block is free exactly
//! when nobody holds it, so an aborted request cannot leak any. The holder must therefore outlive every use of its
//! blocks (steps that were submitted, transfers that may still write). Belongs to one thread.
//!
//! With a prefix cache, a full block keeps its content while it is free, can be found by it and taken again. Blocks
//! that hold nothing are used first, then those whose content nobody asked for the longest; a sequence gives its last
//! blocks back first, so that the beginnings of prompts stay longest. Everything here takes constant time a block.

use std::cell::RefCell;
use std::rc::Rc;

use baton_shared::id::BlockIndex;

use super::free_list::{Links, List};
use super::prefix::{Chain, PrefixCache};

/// Blocks by state; together they are the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Nobody's.
    pub free: u32,
    /// Of running sequences.
    pub used: u32,
    /// Kept for a reader.
    pub leased: u32,
    /// Targets of a pull.
    pub in_flight: u32,
    /// Targets of a pull that was given up but may still write.
    pub quarantined: u32,
}

/// What the holders of a block do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// A sequence reads and writes it.
    Used,
    /// So does a context pass, which will keep it for a reader; counts as used.
    Pledged,
    /// It is kept as it is for a reader.
    Leased,
    /// A transfer may write it: it has one holder.
    InFlight,
    /// A transfer that was given up may still write it: it has one holder.
    Quarantined,
}

/// The prefix cache of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Blocks that can be found by their tokens, held or free.
    pub cached: u32,
    /// Blocks that were found and taken, since start.
    pub reused: u64,
    /// Blocks that lost their content to another use, since start.
    pub evicted: u64,
    /// Blocks that were taken without content, since start.
    pub allocated: u64,
}

/// All blocks. Cloning shares them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    shared: Rc<RefCell<Shared>>,
}

struct Shared {
    /// Free blocks that hold nothing.
    blank: List,
    /// Free blocks of the prefix cache.
    cached: List,
    links: Links,
    entries: Vec<Entry>,
    counts: BlockCounts,
    /// Blocks that are leased or pledged.
    pledged: u32,
    cache: Option<PrefixCache>,
    cache_counts: CacheCounts,
    /// Told of each block whose content is lost.
    on_lost: Option<OnLost>,
}

/// Hears which free block has lost its content, before anybody else can have it.
pub type OnLost = Box<dyn Fn(BlockIndex)>;

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("counts", &self.counts).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    used: u32,
    pledged: u32,
    leased: u32,
    in_flight: bool,
    quarantined: bool,
}

/// Blocks somebody holds, in an order of the holder's. Dropping gives them back.
#[derive(Debug)]
pub struct Blocks {
    shared: Rc<RefCell<Shared>>,
    ids: Vec<BlockIndex>,
    state: BlockState,
}

impl BlockPool {
    /// A pool of free blocks `0..blocks`, which forget what they held.
    pub fn new(blocks: u32) -> Self {
        Self::with_cache(blocks, None)
    }

    /// A pool of free blocks `0..blocks`; `cache` is empty and made for as many.
    pub fn with_cache(blocks: u32, cache: Option<PrefixCache>) -> Self {
        let (mut links, mut blank) = (Links::new(blocks), List::default());
        (0..blocks).for_each(|block| blank.push(&mut links, BlockIndex(block)));
        let shared = Shared {
            blank,
            cached: List::default(),
            links,
            entries: vec![Entry::default(); blocks as usize],
            counts: BlockCounts { free: blocks, ..BlockCounts::default() },
            pledged: 0,
            cache,
            cache_counts: CacheCounts::default(),
            on_lost: None,
        };
        Self { shared: Rc::new(RefCell::new(shared)) }
    }

    /// From now on `hook` hears of each free block that loses its content: when it becomes free, or, if the prefix
    /// cache has it, when it is taken for something else. It must not touch the pool.
    pub fn on_lost(&self, hook: OnLost) {
        self.shared.borrow_mut().on_lost = Some(hook);
    }

    /// Blocks by state. One that is both leased and used counts as leased.
    pub fn counts(&self) -> BlockCounts {
        self.shared.borrow().counts
    }

    /// The prefix cache.
    pub fn cache_counts(&self) -> CacheCounts {
        let shared = self.shared.borrow();
        CacheCounts {
            cached: shared.cache.as_ref().map_or(0, PrefixCache::len),
            ..shared.cache_counts
        }
    }

    /// The names of all cached blocks in events.
    #[cfg(test)]
    fn cached_events(&self) -> Vec<baton_shared::kv::block_hash::EventHash> {
        let shared = self.shared.borrow();
        let cache = shared.cache.as_ref();
        cache.map(|cache| cache.events().collect()).unwrap_or_default()
    }

    /// Free blocks.
    pub fn free(&self) -> u32 {
        self.counts().free
    }

    /// Blocks that leases hold, or will when the context passes that have them now are over.
    pub fn pledged(&self) -> u32 {
        self.shared.borrow().pledged
    }

    /// No blocks, to be grown.
    pub fn none(&self) -> Blocks {
        Blocks { shared: Rc::clone(&self.shared), ids: Vec::new(), state: BlockState::Used }
    }

    /// `count` blocks nobody else holds, [`BlockState::Used`]; `None` if there are not so many.
    pub fn allocate(&self, count: u32) -> Option<Blocks> {
        let mut blocks = self.none();
        blocks.grow(count).then_some(blocks)
    }

    /// Follows `tokens` from where `chain` stands, to at most `most` blocks in all; what is found is put to `found`.
    /// Nothing is held by that: [`Self::claim`] before anything else is done to the pool.
    pub fn find(&self, chain: &mut Chain, tokens: &[u32], most: u32, found: &mut Vec<BlockIndex>) {
        let mut shared = self.shared.borrow_mut();
        let Some(cache) = &mut shared.cache else { return };
        while chain.blocks() < most
            && let Some(block) = cache.find(chain, tokens)
        {
            found.push(block);
        }
    }

    /// How many of `found` neither a lease holds nor a context pass.
    pub fn unpledged(&self, found: &[BlockIndex]) -> u32 {
        let shared = self.shared.borrow();
        found.iter().filter(|block| !shared.entries[block.0 as usize].is_pledged()).count() as u32
    }

    /// The blocks `found`, then `more` that nobody else holds, all in `state`; room for `capacity` without new memory.
    /// `None`, and nothing changed, if that would leave fewer than `spare` blocks free.
    pub fn claim(
        &self,
        found: &[BlockIndex],
        more: u32,
        spare: u32,
        state: BlockState,
        capacity: u32,
    ) -> Option<Blocks> {
        let mut blocks = self.none();
        blocks.state = state;
        let mut shared = self.shared.borrow_mut();
        let is_free = |block: &&BlockIndex| shared.entries[block.0 as usize].is_free();
        let taken = found.iter().filter(is_free).count() as u32 + more;
        if shared.counts.free < taken.saturating_add(spare) {
            return None;
        }
        blocks.ids.reserve(capacity as usize);
        for block in found {
            shared.take_again(*block, state);
            blocks.ids.push(*block);
        }
        shared.take_new(more, state, &mut blocks.ids);
        drop(shared);
        Some(blocks)
    }
}

impl Blocks {
    /// Which, in the holder's order.
    pub fn ids(&self) -> &[BlockIndex] {
        &self.ids
    }

    /// How many.
    pub fn count(&self) -> u32 {
        self.ids.len() as u32
    }

    /// Room for `capacity` in all, so that growing to that needs no new memory.
    pub fn reserve(&mut self, capacity: u32) {
        self.ids.reserve((capacity as usize).saturating_sub(self.ids.len()));
    }

    /// Adds `count` blocks nobody else holds, in the state of these; false, and nothing changed, if there are not so many.
    #[must_use]
    pub fn grow(&mut self, count: u32) -> bool {
        let mut shared = self.shared.borrow_mut();
        if shared.counts.free < count {
            return false;
        }
        shared.take_new(count, self.state, &mut self.ids);
        true
    }

    /// Puts `others` after these, in the state of these.
    ///
    /// # Panics
    /// If `others` are of another pool.
    pub fn append(&mut self, mut others: Self) {
        assert!(Rc::ptr_eq(&self.shared, &others.shared), "blocks of two pools cannot be joined");
        others.become_state(self.state);
        self.ids.append(&mut others.ids);
    }

    /// Those from number `at` on, which are not in these any more.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn split_off(&mut self, at: u32) -> Self {
        let ids = self.ids.split_off(at as usize);
        Self { shared: Rc::clone(&self.shared), ids, state: self.state }
    }

    /// Changes what is done with all of them.
    pub fn become_state(&mut self, state: BlockState) {
        let mut shared = self.shared.borrow_mut();
        for block in &self.ids {
            shared.change(*block, |entry| {
                entry.let_go(self.state);
                entry.hold(state);
            });
        }
        drop(shared);
        self.state = state;
    }

    /// The first `tokens` are computed and will not be written again: from now on the full blocks that hold them can
    /// be found. `chain` is these blocks' own.
    pub fn cache(&self, chain: &mut Chain, tokens: &[u32]) {
        let mut shared = self.shared.borrow_mut();
        let Some(cache) = &mut shared.cache else { return };
        let full = cache.full_blocks(tokens).min(self.ids.len());
        while (chain.blocks() as usize) < full {
            cache.enter(chain, tokens, self.ids[chain.blocks() as usize]);
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        for block in self.ids.iter().rev() {
            shared.change(*block, |entry| entry.let_go(self.state));
            if shared.entries[block.0 as usize].is_free() {
                shared.put_back(*block);
            }
        }
    }
}

impl Shared {
    fn change(&mut self, block: BlockIndex, change: impl FnOnce(&mut Entry)) {
        let entry = &mut self.entries[block.0 as usize];
        *entry.counted_in(&mut self.counts) -= 1;
        self.pledged -= u32::from(entry.is_pledged());
        change(entry);
        self.pledged += u32::from(entry.is_pledged());
        *entry.counted_in(&mut self.counts) += 1;
    }

    /// A cached block, free or not, gets one more holder.
    fn take_again(&mut self, block: BlockIndex, state: BlockState) {
        if self.entries[block.0 as usize].is_free() {
            self.cached.remove(&mut self.links, block);
        }
        self.change(block, |entry| entry.hold(state));
        self.cache_counts.reused += 1;
    }

    /// As many free blocks, which are there; in ascending order, since neighbours are handed over as one piece.
    fn take_new(&mut self, count: u32, state: BlockState, into: &mut Vec<BlockIndex>) {
        let from = into.len();
        for _ in 0..count {
            let block = match self.blank.first() {
                Some(block) => {
                    self.blank.remove(&mut self.links, block);
                    block
                }
                None => self.evict().expect("as many are free as are counted free"),
            };
            self.change(block, |entry| entry.hold(state));
            self.cache_counts.allocated += 1;
            into.push(block);
        }
        into[from..].sort_unstable();
    }

    /// The free block of the prefix cache that nobody asked for the longest.
    fn evict(&mut self) -> Option<BlockIndex> {
        let block = self.cached.first()?;
        self.cached.remove(&mut self.links, block);
        if let Some(cache) = &mut self.cache {
            cache.forget(block);
        }
        self.cache_counts.evicted += 1;
        self.lose(block);
        Some(block)
    }

    /// A block that has just become free.
    fn put_back(&mut self, block: BlockIndex) {
        if self.cache.as_ref().is_some_and(|cache| cache.has(block)) {
            self.cached.push(&mut self.links, block);
        } else {
            self.lose(block);
            self.blank.push(&mut self.links, block);
        }
    }

    fn lose(&self, block: BlockIndex) {
        if let Some(hook) = &self.on_lost {
            hook(block);
        }
    }
}

impl Entry {
    fn hold(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used += 1,
            BlockState::Pledged => self.pledged += 1,
            BlockState::Leased => self.leased += 1,
            BlockState::InFlight => self.in_flight = true,
            BlockState::Quarantined => self.quarantined = true,
        }
        let exclusive = usize::from(self.in_flight) + usize::from(self.quarantined);
        let shared = self.used + self.pledged + self.leased;
        debug_assert!(exclusive == 0 || (exclusive == 1 && shared == 0), "{self:?}");
    }

    fn let_go(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used -= 1,
            BlockState::Pledged => self.pledged -= 1,
            BlockState::Leased => self.leased -= 1,
            BlockState::InFlight => self.in_flight = false,
            BlockState::Quarantined => self.quarantined = false,
        }
    }

    fn is_free(self) -> bool {
        let holders = self.used + self.pledged + self.leased;
        holders == 0 && !self.in_flight && !self.quarantined
    }

    fn is_pledged(self) -> bool {
        self.pledged + self.leased > 0
    }

    fn counted_in(self, counts: &mut BlockCounts) -> &mut u32 {
        match self {
            _ if self.is_free() => &mut counts.free,
            _ if self.in_flight => &mut counts.in_flight,
            _ if self.quarantined => &mut counts.quarantined,
            _ if self.leased > 0 => &mut counts.leased,
            _ => &mut counts.used,
        }
    }
}

#[cfg(test)]
mod tests;
