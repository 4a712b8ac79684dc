//! The KV pool in device memory, as transports and tests see it.

use std::sync::Arc;

use super::sys::buffer::Buffer;
use super::sys::{Gpu, GpuError};
use crate::kv::region::DeviceMemory;

/// A pool's memory. Its copies go through the back end's stream, so they come after every step that was submitted.
#[derive(Debug)]
pub struct PoolMemory {
    buffer: Buffer,
}

impl PoolMemory {
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn new(gpu: &Arc<dyn Gpu>, bytes: usize) -> Result<Self, GpuError> {
        let buffer = Buffer::new(gpu, "the KV pool", bytes)?;
        buffer.fill(0)?;
        gpu.synchronise()?;
        Ok(Self { buffer })
    }

    /// The memory itself.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

fn said<T>(result: Result<T, GpuError>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

impl DeviceMemory for PoolMemory {
    fn base(&self) -> u64 {
        self.buffer.address()
    }

    fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    fn ordinal(&self) -> u32 {
        self.buffer.gpu().facts().ordinal
    }

    fn make_current(&self) -> Result<(), String> {
        said(self.buffer.gpu().make_current())
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String> {
        said(self.buffer.read(offset, into))
    }

    fn write(&self, offset: usize, from: &[u8]) -> Result<(), String> {
        said(self.buffer.write(offset, from))
    }

    fn copy_within(&self, from: usize, to: usize, len: usize) -> Result<(), String> {
        said(self.buffer.copy_within(from, to, len))?;
        said(self.buffer.gpu().synchronise())
    }
}
