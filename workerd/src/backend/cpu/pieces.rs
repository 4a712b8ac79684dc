//! How a buffer falls into pieces that no two threads share: runs of a slice here, rectangles of matrices in [`grid`].
#![expect(unsafe_code, reason = "disjoint pieces of one buffer are handed to several threads")]

pub mod grid;

use std::marker::PhantomData;

/// Work that falls into pieces, no two of which share memory.
///
/// # Safety
/// Pieces of different indices below `count` share no memory that either can write.
pub unsafe trait Pieces: Sync {
    /// What one piece is.
    type Piece;

    /// Pieces there are.
    fn count(&self) -> usize;

    /// Where the pieces end that `thread` of `threads` begins with, so that it goes through memory in order. They ascend;
    /// the last thread's end with all pieces.
    fn share_end(&self, thread: usize, threads: usize) -> usize {
        self.count() * (thread + 1) / threads
    }

    /// How many pieces at the end of a share are so small that others do not help with them: to take one of a thread that
    /// is at it costs some 1 µs.
    fn kept(&self) -> usize {
        0
    }

    /// A piece.
    ///
    /// # Safety
    /// `index < count()`, and each index is asked for once in the life of `self`.
    unsafe fn piece(&self, index: usize) -> Self::Piece;
}

/// Pieces without memory of their own.
#[derive(Clone, Copy, Debug)]
pub struct Count(pub usize);

// SAFETY: no memory at all.
unsafe impl Pieces for Count {
    type Piece = ();

    fn count(&self) -> usize {
        self.0
    }

    unsafe fn piece(&self, _index: usize) {}
}

/// A slice cut into runs.
#[derive(Debug)]
pub struct Split<'a, T> {
    base: *mut T,
    cuts: Cuts<'a>,
    owner: PhantomData<&'a mut [T]>,
}

#[derive(Clone, Copy, Debug)]
enum Cuts<'a> {
    Even { len: usize, piece: usize },
    At { ends: &'a [usize], unit: usize },
}

// SAFETY: a `Split` gives out disjoint `&mut [T]`, each once: as sending those.
unsafe impl<T: Send> Sync for Split<'_, T> {}

impl<'a, T> Split<'a, T> {
    /// Runs of `piece` elements, the last one perhaps shorter.
    ///
    /// # Panics
    /// If `piece` is 0.
    pub fn even(slice: &'a mut [T], piece: usize) -> Self {
        assert!(piece > 0);
        let cuts = Cuts::Even { len: slice.len(), piece };
        Self { base: slice.as_mut_ptr(), cuts, owner: PhantomData }
    }

    /// Runs that end at `ends` times `unit` elements; the first begins at 0.
    ///
    /// # Panics
    /// If the ends do not ascend or pass the slice's end.
    pub fn at(slice: &'a mut [T], ends: &'a [usize], unit: usize) -> Self {
        assert_ascending(ends, unit, slice.len());
        Self { base: slice.as_mut_ptr(), cuts: Cuts::At { ends, unit }, owner: PhantomData }
    }
}

// SAFETY: runs `start..end` of one slice with ascending ends; the slice is borrowed for `'a`.
unsafe impl<'a, T: Send> Pieces for Split<'a, T> {
    type Piece = &'a mut [T];

    fn count(&self) -> usize {
        match self.cuts {
            Cuts::Even { len, piece } => len.div_ceil(piece),
            Cuts::At { ends, .. } => ends.len(),
        }
    }

    unsafe fn piece(&self, index: usize) -> &'a mut [T] {
        let (start, end) = match self.cuts {
            Cuts::Even { len, piece } => (index * piece, ((index + 1) * piece).min(len)),
            Cuts::At { ends, unit } => (start_of(ends, index) * unit, ends[index] * unit),
        };
        // SAFETY: `start <= end <= len` by the checks at construction; no other piece has these elements.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), end - start) }
    }
}

/// Two buffers cut alike.
// SAFETY: the pieces of each share nothing, and two `&mut` buffers share nothing with each other.
unsafe impl<A: Pieces, B: Pieces> Pieces for (A, B) {
    type Piece = (A::Piece, B::Piece);

    fn count(&self) -> usize {
        assert_eq!(self.0.count(), self.1.count(), "two buffers cut alike");
        self.0.count()
    }

    unsafe fn piece(&self, index: usize) -> Self::Piece {
        // SAFETY: the caller's promise, passed on; both have as many pieces.
        unsafe { (self.0.piece(index), self.1.piece(index)) }
    }
}

/// One's pieces, then the other's.
#[derive(Debug)]
pub struct Chain<A, B>(pub A, pub B);

/// A piece of a [`Chain`].
#[derive(Debug)]
pub enum Either<A, B> {
    /// Of the first.
    First(A),
    /// Of the second.
    Second(B),
}

// SAFETY: the pieces of each share nothing, and the two own what they cut.
unsafe impl<A: Pieces, B: Pieces> Pieces for Chain<A, B> {
    type Piece = Either<A::Piece, B::Piece>;

    fn count(&self) -> usize {
        self.0.count() + self.1.count()
    }

    unsafe fn piece(&self, index: usize) -> Self::Piece {
        match index.checked_sub(self.0.count()) {
            // SAFETY: the caller's promise, passed on.
            None => Either::First(unsafe { self.0.piece(index) }),
            // SAFETY: as above; `index` is below the sum of both counts.
            Some(index) => Either::Second(unsafe { self.1.piece(index) }),
        }
    }
}

fn start_of(ends: &[usize], index: usize) -> usize {
    match index.checked_sub(1) {
        Some(before) => ends[before],
        None => 0,
    }
}

fn assert_ascending(ends: &[usize], unit: usize, len: usize) {
    assert!(ends.is_sorted(), "pieces end in order");
    let last = ends.last().copied().unwrap_or(0);
    assert!(last.checked_mul(unit).is_some_and(|end| end <= len), "pieces lie in the buffer");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "pieces lie in the buffer")]
    fn pieces_beyond_the_buffer_are_refused() {
        let _ = Split::at(&mut [0_u8; 10], &[1, 4], 3);
    }
}
