//! How much of a GPU is used, by NVIDIA's management library, which is loaded when it is asked for.
//!
//! The library counts all devices of a machine, the driver those that `CUDA_VISIBLE_DEVICES` leaves: they agree on a
//! device's UUID. Calls may take milliseconds, so they are not for the engine's thread.
#![expect(unsafe_code, reason = "a C library")]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};

use cudarc::driver::result;
use libloading::Library;

use super::{GpuError, driver};

/// What the driver installs it as.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// Why nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NvmlError {
    /// No library, or not the one that was expected.
    #[error("{0}")]
    Missing(String),
    /// It does not do as asked.
    #[error("{call}: {reason}")]
    Call {
        /// Which function.
        call: &'static str,
        /// The library's words.
        reason: String,
    },
    /// The driver does not say which device it is.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// What is used of a device, by all processes together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Bytes of memory.
    pub used: u64,
    /// Bytes of memory there are.
    pub total: u64,
    /// Share of the last moments (up to a second) in which a kernel ran, from 0 to 1; a part of a device has none.
    pub busy: Option<f64>,
}

/// The UUID of the device of that number among the visible ones.
///
/// # Errors
/// [`GpuError`].
pub fn uuid(ordinal: u32) -> Result<[u8; 16], GpuError> {
    let count = driver::count()?;
    let failed = |error: result::DriverError| GpuError::Call {
        call: "cuDeviceGetUuid",
        reason: format!("{:?}", error.0),
    };
    let number = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let number = number.ok_or_else(|| GpuError::Unavailable(format!("no cuda:{ordinal}")))?;
    let device = result::device::get(number).map_err(failed)?;
    let uuid = result::device::get_uuid(device).map_err(failed)?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

/// `nvmlDevice_t`.
type Handle = *mut c_void;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// The functions that are used, as the library's header has them.
#[derive(Clone, Copy, Debug)]
struct Calls {
    init: unsafe extern "C" fn() -> c_int,
    shutdown: unsafe extern "C" fn() -> c_int,
    by_uuid: unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int,
    memory: unsafe extern "C" fn(Handle, *mut Memory) -> c_int,
    utilization: unsafe extern "C" fn(Handle, *mut Utilization) -> c_int,
    words: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// One device, as the library knows it. Stays on the thread that opened it.
#[derive(Debug)]
pub struct Nvml {
    calls: Calls,
    handle: Handle,
    // The functions above are inside it.
    _library: Library,
}

impl Nvml {
    /// The device of that UUID, by the library of that name or path.
    ///
    /// # Errors
    /// [`NvmlError`].
    pub fn open(library: impl AsRef<OsStr>, uuid: [u8; 16]) -> Result<Self, NvmlError> {
        // The loader's words, which name the file or the function, are the error's source.
        let missing = |error: libloading::Error| {
            NvmlError::Missing(format!("{:#}", anyhow::Error::from(error)))
        };
        // SAFETY: a shared library of the driver, whose initialisers are harmless.
        let library = unsafe { Library::new(library.as_ref()) }.map_err(missing)?;
        // SAFETY: the types are those of the library's header; the functions are used only while `library` is there.
        let calls = unsafe {
            Calls {
                init: *library.get(c"nvmlInit_v2").map_err(missing)?,
                shutdown: *library.get(c"nvmlShutdown").map_err(missing)?,
                by_uuid: *library.get(c"nvmlDeviceGetHandleByUUID").map_err(missing)?,
                memory: *library.get(c"nvmlDeviceGetMemoryInfo").map_err(missing)?,
                utilization: *library.get(c"nvmlDeviceGetUtilizationRates").map_err(missing)?,
                words: *library.get(c"nvmlErrorString").map_err(missing)?,
            }
        };
        // SAFETY: takes nothing; ended in `drop`, or not at all if it failed.
        calls.check("nvmlInit", unsafe { (calls.init)() })?;
        let mut nvml = Self { calls, handle: std::ptr::null_mut(), _library: library };
        nvml.handle = nvml.find(uuid)?;
        Ok(nvml)
    }

    /// A whole device, or a part of one (MIG).
    fn find(&self, uuid: [u8; 16]) -> Result<Handle, NvmlError> {
        let of = |kind: &str| {
            let name = CString::new(format!("{kind}-{}", text(uuid))).expect("hexadecimal digits");
            let mut handle = std::ptr::null_mut();
            // SAFETY: text that ends with a zero, and a place for a handle.
            let code = unsafe { (self.calls.by_uuid)(name.as_ptr(), &raw mut handle) };
            self.calls.check("nvmlDeviceGetHandleByUUID", code).map(|()| handle)
        };
        of("GPU").or_else(|error| of("MIG").map_err(|_| error))
    }

    /// What is used now.
    ///
    /// # Errors
    /// [`NvmlError::Call`], if the memory's use is not known.
    pub fn usage(&self) -> Result<Usage, NvmlError> {
        let mut memory = Memory::default();
        // SAFETY: a handle of this library, and a place for what it writes.
        let code = unsafe { (self.calls.memory)(self.handle, &raw mut memory) };
        self.calls.check("nvmlDeviceGetMemoryInfo", code)?;
        let mut busy = Utilization::default();
        // SAFETY: as above.
        let code = unsafe { (self.calls.utilization)(self.handle, &raw mut busy) };
        let is_known = self.calls.check("nvmlDeviceGetUtilizationRates", code).is_ok();
        Ok(Usage {
            used: memory.used,
            total: memory.total,
            busy: is_known.then(|| f64::from(busy.gpu) / 100.0),
        })
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: was initialised; the handle is used no more.
        unsafe { (self.calls.shutdown)() };
    }
}

impl Calls {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), NvmlError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any number; a text that is never freed, or nothing.
        let words = unsafe { (self.words)(code) };
        let reason = if words.is_null() {
            format!("error {code}")
        } else {
            // SAFETY: a text of the library.
            unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
        };
        Err(NvmlError::Call { call, reason })
    }
}

