//! The border to the device: what the back end needs of a GPU ([`Gpu`]), and safe owners over it.
//!
//! [`driver`] is the real one; tests have one that runs the same kernels on the host. [`buffer`] owns memory, [`launch`]
//! has one checked function a kernel. All work of one [`Gpu`] is in one stream: what was asked first is done first.

pub mod blas;
pub mod buffer;
pub mod driver;
pub mod kernel;
pub mod launch;
pub mod nvml;
pub mod products;
pub mod queue;

use std::fmt::Debug;

use self::kernel::{Args, Kernel, Shape};

/// Why a GPU did not do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is none, or not the one asked for.
    #[error("no CUDA device: {0}")]
    Unavailable(String),
    /// Not so much memory.
    #[error("out of device memory: {what} needs {bytes} bytes, {free} of {total} are free")]
    OutOfMemory {
        /// For what.
        what: String,
        /// Bytes wanted.
        bytes: u64,
        /// Bytes free.
        free: u64,
        /// Bytes there are.
        total: u64,
    },
    /// A call failed.
    #[error("{call}: {reason}")]
    Call {
        /// Which.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As the vendor calls it.
    pub name: String,
    /// Its number among those visible.
    pub ordinal: u32,
    /// Compute capability: 90 = 9.0.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Newest CUDA version the driver knows: 12040 = 12.4.
    pub driver: u32,
}

/// Names an event, a graph of one [`Gpu`].
pub type Handle = u64;

/// A product `out[m][stride] (+)= x[m][k] w[n][k]^T` of bf16 in the vendor's library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Address of the weights.
    pub weights: u64,
    /// Address of the rows.
    pub x: u64,
    /// Address of the results.
    pub out: u64,
    /// Rows.
    pub m: u32,
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
    /// Elements between results of two rows.
    pub stride: u32,
    /// Results are f32; else bf16.
    pub wide: bool,
    /// They are added to what is there.
    pub add: bool,
}

/// One device with one stream. Addresses are the device's unless they are pointers.
///
/// # Safety
/// The unsafe functions take addresses: all of them must be of living memory of this device (or, as pointers, of pinned
/// host memory), and stay so until the stream has done what was asked.
#[expect(unsafe_code, reason = "its functions take addresses")]
pub trait Gpu: Send + Sync + Debug {
    /// What it is.
    fn facts(&self) -> &Facts;
    /// Bytes of memory that are free.
    fn free_memory(&self) -> Result<u64, GpuError>;
    /// Makes its context the calling thread's.
    fn make_current(&self) -> Result<(), GpuError>;

    /// Device memory, aligned to 256 bytes at least.
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError>;
    /// Gives it back. Waits for the device.
    ///
    /// # Safety
    /// It came from [`Self::allocate`] and is used no more.
    unsafe fn free(&self, address: u64);
    /// Pinned host memory.
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError>;
    /// Gives it back.
    ///
    /// # Safety
    /// It came from [`Self::allocate_host`] and is used no more.
    unsafe fn free_host(&self, base: *mut u8);

    /// Host to device, in the stream.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), GpuError>;
    /// Device to host, in the stream.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), GpuError>;
    /// Within the device, in the stream; the ranges do not overlap.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError>;
    /// Sets bytes, in the stream.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), GpuError>;
    /// Starts a kernel, in the stream.
    ///
    /// # Safety
    /// The arguments are what the kernel takes, and it touches nothing but what they name.
    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &Args) -> Result<(), GpuError>;
    /// Whether [`Self::multiply`] can be had.
    fn has_blas(&self) -> bool;
    /// A product by the vendor's library, in the stream.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn multiply(&self, product: &Product) -> Result<(), GpuError>;

    /// A new event.
    fn create_event(&self) -> Result<Handle, GpuError>;
    /// Marks this place of the stream.
    fn record(&self, event: Handle) -> Result<(), GpuError>;
    /// Waits until the stream has passed the place marked last. An error of any earlier work comes out here.
    fn wait(&self, event: Handle) -> Result<(), GpuError>;
    /// Milliseconds from one marked place to another; both were waited for.
    fn elapsed(&self, from: Handle, to: Handle) -> Result<f32, GpuError>;
    /// Ends an event.
    fn destroy_event(&self, event: Handle);

    /// Whatever is asked from now on is kept instead of done.
    fn begin_capture(&self) -> Result<(), GpuError>;
    /// What was kept, as a graph.
    fn end_capture(&self) -> Result<Handle, GpuError>;
    /// Does what a graph keeps, in the stream.
    ///
    /// # Safety
    /// All memory it names lives.
    unsafe fn launch_graph(&self, graph: Handle) -> Result<(), GpuError>;
    /// Ends a graph.
    fn destroy_graph(&self, graph: Handle);
    /// Waits for all that was asked.
    fn synchronise(&self) -> Result<(), GpuError>;
}
