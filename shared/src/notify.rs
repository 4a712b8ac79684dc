//! What a service manager is told (`sd_notify(3)`) and how often it wants to hear that we live, without its library.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// A service manager that takes nothing for this long is not waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// The way to a service manager; none, where the process was started by hand.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// `address` is `$NOTIFY_SOCKET`: an absolute path, or `@` and a name.
    ///
    /// # Errors
    /// If that is no address.
    pub fn new(address: Option<&OsStr>) -> io::Result<Self> {
        let address = match address.map(OsStr::as_bytes) {
            None | Some([]) => return Ok(Self { socket: None }),
            Some([b'@', name @ ..]) => SocketAddr::from_abstract_name(name)?,
            Some(path @ [b'/', ..]) => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
            Some(_) => {
                let rule = "must be an absolute path, or `@` and a name";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, rule));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket: Some((socket, address)) })
    }

    /// Says `state`: lines of `KEY=VALUE`, `READY=1` or `STATUS=in words`.
    pub fn say(&self, state: &str) {
        let Some((socket, address)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::warn!(%error, state, "the service manager does not hear us");
        }
    }
}

/// How long this process may go without `WATCHDOG=1`, by `$WATCHDOG_USEC` and `$WATCHDOG_PID` as `variable` gives them; `None` =
/// for ever.
pub fn watchdog_limit(variable: impl Fn(&str) -> Option<String>) -> Option<Duration> {
    let own = std::process::id().to_string();
    if variable("WATCHDOG_PID").is_some_and(|id| id != own) {
        return None;
    }
    let micros = variable("WATCHDOG_USEC")?.parse().ok().filter(|&micros: &u64| micros > 0)?;
    Some(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_hears_each_state_on_the_socket_it_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str())).unwrap();
        let mut text = [0; 64];
        for state in ["READY=1\nSTATUS=serving", "STOPPING=1"] {
            notifier.say(state);
            let count = manager.recv(&mut text).unwrap();
            assert_eq!(&text[..count], state.as_bytes());
        }
    }

    #[test]
    fn nobody_is_told_where_nobody_asked() {
        Notifier::new(None).unwrap().say("READY=1");
        Notifier::new(Some(OsStr::new(""))).unwrap().say("READY=1");
        let error = Notifier::new(Some(OsStr::new("relative"))).unwrap_err();
        assert!(error.to_string().contains("absolute"), "{error}");
    }

    #[test]
    fn beats_are_for_the_process_that_is_watched() {
        let own = std::process::id().to_string();
        let limit = |micros: Option<&str>, process: Option<&str>| {
            watchdog_limit(|name| {
                let value = if name == "WATCHDOG_USEC" { micros } else { process };
                value.map(str::to_owned)
            })
        };
        assert_eq!(limit(Some("3000000"), Some(&own)), Some(Duration::from_secs(3)));
        assert_eq!(limit(Some("5"), None), Some(Duration::from_micros(5)));
        for (micros, process) in
            [(None, None), (Some("0"), None), (Some("x"), None), (Some("5"), Some("1"))]
        {
            assert_eq!(limit(micros, process), None);
        }
    }
}
