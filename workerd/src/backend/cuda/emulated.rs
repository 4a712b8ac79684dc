//! A [`Gpu`] for tests: the same kernels, compiled for the host, on memory whose every access is checked
//! (`kernels/host/machine.hpp`).
//!
//! It is as lazy as a stream may be: what is asked for is done when somebody waits for it, so that host code which
//! touches memory too early reads poison or spoils what is still to be read. Limits of launches are those of a real
//! device, and any call, or any work in the stream, can be made to fail ([`Fault`]).
#![expect(unsafe_code, reason = "it stands for a device that is reached by addresses")]

mod build;
mod library;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::library::{Library, Machine};
use super::sys::kernel::{Args, Kernel, Shape};
use super::sys::{Facts, Gpu, GpuError, Handle, Product};

/// Shared memory of a block without asking for more.
const PLAIN_SHARED: u32 = 48 << 10;
/// Most shared memory of a block on any device that the kernels are for (compute capability 9.0).
const MOST_SHARED: u32 = 227 << 10;

/// What fails, once reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th call from now on (0 = the next) says that it failed, and does nothing.
    Call(u64),
    /// The n-th piece of work in the stream fails; every call from then on does: the context is lost.
    Work(u64),
}

/// What is still there: zero in all fields when everything was given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alive {
    /// Pieces of device memory.
    pub memory: u64,
    /// Pieces of pinned memory.
    pub pinned: usize,
    /// Events.
    pub events: usize,
    /// Graphs.
    pub graphs: usize,
}

/// A device with one lazy stream.
#[derive(Debug)]
pub struct Emulator {
    facts: Facts,
    has_blas: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    machine: Machine,
    /// Bytes of each piece of device memory.
    memory: HashMap<u64, usize>,
    pinned: HashMap<usize, Box<[u8]>>,
    stream: VecDeque<Work>,
    capture: Option<Vec<Work>>,
    graphs: HashMap<Handle, Vec<Work>>,
    /// Whether each event was reached.
    events: HashMap<Handle, bool>,
    next_handle: Handle,
    fault: Option<Fault>,
    calls: u64,
    lost: Option<GpuError>,
}

#[derive(Clone, Debug)]
enum Work {
    CopyIn { to: u64, from: *const u8, bytes: usize },
    CopyOut { to: *mut u8, from: u64, bytes: usize },
    CopyWithin { to: u64, from: u64, bytes: usize },
    Fill { to: u64, byte: u8, bytes: usize },
    Launch { kernel: Kernel, shape: Shape, args: Box<Args> },
    Multiply(Product),
    Record(Handle),
}

// SAFETY: pointers to pinned memory, which the callers of `Gpu`'s functions keep until the stream is done.
unsafe impl Send for State {}

impl Emulator {
    /// A device of so many bytes and multiprocessors.
    pub fn new(memory: u64, multiprocessors: u32, has_blas: bool) -> Arc<Self> {
        Self::with(Library::of_the_tree(), memory, multiprocessors, has_blas)
    }

