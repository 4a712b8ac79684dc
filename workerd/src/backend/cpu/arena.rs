//! Memory for weights: many matrices in few mappings of huge pages, each at the start of a cache line.
//!
//! A token reads every weight once. Through pages of 4 KiB one core gets about half of what memory can give: the
//! processor fetches ahead within a page only. Nothing is given back before all of a mapping's pieces are gone.
#![expect(unsafe_code, reason = "pieces of one mapping that share no byte")]

use std::ops::{Deref, DerefMut};

use crate::kv::host_memory::HostMemory;

/// Bytes of a mapping, unless one piece is larger.
const MAPPING: usize = 32 << 20;
/// Bytes of a cache line: vectors then rarely lie across two.
const LINE: usize = 64;

/// Where pieces come from.
#[derive(Debug, Default)]
pub struct Arena {
    /// The newest mapping and how many of its bytes are taken.
    newest: Option<(HostMemory, usize)>,
}

/// Bytes of a mapping that no other piece has.
#[derive(Debug)]
pub struct Piece {
    mapping: HostMemory,
    start: usize,
    len: usize,
}

/// The system has not so much memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot get {bytes} bytes for weights")]
pub struct OutOfMemory {
    bytes: usize,
    source: std::io::Error,
}

impl Arena {
    /// `len` bytes, all zero.
    ///
    /// # Errors
    /// If there is not so much.
    pub fn take(&mut self, len: usize) -> Result<Piece, OutOfMemory> {
        let free = |(mapping, taken): &(HostMemory, usize)| mapping.bytes() - taken;
        if self.newest.as_ref().is_none_or(|newest| free(newest) < len) {
            let bytes = len.max(MAPPING);
            let mapping =
                HostMemory::zeroed(bytes).map_err(|source| OutOfMemory { bytes, source })?;
            self.newest = Some((mapping, 0));
        }
        let (mapping, taken) = self.newest.as_mut().expect("made above where there was none");
        let start = *taken;
        *taken = (start + len).next_multiple_of(LINE).min(mapping.bytes());
        Ok(Piece { mapping: mapping.clone(), start, len })
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `take` gave these bytes of the mapping, which `self` keeps, to this piece only and to no peer; all of
        // them were zeroed.
        unsafe { std::slice::from_raw_parts(self.mapping.base().add(self.start), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed as a whole.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.base().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_at_lines_are_zero_and_share_no_byte() {
        let mut arena = Arena::default();
        let lengths = [1, 0, 63, 64, 65, 1 << 20, MAPPING - (1 << 20), 100, MAPPING + 1, 7];
        let mut pieces = lengths.map(|len| arena.take(len).unwrap());
        for (number, piece) in (1..).zip(&mut pieces) {
            assert!(piece.as_ptr().addr().is_multiple_of(LINE));
            assert!(piece.iter().all(|byte| *byte == 0));
            piece.fill(number);
        }
        for ((number, piece), len) in (1..).zip(&pieces).zip(lengths) {
            assert!(piece.len() == len && piece.iter().all(|byte| *byte == number));
        }
    }
}
