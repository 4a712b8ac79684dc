//! What others may know of the prefix cache: which blocks entered it and left it, in order, until somebody asks.
//!
//! Bounded: when nobody asks, the oldest are dropped and counted; the ids, which have no other gaps, show it. Written by
//! the engine thread, taken by whoever answers `/kv_cache_events`; each event is given out once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_shared::kv::block_hash::{EventHash, EventHashAlgorithm};

/// Blocks one event names at most; more begin another.
const MOST_BLOCKS: u32 = 64;

/// Events that memory is set aside for; a larger buffer grows when it has to.
const MOST_RESERVED: usize = 4096;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEvent {
    /// Counts up by one.
    pub id: u64,
    /// What changed.
    pub change: KvChange,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvChange {
    /// A cache of this many blocks, empty.
    Created {
        /// Blocks of the pool.
        blocks: u32,
    },
    /// Blocks entered, each the child of the one before.
    Stored {
        /// The block before the first; `None` = they begin a prompt.
        parent: Option<EventHash>,
        /// At least one.
        blocks: Vec<StoredBlock>,
    },
    /// Blocks left.
    Removed(Vec<EventHash>),
}

/// A block that entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlock {
    /// Its name.
    pub hash: EventHash,
    /// What it holds.
    pub tokens: Vec<u32>,
}

/// Events nobody took yet. Cloning shares them.
#[derive(Clone, Debug)]
pub struct EventLog {
    algorithm: EventHashAlgorithm,
    block_tokens: usize,
    capacity: usize,
    pending: Arc<Mutex<Pending>>,
}

/// Flat, so that writing needs no memory beyond what was reserved.
#[derive(Debug, Default)]
struct Pending {
    events: VecDeque<Head>,
    /// Names of all events' blocks.
    hashes: VecDeque<EventHash>,
    /// Tokens of all stored blocks.
    tokens: VecDeque<u32>,
    next_id: u64,
    dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    id: u64,
    kind: Kind,
    /// Blocks it names.
    blocks: u32,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Created { pool: u32 },
    Stored { parent: Option<EventHash> },
    Removed,
}

impl EventLog {
    /// Keeps `capacity` events, at least one, of blocks of `block_tokens`.
    pub fn new(capacity: usize, block_tokens: u32, algorithm: EventHashAlgorithm) -> Self {
        let (capacity, block_tokens) = (capacity.max(1), block_tokens as usize);
        let pending = Arc::new(Mutex::new(Pending::reserved(capacity, block_tokens)));
        Self { algorithm, block_tokens, capacity, pending }
    }

    /// How blocks are named.
    pub fn algorithm(&self) -> EventHashAlgorithm {
        self.algorithm
    }

    /// Events that were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// All events so far that nobody took, oldest first.
    pub fn take(&self) -> Vec<KvEvent> {
        let fresh = Pending::reserved(self.capacity, self.block_tokens);
        let mut pending = self.lock();
        let fresh = Pending { next_id: pending.next_id, dropped: pending.dropped, ..fresh };
        let mut taken = std::mem::replace(&mut *pending, fresh);
        drop(pending);
        let mut events = Vec::with_capacity(taken.events.len());
        while let Some(head) = taken.events.pop_front() {
            events.push(taken.read(head, self.block_tokens));
        }
        events
    }

    pub(super) fn created(&self, pool: u32) {
        self.lock().begin(Kind::Created { pool }, self.capacity, self.block_tokens);
    }

    pub(super) fn stored(&self, parent: Option<EventHash>, hash: EventHash, tokens: &[u32]) {
        let mut pending = self.lock();
        let goes_on = match pending.events.back() {
            Some(Head { kind: Kind::Stored { .. }, blocks, .. }) => {
                *blocks < MOST_BLOCKS && pending.hashes.back().copied() == parent
            }
            _ => false,
        };
        if !goes_on {
            pending.begin(Kind::Stored { parent }, self.capacity, self.block_tokens);
        }
        pending.name(hash);
        pending.tokens.extend(tokens);
    }

