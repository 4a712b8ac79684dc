//! Which worker saw what, as far as it is remembered: hashes with the workers they went to, in bounded memory.
//!
//! A table of sets, each one cache line of eight entries, the latest first: what is looked for is found or not after
//! one line was read, and what is new pushes out what was not used for longest in its set. Nothing is locked; two
//! requests that write one set at once may lose an entry or keep it twice, and either costs a cache hit at worst.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// 4 MiB a memory: room for half a million entries.
const SETS: usize = 1 << 16;
const WAYS: usize = 8;
/// Low bits of an entry: the worker's slot plus one, so that 0 is no entry; the others are the hash's.
const SLOT_BITS: u32 = 24;
const SLOT: u64 = (1 << SLOT_BITS) - 1;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Set([AtomicU64; WAYS]);

/// The memory of one pool; takes no room before the first thing is remembered.
#[derive(Debug, Default)]
pub struct Seen(OnceLock<Box<[Set]>>);

impl Seen {
    /// Slots of the workers that saw `hash`, the latest first. A rare hash is taken for another one.
    pub fn holders(&self, hash: u64) -> impl Iterator<Item = usize> {
        let set = self.0.get().map(|sets| &sets[place(hash)].0);
        let entries = set.into_iter().flatten().map(|entry| entry.load(Ordering::Relaxed));
        let held = entries.filter(move |entry| *entry != 0 && entry & !SLOT == hash & !SLOT);
        held.map(|entry| (entry & SLOT) as usize - 1)
    }

    /// The worker in `slot` saw `hash` just now.
    pub fn remember(&self, hash: u64, slot: usize) {
        // Slots count workers since the start of the process; so many there never are.
        let Some(slot) = u64::try_from(slot + 1).ok().filter(|slot| *slot <= SLOT) else { return };
        let sets = self.0.get_or_init(|| (0..SETS).map(|_| Set::default()).collect());
        let mut carried = (hash & !SLOT) | slot;
        let newest = carried;
        for entry in &sets[place(hash)].0 {
            let older = entry.load(Ordering::Relaxed);
            if older != carried {
                entry.store(carried, Ordering::Relaxed);
            }
            if older == newest || older == 0 {
                return;
            }
            carried = older;
        }
    }
}

/// By the low bits, which an entry does not keep.
fn place(hash: u64) -> usize {
    hash as usize % SETS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distinct hashes of one set.
    fn hash(number: u64) -> u64 {
        (number << SLOT_BITS) | 5
    }

    fn holders(seen: &Seen, hash: u64) -> Vec<usize> {
        seen.holders(hash).collect()
    }

    #[test]
    fn the_latest_holder_comes_first_and_nothing_is_kept_twice() {
        let seen = Seen::default();
        assert!(holders(&seen, hash(1)).is_empty());
        for slot in [3, 4, 3, 0, 4] {
            seen.remember(hash(1), slot);
        }
        assert_eq!(holders(&seen, hash(1)), [4, 0, 3]);
        assert!(holders(&seen, hash(2)).is_empty());
    }

    #[test]
    fn what_was_not_used_for_longest_is_forgotten_first() {
        let seen = Seen::default();
        for number in 1..=8 {
            seen.remember(hash(number), 0);
        }
        seen.remember(hash(1), 0);
        seen.remember(hash(9), 0);
        let kept: Vec<u64> = (1..=9).filter(|n| !holders(&seen, hash(*n)).is_empty()).collect();
        assert_eq!(kept, [1, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn memory_is_bounded_whatever_is_remembered() {
        let seen = Seen::default();
        for number in 0..2_000_000u64 {
            seen.remember(number.wrapping_mul(0x9E37_79B9_7F4A_7C15), 1);
        }
        let sets = seen.0.get().unwrap();
        assert_eq!(size_of_val(&**sets), 4 << 20);
        let full = |set: &Set| set.0.iter().all(|entry| entry.load(Ordering::Relaxed) != 0);
        assert!(sets.iter().all(full), "old entries give way to new ones");
    }

    #[test]
    fn a_slot_beyond_what_an_entry_holds_is_not_remembered() {
        let seen = Seen::default();
        seen.remember(hash(1), usize::MAX - 1);
        seen.remember(hash(1), 1 << SLOT_BITS);
        assert!(holders(&seen, hash(1)).is_empty());
    }
}
