//! Memory of a device that is not there, for tests: its bytes are in host memory, at other addresses than it says.
//! Whoever follows such an address as the host's dies of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use super::host_memory::HostMemory;
use super::region::{DeviceMemory, Region};

/// No process has memory here.
static NEXT_BASE: AtomicU64 = AtomicU64::new(1 << 60);

/// See the module.
#[derive(Debug)]
pub struct FakeDevice {
    memory: HostMemory,
    base: u64,
    ordinal: u32,
    is_broken: AtomicBool,
    /// Threads on which its context was made current.
    threads: Mutex<Vec<ThreadId>>,
}

impl FakeDevice {
    /// Zeroed memory, whose driver works.
    pub fn new(ordinal: u32, bytes: usize) -> Arc<Self> {
        let memory = HostMemory::zeroed(bytes).unwrap();
        let base = NEXT_BASE.fetch_add(memory.bytes() as u64 + 4096, Ordering::Relaxed);
        let (is_broken, threads) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        Arc::new(Self { memory, base, ordinal, is_broken, threads })
    }

    /// The same as a region.
    pub fn region(ordinal: u32, bytes: usize) -> Region {
        Region::device(Self::new(ordinal, bytes))
    }

    /// Its driver fails from now on.
    pub fn fail(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    /// Whether its context is current on this thread.
    pub fn is_current(&self) -> bool {
        self.threads.lock().unwrap().contains(&std::thread::current().id())
    }

    fn works(&self) -> Result<(), String> {
        let is_broken = self.is_broken.load(Ordering::Relaxed);
        if is_broken { Err("the fake driver was told to fail".to_owned()) } else { Ok(()) }
    }
}

impl DeviceMemory for FakeDevice {
    fn base(&self) -> u64 {
        self.base
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn ordinal(&self) -> u32 {
        self.ordinal
    }

    fn make_current(&self) -> Result<(), String> {
        self.works()?;
        self.threads.lock().unwrap().push(std::thread::current().id());
        Ok(())
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String> {
        self.works().map(|()| self.memory.read(offset, into))
    }

    fn write(&self, offset: usize, from: &[u8]) -> Result<(), String> {
        self.works().map(|()| self.memory.write(offset, from))
    }

    fn copy_within(&self, from: usize, to: usize, len: usize) -> Result<(), String> {
        self.works().map(|()| self.memory.copy_within(from, to, len))
    }
}
