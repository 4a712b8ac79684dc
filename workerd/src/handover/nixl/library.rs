//! Finds NIXL and loads it before anything calls it: the bindings' own loading aborts the process when it fails.
//! A [`NixlLibrary`] is the proof that it is loaded; no agent opens without one.
//!
//! Also the environment that NIXL and UCX want, which has to be set first in `main`.
#![expect(unsafe_code, reason = "loading a library runs its initialisers")]

use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use super::sends;
use baton_shared::os::{EnvironmentError, set_default_environment};

/// What is loaded; its own dependencies are found relative to it.
const FILE: &str = "libnixl_capi.so";
/// Where below a place the file may be: unpacked wheels, and an installation prefix.
const FOLDERS: [&str; 7] = [
    "",
    ".nixl_cu12.mesonpy.libs",
    ".nixl_cu13.mesonpy.libs",
    "lib",
    "lib64",
    "lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
];
/// Where an installation has it, seen from the executable's folder: `/usr/bin` and `/usr/lib/baton/nixl`.
const INSTALLED: &str = "../lib/baton/nixl";
/// How far above the executable a `.deps` counts as its build tree's: `target/release/deps/`.
const BUILD_TREE_DEPTH: usize = 6;
/// Everything that `agent` calls; a library without one of them would abort the process at the first call.
const SYMBOLS: [&str; 24] = [
    "nixl_capi_agent_make_connection",
    "nixl_capi_create_backend",
    "nixl_capi_create_configured_agent",
    "nixl_capi_create_notif_map",
    "nixl_capi_create_xfer_dlist",
    "nixl_capi_create_xfer_req",
    "nixl_capi_deregister_mem",
    "nixl_capi_destroy_agent",
    "nixl_capi_destroy_backend",
    "nixl_capi_destroy_xfer_req",
    "nixl_capi_gen_notif",
    "nixl_capi_get_local_md",
    "nixl_capi_get_notifs",
    "nixl_capi_get_plugin_params",
    "nixl_capi_get_xfer_status",
    "nixl_capi_invalidate_remote_md",
    "nixl_capi_load_remote_md",
    "nixl_capi_notif_map_get_agent_at",
    "nixl_capi_notif_map_get_notif",
    "nixl_capi_params_add",
    "nixl_capi_post_xfer_req",
    "nixl_capi_register_mem",
    "nixl_capi_release_xfer_req",
    "nixl_capi_xfer_dlist_add_desc",
];

/// Why NIXL cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// In none of the five places.
    #[error(
        "NIXL (`{FILE}`) was not found; looked in:\n{}\nrun `make setup`, or name its folder in \
         `nixl.library_dir`",
        looked.iter().map(|place| format!("  {place}")).collect::<Vec<_>>().join("\n")
    )]
    NotFound {
        /// Each place, with what it was there.
        looked: Vec<String>,
    },
    /// A place that was named holds none: another one is not taken silently.
    #[error("{place} is `{}`, which holds no `{FILE}` (nor do its folders {})",
        folder.display(), FOLDERS[1..].join(", "))]
    NotThere {
        /// Who named it.
        place: &'static str,
        /// The folder.
        folder: PathBuf,
    },
    /// Found, not usable.
    #[error("NIXL cannot be loaded from `{}`: {reason}", file.display())]
    Unusable {
        /// Which file.
        file: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// One process, one copy.
    #[error("NIXL is loaded from `{}` already, not from `{}`", loaded.display(), wanted.display())]
    SecondCopy {
        /// The copy in use.
        loaded: PathBuf,
        /// The other one.
        wanted: PathBuf,
    },
}

/// NIXL is loaded, for the life of the process.
#[derive(Clone, Debug)]
pub struct NixlLibrary {
    file: PathBuf,
}

static LOADED: Mutex<Option<NixlLibrary>> = Mutex::new(None);

