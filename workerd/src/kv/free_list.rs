//! Lists of blocks threaded through one table: put in, take out from anywhere, all in constant time and without memory
//! of their own. A block is in one list at most.

use baton_shared::id::BlockIndex;

/// The table all lists of a pool share: the neighbours of each block.
#[derive(Debug)]
pub(super) struct Links {
    neighbours: Vec<Neighbours>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Neighbours {
    before: Option<BlockIndex>,
    after: Option<BlockIndex>,
}

/// One list, oldest first.
#[derive(Debug, Default)]
pub(super) struct List {
    first: Option<BlockIndex>,
    last: Option<BlockIndex>,
}

impl Links {
    /// Of blocks `0..blocks`.
    pub(super) fn new(blocks: u32) -> Self {
        Self { neighbours: vec![Neighbours::default(); blocks as usize] }
    }

    fn of(&mut self, block: BlockIndex) -> &mut Neighbours {
        &mut self.neighbours[block.0 as usize]
    }
}

impl List {
    /// The oldest.
    pub(super) fn first(&self) -> Option<BlockIndex> {
        self.first
    }

    /// Adds a block that is in no list, as the newest.
    pub(super) fn push(&mut self, links: &mut Links, block: BlockIndex) {
        *links.of(block) = Neighbours { before: self.last, after: None };
        match self.last {
            Some(last) => links.of(last).after = Some(block),
            None => self.first = Some(block),
        }
        self.last = Some(block);
    }

    /// Takes out a block that is in this list.
    pub(super) fn remove(&mut self, links: &mut Links, block: BlockIndex) {
        let Neighbours { before, after } = std::mem::take(links.of(block));
        match before {
            Some(before) => links.of(before).after = after,
            None => self.first = after,
        }
        match after {
            Some(after) => links.of(after).before = before,
            None => self.last = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn all(list: &List, links: &mut Links) -> Vec<BlockIndex> {
        let next = |block: &BlockIndex| links.of(*block).after;
        std::iter::successors(list.first(), next).collect()
    }

    #[test]
    fn two_lists_over_one_table_are_two_queues_with_a_way_out_of_the_middle() {
        const BLOCKS: u32 = 20;
        let mut random = SmallRng::seed_from_u64(5);
        let mut links = Links::new(BLOCKS);
        let mut lists = [List::default(), List::default()];
        let mut models = [Vec::new(), Vec::new()];
        for _ in 0..5_000 {
            let block = BlockIndex(random.random_range(0..BLOCKS));
            match models.iter().position(|model| model.contains(&block)) {
                Some(which) => {
                    lists[which].remove(&mut links, block);
                    models[which].retain(|other| *other != block);
                }
                None => {
                    let which = random.random_range(0..2);
                    lists[which].push(&mut links, block);
                    models[which].push(block);
                }
            }
            for (list, model) in lists.iter().zip(&models) {
                assert_eq!(all(list, &mut links), *model);
            }
        }
    }
}
