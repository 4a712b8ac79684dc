//! Which blocks hold which tokens: full blocks, found by a hash that is chained over all that comes before them, and
//! only if their tokens are the same too.
//!
//! Decides nothing about who holds a block or when it is reused: that is the pool's business, which tells this index
//! what enters and what is lost. A block enters when it is full and computed, and is not written afterwards.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;

use baton_shared::id::BlockIndex;
use baton_shared::kv::block_hash::{BlockExtra, CacheSalt, EventHash, PoolHash, PoolHasher};

use super::events::EventLog;

/// Index of the cached blocks of a pool.
#[derive(Debug)]
pub struct PrefixCache {
    hasher: PoolHasher,
    block_tokens: usize,
    by_hash: HashMap<PoolHash, BlockIndex>,
    /// By block.
    entries: Vec<Option<Entry>>,
    /// Of all blocks, back to back.
    tokens: Vec<u32>,
    events: Option<EventLog>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: PoolHash,
    parent: PoolHash,
    /// Set if there are events.
    event: Option<EventHash>,
}

/// How far a sequence's full blocks were named. It goes with one list of tokens, which only grows.
#[derive(Clone, Debug)]
pub struct Chain {
    salt: Option<CacheSalt>,
    blocks: u32,
    hash: PoolHash,
    event: Option<EventHash>,
}

impl Chain {
    /// No block yet; sequences of another salt share none.
    pub fn new(salt: Option<CacheSalt>) -> Self {
        Self { hash: PoolHash::root(salt.as_ref()), salt, blocks: 0, event: None }
    }

    /// Back to no block.
    pub fn restart(&mut self) {
        *self = Self::new(self.salt);
    }

    /// Blocks named so far.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    fn advance(&mut self, hash: PoolHash, event: Option<EventHash>) {
        self.blocks += 1;
        self.hash = hash;
        self.event = event;
    }
}

impl PrefixCache {
    /// An empty one for a pool of `blocks`; `seed` should be a secret of this process. What enters and is lost is
    /// written to `events`.
    pub fn new(blocks: u32, block_tokens: u32, seed: u64, events: Option<EventLog>) -> Self {
        let block_tokens = block_tokens as usize;
        if let Some(events) = &events {
            events.created(blocks);
        }
        Self {
            hasher: PoolHasher::new(seed),
            block_tokens,
            by_hash: HashMap::with_capacity(blocks as usize),
            entries: vec![None; blocks as usize],
            tokens: vec![0; blocks as usize * block_tokens],
            events,
        }
    }

    /// Cached blocks.
    pub(super) fn len(&self) -> u32 {
        self.by_hash.len() as u32
    }

    /// Full blocks of so many tokens.
    pub(super) fn full_blocks(&self, tokens: &[u32]) -> usize {
        tokens.len() / self.block_tokens
    }

    /// Whether a block is cached.
    pub(super) fn has(&self, block: BlockIndex) -> bool {
        self.entries[block.0 as usize].is_some()
    }

    /// The block that holds the next `block_tokens` of `tokens`, if there is one; the chain is then one block longer.
    pub(super) fn find(&mut self, chain: &mut Chain, tokens: &[u32]) -> Option<BlockIndex> {
        let tokens = next_block(chain, tokens, self.block_tokens)?;
        let hash = self.hasher.next(chain.hash, tokens);
        let block = *self.by_hash.get(&hash)?;
        let entry = self.entries[block.0 as usize].filter(|entry| entry.parent == chain.hash)?;
        if self.tokens_of(block) != tokens {
            return None;
        }
        chain.advance(hash, entry.event);
        Some(block)
    }

    /// From now on `block` can be found as the chain's next; the chain is one block longer. Where another block holds
    /// the same, or this one is cached already, nothing else changes.
    pub(super) fn enter(&mut self, chain: &mut Chain, tokens: &[u32], block: BlockIndex) {
        let Some(tokens) = next_block(chain, tokens, self.block_tokens) else { return };
        let hash = self.hasher.next(chain.hash, tokens);
        let event = self.events.as_ref().map(|events| {
            let extra = BlockExtra { salt: chain.salt.map(|salt| salt.id()), lora: None };
            events.algorithm().next(chain.event, tokens, extra)
        });
        let (parent, parent_event) = (chain.hash, chain.event);
        chain.advance(hash, event);
        let place = &mut self.entries[block.0 as usize];
        let (None, Place::Vacant(vacant)) = (*place, self.by_hash.entry(hash)) else { return };
        vacant.insert(block);
        *place = Some(Entry { hash, parent, event });
        let at = block.0 as usize * self.block_tokens;
        self.tokens[at..at + self.block_tokens].copy_from_slice(tokens);
        if let (Some(events), Some(event)) = (&self.events, event) {
            events.stored(parent_event, event, tokens);
        }
    }