    pub(super) fn removed(&self, hash: EventHash) {
        let mut pending = self.lock();
        let goes_on = match pending.events.back() {
            Some(Head { kind: Kind::Removed, blocks, .. }) => *blocks < MOST_BLOCKS,
            _ => false,
        };
        if !goes_on {
            pending.begin(Kind::Removed, self.capacity, self.block_tokens);
        }
        pending.name(hash);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn reserved(capacity: usize, block_tokens: usize) -> Self {
        let capacity = capacity.min(MOST_RESERVED);
        Self {
            events: VecDeque::with_capacity(capacity + 1),
            hashes: VecDeque::with_capacity(capacity),
            tokens: VecDeque::with_capacity(capacity * block_tokens),
            ..Self::default()
        }
    }

    /// A new event; the oldest makes room.
    fn begin(&mut self, kind: Kind, capacity: usize, block_tokens: usize) {
        self.events.push_back(Head { id: self.next_id, kind, blocks: 0 });
        self.next_id += 1;
        if self.events.len() > capacity
            && let Some(Head { kind, blocks, .. }) = self.events.pop_front()
        {
            self.dropped += 1;
            self.hashes.drain(..blocks as usize);
            if let Kind::Stored { .. } = kind {
                self.tokens.drain(..blocks as usize * block_tokens);
            }
        }
    }

    /// One more block for the newest event.
    fn name(&mut self, hash: EventHash) {
        if let Some(newest) = self.events.back_mut() {
            newest.blocks += 1;
            self.hashes.push_back(hash);
        }
    }

    fn read(&mut self, head: Head, block_tokens: usize) -> KvEvent {
        let Head { id, kind, blocks } = head;
        let hashes = self.hashes.drain(..blocks as usize);
        let change = match kind {
            Kind::Created { pool } => KvChange::Created { blocks: pool },
            Kind::Removed => KvChange::Removed(hashes.collect()),
            Kind::Stored { parent } => {
                let tokens = &mut self.tokens;
                let stored =
                    |hash| StoredBlock { hash, tokens: tokens.drain(..block_tokens).collect() };
                KvChange::Stored { parent, blocks: hashes.map(stored).collect() }
            }
        };
        KvEvent { id, change }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(capacity: usize) -> EventLog {
        EventLog::new(capacity, 2, EventHashAlgorithm::V1BlockKey)
    }

    fn key(key: u64) -> EventHash {
        EventHash::Key(key)
    }

    #[test]
    fn events_are_given_out_once_in_order_with_ids_that_count_on() {
        let log = log(8);
        log.created(5);
        log.stored(None, key(1), &[1, 2]);
        log.removed(key(1));
        let events = log.take();
        assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(events[0].change, KvChange::Created { blocks: 5 });
        let blocks = vec![StoredBlock { hash: key(1), tokens: vec![1, 2] }];
        assert_eq!(events[1].change, KvChange::Stored { parent: None, blocks });
        assert_eq!(events[2].change, KvChange::Removed(vec![key(1)]));
        assert!(log.take().is_empty());
        log.removed(key(2));
        assert_eq!(log.take()[0].id, 3);
    }

    #[test]
    fn a_chain_is_one_event_and_so_are_removals_in_a_row() {
        let log = log(8);
        log.stored(None, key(1), &[1, 2]);
        log.stored(Some(key(1)), key(2), &[3, 4]);
        log.stored(Some(key(1)), key(3), &[5, 6]);
        log.removed(key(2));
        log.removed(key(3));
        let events = log.take();
        let [first, second, removed] = &events[..] else { panic!("{events:?}") };
        let stored = |hash, tokens: [u32; 2]| StoredBlock { hash, tokens: tokens.to_vec() };
        let blocks = vec![stored(key(1), [1, 2]), stored(key(2), [3, 4])];
        assert_eq!(first.change, KvChange::Stored { parent: None, blocks });
        let blocks = vec![stored(key(3), [5, 6])];
        assert_eq!(second.change, KvChange::Stored { parent: Some(key(1)), blocks });
        assert_eq!(removed.change, KvChange::Removed(vec![key(2), key(3)]));
    }

    #[test]
    fn what_nobody_takes_is_dropped_oldest_first_and_counted() {
        let log = log(3);
        log.created(9);
        for block in 0..10 {
            log.stored(None, key(block), &[block as u32; 2]);
        }
        let events = log.take();
        assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), [8, 9, 10]);
        let blocks = vec![StoredBlock { hash: key(7), tokens: vec![7, 7] }];
        assert_eq!(events[0].change, KvChange::Stored { parent: None, blocks });
        assert_eq!(log.dropped(), 8);
    }

    #[test]
    fn an_event_has_a_bound_too() {
        let log = log(8);
        (0..u64::from(MOST_BLOCKS) + 1).for_each(|block| log.removed(key(block)));
        let events = log.take();
        assert_eq!(events.len(), 2);
        assert_eq!(events[1].change, KvChange::Removed(vec![key(u64::from(MOST_BLOCKS))]));
    }
}
