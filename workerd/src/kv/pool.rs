//! The blocks of one instance: who may use which.
//!
//! Blocks are handed out as [`Blocks`], which give themselves back when they are dropped: a block is free exactly
//! when nobody holds it, so an aborted request cannot leak any. The holder must therefore outlive every use of its
//! blocks (steps that were submitted, transfers that may still write). Belongs to one thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use baton_shared::id::BlockIndex;

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
    /// It is kept as it is for a reader.
    Leased,
    /// A transfer may write it: it has one holder.
    InFlight,
    /// A transfer that was given up may still write it: it has one holder.
    Quarantined,
}

/// All blocks. Cloning shares them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    shared: Rc<RefCell<Shared>>,
}

struct Shared {
    /// Oldest first: the block that has been free for longest is used next.
    free: VecDeque<BlockIndex>,
    entries: Vec<Entry>,
    counts: BlockCounts,
    /// Told of each block that becomes free.
    on_free: Option<OnFree>,
}

/// Hears which block has become free, before anybody else can have it.
pub type OnFree = Box<dyn Fn(BlockIndex)>;

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("counts", &self.counts).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    used: u32,
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
    /// A pool of free blocks `0..blocks`.
    pub fn new(blocks: u32) -> Self {
        let shared = Shared {
            free: (0..blocks).map(BlockIndex).collect(),
            entries: vec![Entry::default(); blocks as usize],
            counts: BlockCounts { free: blocks, ..BlockCounts::default() },
            on_free: None,
        };
        Self { shared: Rc::new(RefCell::new(shared)) }
    }

    /// From now on `hook` hears of each block that becomes free. It must not touch the pool.
    pub fn on_free(&self, hook: OnFree) {
        self.shared.borrow_mut().on_free = Some(hook);
    }

    /// Blocks by state. One that is both leased and used counts as leased.
    pub fn counts(&self) -> BlockCounts {
        self.shared.borrow().counts
    }

    /// Free blocks.
    pub fn free(&self) -> u32 {
        self.counts().free
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

    /// Adds `count` blocks nobody else holds, in the state of these; false, and nothing changed, if there are not so many.
    #[must_use]
    pub fn grow(&mut self, count: u32) -> bool {
        let mut shared = self.shared.borrow_mut();
        if shared.counts.free < count {
            return false;
        }
        for _ in 0..count {
            let block = shared.free.pop_front().expect("as many are free as are counted free");
            shared.change(block, |entry| entry.hold(self.state));
            self.ids.push(block);
        }
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
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        for block in &self.ids {
            shared.change(*block, |entry| entry.let_go(self.state));
            if shared.entries[block.0 as usize].is_free() {
                if let Some(hook) = &shared.on_free {
                    hook(*block);
                }
                shared.free.push_back(*block);
            }
        }
    }
}

impl Shared {
    fn change(&mut self, block: BlockIndex, change: impl FnOnce(&mut Entry)) {
        let entry = &mut self.entries[block.0 as usize];
        *entry.counted_in(&mut self.counts) -= 1;
        change(entry);
        *entry.counted_in(&mut self.counts) += 1;
    }
}

impl Entry {
    fn hold(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used += 1,
            BlockState::Leased => self.leased += 1,
            BlockState::InFlight => self.in_flight = true,
            BlockState::Quarantined => self.quarantined = true,
        }
        let exclusive = usize::from(self.in_flight) + usize::from(self.quarantined);
        let shared = self.used + self.leased;
        debug_assert!(exclusive == 0 || (exclusive == 1 && shared == 0), "{self:?}");
    }

    fn let_go(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used -= 1,
            BlockState::Leased => self.leased -= 1,
            BlockState::InFlight => self.in_flight = false,
            BlockState::Quarantined => self.quarantined = false,
        }
    }

    fn is_free(self) -> bool {
        self.used == 0 && self.leased == 0 && !self.in_flight && !self.quarantined
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
mod tests {
    use std::collections::HashSet;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn ids(blocks: &Blocks) -> Vec<u32> {
        blocks.ids().iter().map(|block| block.0).collect()
    }

    #[test]
    fn freed_blocks_are_reused_oldest_first() {
        let pool = BlockPool::new(4);
        let first = pool.allocate(2).unwrap();
        let second = pool.allocate(2).unwrap();
        drop(second);
        drop(first);
        assert_eq!(ids(&pool.allocate(4).unwrap()), [2, 3, 0, 1]);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let pool = BlockPool::new(3);
        let mut held = pool.allocate(2).unwrap();
        assert!(pool.allocate(2).is_none());
        assert!(!held.grow(2));
        assert_eq!(held.count(), 2);
        assert!(held.grow(1));
        assert_eq!(pool.free(), 0);
    }

    #[test]
    fn each_state_is_counted_as_itself() {
        let pool = BlockPool::new(8);
        let mut blocks = pool.allocate(3).unwrap();
        for (state, expected) in [
            (BlockState::Used, BlockCounts { free: 5, used: 3, ..BlockCounts::default() }),
            (BlockState::InFlight, BlockCounts { free: 5, in_flight: 3, ..BlockCounts::default() }),
            (
                BlockState::Quarantined,
                BlockCounts { free: 5, quarantined: 3, ..BlockCounts::default() },
            ),
            (BlockState::Leased, BlockCounts { free: 5, leased: 3, ..BlockCounts::default() }),
        ] {
            blocks.become_state(state);
            assert_eq!(pool.counts(), expected);
        }
        drop(blocks);
        assert_eq!(pool.free(), 8);
    }

    #[test]
    fn joined_blocks_take_the_state_of_what_they_join() {
        let pool = BlockPool::new(4);
        let mut used = pool.allocate(1).unwrap();
        let mut leased = pool.allocate(2).unwrap();
        leased.become_state(BlockState::Leased);
        used.append(leased);
        assert_eq!(ids(&used), [0, 1, 2]);
        assert_eq!(pool.counts().used, 3);
    }

    #[test]
    fn any_order_of_operations_keeps_every_block_with_at_most_one_holder_and_loses_none() {
        const SIZE: u32 = 37;
        let states =
            [BlockState::Used, BlockState::Leased, BlockState::InFlight, BlockState::Quarantined];
        let mut random = SmallRng::seed_from_u64(1);
        let pool = BlockPool::new(SIZE);
        let mut held: Vec<Blocks> = Vec::new();
        for _ in 0..20_000 {
            match random.random_range(0..5) {
                0 | 1 => held.extend(pool.allocate(random.random_range(0..6))),
                2 if !held.is_empty() => {
                    let which = random.random_range(0..held.len());
                    held.swap_remove(which);
                }
                3 if !held.is_empty() => {
                    let which = random.random_range(0..held.len());
                    let fits = held[which].count() + pool.free();
                    let more = random.random_range(0..4);
                    let before = held[which].count();
                    assert_eq!(held[which].grow(more), before + more <= fits);
                }
                4 if !held.is_empty() => {
                    let which = random.random_range(0..held.len());
                    held[which].become_state(states[random.random_range(0..4)]);
                }
                _ => {}
            }
            let BlockCounts { free, used, leased, in_flight, quarantined } = pool.counts();
            assert_eq!(free + used + leased + in_flight + quarantined, SIZE);
            let all: Vec<u32> = held.iter().flat_map(ids).collect();
            assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            assert_eq!(all.len() as u32 + free, SIZE);
        }
        held.clear();
        assert_eq!(pool.free(), SIZE);
    }
}
