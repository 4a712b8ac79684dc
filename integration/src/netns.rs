//! Threads in another network namespace: what they connect to and listen on is there.
#![expect(unsafe_code, reason = "setns is a C interface")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Moves this thread, and those it starts from now on, to the network of `namespace`, a `/proc/PID/ns/net`.
///
/// # Errors
/// What the system says.
pub fn enter(namespace: &Path) -> io::Result<()> {
    let file = File::open(namespace)?;
    // SAFETY: the descriptor is open until the call has returned; it touches no memory of this process.
    let status = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
