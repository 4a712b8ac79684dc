//! What both daemons ask of the operating system at start.
#![expect(unsafe_code, reason = "setting the environment is unsafe once a second thread runs")]

use std::ffi::OsStr;
use std::num::NonZeroUsize;

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

/// Cores this process may use: its affinity mask, bounded by the CPU quota of its control group; at least 1.
pub fn cores_available() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn no_more_cores_are_reported_than_the_machine_has() {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let online = text.lines().filter(|line| line.starts_with("processor")).count();
        assert!(cores_available().get() <= online.max(1));
    }
}