impl NixlLibrary {
    /// Loads it from `nixl.library_dir` if that is configured, else `$NIXL_PREFIX`, else `../lib/baton/nixl` beside the
    /// executable's folder, else `.deps/nixl` beside its build tree, else where the system's loader finds it. A second
    /// call gets the same one.
    ///
    /// # Errors
    /// [`LibraryError`]; the process goes on unharmed.
    pub fn load(library_dir: Option<&Path>) -> Result<Self, LibraryError> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let exe = std::env::current_exe().ok();
        let file = find(library_dir, std::env::var_os("NIXL_PREFIX"), exe.as_deref())?;
        if let Some(library) = &*loaded {
            return if library.file == file.path() {
                Ok(library.clone())
            } else {
                let (loaded, wanted) = (library.file.clone(), file.path());
                Err(LibraryError::SecondCopy { loaded, wanted })
            };
        }
        let library = open(&file)?;
        *loaded = Some(library.clone());
        Ok(library)
    }

    /// Which file.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// What to hand to the system's loader.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File(PathBuf),
    /// By name: whatever `ld.so` finds, if anything. With the places that were looked at before.
    System(Vec<String>),
}

impl Found {
    fn path(&self) -> PathBuf {
        match self {
            Self::File(file) => file.clone(),
            Self::System(_) => PathBuf::from(FILE),
        }
    }
}

fn find(
    library_dir: Option<&Path>,
    prefix: Option<OsString>,
    exe: Option<&Path>,
) -> Result<Found, LibraryError> {
    let named = [
        ("`nixl.library_dir`", library_dir.map(Path::to_owned)),
        ("`$NIXL_PREFIX`", prefix.filter(|prefix| !prefix.is_empty()).map(PathBuf::from)),
    ];
    let mut looked = Vec::new();
    for (place, folder) in named {
        match folder {
            Some(folder) => {
                let file = file_in(&folder).ok_or(LibraryError::NotThere { place, folder })?;
                return Ok(Found::File(file));
            }
            None => looked.push(format!("{place}: not set")),
        }
    }
    let bin = exe.and_then(Path::parent);
    let installed = bin.map(|bin| bin.join(INSTALLED));
    let trees = bin.into_iter().flat_map(Path::ancestors).take(BUILD_TREE_DEPTH);
    let tree = trees.map(|folder| folder.join(".deps/nixl")).find(|folder| is_trusted(folder, exe));
    let ours = installed.filter(|folder| is_trusted(folder, exe)).into_iter().chain(tree);
    match ours.into_iter().find_map(|folder| file_in(&folder)) {
        Some(file) => Ok(Found::File(file)),
        None => {
            let beside =
                bin.map_or_else(|| "the executable".to_owned(), |bin| bin.display().to_string());
            looked.push(format!("`{INSTALLED}` from `{beside}`: not there, or another user's"));
            looked.push(format!(
                "`.deps/nixl` in `{beside}` and above: not there, or another user's"
            ));
            Ok(Found::System(looked))
        }
    }
}

fn file_in(folder: &Path) -> Option<PathBuf> {
    let files = FOLDERS.iter().map(|below| folder.join(below).join(FILE));
    // Absolute, so that what is loaded does not depend on the current folder.
    files.into_iter().find(|file| file.is_file()).and_then(|file| file.canonicalize().ok())
}

/// Whether code may be loaded from a folder that nobody named: only root, we ourselves, or whoever could change the
/// executable could have put it there.
fn is_trusted(folder: &Path, exe: Option<&Path>) -> bool {
    let owner = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.uid()).ok();
    let trusted = [Some(0), owner(Path::new("/proc/self")), exe.and_then(owner)];
    owner(folder).is_some_and(|owner| trusted.contains(&Some(owner)))
}

fn open(found: &Found) -> Result<NixlLibrary, LibraryError> {
    want_fresh_memory();
    let file = found.path();
    let unusable = |reason: String| LibraryError::Unusable { file: file.clone(), reason };
    if !sends::stand_before_ucx() {
        let reason = "this executable does not export the functions of `sends.rs`, as \
                      `workerd/build.rs` has it done: UCX would end it with its peers";
        return Err(unusable(reason.to_owned()));
    }
    let name = CString::new(file.as_os_str().as_bytes())
        .map_err(|_| unusable("its name holds a zero byte".to_owned()))?;
    let library = match (dlopen(&name, libc::RTLD_NOW | libc::RTLD_LOCAL), found) {
        (Ok(library), _) => library,
        (Err(reason), Found::File(_)) => return Err(unusable(reason)),
        (Err(reason), Found::System(before)) => {
            let system = format!("the system's libraries: {reason}");
            let looked = before.iter().cloned().chain([system]).collect();
            return Err(LibraryError::NotFound { looked });
        }
    };
    for symbol in SYMBOLS {
        if !has_symbol(library, symbol) {
            return Err(unusable(format!("it has no `{symbol}`: not NIXL, or another version")));
        }
    }
    // The bindings look it up by this name: it must be the copy just loaded.
    let name = CString::new(FILE).expect("a file name without a zero byte");
    if dlopen(&name, libc::RTLD_NOW | libc::RTLD_NOLOAD) != Ok(library) || nixl_sys::is_stub() {
        return Err(unusable(format!("its name for the loader is not `{FILE}`")));
    }
    Ok(NixlLibrary { file })
}

