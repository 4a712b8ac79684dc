//! Owners of device memory and of pinned host memory, and views of parts of them.
#![expect(unsafe_code, reason = "the device's memory is reached by addresses")]

use std::marker::PhantomData;
use std::sync::Arc;

use super::{Gpu, GpuError};

/// Device memory, freed when dropped.
#[derive(Debug)]
pub struct Buffer {
    gpu: Arc<dyn Gpu>,
    address: u64,
    bytes: usize,
}

/// A part of a [`Buffer`] that lives.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    address: u64,
    bytes: usize,
    buffer: PhantomData<&'a Buffer>,
}

impl Buffer {
    /// New memory with any content; `what` is for the error.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or what the device says.
    pub fn new(gpu: &Arc<dyn Gpu>, what: &str, bytes: usize) -> Result<Self, GpuError> {
        let bytes = bytes.max(16).next_multiple_of(16);
        let address = gpu.allocate(bytes).map_err(|error| match gpu.free_memory() {
            Ok(free) if free < bytes as u64 + (64 << 20) => GpuError::OutOfMemory {
                what: what.to_owned(),
                bytes: bytes as u64,
                free,
                total: gpu.facts().memory,
            },
            _ => error,
        })?;
        Ok(Self { gpu: Arc::clone(gpu), address, bytes })
    }

    /// New memory with this content.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(gpu: &Arc<dyn Gpu>, what: &str, content: &[u8]) -> Result<Self, GpuError> {
        let buffer = Self::new(gpu, what, content.len())?;
        buffer.write(0, content)?;
        Ok(buffer)
    }

    /// All of it.
    pub fn view(&self) -> View<'_> {
        View { address: self.address, bytes: self.bytes, buffer: PhantomData }
    }

    /// First byte's address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whose memory it is.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    /// Puts bytes at an offset and waits for it.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), GpuError> {
        let to = self.view().part(offset, from.len()).address;
        // SAFETY: inside by `part`; `from` lives until the stream is done.
        unsafe { self.gpu.copy_in(to, from.as_ptr(), from.len())? };
        self.gpu.synchronise()
    }

    /// Gets bytes from an offset.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), GpuError> {
        let from = self.view().part(offset, into.len()).address;
        // SAFETY: inside by `part`; `into` lives, and is touched by nobody else, until the stream is done.
        unsafe { self.gpu.copy_out(into.as_mut_ptr(), from, into.len())? };
        self.gpu.synchronise()
    }

    /// Sets all bytes, in the stream.
    ///
    /// # Errors
    /// What the device says.
    pub fn fill(&self, byte: u8) -> Result<(), GpuError> {
        // SAFETY: all of living memory; freeing it waits for the stream.
        unsafe { self.gpu.fill(self.address, byte, self.bytes) }
    }

    /// Copies `bytes` from one offset to another that does not overlap, in the stream.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If a range is not inside, or they overlap.
    pub fn copy_within(&self, from: usize, to: usize, bytes: usize) -> Result<(), GpuError> {
        assert!(from.abs_diff(to) >= bytes, "the ranges overlap");
        let (from, to) = (self.view().part(from, bytes), self.view().part(to, bytes));
        // SAFETY: both inside living memory and apart by the assertions.
        unsafe { self.gpu.copy_within(to.address, from.address, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `allocate`, freed once; freeing waits for the device.
        unsafe { self.gpu.free(self.address) };
    }
}

impl<'a> View<'a> {
    /// `bytes` from `offset` on.
    ///
    /// # Panics
    /// If that is not inside.
    pub fn part(self, offset: usize, bytes: usize) -> View<'a> {
        let is_inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(is_inside, "{bytes} bytes at {offset} of {}", self.bytes);
        View { address: self.address + offset as u64, bytes, buffer: PhantomData }
    }

    /// First byte's address.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(self) -> usize {
        self.bytes
    }
}

/// Pinned host memory, freed when dropped. The device may be writing or reading it: who waits for what is the owner's
/// business ([`super::queue`]).
#[derive(Debug)]
pub struct Pinned {
    gpu: Arc<dyn Gpu>,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: memory of the process, reached through this owner only.
unsafe impl Send for Pinned {}
// SAFETY: as above: shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// New zeroed memory.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(gpu: &Arc<dyn Gpu>, bytes: usize) -> Result<Self, GpuError> {
        let bytes = bytes.max(16);
        let base = gpu.allocate_host(bytes)?;
        // SAFETY: just allocated, so many bytes.
        unsafe { base.write_bytes(0, bytes) };
        Ok(Self { gpu: Arc::clone(gpu), base, bytes })
    }

    /// Its bytes; the device is not writing them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: so many initialised bytes; writers hold `&mut self` or were waited for.
        unsafe { std::slice::from_raw_parts(self.base, self.bytes) }
    }

    /// Its bytes; the device is not using them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.bytes) }
    }

    /// The first `bytes` to a view, in the stream.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If either has not so many.
    pub fn copy_to(&self, to: View<'_>, bytes: usize) -> Result<(), GpuError> {
        assert!(bytes <= self.bytes, "{bytes} of {}", self.bytes);
        // SAFETY: so many bytes on both sides; both are kept until the stream is done, by the owner of this memory.
        unsafe { self.gpu.copy_in(to.part(0, bytes).address, self.base, bytes) }
    }

    /// A view's bytes to `offset`, in the stream.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If there is not so much room.
    pub fn copy_from(&mut self, offset: usize, from: View<'_>) -> Result<(), GpuError> {
        assert!(offset + from.bytes <= self.bytes, "{} at {offset} of {}", from.bytes, self.bytes);
        // SAFETY: inside by the assertion; read only after the stream is waited for.
        unsafe { self.gpu.copy_out(self.base.add(offset), from.address, from.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: from `allocate_host`, freed once; nothing may be under way once the stream is done.
        unsafe {
            let _ = self.gpu.synchronise();
            self.gpu.free_host(self.base);
        }
    }
}