    /// The block's content is about to be lost; false if it was not cached.
    pub(super) fn forget(&mut self, block: BlockIndex) -> bool {
        let Some(entry) = self.entries[block.0 as usize].take() else { return false };
        self.by_hash.remove(&entry.hash);
        if let (Some(events), Some(event)) = (&self.events, entry.event) {
            events.removed(event);
        }
        true
    }

    /// The names of all cached blocks in events.
    #[cfg(test)]
    pub(super) fn events(&self) -> impl Iterator<Item = EventHash> {
        self.entries.iter().flatten().filter_map(|entry| entry.event)
    }

    fn tokens_of(&self, block: BlockIndex) -> &[u32] {
        let at = block.0 as usize * self.block_tokens;
        &self.tokens[at..at + self.block_tokens]
    }
}

/// The tokens of the block after those named, if there are enough.
fn next_block<'a>(chain: &Chain, tokens: &'a [u32], block_tokens: usize) -> Option<&'a [u32]> {
    let at = chain.blocks as usize * block_tokens;
    tokens.get(at..at + block_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> PrefixCache {
        PrefixCache::new(8, 2, 1, None)
    }

    fn enter(cache: &mut PrefixCache, salt: Option<CacheSalt>, tokens: &[u32], blocks: &[u32]) {
        let mut chain = Chain::new(salt);
        blocks.iter().for_each(|block| cache.enter(&mut chain, tokens, BlockIndex(*block)));
    }

    fn found(cache: &mut PrefixCache, salt: Option<CacheSalt>, tokens: &[u32]) -> Vec<u32> {
        let mut chain = Chain::new(salt);
        std::iter::from_fn(|| cache.find(&mut chain, tokens)).map(|block| block.0).collect()
    }

    #[test]
    fn blocks_are_found_as_far_as_all_tokens_agree() {
        let mut cache = cache();
        enter(&mut cache, None, &[1, 2, 3, 4, 5, 6], &[3, 1, 2]);
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4, 5, 6, 7]), [3, 1, 2]);
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4, 5]), [3, 1]);
        assert_eq!(found(&mut cache, None, &[1, 2, 9, 4, 5, 6]), [3]);
        assert!(found(&mut cache, None, &[3, 4, 5, 6]).is_empty());
    }

    #[test]
    fn salts_share_nothing() {
        let mut cache = cache();
        let (one, two) = (Some(CacheSalt::of("one")), Some(CacheSalt::of("two")));
        enter(&mut cache, one, &[1, 2, 3, 4], &[0, 1]);
        assert_eq!(found(&mut cache, one, &[1, 2, 3, 4]), [0, 1]);
        assert!(found(&mut cache, two, &[1, 2, 3, 4]).is_empty());
        assert!(found(&mut cache, None, &[1, 2, 3, 4]).is_empty());
    }

    #[test]
    fn the_first_of_two_equal_blocks_is_the_one_that_is_found() {
        let mut cache = cache();
        enter(&mut cache, None, &[1, 2, 3, 4], &[0]);
        enter(&mut cache, None, &[1, 2, 3, 4], &[5, 6]);
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4]), [0, 6]);
        assert_eq!((cache.len(), cache.has(BlockIndex(5))), (2, false));
        assert!(!cache.forget(BlockIndex(5)));
    }

    #[test]
    fn what_is_forgotten_is_not_found_and_may_come_again() {
        let mut cache = cache();
        enter(&mut cache, None, &[1, 2, 3, 4], &[0, 1]);
        assert!(cache.forget(BlockIndex(0)) && !cache.forget(BlockIndex(0)));
        assert!(found(&mut cache, None, &[1, 2, 3, 4]).is_empty());
        // The second block still holds what it held.
        enter(&mut cache, None, &[1, 2], &[7]);
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4]), [7, 1]);
    }

    #[test]
    fn a_hash_alone_is_not_enough() {
        let mut cache = cache();
        enter(&mut cache, None, &[1, 2, 3, 4], &[0, 1]);
        // As if another prompt's block had the same hash.
        cache.tokens[0] = 9;
        assert!(found(&mut cache, None, &[1, 2, 3, 4]).is_empty());
        cache.tokens[0] = 1;
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4]), [0, 1]);
        let other = PoolHash::root(Some(&CacheSalt::of("x")));
        cache.entries[1].as_mut().unwrap().parent = other;
        assert_eq!(found(&mut cache, None, &[1, 2, 3, 4]), [0]);
    }

    #[test]
    fn a_chain_that_found_blocks_goes_on_behind_them() {
        let mut cache = cache();
        enter(&mut cache, None, &[1, 2], &[0]);
        let (mut chain, tokens) = (Chain::new(None), [1, 2, 3, 4]);
        assert_eq!(cache.find(&mut chain, &tokens), Some(BlockIndex(0)));
        assert_eq!((cache.find(&mut chain, &tokens), chain.blocks()), (None, 1));
        cache.enter(&mut chain, &tokens, BlockIndex(4));
        assert_eq!(found(&mut cache, None, &tokens), [0, 4]);
        chain.restart();
        assert_eq!(cache.find(&mut chain, &tokens), Some(BlockIndex(0)));
    }
}
