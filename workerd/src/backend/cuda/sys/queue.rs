//! Owners of events and graphs.
#![expect(unsafe_code, reason = "a graph names memory by addresses")]

use std::sync::Arc;

use super::{Gpu, GpuError, Handle};

/// A place in the stream that can be waited for.
#[derive(Debug)]
pub struct Event {
    gpu: Arc<dyn Gpu>,
    handle: Handle,
}

impl Event {
    /// Not recorded yet: waiting for it returns at once.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(gpu: &Arc<dyn Gpu>) -> Result<Self, GpuError> {
        Ok(Self { handle: gpu.create_event()?, gpu: Arc::clone(gpu) })
    }

    /// Marks this place of the stream.
    ///
    /// # Errors
    /// What the device says.
    pub fn record(&self) -> Result<(), GpuError> {
        self.gpu.record(self.handle)
    }

    /// Waits for the place marked last.
    ///
    /// # Errors
    /// What the device says, of anything asked before.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.gpu.wait(self.handle)
    }

    /// Milliseconds from `earlier` to this; both were waited for.
    ///
    /// # Errors
    /// What the device says.
    pub fn since(&self, earlier: &Self) -> Result<f32, GpuError> {
        self.gpu.elapsed(earlier.handle, self.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.gpu.destroy_event(self.handle);
    }
}

/// Work that can be asked for again in one call.
#[derive(Debug)]
pub struct Graph {
    gpu: Arc<dyn Gpu>,
    handle: Handle,
}

impl Graph {
    /// Keeps what `work` asks for. Nothing of it is done now.
    ///
    /// # Errors
    /// What the device says, or `work`.
    pub fn capture(
        gpu: &Arc<dyn Gpu>,
        work: impl FnOnce() -> Result<(), GpuError>,
    ) -> Result<Self, GpuError> {
        gpu.begin_capture()?;
        let asked = work();
        // Capturing ends in any case, and what was kept is given back.
        let graph = gpu.end_capture().map(|handle| Self { gpu: Arc::clone(gpu), handle });
        asked.and(graph)
    }

    /// Does it, in the stream. The memory that `work` named must still be there: the caller keeps both together.
    ///
    /// # Errors
    /// What the device says.
    pub fn launch(&self) -> Result<(), GpuError> {
        // SAFETY: the back end holds its buffers as long as its graphs.
        unsafe { self.gpu.launch_graph(self.handle) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.destroy_graph(self.handle);
    }
}
