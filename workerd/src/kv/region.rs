//! Memory that a transport can register, of this host or of a device: one address, one length, one owner.
//!
//! Host memory is [`HostMemory`]. Memory of a device is what its back end offers as [`DeviceMemory`]: nothing here or
//! in the hand-over calls a driver, and no device address is ever followed by this process.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use baton_shared::kv::layout::KvLayout;

use super::host_memory::HostMemory;

/// Where a region's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In this host's memory.
    Host,
    /// In the memory of the CUDA device of that ordinal.
    Cuda(u32),
}

impl Place {
    /// The device's ordinal, as hand-over records have it: `None` = host memory.
    pub fn device(self) -> Option<u32> {
        match self {
            Self::Host => None,
            Self::Cuda(ordinal) => Some(ordinal),
        }
    }

    /// The place that a hand-over record names.
    pub fn of_device(device: Option<u32>) -> Self {
        device.map_or(Self::Host, Self::Cuda)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Cuda(ordinal) => write!(f, "device memory of cuda:{ordinal}"),
        }
    }
}

/// Memory of a device, as the back end that owns the device offers it. Freed when dropped.
///
/// Offsets are bytes from [`Self::base`] and were checked; errors are the driver's words. The copies may be called on
/// any thread and have ended when they return. They wait for no step of the back end, and no step for them: whoever
/// calls them sees to that.
pub trait DeviceMemory: Send + Sync + std::fmt::Debug {
    /// First byte, as the device addresses it.
    fn base(&self) -> u64;
    /// Length in bytes.
    fn bytes(&self) -> usize;
    /// Which device.
    fn ordinal(&self) -> u32;
    /// Makes the device's context current on the calling thread: whoever registers memory needs it.
    ///
    /// # Errors
    /// The driver's words.
    fn make_current(&self) -> Result<(), String>;
    /// Copies `into.len()` bytes from `offset` to the host.
    ///
    /// # Errors
    /// The driver's words.
    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String>;
    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// The driver's words.
    fn write(&self, offset: usize, from: &[u8]) -> Result<(), String>;
    /// Copies `len` bytes from offset `from` to offset `to`, which do not overlap.
    ///
    /// # Errors
    /// The driver's words.
    fn copy_within(&self, from: usize, to: usize, len: usize) -> Result<(), String>;
}

/// A range of memory that can be registered with a transport. Cloning shares it.
#[derive(Clone, Debug)]
pub enum Region {
    /// Memory of this host.
    Host(HostMemory),
    /// Memory of a device.
    Device(Arc<dyn DeviceMemory>),
}

impl Region {
    /// Zeroed host memory of at least `bytes` bytes.
    ///
    /// # Errors
    /// What the system says when there is not so much.
    pub fn host(bytes: usize) -> std::io::Result<Self> {
        HostMemory::zeroed(bytes).map(Self::Host)
    }

    /// Memory that a device's back end made.
    pub fn device(memory: Arc<dyn DeviceMemory>) -> Self {
        Self::Device(memory)
    }

    /// Where the bytes are.
    pub fn place(&self) -> Place {
        match self {
            Self::Host(_) => Place::Host,
            Self::Device(memory) => Place::Cuda(memory.ordinal()),
        }
    }