/// Has the C library map larger pieces of memory anew, which are zero then. UCX leaves a field of its requests as
/// `malloc` gives it and acts upon it when a reader dies while bytes are sent to it: the owner of the blocks crashed.
fn want_fresh_memory() {
    /// UCX allocates its requests in pieces larger than this.
    const MAPPED_FROM: libc::c_int = 16 << 10;
    // SAFETY: it changes where later allocations of the C library come from, and touches none.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM) } != 1 {
        tracing::warn!("the C library maps no fresh memory: a peer that dies may end this process");
    }
}

fn dlopen(name: &CStr, flags: libc::c_int) -> Result<NonNull<libc::c_void>, String> {
    // SAFETY: `name` ends with a zero byte. The initialisers that run are those of a library the operator named,
    // that we own, or that the system installed; with `RTLD_NOLOAD` none run. The library is never unloaded.
    let library = unsafe { libc::dlopen(name.as_ptr(), flags) };
    NonNull::new(library).ok_or_else(last_error)
}

fn has_symbol(library: NonNull<libc::c_void>, symbol: &str) -> bool {
    let Ok(symbol) = CString::new(symbol) else { return false };
    // SAFETY: the handle came from `dlopen` and is never closed; the name ends with a zero byte.
    !unsafe { libc::dlsym(library.as_ptr(), symbol.as_ptr()) }.is_null()
}

fn last_error() -> String {
    // SAFETY: no arguments; the text is this thread's.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the loader gives no reason".to_owned();
    }
    // SAFETY: not null, ends with a zero byte, and valid until this thread's next call to the loader.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Why the environment was not prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A key of `nixl.ucx` that cannot be a variable.
    #[error("`nixl.ucx` key `{0}` is not made of A-Z 0-9 _, or its value holds a zero byte")]
    Variable(String),
    /// Not the first thing in `main`.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
}

