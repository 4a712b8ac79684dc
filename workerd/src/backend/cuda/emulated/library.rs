//! The emulator's C interface (`kernels/host/emulator.cpp`), and a machine as an owner.
#![expect(unsafe_code, reason = "a C library")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;

use super::build::{self, Source};

/// Functions of a shared object that stays loaded.
#[derive(Debug)]
pub struct Library {
    open: unsafe extern "C" fn() -> *mut c_void,
    close: unsafe extern "C" fn(*mut c_void),
    alloc: unsafe extern "C" fn(*mut c_void, u64) -> u64,
    free: unsafe extern "C" fn(*mut c_void, u64) -> bool,
    allocations: unsafe extern "C" fn(*mut c_void) -> u64,
    range: unsafe extern "C" fn(*mut c_void, u64, u64, bool) -> bool,
    writes: unsafe extern "C" fn(*mut c_void, u64, u64, *mut u32, *mut u32) -> bool,
    kernel: unsafe extern "C" fn(*const c_char, *mut u32) -> u32,
    mode: unsafe extern "C" fn(*mut c_void, bool, bool),
    launch: Launch,
    error: unsafe extern "C" fn(*mut c_void) -> *const c_char,
}

type Launch = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const u32,
    u32,
    u32,
    *mut *mut c_void,
) -> bool;

impl Library {
    /// Of all kernels of the tree.
    pub fn of_the_tree() -> &'static Self {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| Self::of(&build::sources()))
    }

    /// Of these sources; stays loaded.
    pub fn of(sources: &[Source]) -> Self {
        let path = build::shared_object(sources);
        // SAFETY: our own code, which does nothing when it is loaded; each name has the type of its field.
        unsafe {
            let library = libloading::Library::new(&path);
            let library = Box::leak(Box::new(library.expect("the emulator can be loaded")));
            let library: &'static libloading::Library = library;
            macro_rules! function {
                ($name:literal) => {
                    *library.get($name).expect("the emulator has it")
                };
            }
            Self {
                open: function!("baton_open"),
                close: function!("baton_close"),
                alloc: function!("baton_alloc"),
                free: function!("baton_free"),
                allocations: function!("baton_allocations"),
                range: function!("baton_range"),
                writes: function!("baton_writes"),
                kernel: function!("baton_kernel"),
                mode: function!("baton_mode"),
                launch: function!("baton_launch"),
                error: function!("baton_error"),
            }
        }
    }

    /// Most threads of a block of this kernel, and how many arguments it takes.
    pub fn kernel(&self, name: &str) -> Option<(u32, u32)> {
        let name = CString::new(name).expect("a name is text");
        let mut parameters = 0;
        // SAFETY: a string and a place for one number.
        let threads = unsafe { (self.kernel)(name.as_ptr(), &raw mut parameters) };
        (threads > 0).then_some((threads, parameters))
    }
}

/// A machine of one library, with its memory.
#[derive(Debug)]
pub struct Machine {
    library: &'static Library,
    machine: *mut c_void,
}

// SAFETY: nothing in the machine belongs to a thread while no kernel runs.
unsafe impl Send for Machine {}

impl Machine {
    /// With nothing in its memory.
    pub fn new(library: &'static Library) -> Self {
        // SAFETY: no arguments; `drop` closes it.
        Self { library, machine: unsafe { (library.open)() } }
    }

    /// Whose kernels it runs.
    pub fn library(&self) -> &'static Library {
        self.library
    }

    /// Poisoned memory between guard pages; 0 if there is none.
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        // SAFETY: an open machine, here and below.
        unsafe { (self.library.alloc)(self.machine, bytes as u64) }
    }

    /// Whether there was such memory.
    pub fn free(&mut self, address: u64) -> bool {
        // SAFETY: see above; an address that is no allocation's is refused.
        unsafe { (self.library.free)(self.machine, address) }
    }

    /// How many pieces of memory there are.
    pub fn allocations(&mut self) -> u64 {
        // SAFETY: see above.
        unsafe { (self.library.allocations)(self.machine) }
    }

    /// Whether a range lies in one allocation; `written`: it counts as stored to from now on.
    pub fn holds(&mut self, address: u64, bytes: usize, written: bool) -> bool {
        // SAFETY: see above; any numbers will do.
        unsafe { (self.library.range)(self.machine, address, bytes as u64, written) }
    }

    /// How often the last kernel stored to a byte of a range: least and most.
    pub fn writes(&mut self, address: u64, bytes: usize) -> (u32, u32) {
        let (mut least, mut most) = (0, 0);
        // SAFETY: see above; two places for one number each.
        let known = unsafe {
            (self.library.writes)(
                self.machine,
                address,
                bytes as u64,
                &raw mut least,
                &raw mut most,
            )
        };
        assert!(known, "{bytes} bytes at {address:#x} are no memory");
        (least, most)
    }

    /// Threads and blocks in falling order; reads of what nobody wrote an error.
    pub fn set_mode(&mut self, backward: bool, strict: bool) {
        // SAFETY: see above.
        unsafe { (self.library.mode)(self.machine, backward, strict) };
    }

    /// Runs a kernel to its end.
    ///
    /// # Safety
    /// `arguments` points to what the kernel takes.
    ///
    /// # Errors
    /// What it did that no kernel may do.
    pub unsafe fn launch(
        &mut self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), String> {
        let name = CString::new(name).expect("a name is text");
        let (library, machine) = (self.library, self.machine);
        let (grid, arguments) = (grid.as_ptr(), arguments.as_mut_ptr());
        // SAFETY: the caller's promise; all memory that the kernel touches is checked.
        unsafe {
            if (library.launch)(machine, name.as_ptr(), grid, threads, shared, arguments) {
                return Ok(());
            }
            Err(CStr::from_ptr((library.error)(machine)).to_string_lossy().into_owned())
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once.
        unsafe { (self.library.close)(self.machine) };
    }
}