/// As in `GPU-8932f937-d72c-4106-c12f-20bd9faed9f6`, without what is before the first `-`.
fn text(uuid: [u8; 16]) -> String {
    let part = |range: std::ops::Range<usize>| -> String {
        uuid[range].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    [part(0..4), part(4..6), part(6..8), part(8..10), part(10..16)].join("-")
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use baton_shared::role::Role;

    use super::*;
    use crate::engine::status::EngineStatus;
    use crate::handover::mover::MoverFigures;
    use crate::metrics::Metrics;

    /// A library that knows a device and a part of one, and does nothing before it was initialised.
    const FAKE: &str = r#"
        #include <string.h>
        static int started;
        int nvmlInit_v2(void) { started++; return 0; }
        int nvmlShutdown(void) { return --started < 0; }
        const char *nvmlErrorString(int code) { return code == 6 ? "Not Found" : "Something Else"; }
        int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
            if (!started) return 1;
            if (!strcmp(uuid, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f")) *device = (void *)0x10;
            else if (!strcmp(uuid, "MIG-f0010203-0405-0607-0809-0a0b0c0d0eff")) *device = (void *)0x20;
            else return 6;
            return 0;
        }
        int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
            if (!started) return 1;
            memory[0] = device == (void *)0x10 ? 85899345920ull : 10737418240ull;
            memory[1] = memory[0] - 5000;
            memory[2] = 5000;
            return 0;
        }
        int nvmlDeviceGetUtilizationRates(void *device, unsigned *percent) {
            if (!started) return 1;
            if (device == (void *)0x20) return 3;
            percent[0] = 37;
            percent[1] = 90;
            return 0;
        }
    "#;

    fn whole() -> [u8; 16] {
        std::array::from_fn(|i| i as u8)
    }

    fn part() -> [u8; 16] {
        let mut uuid = whole();
        (uuid[0], uuid[15]) = (0xf0, 0xff);
        uuid
    }

    fn compiled(folder: &Path, text: &str) -> PathBuf {
        let (source, library) = (folder.join("nvml.c"), folder.join("libnvml.so"));
        std::fs::write(&source, text).unwrap();
        let mut command = Command::new("gcc");
        command.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        assert!(command.status().unwrap().success());
        library
    }

    #[test]
    fn a_device_is_found_by_its_uuid_and_its_use_becomes_gauges() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = Nvml::open(compiled(folder.path(), FAKE), whole()).unwrap();
        let usage = gpu.usage().unwrap();
        assert_eq!(usage, Usage { used: 5000, total: 80 << 30, busy: Some(0.37) });
        let metrics = Metrics::new(Role::Both, "M");
        metrics.gpu(1, Some(&usage));
        let text = metrics.render(&EngineStatus::default(), MoverFigures::default());
        for line in [
            "baton_worker_gpu_memory_used_bytes{device=\"cuda:1\"} 5000",
            "baton_worker_gpu_memory_total_bytes{device=\"cuda:1\"} 85899345920",
            "baton_worker_gpu_utilization_ratio{device=\"cuda:1\"} 0.37",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_part_of_a_device_has_memory_but_no_utilisation() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = Nvml::open(compiled(folder.path(), FAKE), part()).unwrap();
        assert_eq!(gpu.usage().unwrap(), Usage { used: 5000, total: 10 << 30, busy: None });
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path, uuid| Nvml::open(path, uuid).unwrap_err();
        let missing = open(&folder.path().join("nowhere.so"), whole()).to_string();
        assert!(missing.contains("nowhere.so"), "{missing}");
        let unknown = open(&compiled(folder.path(), FAKE), [9; 16]);
        let call = "nvmlDeviceGetHandleByUUID";
        assert_eq!(unknown, NvmlError::Call { call, reason: "Not Found".to_owned() });
        let folder = tempfile::tempdir().unwrap();
        let short = open(&compiled(folder.path(), "int nvmlInit_v2(void) { return 0; }"), whole());
        assert!(short.to_string().contains("nvmlShutdown"), "{short}");
    }
}