/// What NIXL and UCX are told, `nixl.ucx` before our own; each key without `UCX_`.
///
/// # Errors
/// [`PrepareError::Variable`].
pub fn environment(ucx: &[(String, String)]) -> Result<Vec<(String, String)>, PrepareError> {
    let mut variables = Vec::new();
    for (key, value) in ucx {
        let legal = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
        if key.is_empty() || !key.bytes().all(legal) || value.contains('\0') {
            return Err(PrepareError::Variable(key.clone()));
        }
        let name = if key.starts_with("UCX_") { key.clone() } else { format!("UCX_{key}") };
        variables.push((name, value.clone()));
    }
    let ours = [
        // Else `$HOME` is searched for a file, and an unreadable one makes every agent fail.
        ("NIXL_CONFIG_FILE", "/dev/null"),
        // Expected errors go to standard error, and UCX writes to standard output: we log ourselves.
        ("NIXL_LOG_LEVEL", "FATAL"),
        ("UCX_LOG_LEVEL", "fatal"),
        // Else UCX takes SIGHUP.
        ("UCX_DEBUG_SIGNO", "0"),
        // 8 KiB segments make reads over TCP several times slower.
        ("UCX_TCP_TX_SEG_SIZE", "256K"),
        ("UCX_TCP_RX_SEG_SIZE", "256K"),
        // Else UCX takes the memory of devices for the host's, unless it could patch the driver's functions, for which
        // it wants CUDA's runtime library; so it asks the driver.
        ("UCX_MEMTYPE_CACHE", "n"),
        // Else it reads from another process's device only where there is NVLink, and through sockets elsewhere.
        ("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "y"),
        // Else vanished packets are noticed after 15 minutes.
        ("UCX_TCP_USER_TIMEOUT", "5s"),
    ];
    for (name, value) in ours {
        if variables.iter().all(|(given, _)| given != name) {
            variables.push((name.to_owned(), value.to_owned()));
        }
    }
    Ok(variables)
}

/// Sets [`environment`], except what the caller's environment has already. To be called first in `main`.
///
/// # Errors
/// [`PrepareError`]; nothing is set then.
pub fn prepare_environment(ucx: &[(String, String)]) -> Result<(), PrepareError> {
    Ok(set_default_environment(&environment(ucx)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn place(below: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join(below)).unwrap();
        fs::write(folder.path().join(below).join(FILE), "not a library").unwrap();
        folder
    }

    #[test]
    fn the_five_places_are_tried_in_order() {
        let (config, prefix, tree) =
            (place(".nixl_cu12.mesonpy.libs"), place("lib64"), place(".deps/nixl/lib"));
        let installed = place("lib/baton/nixl");
        fs::create_dir(installed.path().join("bin")).unwrap();
        let exe = tree.path().join("target/release/deps/baton");
        let file = |found: Found| found.path();
        let prefix_set = || Some(prefix.path().as_os_str().to_owned());
        let found = find(Some(config.path()), prefix_set(), Some(&exe)).unwrap();
        assert!(file(found).ends_with(".nixl_cu12.mesonpy.libs/libnixl_capi.so"));
        let found = find(None, prefix_set(), Some(&exe)).unwrap();
        assert!(file(found).ends_with("lib64/libnixl_capi.so"));
        let found = find(None, Some(OsString::new()), Some(&exe)).unwrap();
        assert!(file(found).ends_with(".deps/nixl/lib/libnixl_capi.so"));
        // Unpacked into a build tree, it is still the installed one that counts.
        let below = tree.path().join("prefix");
        fs::rename(installed.path(), &below).unwrap();
        let found = find(None, None, Some(&below.join("bin/baton-workerd"))).unwrap();
        assert!(file(found).ends_with("prefix/lib/baton/nixl/libnixl_capi.so"));
        let nowhere = find(None, None, Some(Path::new("/nonexistent/target/baton"))).unwrap();
        let Found::System(looked) = nowhere else { panic!("{nowhere:?}") };
        assert_eq!(looked.len(), 4);
    }

    #[test]
    fn a_place_that_was_named_and_is_empty_is_not_passed_over() {
        let (empty, full) = (tempfile::tempdir().unwrap(), place("lib"));
        let in_config = find(Some(empty.path()), Some(full.path().into()), None).unwrap_err();
        assert!(in_config.to_string().starts_with("`nixl.library_dir` is `/"), "{in_config}");
        let in_prefix = find(None, Some(empty.path().into()), None).unwrap_err();
        assert!(in_prefix.to_string().starts_with("`$NIXL_PREFIX` is `/"), "{in_prefix}");
    }

    #[test]
    fn a_file_that_is_no_library_is_an_error_with_the_loaders_words() {
        let folder = place("lib");
        let error = open(&Found::File(folder.path().join("lib").join(FILE))).unwrap_err();
        assert!(error.to_string().contains("libnixl_capi.so"), "{error}");
        assert!(matches!(error, LibraryError::Unusable { .. }));
    }

    #[test]
    fn the_environment_holds_what_was_configured_and_our_own_for_the_rest() {
        let ucx = [("TLS", "tcp,self"), ("UCX_LOG_LEVEL", "warn")];
        let ucx = ucx.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let variables = environment(&ucx).unwrap();
        let value = |name: &str| {
            let found: Vec<_> = variables.iter().filter(|(given, _)| given == name).collect();
            assert_eq!(found.len(), 1, "{name}");
            found[0].1.as_str()
        };
        assert_eq!(value("UCX_TLS"), "tcp,self");
        assert_eq!(value("UCX_LOG_LEVEL"), "warn");
        assert_eq!(value("UCX_DEBUG_SIGNO"), "0");
        for bad in ["", "tls", "A=B", "A\0"] {
            assert!(environment(&[(bad.to_owned(), String::new())]).is_err(), "{bad:?}");
        }
    }
}
