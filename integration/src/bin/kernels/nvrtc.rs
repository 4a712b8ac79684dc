//! NVIDIA's runtime compiler, called for its PTX.
#![expect(unsafe_code, reason = "a C library loaded at run time")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libloading::{Library, Symbol};

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Name = unsafe extern "C" fn(c_int) -> *const c_char;

/// The library.
pub struct Nvrtc {
    library: Library,
}

impl Nvrtc {
    /// Loads the library at `path`.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn load(path: &Path) -> Result<Self> {
        // SAFETY: the pinned NVRTC; its initialisers touch nothing of ours.
        let library = unsafe { Library::new(path) };
        Ok(Self { library: library.with_context(|| path.display().to_string())? })
    }

    /// The PTX of `source` for `target`, without the comment that names the compiler's build.
    ///
    /// # Errors
    /// With the compiler's log.
    pub fn compile(&self, source: &str, name: &str, target: &str) -> Result<String> {
        let text = CString::new(source).context("the source holds a zero byte")?;
        let name = CString::new(format!("{name}.cu"))?;
        let options = [
            format!("--gpu-architecture={target}"),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
            // A source need not use all of the prelude.
            "-diag-suppress=177".to_owned(),
        ];
        let options = options.map(|option| CString::new(option).unwrap_or_default());
        let pointers = options.each_ref().map(|option| option.as_ptr());
        let mut program = std::ptr::null_mut();
        // SAFETY: `nvrtcCreateProgram`'s type; the strings outlive the call, no headers are given.
        let code = unsafe {
            self.symbol::<Create>("nvrtcCreateProgram")?(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        self.check(code)?;
        // SAFETY: `nvrtcCompileProgram`'s type; the program is alive, the options outlive the call.
        let compiled = unsafe {
            let count = pointers.len() as c_int;
            self.symbol::<Compile>("nvrtcCompileProgram")?(program, count, pointers.as_ptr())
        };
        let log = self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
        let ptx = match self.check(compiled) {
            Ok(()) if log.trim().is_empty() => {
                self.text(program, "nvrtcGetPTXSize", "nvrtcGetPTX").map(|ptx| strip(&ptx))
            }
            Ok(()) => bail!("it warns:\n{log}"),
            Err(error) => Err(error.context(log)),
        };
        // SAFETY: `nvrtcDestroyProgram`'s type; the program is not used afterwards.
        unsafe { self.symbol::<Destroy>("nvrtcDestroyProgram")?(&raw mut program) };
        ptx
    }

    /// # Safety
    /// `T` is the function's type.
    unsafe fn symbol<T>(&self, name: &str) -> Result<Symbol<'_, T>> {
        // SAFETY: the caller's promise.
        unsafe { self.library.get(name) }.with_context(|| format!("NVRTC has no {name}"))
    }

    fn text(&self, program: Program, size: &str, get: &str) -> Result<String> {
        let mut bytes = 0;
        // SAFETY: the type of both size functions; the program is alive.
        self.check(unsafe { self.symbol::<Size>(size)?(program, &raw mut bytes) })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: the type of both text functions, which write as many bytes as they said.
        self.check(unsafe { self.symbol::<Get>(get)?(program, text.as_mut_ptr().cast()) })?;
        let text = text.strip_suffix(&[0]).unwrap_or(&text);
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: `nvrtcGetErrorString`'s type; it gives a static string for any number.
        let name = unsafe { CStr::from_ptr(self.symbol::<Name>("nvrtcGetErrorString")?(code)) };
        bail!("{}", name.to_string_lossy());
    }
}

/// The text from its first directive on.
fn strip(ptx: &str) -> String {
    ptx.find(".version").map_or(ptx, |start| &ptx[start..]).to_owned()
}
