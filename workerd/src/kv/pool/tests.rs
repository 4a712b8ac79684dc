use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use baton_shared::kv::block_hash::{BlockExtra, CacheSalt, EventHash, EventHashAlgorithm};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::kv::events::{EventLog, KvChange};

/// Tokens of a block in all pools with a cache here.
const BLOCK_TOKENS: u32 = 2;

fn cached_pool(blocks: u32) -> BlockPool {
    BlockPool::with_cache(blocks, Some(PrefixCache::new(blocks, BLOCK_TOKENS, 1, None)))
}

/// Blocks of all these tokens, computed and cached, and how many of them were there already.
fn computed(pool: &BlockPool, tokens: &[u32], salt: Option<CacheSalt>) -> Option<(Blocks, u32)> {
    let (mut chain, mut found) = (Chain::new(salt), Vec::new());
    let all = (tokens.len() as u32).div_ceil(BLOCK_TOKENS);
    pool.find(&mut chain, tokens, all, &mut found);
    let hits = found.len() as u32;
    let blocks = pool.claim(&found, all - hits, 0, BlockState::Used, all)?;
    blocks.cache(&mut chain, tokens);
    Some((blocks, hits))
}

fn hits(pool: &BlockPool, tokens: &[u32]) -> u32 {
    let mut found = Vec::new();
    pool.find(&mut Chain::new(None), tokens, u32::MAX, &mut found);
    found.len() as u32
}

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
    assert_eq!(ids(&pool.allocate(2).unwrap()), [2, 3]);
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

#[test]
fn free_blocks_keep_what_they_hold_until_nothing_else_is_free() {
    let pool = cached_pool(6);
    drop(computed(&pool, &[1, 2, 3, 4], None));
    drop(computed(&pool, &[5, 6, 7], None));
    assert_eq!((pool.free(), pool.cache_counts().cached), (6, 3));
    // Three hold nothing.
    let blank = pool.allocate(3).unwrap();
    assert_eq!((hits(&pool, &[1, 2, 3, 4]), hits(&pool, &[5, 6])), (2, 1));
    // The oldest prompt's end goes first, then its beginning.
    let mut more = pool.allocate(1).unwrap();
    assert_eq!((hits(&pool, &[1, 2, 3, 4]), hits(&pool, &[5, 6])), (1, 1));
    assert!(more.grow(1));
    assert_eq!((hits(&pool, &[1, 2, 3, 4]), hits(&pool, &[5, 6])), (0, 1));
    assert_eq!(pool.cache_counts().evicted, 2);
    drop((blank, more));
    assert_eq!((pool.free(), pool.cache_counts().cached), (6, 1));
}

#[test]
fn what_is_asked_for_again_stays_longer() {
    let pool = cached_pool(2);
    drop(computed(&pool, &[1, 2], None));
    drop(computed(&pool, &[3, 4], None));
    let (again, found) = computed(&pool, &[1, 2], None).unwrap();
    assert_eq!((found, again.count(), pool.free()), (1, 1, 1));
    drop(again);
    drop(pool.allocate(1));
    assert_eq!((hits(&pool, &[1, 2]), hits(&pool, &[3, 4])), (1, 0));
}

#[test]
fn a_block_in_use_is_shared_and_free_when_its_last_holder_is_gone() {
    let pool = cached_pool(4);
    let (one, _) = computed(&pool, &[1, 2, 3, 4], None).unwrap();
    let (mut two, found) = computed(&pool, &[1, 2, 3, 4, 5], None).unwrap();
    assert_eq!((found, pool.counts().used), (2, 3));
    two.become_state(BlockState::Leased);
    assert_eq!((pool.counts().leased, pool.counts().used), (3, 0));
    drop(one);
    assert_eq!(pool.counts().leased, 3);
    drop(two);
    assert_eq!(pool.free(), 4);
}

