//! The real device, through the CUDA driver's library, which is loaded when it is asked for.
//!
//! The bindings panic where the library is missing, so [`open`] asks for it first. Kernels are the PTX of the tree, which
//! the driver compiles for its device. Nothing is allocated or freed by stream: pools are registered with transports.
#![expect(unsafe_code, reason = "the CUDA driver is a C library")]

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::blas::{Blas, WORKSPACE};
use super::kernel::{Args, Kernel, SOURCES, Shape};
use super::{Facts, Gpu, GpuError, Handle, Product};

/// Below this the kernels do not run.
const OLDEST: u32 = 80;
/// Exactly here kernels say when they depend on the one before.
const OVERLAPS: u32 = 90;

/// A device with its primary context, one stream and all kernels.
#[derive(Debug)]
struct Driver {
    facts: Facts,
    overlap: bool,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// By [`Kernel::index`].
    functions: Vec<sys::CUfunction>,
    blas: Option<(Blas, u64)>,
}

// SAFETY: the driver's objects may be used by any thread that has the context current, which every call below sees to.
unsafe impl Send for Driver {}
// SAFETY: as above; the stream orders what threads ask for.
unsafe impl Sync for Driver {}

fn failed(call: &'static str) -> impl Fn(DriverError) -> GpuError {
    move |error| GpuError::Call {
        call,
        reason: error.error_string().map_or_else(
            |_| format!("{:?}", error.0),
            |text| format!("{} ({:?})", text.to_string_lossy(), error.0),
        ),
    }
}

/// How many devices can be used.
///
/// # Errors
/// [`GpuError::Unavailable`], with the reason.
pub fn count() -> Result<u32, GpuError> {
    // SAFETY: opens the driver's library if there is one; nothing is called.
    if !unsafe { sys::is_culib_present() } {
        let reason = "the NVIDIA driver's library libcuda.so.1 is not on this machine";
        return Err(GpuError::Unavailable(reason.to_owned()));
    }
    let unavailable = |error: DriverError| match failed("cuInit")(error) {
        GpuError::Call { reason, .. } => GpuError::Unavailable(reason),
        other => other,
    };
    result::init().map_err(unavailable)?;
    let count = result::device::get_count().map_err(unavailable)?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// What of a device is used.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// The vendor's matrix library, if it is there.
    pub blas: bool,
    /// Kernels start before the one before them has ended, where the device can do that.
    pub overlap: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self { blas: true, overlap: true }
    }
}

/// The device of that number among those visible (`CUDA_VISIBLE_DEVICES` is the driver's business), and all kernels.
///
/// # Errors
/// [`GpuError`].
pub fn open(ordinal: u32, features: Features) -> Result<Arc<dyn Gpu>, GpuError> {
    let count = count()?;
    if ordinal >= count {
        let reason = format!("cuda:{ordinal} was asked for, {count} devices are visible");
        return Err(GpuError::Unavailable(reason));
    }
    Ok(Arc::new(Driver::open(ordinal, features)?))
}

impl Driver {
    fn open(ordinal: u32, features: Features) -> Result<Self, GpuError> {
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = result::device::get(number).map_err(failed("cuDeviceGet"))?;
        let facts = facts(ordinal, device)?;
        if facts.capability < OLDEST {
            let reason = format!(
                "{} has compute capability {}.{}, at least 8.0 is needed",
                facts.name,
                facts.capability / 10,
                facts.capability % 10
            );
            return Err(GpuError::Unavailable(reason));
        }
        // SAFETY: a device the driver gave; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let mut driver = Self {
            overlap: features.overlap && facts.capability == OVERLAPS,
            facts,
            device,
            context,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            functions: Vec::new(),
            blas: None,
        };
        driver.make_current()?;
        driver.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("cuStreamCreate"))?;
        driver.load()?;
        if features.blas && Blas::is_present() {
            let workspace = driver.allocate(WORKSPACE)?;
            driver.blas = Some((Blas::new(workspace)?, workspace));
        }
        Ok(driver)
    }

    /// Compiles and looks up all kernels.
    fn load(&mut self) -> Result<(), GpuError> {
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        for source in SOURCES {
            let ptx = if self.facts.capability == OVERLAPS { source.ptx_90a } else { source.ptx };
            let ptx = CString::new(ptx).expect("PTX is text");
            // SAFETY: PTX that ends with a zero.
            let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) }
                .map_err(failed("cuModuleLoadData"))?;
            self.modules.push(module);
            for (name, shared) in source.kernels {
                let name = CString::new(*name).expect("a name is text");
                // SAFETY: a module just loaded, a function just found.
                unsafe {
                    let function = result::module::get_function(module, name)
                        .map_err(failed("cuModuleGetFunction"))?;
                    if *shared > 48 << 10 {
                        result::function::set_function_attribute(
                            function,
                            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                            *shared as i32,
                        )
                        .map_err(failed("cuFuncSetAttribute"))?;
                    }
                    self.functions.push(function);
                }
            }
        }
        Ok(())
    }

    /// [`Gpu::make_current`] for calls that cannot fail.
    fn enter(&self) {
        let _ = self.make_current();
    }
}

fn facts(ordinal: u32, device: sys::CUdevice) -> Result<Facts, GpuError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    };
    let attribute = |which| {
        // SAFETY: a device the driver gave.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.map(|value| value as u32).map_err(failed("cuDeviceGetAttribute"))
    };
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&raw mut driver) }
        .result()
        .map_err(failed("cuDriverGetVersion"))?;
    Ok(Facts {
        name: result::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
        ordinal,
        capability: attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: a device the driver gave.
        memory: unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?
            as u64,
        driver: driver as u32,
    })
}

