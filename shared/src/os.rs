//! What both daemons ask of the operating system at start.
#![expect(unsafe_code, reason = "environment and network interfaces are C interfaces")]

use std::ffi::{CStr, OsStr};
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// Why the environment was left alone.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// Another thread might be reading it.
    #[error("the environment can only be set before the first thread starts, {0} run")]
    ThreadsRunning(usize),
    /// `/proc` is not mounted, so nobody can tell.
    #[error("cannot count this process's threads in `/proc/self/task`")]
    UnknownThreads(#[source] std::io::Error),
}

/// Sets each variable that the caller's environment leaves out: what an operator set wins. To be called first
/// in `main`, as libraries read their variables when they are loaded.
///
/// # Errors
/// If more than one thread runs; nothing is set then.
pub fn set_default_environment<K: AsRef<OsStr>, V: AsRef<OsStr>>(
    pairs: &[(K, V)],
) -> Result<(), EnvironmentError> {
    match threads_running() {
        Ok(1) => {}
        Ok(count) => return Err(EnvironmentError::ThreadsRunning(count)),
        Err(error) => return Err(EnvironmentError::UnknownThreads(error)),
    }
    for (name, value) in pairs {
        if std::env::var_os(name.as_ref()).is_none() {
            // SAFETY: `/proc/self/task` just listed one thread, this one, and it starts none in this loop; so
            // nobody reads or writes the environment meanwhile.
            unsafe { std::env::set_var(name.as_ref(), value.as_ref()) };
        }
    }
    Ok(())
}

fn threads_running() -> std::io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Number of the first socket that a service manager hands over (`sd_listen_fds(3)`).
const FIRST_INHERITED: RawFd = 3;
/// More are a mistake.
const MAX_INHERITED: RawFd = 64;

/// Why inherited sockets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// Not a number, or a senseless one.
    #[error("`LISTEN_FDS` = `{0}`: must be a number up to {MAX_INHERITED}")]
    Count(String),
    /// A number without a socket that accepts connections behind it.
    #[error(
        "inherited socket {0} (`{1}`) does not listen: it needs `ListenStream=` and `Accept=no`"
    )]
    NotListening(RawFd, String),
}

/// Listening sockets that the service manager opened for this process (`LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`), with
/// their names; none when they are meant for another process, and at the second call. They are not passed on to children,
/// and do not block. To be called first in `main`, before anything else opens files.
///
/// # Errors
/// If what is there is not what the variables say.
pub fn inherited_sockets() -> Result<Vec<(String, OwnedFd)>, InheritedError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let own = std::process::id().to_string();
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if variable("LISTEN_PID") != own || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let text = variable("LISTEN_FDS");
    let count = text.parse().ok().filter(|count| (0..=MAX_INHERITED).contains(count));
    let count: RawFd = count.ok_or(InheritedError::Count(text))?;
    let names = variable("LISTEN_FDNAMES");
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat("unknown".to_owned()));
    let take = |(fd, name): (RawFd, String)| {
        if !is_listening(fd) {
            return Err(InheritedError::NotListening(fd, name));
        }
        // SAFETY: plain calls on a number that was just seen to be an open socket.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL);
            libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        // SAFETY: open, and ours alone: by the protocol the variables give these numbers to this process, `TAKEN` lets
        // nobody have them twice, and nothing before `main` opens a listening socket.
        Ok((name, unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    (FIRST_INHERITED..FIRST_INHERITED + count).zip(names).map(take).collect()
}

fn is_listening(fd: RawFd) -> bool {
    let mut listens: libc::c_int = 0;
    let mut size = libc::socklen_t::try_from(size_of_val(&listens)).expect("4 fits");
    let place = (&raw mut listens).cast();
    // SAFETY: `place` has room for the `size` bytes of an int; a number that is no socket is an error.
    let status = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, place, &raw mut size)
    };
    status == 0 && listens != 0
}

/// The system's monotonic clock, as service managers compare it (`CLOCK_MONOTONIC`).
pub fn monotonic_time() -> Duration {
    clock(libc::CLOCK_MONOTONIC)
}

/// CPU time that this process has used, all threads together.
pub fn cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// When the system was started, as far as its clock was right then.
pub fn boot_time() -> Option<SystemTime> {
    SystemTime::now().checked_sub(clock(libc::CLOCK_BOOTTIME))
}

/// Ticks of a second in `/proc`.
pub fn clock_ticks() -> f64 {
    // SAFETY: a plain call without memory.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a place for one time.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Cores this process may use: its affinity mask, bounded by the CPU quota of its control group; at least 1.
pub fn cores_available() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// IP addresses of a network interface, in the system's order; none if there is no such interface.
///
/// # Errors
/// What the system says when it cannot list interfaces.
pub fn interface_addresses(name: &str) -> std::io::Result<Vec<IpAddr>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` is a place for one pointer, which is given back below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next: *const libc::ifaddrs = list;
    // SAFETY: null, or an entry of the list, which lives until `freeifaddrs`.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: every entry has a name that ends with a zero byte.
        let own = unsafe { CStr::from_ptr(entry.ifa_name) };
        if own.to_bytes() == name.as_bytes() {
            found.extend(address_of(entry));
        }
        next = entry.ifa_next;
    }
    // SAFETY: what `getifaddrs` gave, once; nothing of it is used any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// An interface's IP address, if this entry has one.
fn address_of(entry: &libc::ifaddrs) -> Option<IpAddr> {
    // SAFETY: null, or a socket address of some family.
    let family = i32::from(unsafe { entry.ifa_addr.as_ref() }?.sa_family);
    match family {
        libc::AF_INET => {
            // SAFETY: the family says that it is an IPv4 address; read as bytes, as it may not be aligned.
            let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is an IPv6 address; read as bytes, as it may not be aligned.
            let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::from(address.sin6_addr.s6_addr))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn the_environment_stays_as_it_is_once_a_second_thread_runs() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || stopped.recv());
        let result = set_default_environment(&[("BATON_TEST_NEVER_SET", "1")]);
        drop(stop);
        assert!(other.join().unwrap().is_err());
        assert!(matches!(result, Err(EnvironmentError::ThreadsRunning(count)) if count > 1));
        assert_eq!(std::env::var_os("BATON_TEST_NEVER_SET"), None);
    }

    #[test]
    fn only_a_socket_that_accepts_connections_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_listening(listener.as_raw_fd()));
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_listening(stream.as_raw_fd()));
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert!(!is_listening(file.as_raw_fd()));
    }

    #[test]
    fn sockets_meant_for_another_process_are_left_alone() {
        assert!(inherited_sockets().unwrap().is_empty());
    }

    #[test]
    fn the_loopback_interface_has_a_loopback_address() {
        let all = interface_addresses("lo").unwrap();
        assert!(!all.is_empty() && all.iter().all(IpAddr::is_loopback), "{all:?}");
        assert!(interface_addresses("no-such-interface").unwrap().is_empty());
    }

    #[test]
    fn no_more_cores_are_reported_than_the_machine_has() {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let online = text.lines().filter(|line| line.starts_with("processor")).count();
        assert!(cores_available().get() <= online.max(1));
    }
}