#[test]
fn a_claim_that_does_not_fit_changes_nothing() {
    let pool = cached_pool(4);
    drop(computed(&pool, &[1, 2, 3, 4], None));
    let (mut chain, mut found) = (Chain::new(None), Vec::new());
    pool.find(&mut chain, &[1, 2, 3, 4], 2, &mut found);
    // Two found ones that are free, two more: none would be left.
    assert!(pool.claim(&found, 2, 1, BlockState::Used, 4).is_none());
    assert_eq!((pool.free(), hits(&pool, &[1, 2, 3, 4])), (4, 2));
    let held = pool.claim(&found, 2, 0, BlockState::Used, 4).unwrap();
    assert_eq!((held.count(), pool.free()), (4, 0));
}

#[test]
fn pledged_blocks_count_as_used_and_once_with_those_leased() {
    let pool = cached_pool(8);
    let (mut lease, _) = computed(&pool, &[1, 2, 3, 4], None).unwrap();
    lease.become_state(BlockState::Leased);
    let (mut chain, mut found) = (Chain::new(None), Vec::new());
    pool.find(&mut chain, &[1, 2, 3, 4, 5], 2, &mut found);
    assert_eq!(pool.unpledged(&found), 0);
    let pledged = pool.claim(&found, 1, 0, BlockState::Pledged, 3).unwrap();
    assert_eq!((pool.pledged(), pool.counts().used, pool.counts().leased), (3, 1, 2));
    drop(lease);
    assert_eq!((pool.pledged(), pool.counts().used), (3, 3));
    drop(pledged);
    assert_eq!((pool.pledged(), pool.free()), (0, 8));
}

#[test]
fn a_split_is_two_holders() {
    let pool = BlockPool::new(4);
    let mut first = pool.allocate(4).unwrap();
    let mut rest = first.split_off(1);
    rest.become_state(BlockState::InFlight);
    assert_eq!((pool.counts().used, pool.counts().in_flight), (1, 3));
    drop(first);
    assert_eq!(pool.free(), 1);
}

#[test]
fn a_lost_content_is_told_once_and_before_the_block_is_used_again() {
    let pool = cached_pool(3);
    let lost = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&lost);
    pool.on_lost(Box::new(move |block| into.lock().unwrap().push(block.0)));
    let told = || std::mem::take(&mut *lost.lock().unwrap());
    let (blocks, _) = computed(&pool, &[1, 2, 3], None).unwrap();
    drop(blocks);
    // The full one keeps what it holds.
    assert_eq!(told(), [1]);
    let again = computed(&pool, &[1, 2], None).unwrap();
    drop(again);
    assert!(told().is_empty());
    let all = pool.allocate(3).unwrap();
    assert_eq!(told(), [0]);
    drop(all);
    assert_eq!(told(), [2, 1, 0]);
}

#[test]
fn shared_blocks_count_once_by_what_their_holders_do_whatever_happens() {
    const SIZE: u32 = 31;
    let states = [BlockState::Used, BlockState::Pledged, BlockState::Leased];
    let mut random = SmallRng::seed_from_u64(4);
    let pool = cached_pool(SIZE);
    let mut held: Vec<(Blocks, BlockState)> = Vec::new();
    let mut shared = 0;
    for _ in 0..10_000 {
        let which = random.random_range(0..held.len().max(1));
        match random.random_range(0..4) {
            0 | 1 => {
                let tokens: Vec<u32> = (0..10).map(|_| random.random_range(0..2)).collect();
                let blocks = computed(&pool, &tokens, None);
                held.extend(blocks.map(|(blocks, _)| (blocks, BlockState::Used)));
            }
            2 if !held.is_empty() => drop(held.swap_remove(which)),
            3 if !held.is_empty() => {
                let (blocks, state) = &mut held[which];
                *state = states[random.random_range(0..3)];
                blocks.become_state(*state);
            }
            _ => {}
        }
        let of = |wanted: &[BlockState]| -> HashSet<u32> {
            let some = held.iter().filter(|(_, state)| wanted.contains(state));
            some.flat_map(|(blocks, _)| ids(blocks)).collect()
        };
        let (all, leased) = (of(&states), of(&[BlockState::Leased]));
        let BlockCounts { free, used, leased: counted, in_flight, quarantined } = pool.counts();
        assert_eq!((free, counted), (SIZE - all.len() as u32, leased.len() as u32));
        assert_eq!((used, in_flight + quarantined), ((all.len() - leased.len()) as u32, 0));
        assert_eq!(pool.pledged(), of(&states[1..]).len() as u32);
        shared += held.iter().map(|(blocks, _)| blocks.count() as usize).sum::<usize>() - all.len();
    }
    assert!(shared > 10_000, "{shared}");
}

