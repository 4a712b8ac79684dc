//! Memory that peers read and write: only raw pointers and copies, never a `&mut [u8]` (a peer may write at any time).
#![expect(unsafe_code, reason = "memory that peers read and write is reached by raw pointers only")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use baton_shared::kv::layout::KvLayout;

/// Bytes of a huge page. Attention walks through blocks far apart: with small pages it waits for page tables.
const HUGE_PAGE: usize = 2 << 20;

/// A page-aligned, zeroed private mapping of host memory, unmapped when the last [`Region`] of it is gone.
#[derive(Debug)]
struct HostMemory {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping lives as long as the struct, and all access goes through raw pointers; who may touch which bytes when is decided by block states.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl Drop for HostMemory {
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

/// A range of memory that can be registered with a transport. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Region {
    memory: Arc<HostMemory>,
}

impl Region {
    /// Zeroed host memory of at least `bytes` bytes.
    ///
    /// # Errors
    /// What the system says when there is not so much.
    pub fn host(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(4096);
        if bytes < HUGE_PAGE {
            return Ok(Self { memory: Arc::new(HostMemory { base: map(bytes)?, bytes }) });
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
        Ok(Self { memory: Arc::new(HostMemory { base, bytes }) })
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.memory.base
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// Copies `into.len()` bytes from `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset.checked_add(into.len()).is_some_and(|end| end <= self.bytes()));
        // SAFETY: in bounds by the assertion; `into` is ours alone.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset), into.as_mut_ptr(), into.len())
        };
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.bytes()));
        // SAFETY: in bounds by the assertion; `from` cannot overlap memory only reachable by raw pointers.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.base().add(offset), from.len())
        };
    }
}

impl Region {
    /// Copies `len` bytes from offset `from` to offset `to`; the ranges may overlap.
    ///
    /// # Panics
    /// If either range is not inside the region.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.bytes()));
        assert!(to.checked_add(len).is_some_and(|end| end <= self.bytes()));
        // SAFETY: both in bounds by the assertions; `copy` allows overlap.
        unsafe { std::ptr::copy(self.base().add(from), self.base().add(to), len) };
    }

    /// Copies 16-bit elements, as stored, from `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn read_elements(&self, offset: usize, into: &mut [u16]) {
        let len = size_of_val(into);
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes()));
        // SAFETY: in bounds by the assertion; `into` is ours alone, `len` bytes long, and any bits are a `u16`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset), into.as_mut_ptr().cast(), len);
        };
    }

    /// Has the processor fetch `len` bytes from `offset` while it does something else.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn prefetch(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes()));
        #[cfg(target_arch = "x86_64")]
        for line in (offset..offset + len).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: in bounds by the assertion; nothing is read as far as the language is concerned.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.base().add(line).cast()) };
        }
    }

    /// Copies 16-bit elements to `offset`.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn write_elements(&self, offset: usize, from: &[u16]) {
        let len = size_of_val(from);
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes()));
        // SAFETY: in bounds by the assertion; `from` cannot overlap memory only reachable by raw pointers.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().cast(), self.base().add(offset), len)
        };
    }
}

/// The KV pool: memory and how it lies.
#[derive(Clone, Debug)]
pub struct KvRegion {
    /// The memory.
    pub region: Region,
    /// How it lies.
    pub layout: KvLayout,
}

/// A page of epoch words, one a lease slot. Only this process writes it; peers read it.
#[derive(Clone, Debug)]
pub struct EpochPage {
    region: Region,
}

impl EpochPage {
    /// `slots` words. Each starts at random, so that no word says what one of an earlier start of this process said.
    ///
    /// # Errors
    /// As [`Region::host`].
    pub fn new(slots: usize) -> std::io::Result<Self> {
        let page = Self { region: Region::host(slots * 8)? };
        // Half of what a word holds is left to rise into.
        (0..page.slots())
            .for_each(|slot| page.word(slot).store(rand::random::<u64>() >> 1, Ordering::Release));
        Ok(page)
    }

    /// What is registered.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Words.
    pub fn slots(&self) -> usize {
        self.region.bytes() / 8
    }

    /// Address of a slot's word in this process.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn address(&self, slot: usize) -> u64 {
        assert!(slot < self.slots());
        self.region.base() as u64 + slot as u64 * 8
    }

    /// The word's value.
    pub fn value(&self, slot: usize) -> u64 {
        self.word(slot).load(Ordering::Acquire)
    }

    /// Raises the word; whatever is written to the lease's blocks afterwards is seen after this.
    pub fn bump(&self, slot: usize) {
        self.word(slot).fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    fn word(&self, slot: usize) -> &AtomicU64 {
        assert!(slot < self.slots());
        // SAFETY: in bounds, 8-aligned (page base), lives as long as `self`, and only accessed as an atomic here.
        unsafe { AtomicU64::from_ptr(self.region.base().cast::<u64>().add(slot)) }
    }
}
