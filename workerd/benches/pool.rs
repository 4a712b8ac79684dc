//! Nanoseconds a block in the pool: taken and given back, found by its tokens and taken again, entered into the prefix
//! cache, and taken from it for something else. With the xxh3 of 32 tokens in all but the first.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_shared::kv::block_hash::EventHashAlgorithm;
use baton_workerd::kv::events::EventLog;
use baton_workerd::kv::pool::{BlockPool, BlockState};
use baton_workerd::kv::prefix::{Chain, PrefixCache};

const BLOCK_TOKENS: u32 = 32;
/// Blocks of a pool: 64 KiB tokens.
const BLOCKS: u32 = 2048;
/// Blocks of a prompt.
const PROMPT: u32 = 64;

fn main() {
    let tokens: Vec<u32> = (0..PROMPT * BLOCK_TOKENS).collect();
    row("allocate and free", &mut allocate_and_free(&pool(None)));
    let known = pool(None);
    drop(compute(&known, &tokens));
    row("find, claim and free", &mut find_and_free(&known, &tokens));
    row("enter, evicting", &mut enter(&pool(None), &tokens));
    for (name, algorithm) in [
        ("enter, evicting, v1_block_key events", EventHashAlgorithm::V1BlockKey),
        ("enter, evicting, v2_sha256 events", EventHashAlgorithm::V2Sha256),
    ] {
        let events = EventLog::new(1024, BLOCK_TOKENS, algorithm);
        row(name, &mut enter(&pool(Some(events)), &tokens));
    }
}

fn pool(events: Option<EventLog>) -> BlockPool {
    BlockPool::with_cache(BLOCKS, Some(PrefixCache::new(BLOCKS, BLOCK_TOKENS, 1, events)))
}

/// Prints what `work` takes for one of [`PROMPT`] blocks: the best of several batches.
fn row(name: &str, work: &mut dyn FnMut()) {
    const ROUNDS: u32 = 200;
    let mut batch = |_| {
        let begun = Instant::now();
        (0..ROUNDS).for_each(|_| work());
        begun.elapsed()
    };
    let least: Option<Duration> = (0..20).map(&mut batch).min();
    let blocks = f64::from(ROUNDS * PROMPT);
    println!("{name:>40} {:>8.1} ns", least.unwrap_or_default().as_nanos() as f64 / blocks);
}

fn allocate_and_free(pool: &BlockPool) -> impl FnMut() {
    move || drop(black_box(pool.allocate(PROMPT)))
}

fn find_and_free(pool: &BlockPool, tokens: &[u32]) -> impl FnMut() {
    let mut found = Vec::new();
    move || {
        found.clear();
        pool.find(&mut Chain::new(None), tokens, PROMPT, &mut found);
        assert_eq!(found.len(), PROMPT as usize);
        drop(black_box(pool.claim(&found, 0, 0, BlockState::Used, PROMPT)));
    }
}

/// A new prompt each time, so that the pool is full of others soon.
fn enter(pool: &BlockPool, tokens: &[u32]) -> impl FnMut() {
    let mut tokens = tokens.to_vec();
    move || {
        tokens[0] += 1;
        drop(black_box(compute(pool, &tokens)));
    }
}

fn compute(pool: &BlockPool, tokens: &[u32]) -> Option<baton_workerd::kv::pool::Blocks> {
    let blocks = pool.allocate(PROMPT)?;
    blocks.cache(&mut Chain::new(None), tokens);
    Some(blocks)
}