#[test]
#[should_panic(expected = "a block that others hold cannot be InFlight")]
fn a_block_that_a_transfer_may_write_has_no_other_holder() {
    let pool = cached_pool(2);
    let (mut one, _) = computed(&pool, &[1, 2], None).unwrap();
    let (_two, found) = computed(&pool, &[1, 2], None).unwrap();
    assert_eq!(found, 1);
    one.become_state(BlockState::InFlight);
}

#[test]
fn events_tell_at_every_moment_exactly_which_blocks_can_be_found() {
    const SIZE: u32 = 23;
    for algorithm in [EventHashAlgorithm::V1BlockKey, EventHashAlgorithm::V2Sha256] {
        let log = EventLog::new(1 << 16, BLOCK_TOKENS, algorithm);
        let cache = PrefixCache::new(SIZE, BLOCK_TOKENS, 1, Some(log.clone()));
        let pool = BlockPool::with_cache(SIZE, Some(cache));
        let mut random = SmallRng::seed_from_u64(9);
        let salts = [None, Some(CacheSalt::of("a"))];
        let mut held: Vec<Blocks> = Vec::new();
        let mut told: HashSet<EventHash> = HashSet::new();
        let mut next_id = 0;
        for _ in 0..5_000 {
            match random.random_range(0..5) {
                0..3 => {
                    // Few tokens, so that prompts meet, part and meet again.
                    let len = random.random_range(1..13);
                    let tokens: Vec<u32> = (0..len).map(|_| random.random_range(0..2)).collect();
                    let salt = salts[random.random_range(0..2)];
                    held.extend(computed(&pool, &tokens, salt).map(|(blocks, _)| blocks));
                }
                3 if !held.is_empty() => {
                    let which = random.random_range(0..held.len());
                    held.swap_remove(which);
                }
                _ => drop(pool.allocate(random.random_range(0..4))),
            }
            for event in log.take() {
                assert_eq!(event.id, next_id);
                next_id += 1;
                match event.change {
                    KvChange::Created { blocks } => assert_eq!(blocks, SIZE),
                    KvChange::Stored { mut parent, blocks } => {
                        for block in blocks {
                            let salts = salts.iter().map(|salt| BlockExtra {
                                salt: salt.map(|salt| salt.id()),
                                lora: None,
                            });
                            let mut names =
                                salts.map(|extra| algorithm.next(parent, &block.tokens, extra));
                            assert!(names.any(|name| name == block.hash), "{block:?}");
                            assert!(told.insert(block.hash), "stored twice: {block:?}");
                            parent = Some(block.hash);
                        }
                    }
                    KvChange::Removed(hashes) => {
                        assert!(hashes.iter().all(|hash| told.remove(hash)), "{hashes:?}");
                    }
                }
            }
            let cached: HashSet<EventHash> = pool.cached_events().into_iter().collect();
            assert_eq!(told, cached);
            assert_eq!(told.len() as u32, pool.cache_counts().cached);
        }
        assert!(pool.cache_counts().evicted > 100 && pool.cache_counts().reused > 100);
        assert_eq!(log.dropped(), 0);
    }
}