    fn with(
        library: &'static Library,
        memory: u64,
        multiprocessors: u32,
        has_blas: bool,
    ) -> Arc<Self> {
        let facts = Facts {
            name: "emulated".to_owned(),
            ordinal: 0,
            capability: 80,
            multiprocessors,
            memory,
            driver: 12_040,
        };
        let state = State {
            machine: Machine::new(library),
            memory: HashMap::new(),
            pinned: HashMap::new(),
            stream: VecDeque::new(),
            capture: None,
            graphs: HashMap::new(),
            events: HashMap::new(),
            next_handle: 1,
            fault: None,
            calls: 0,
            lost: None,
        };
        Arc::new(Self { facts, has_blas, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for a call that may fail.
    fn call(&self, name: &'static str) -> Result<MutexGuard<'_, State>, GpuError> {
        let mut state = self.state();
        if let Some(lost) = &state.lost {
            return Err(lost.clone());
        }
        state.calls += 1;
        if let Some(Fault::Call(left)) = &mut state.fault {
            if *left == 0 {
                state.fault = None;
                return Err(GpuError::Call { call: name, reason: "made to fail".to_owned() });
            }
            *left -= 1;
        }
        Ok(state)
    }

    /// Threads and blocks in falling order: nothing may depend on it.
    pub fn run_backward(&self, backward: bool) {
        self.state().machine.set_mode(backward, true);
    }

    /// Something is to fail.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// Whether what was to fail has not failed yet.
    pub fn has_fault(&self) -> bool {
        self.state().fault.is_some()
    }

    /// How many calls were made that could fail.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// What was not given back.
    pub fn alive(&self) -> Alive {
        let mut state = self.state();
        Alive {
            memory: state.machine.allocations(),
            pinned: state.pinned.len(),
            events: state.events.len(),
            graphs: state.graphs.len(),
        }
    }

    /// How often the last kernel stored to a byte of a range: least and most.
    pub fn writes(&self, address: u64, bytes: usize) -> (u32, u32) {
        self.state().machine.writes(address, bytes)
    }
}

impl State {
    fn ask(&mut self, work: Work) {
        match &mut self.capture {
            Some(kept) => kept.push(work),
            None => self.stream.push_back(work),
        }
    }

    /// Does what was asked for, up to an event or all.
    fn run(&mut self, until: Option<Handle>) -> Result<(), GpuError> {
        while let Some(work) = self.stream.pop_front() {
            if let Some(Fault::Work(left)) = &mut self.fault {
                if *left == 0 {
                    self.fault = None;
                    let reason = "made to fail".to_owned();
                    return self.lose(GpuError::Call { call: "work", reason });
                }
                *left -= 1;
            }
            if let Err(error) = self.work(&work) {
                return self.lose(error);
            }
            if matches!(work, Work::Record(event) if Some(event) == until) {
                break;
            }
        }
        Ok(())
    }

    fn lose(&mut self, error: GpuError) -> Result<(), GpuError> {
        self.stream.clear();
        self.lost = Some(error.clone());
        Err(error)
    }

    fn work(&mut self, work: &Work) -> Result<(), GpuError> {
        let pointer = |address: u64| address as *mut u8;
        match *work {
            Work::CopyIn { to, from, bytes } => {
                self.check(to, bytes, true)?;
                // SAFETY: in living memory by the check, here and below; the caller keeps the host's side.
                unsafe { std::ptr::copy_nonoverlapping(from, pointer(to), bytes) };
            }
            Work::CopyOut { to, from, bytes } => {
                self.check(from, bytes, false)?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(pointer(from).cast_const(), to, bytes) };
            }
            Work::CopyWithin { to, from, bytes } => {
                self.check(from, bytes, false)?;
                self.check(to, bytes, true)?;
                // SAFETY: as above.
                unsafe { std::ptr::copy(pointer(from).cast_const(), pointer(to), bytes) };
            }
            Work::Fill { to, byte, bytes } => {
                self.check(to, bytes, true)?;
                // SAFETY: as above.
                unsafe { pointer(to).write_bytes(byte, bytes) };
            }
            Work::Launch { kernel, shape, ref args } => {
                let (mut pointers, count) = args.pointers();
                let pointers = &mut pointers[..count];
                let Shape { grid, threads, shared } = shape;
                // SAFETY: as many arguments as the kernel takes (`launch` checks), of its types (the caller's promise).
                unsafe { self.machine.launch(kernel.name, grid, threads, shared, pointers) }
                    .map_err(|reason| GpuError::Call { call: kernel.name, reason })?;
            }
            Work::Multiply(ref product) => self.multiply(product)?,
            Work::Record(event) => {
                if let Some(reached) = self.events.get_mut(&event) {
                    *reached = true;
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, address: u64, bytes: usize, written: bool) -> Result<(), GpuError> {
        if bytes == 0 || self.machine.holds(address, bytes, written) {
            return Ok(());
        }
        let reason = format!("{bytes} bytes at {address:#x} are not in one piece of memory");
        Err(GpuError::Call { call: "copy", reason })
    }

    /// What the vendor's library computes, column by column.
    fn multiply(&mut self, product: &Product) -> Result<(), GpuError> {
        let Product { weights, x, out, m, n, k, stride, wide, add } = *product;
        let [m, n, k, stride] = [m, n, k, stride].map(|number| number as usize);
        let size = if wide { 4 } else { 2 };
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.check(weights, n * k * 2, false)?;
        self.check(x, m * k * 2, false)?;
        self.check(out, ((m - 1) * stride + n) * size, false)?;
        let from_bf16 = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        for row in 0..m {
            self.check(out + (row * stride * size) as u64, n * size, true)?;
            for column in 0..n {
                // SAFETY: all in living memory by the checks above.
                unsafe {
                    let weights = (weights as *const u16).add(column * k);
                    let x = (x as *const u16).add(row * k);
                    let each = (0..k).map(|i| from_bf16(*x.add(i)) * from_bf16(*weights.add(i)));
                    let sum: f32 = each.sum();
                    let at = row * stride + column;
                    if wide {
                        let to = (out as *mut f32).add(at);
                        *to = if add { *to + sum } else { sum };
                    } else {
                        *(out as *mut u16).add(at) = half::bf16::from_f32(sum).to_bits();
                    }
                }
            }
        }
        Ok(())
    }
}

/// Why a device would refuse to launch that; `None` if it would not.
fn refusal(library: &Library, kernel: Kernel, shape: Shape, count: usize) -> Option<String> {
    let Some((most, parameters)) = library.kernel(kernel.name) else {
        return Some("there is no such kernel".to_owned());
    };
    let Shape { grid: [x, y, z], threads, shared } = shape;
    if count != parameters as usize {
        return Some(format!("{count} arguments, it takes {parameters}"));
    }
    if threads == 0 || threads > most {
        return Some(format!("{threads} threads a block, of at most {most}"));
    }
    if [x, y, z].contains(&0) || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
        return Some(format!("a grid of {x} x {y} x {z} blocks"));
    }
    if shared > PLAIN_SHARED && (shared > kernel.shared || shared > MOST_SHARED) {
        return Some(format!("{shared} bytes of shared memory, {} were asked for", kernel.shared));
    }
    None
}

impl Gpu for Emulator {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_memory(&self) -> Result<u64, GpuError> {
        let state = self.call("cuMemGetInfo")?;
        let used: usize = state.memory.values().sum();
        Ok(self.facts.memory - used as u64)
    }

    fn make_current(&self) -> Result<(), GpuError> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64, GpuError> {
        let mut state = self.call("cuMemAlloc")?;
        if state.capture.is_some() {
            let reason = "the stream is being captured".to_owned();
            return Err(GpuError::Call { call: "cuMemAlloc", reason });
        }
        let used: usize = state.memory.values().sum();
        let fits = used.checked_add(bytes).is_some_and(|all| all as u64 <= self.facts.memory);
        let address = if fits { state.machine.allocate(bytes) } else { 0 };
        if address == 0 {
            let reason = "out of memory".to_owned();
            return Err(GpuError::Call { call: "cuMemAlloc", reason });
        }
        state.memory.insert(address, bytes);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        let mut state = self.state();
        let _ = state.run(None);
        assert!(state.machine.free(address), "{address:#x} was not allocated");
        state.memory.remove(&address);
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        let mut state = self.call("cuMemHostAlloc")?;
        let mut memory = vec![0xff; bytes].into_boxed_slice();
        let base = memory.as_mut_ptr();
        state.pinned.insert(base as usize, memory);
        Ok(base)
    }

    unsafe fn free_host(&self, base: *mut u8) {
        let mut state = self.state();
        let _ = state.run(None);
        assert!(state.pinned.remove(&(base as usize)).is_some(), "{base:?} was not allocated");
    }

    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), GpuError> {
        self.call("cuMemcpyHtoDAsync")?.ask(Work::CopyIn { to, from, bytes });
        Ok(())
    }

    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.call("cuMemcpyDtoHAsync")?.ask(Work::CopyOut { to, from, bytes });
        Ok(())
    }

    unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.call("cuMemcpyDtoDAsync")?.ask(Work::CopyWithin { to, from, bytes });
        Ok(())
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), GpuError> {
        self.call("cuMemsetD8Async")?.ask(Work::Fill { to, byte, bytes });
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &Args) -> Result<(), GpuError> {
        let mut state = self.call(kernel.name)?;
        let (_, count) = args.pointers();
        if let Some(reason) = refusal(state.machine.library(), kernel, shape, count) {
            return Err(GpuError::Call { call: kernel.name, reason });
        }
        state.ask(Work::Launch { kernel, shape, args: Box::new(args.clone()) });
        Ok(())
    }

    fn has_blas(&self) -> bool {
        self.has_blas
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), GpuError> {
        self.call("cublasLtMatmul")?.ask(Work::Multiply(*product));
        Ok(())
    }

    fn create_event(&self) -> Result<Handle, GpuError> {
        let mut state = self.call("cuEventCreate")?;
        state.next_handle += 1;
        let event = state.next_handle;
        // Waiting for an event that was never recorded returns at once.
        state.events.insert(event, true);
        Ok(event)
    }

    fn record(&self, event: Handle) -> Result<(), GpuError> {
        let mut state = self.call("cuEventRecord")?;
        if state.capture.is_none() {
            state.events.insert(event, false);
        }
        state.ask(Work::Record(event));
        Ok(())
    }

    fn wait(&self, event: Handle) -> Result<(), GpuError> {
        let mut state = self.call("cuEventSynchronize")?;
        if state.events[&event] { Ok(()) } else { state.run(Some(event)) }
    }

    fn elapsed(&self, from: Handle, to: Handle) -> Result<f32, GpuError> {
        let state = self.call("cuEventElapsedTime")?;
        if state.events[&from] && state.events[&to] {
            return Ok(1.0);
        }
        let reason = "not ready".to_owned();
        Err(GpuError::Call { call: "cuEventElapsedTime", reason })
    }

    fn destroy_event(&self, event: Handle) {
        assert!(self.state().events.remove(&event).is_some(), "event {event} is there");
    }

    fn begin_capture(&self) -> Result<(), GpuError> {
        let mut state = self.call("cuStreamBeginCapture")?;
        assert!(state.capture.is_none(), "a capture is under way");
        state.capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Handle, GpuError> {
        // A capture ends even where ending it fails.
        let kept = self.state().capture.take().expect("a capture is under way");
        let mut state = self.call("cuStreamEndCapture")?;
        state.next_handle += 1;
        let graph = state.next_handle;
        state.graphs.insert(graph, kept);
        Ok(graph)
    }

    unsafe fn launch_graph(&self, graph: Handle) -> Result<(), GpuError> {
        let mut state = self.call("cuGraphLaunch")?;
        let kept = state.graphs[&graph].clone();
        kept.into_iter().for_each(|work| state.ask(work));
        Ok(())
    }

    fn destroy_graph(&self, graph: Handle) {
        assert!(self.state().graphs.remove(&graph).is_some(), "graph {graph} is there");
    }

    fn synchronise(&self) -> Result<(), GpuError> {
        let mut state = self.call("cuStreamSynchronize")?;
        if state.capture.is_some() {
            let reason = "the stream is being captured".to_owned();
            return Err(GpuError::Call { call: "cuStreamSynchronize", reason });
        }
        state.run(None)
    }
}
