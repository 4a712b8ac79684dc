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

use super::block::Holders;
use super::free_list::{Links, List};
use super::prefix::{Chain, PrefixCache};

pub use super::block::{BlockCounts, BlockState};

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
    holders: Vec<Holders>,
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
            holders: vec![Holders::default(); blocks as usize],
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
        found.iter().filter(|block| !shared.holders[block.0 as usize].is_pledged()).count() as u32
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
        let is_free = |block: &&BlockIndex| shared.holders[block.0 as usize].is_free();
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
    ///
    /// # Panics
    /// If a transfer may write one from now on that somebody else holds: rather no engine than a wrong answer.
    pub fn become_state(&mut self, state: BlockState) {
        let mut shared = self.shared.borrow_mut();
        let allows = |block: &BlockIndex| shared.holders[block.0 as usize].allows(state);
        assert!(self.ids.iter().all(allows), "a block that others hold cannot be {state:?}");
        for block in &self.ids {
            shared.change(*block, |holders| {
                holders.let_go(self.state);
                holders.hold(state);
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
            shared.change(*block, |holders| holders.let_go(self.state));
            if shared.holders[block.0 as usize].is_free() {
                shared.put_back(*block);
            }
        }
    }
}

impl Shared {
    fn change(&mut self, block: BlockIndex, change: impl FnOnce(&mut Holders)) {
        let holders = &mut self.holders[block.0 as usize];
        *holders.counted_in(&mut self.counts) -= 1;
        self.pledged -= u32::from(holders.is_pledged());
        change(holders);
        self.pledged += u32::from(holders.is_pledged());
        *holders.counted_in(&mut self.counts) += 1;
    }

    /// A cached block, free or not, gets one more holder.
    fn take_again(&mut self, block: BlockIndex, state: BlockState) {
        if self.holders[block.0 as usize].is_free() {
            self.cached.remove(&mut self.links, block);
        }
        self.change(block, |holders| holders.hold(state));
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
            self.change(block, |holders| holders.hold(state));
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

#[cfg(test)]
mod tests;
