//! Host memory that peers read and write: only raw pointers and copies, never a `&mut [u8]` (a peer may write at any
//! time).
#![expect(unsafe_code, reason = "memory that peers read and write is reached by raw pointers only")]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of a huge page. Attention walks through blocks far apart: with small pages it waits for page tables.
const HUGE_PAGE: usize = 2 << 20;

/// A private mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping lives as long as the struct, and all access goes through raw pointers; who may touch which bytes when is decided by block states.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are what `mmap` gave, unmapped exactly once.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// A new anonymous private mapping at an address of the kernel's choice.
fn map(bytes: usize) -> std::io::Result<*mut u8> {
    // SAFETY: no memory that is in use is named.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(base.cast())
}

/// Page-aligned host memory, freed when the last clone of it is gone.
#[derive(Clone, Debug)]
pub struct HostMemory {
    mapping: Arc<Mapping>,
}

impl HostMemory {
    /// Zeroed memory of at least `bytes` bytes.
    ///
    /// # Errors
    /// What the system says when there is not so much.
    pub fn zeroed(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(4096);
        if bytes < HUGE_PAGE {
            return Ok(Self { mapping: Arc::new(Mapping { base: map(bytes)?, bytes }) });
        }
        // An aligned stretch out of a longer one; what lies before and behind it is given back.
        let longer = bytes.checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let start = map(longer)?;
        let before = start.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let base = start.wrapping_add(before);
        for (part, len) in [(start, before), (base.wrapping_add(bytes), HUGE_PAGE - before)] {
            if len > 0 {
                // SAFETY: whole pages of the mapping just made that nobody knows of.
                unsafe { libc::munmap(part.cast(), len) };
            }
        }
        // Only a wish: where there are no huge pages, small ones do.
        // SAFETY: the mapping just made, as long as it still is.
        unsafe { libc::madvise(base.cast(), bytes, libc::MADV_HUGEPAGE) };
        Ok(Self { mapping: Arc::new(Mapping { base, bytes }) })
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.mapping.base
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    /// Whether `len` bytes from `offset` are all inside.
    fn holds(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.bytes())
    }

    /// Copies `into.len()` bytes from `offset`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(self.holds(offset, into.len()));
        // SAFETY: in bounds by the assertion; `into` is ours alone.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset), into.as_mut_ptr(), into.len());
        };
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(self.holds(offset, from.len()));
        // SAFETY: in bounds by the assertion; `from` cannot overlap memory only reachable by raw pointers.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.base().add(offset), from.len());
        };
    }

    /// Copies `len` bytes from offset `from` to offset `to`; the ranges may overlap.
    ///
    /// # Panics
    /// If either range is not inside.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) {
        assert!(self.holds(from, len) && self.holds(to, len));
        // SAFETY: both in bounds by the assertion; `copy` allows overlap.
        unsafe { std::ptr::copy(self.base().add(from), self.base().add(to), len) };
    }

    /// Copies 16-bit elements, as stored, from `offset`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn read_elements(&self, offset: usize, into: &mut [u16]) {
        let len = size_of_val(into);
        assert!(self.holds(offset, len));
        // SAFETY: in bounds by the assertion; `into` is ours alone, `len` bytes long, and any bits are a `u16`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset), into.as_mut_ptr().cast(), len);
        };
    }

    /// Copies 16-bit elements to `offset`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn write_elements(&self, offset: usize, from: &[u16]) {
        let len = size_of_val(from);
        assert!(self.holds(offset, len));
        // SAFETY: in bounds by the assertion; `from` cannot overlap memory only reachable by raw pointers.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().cast(), self.base().add(offset), len);
        };
    }

    /// Has the processor fetch `len` bytes from `offset` while it does something else.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn prefetch(&self, offset: usize, len: usize) {
        assert!(self.holds(offset, len));
        #[cfg(target_arch = "x86_64")]
        for line in (offset..offset + len).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: in bounds by the assertion; nothing is read as far as the language is concerned.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.base().add(line).cast()) };
        }
    }

    /// The eight bytes of word number `index`, for memory that is used as nothing but such words.
    ///
    /// # Panics
    /// If there is no such word.
    pub(super) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes() / 8);
        // SAFETY: in bounds, 8-aligned (the base is a page's), lives as long as `self`; the caller accesses it as an
        // atomic only, as the doc comment demands.
        unsafe { AtomicU64::from_ptr(self.base().cast::<u64>().add(index)) }
    }
}