impl Gpu for Driver {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_memory(&self) -> Result<u64, GpuError> {
        self.make_current()?;
        let (free, _) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok(free as u64)
    }

    fn make_current(&self) -> Result<(), GpuError> {
        // SAFETY: a context that lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    fn allocate(&self, bytes: usize) -> Result<u64, GpuError> {
        self.make_current()?;
        // SAFETY: the caller frees it.
        unsafe { result::malloc_sync(bytes) }.map_err(failed("cuMemAlloc"))
    }

    unsafe fn free(&self, address: u64) {
        self.enter();
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { result::free_sync(address) } {
            tracing::warn!(error = %failed("cuMemFree")(error), "device memory could not be freed");
        }
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        self.make_current()?;
        // SAFETY: the caller frees it. Without flags: memory that the CPU reads at full speed.
        let base = unsafe { result::malloc_host(bytes, 0) }.map_err(failed("cuMemHostAlloc"))?;
        Ok(base.cast())
    }

    unsafe fn free_host(&self, base: *mut u8) {
        self.enter();
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { result::free_host(base.cast()) } {
            tracing::warn!(error = %failed("cuMemFreeHost")(error), "host memory could not be freed");
        }
    }

    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), GpuError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream) }
            .result()
            .map_err(failed("cuMemcpyHtoDAsync"))
    }

    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream) }
            .result()
            .map_err(failed("cuMemcpyDtoHAsync"))
    }

    unsafe fn copy_within(&self, to: u64, from: u64, bytes: usize) -> Result<(), GpuError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(failed("cuMemcpyDtoDAsync"))
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), GpuError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(to, byte, bytes, self.stream) }
            .map_err(failed("cuMemsetD8Async"))
    }

    unsafe fn launch(&self, kernel: Kernel, shape: Shape, args: &Args) -> Result<(), GpuError> {
        use sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let (mut pointers, _) = args.pointers();
        let [x, y, z] = shape.grid;
        let mut overlap = sys::CUlaunchAttribute {
            id: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: self.stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.overlap),
        };
        let function = self.functions[kernel.index];
        // SAFETY: the caller's promise; the values live until the call returns, which copies them.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(failed(kernel.name))
    }

    fn has_blas(&self) -> bool {
        self.blas.is_some()
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), GpuError> {
        let Some((blas, _)) = &self.blas else {
            let reason = "cuBLASLt is not there".to_owned();
            return Err(GpuError::Call { call: "cublasLtMatmul", reason });
        };
        // SAFETY: the caller's promise.
        unsafe { blas.multiply(product, self.stream) }
    }

    fn create_event(&self) -> Result<Handle, GpuError> {
        self.make_current()?;
        let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)
            .map_err(failed("cuEventCreate"))?;
        Ok(event as Handle)
    }

    fn record(&self, event: Handle) -> Result<(), GpuError> {
        // SAFETY: an event of this device.
        unsafe { result::event::record(event as sys::CUevent, self.stream) }
            .map_err(failed("cuEventRecord"))
    }

    fn wait(&self, event: Handle) -> Result<(), GpuError> {
        // SAFETY: an event of this device.
        unsafe { result::event::synchronize(event as sys::CUevent) }
            .map_err(failed("cuEventSynchronize"))
    }

    fn elapsed(&self, from: Handle, to: Handle) -> Result<f32, GpuError> {
        // SAFETY: events of this device.
        unsafe { result::event::elapsed(from as sys::CUevent, to as sys::CUevent) }
            .map_err(failed("cuEventElapsedTime"))
    }

    fn destroy_event(&self, event: Handle) {
        self.enter();
        // SAFETY: an event of this device, destroyed once.
        let _ = unsafe { result::event::destroy(event as sys::CUevent) };
    }

    fn begin_capture(&self) -> Result<(), GpuError> {
        self.make_current()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: our stream.
        unsafe { result::stream::begin_capture(self.stream, mode) }
            .map_err(failed("cuStreamBeginCapture"))
    }

    fn end_capture(&self) -> Result<Handle, GpuError> {
        // SAFETY: our stream; the graph is not needed once its executable form is there.
        unsafe {
            let graph =
                result::stream::end_capture(self.stream).map_err(failed("cuStreamEndCapture"))?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made.map_err(failed("cuGraphInstantiate"))?;
            Ok(executable as Handle)
        }
    }

    unsafe fn launch_graph(&self, graph: Handle) -> Result<(), GpuError> {
        // SAFETY: the caller's promise; a graph of this device.
        unsafe { result::graph::launch(graph as sys::CUgraphExec, self.stream) }
            .map_err(failed("cuGraphLaunch"))
    }

    fn destroy_graph(&self, graph: Handle) {
        self.enter();
        // SAFETY: a graph of this device, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(graph as sys::CUgraphExec) };
    }

    fn synchronise(&self) -> Result<(), GpuError> {
        self.make_current()?;
        // SAFETY: our stream.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("cuStreamSynchronize"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.enter();
        let _ = self.synchronise();
        // SAFETY: all objects are of this device and used no more; the context goes last.
        unsafe {
            if let Some((blas, workspace)) = self.blas.take() {
                drop(blas);
                self.free(workspace);
            }
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