    /// Address of the first byte, of this process or of the device.
    pub fn base(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.base() as u64,
            Self::Device(memory) => memory.base(),
        }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Host(memory) => memory.bytes(),
            Self::Device(memory) => memory.bytes(),
        }
    }

    /// Makes the device's context current on the calling thread, where there is a device.
    ///
    /// # Errors
    /// The driver's words.
    pub fn make_current(&self) -> Result<(), String> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Device(memory) => memory.make_current(),
        }
    }

    /// Copies `into.len()` bytes from `offset`.
    ///
    /// # Errors
    /// The driver's words; never for host memory.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), String> {
        self.check(offset, into.len());
        match self {
            Self::Host(memory) => {
                memory.read(offset, into);
                Ok(())
            }
            Self::Device(memory) => memory.read(offset, into),
        }
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// The driver's words; never for host memory.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), String> {
        self.check(offset, from.len());
        match self {
            Self::Host(memory) => {
                memory.write(offset, from);
                Ok(())
            }
            Self::Device(memory) => memory.write(offset, from),
        }
    }

    /// Copies `len` bytes from offset `from` to offset `to`; the ranges do not overlap.
    ///
    /// # Errors
    /// The driver's words; never for host memory.
    ///
    /// # Panics
    /// If either range is not inside the region, or if they overlap.
    pub fn copy_within(&self, from: usize, to: usize, len: usize) -> Result<(), String> {
        self.check(from, len);
        self.check(to, len);
        assert!(from.abs_diff(to) >= len);
        match self {
            Self::Host(memory) => {
                memory.copy_within(from, to, len);
                Ok(())
            }
            Self::Device(memory) => memory.copy_within(from, to, len),
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes()));
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

/// A page of epoch words in host memory, one a lease slot. Only this process writes it; peers read it.
#[derive(Clone, Debug)]
pub struct EpochPage {
    memory: HostMemory,
    region: Region,
}

impl EpochPage {
    /// `slots` words. Each starts at random, so that no word says what one of an earlier start of this process said.
    ///
    /// # Errors
    /// As [`Region::host`].
    pub fn new(slots: usize) -> std::io::Result<Self> {
        let memory = HostMemory::zeroed(slots * 8)?;
        let page = Self { region: Region::Host(memory.clone()), memory };
        // Half of what a word holds is left to rise into.
        (0..page.slots()).for_each(|slot| {
            page.memory.word(slot).store(rand::random::<u64>() >> 1, Ordering::Release);
        });
        Ok(page)
    }

    /// What is registered.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Words.
    pub fn slots(&self) -> usize {
        self.memory.bytes() / 8
    }

    /// Address of a slot's word in this process.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn address(&self, slot: usize) -> u64 {
        assert!(slot < self.slots());
        self.region.base() + slot as u64 * 8
    }

    /// The word's value.
    pub fn value(&self, slot: usize) -> u64 {
        self.memory.word(slot).load(Ordering::Acquire)
    }

    /// Raises the word; whatever is written to the lease's blocks afterwards is seen after this.
    pub fn bump(&self, slot: usize) {
        self.memory.word(slot).fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::fake_device::FakeDevice;

    #[test]
    fn both_kinds_of_memory_are_read_written_and_copied() {
        for (region, place) in [
            (Region::host(4096).unwrap(), Place::Host),
            (FakeDevice::region(3, 4096), Place::Cuda(3)),
        ] {
            assert_eq!((region.place(), region.bytes()), (place, 4096));
            assert_eq!(Place::of_device(place.device()), place);
            let mut bytes = [1; 4];
            region.read(4092, &mut bytes).unwrap();
            assert_eq!(bytes, [0; 4]);
            region.write(4092, &[5, 6, 7, 8]).unwrap();
            region.copy_within(4092, 10, 4).unwrap();
            region.read(10, &mut bytes).unwrap();
            assert_eq!(bytes, [5, 6, 7, 8]);
        }
    }

    #[test]
    fn what_is_outside_never_reaches_the_driver() {
        let device = FakeDevice::new(0, 4096);
        device.fail();
        let region = Region::device(device);
        let outside = |access: &dyn Fn()| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).unwrap_err();
        };
        outside(&|| region.read(4093, &mut [0; 4]).unwrap_or_default());
        outside(&|| region.write(usize::MAX, &[0; 4]).unwrap_or_default());
        outside(&|| region.copy_within(0, 4093, 4).unwrap_or_default());
        outside(&|| region.copy_within(0, 3, 4).unwrap_or_default());
        assert_eq!(region.write(0, &[0; 4]).unwrap_err(), "the fake driver was told to fail");
    }
}
