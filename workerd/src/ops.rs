//! Tells a service manager how we are: `sd_notify` without its library.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The way to a service manager; none, where the process was started by hand.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// `address` is `$NOTIFY_SOCKET`: a path, or `@` and a name.
    ///
    /// # Errors
    /// If that is no address.
    pub fn new(address: Option<&OsStr>) -> io::Result<Self> {
        let Some(address) = address.filter(|address| !address.is_empty()) else {
            return Ok(Self { socket: None });
        };
        let address = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        Ok(Self { socket: Some((UnixDatagram::unbound()?, address)) })
    }

    /// We accept work.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// We finish what runs.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, state: &str) {
        let Some((socket, address)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::warn!(%error, state, "the service manager does not hear us");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_hears_ready_and_stopping() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str())).unwrap();
        notifier.ready();
        notifier.stopping();
        let mut text = [0; 64];
        for expected in ["READY=1", "STOPPING=1"] {
            let count = manager.recv(&mut text).unwrap();
            assert_eq!(&text[..count], expected.as_bytes());
        }
    }

    #[test]
    fn without_a_service_manager_nothing_is_said() {
        Notifier::new(None).unwrap().ready();
        Notifier::new(Some(OsStr::new(""))).unwrap().stopping();
    }
}
