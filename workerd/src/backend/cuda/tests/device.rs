//! What the tests run on: an emulated device, or, for those that are asked for by name, this machine's GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use super::super::emulated::{Alive, Emulator};
use super::super::sys::Gpu;
use super::super::sys::buffer::Buffer;
use super::super::sys::driver::{self, Features};

/// By whether kernels overlap, and whether it has the vendor's library.
type Opened = HashMap<(bool, bool), Arc<dyn Gpu>>;

thread_local! {
    /// The GPU, opened once in each way, as compiling the kernels takes a while. `None`: tests that this thread calls run
    /// on an emulated device.
    static OPENED: RefCell<Option<Opened>> = const { RefCell::new(None) };
}

/// Poison, as memory of the emulator has it.
const POISON: u8 = 0xff;

/// A device.
pub struct Device {
    /// As the back end knows it.
    pub gpu: Arc<dyn Gpu>,
    emulator: Option<Arc<Emulator>>,
}

/// Runs tests of the emulated device on this machine's GPU.
pub fn on_the_gpu(tests: &[fn()]) {
    assert_ne!(driver::count().unwrap(), 0, "no GPU is visible");
    OPENED.set(Some(HashMap::new()));
    tests.iter().for_each(|test| test());
    OPENED.set(None);
}

impl Device {
    /// Its threads run in rising or in falling order, and it has the vendor's library or not: on a GPU, as it comes.
    pub fn new(backward: bool, has_blas: bool) -> Self {
        let features = Features { blas: has_blas, overlap: !backward };
        let open = || driver::open(0, features).unwrap();
        let gpu = OPENED.with_borrow_mut(|opened| {
            let opened = opened.as_mut()?;
            Some(Arc::clone(opened.entry((!backward, has_blas)).or_insert_with(open)))
        });
        if let Some(gpu) = gpu {
            return Self { gpu, emulator: None };
        }
        let emulator = Emulator::new(256 << 20, 3, has_blas);
        emulator.run_backward(backward);
        let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
        Self { gpu, emulator: Some(emulator) }
    }

    /// Of the numbers that memory is filled with: fresh ones on a GPU.
    pub fn seed(&self) -> u64 {
        if self.emulator.is_some() {
            return 5;
        }
        let seed = rand::random();
        println!("seed {seed}");
        seed
    }

    /// Poisoned memory.
    pub fn empty(&self, bytes: usize) -> Buffer {
        let buffer = Buffer::new(&self.gpu, "a test", bytes).unwrap();
        if self.emulator.is_none() {
            buffer.fill(POISON).unwrap();
        }
        buffer
    }

    /// The last kernel wrote each of these bytes so often; on a GPU, which does not count, those of no time are still
    /// poison.
    pub fn assert_writes(&self, buffer: &Buffer, range: (usize, usize), times: u32) {
        self.gpu.synchronise().unwrap();
        let (offset, bytes) = range;
        match &self.emulator {
            Some(emulator) => {
                let writes = emulator.writes(buffer.address() + offset as u64, bytes);
                assert_eq!(writes, (times, times), "{bytes} bytes at {offset}");
            }
            None if times == 0 => {
                let mut read = vec![0; bytes];
                buffer.read(offset, &mut read).unwrap();
                assert!(read.iter().all(|byte| *byte == POISON), "{bytes} bytes at {offset}");
            }
            None => (),
        }
    }

    /// The elements of `size` bytes that the last kernel wrote, each of them once.
    pub fn written(&self, buffer: &Buffer, size: usize) -> Vec<usize> {
        self.gpu.synchronise().unwrap();
        let mut read = vec![0; buffer.bytes()];
        buffer.read(0, &mut read).unwrap();
        let is_written = |at: &usize| match &self.emulator {
            Some(emulator) => {
                let writes = emulator.writes(buffer.address() + (at * size) as u64, size);
                assert!(writes == (0, 0) || writes == (1, 1), "element {at}: {writes:?}");
                writes.0 > 0
            }
            None => read[at * size..][..size].iter().any(|byte| *byte != POISON),
        };
        (0..buffer.bytes() / size).filter(is_written).collect()
    }

    /// Everything was given back.
    pub fn assert_nothing_is_left(&self) {
        if let Some(emulator) = &self.emulator {
            assert_eq!(emulator.alive(), Alive::default());
        }
    }
}
