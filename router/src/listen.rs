//! Listening sockets, bound before anything is started: a port in use is then an error with a name instead of a
//! panic somewhere in a service, nobody can take the port in between, and port 0 is known before it is used.
//!
//! Pingora finds "its" socket in the table of inherited ones, which is also how sockets survive an upgrade.

use std::fs::Permissions;
use std::io;
use std::net::TcpListener;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use async_trait::async_trait;
use baton_shared::config::net::{HostPort, Listen};
use pingora_core::apps::ServerApp;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::protocols::Stream;
use pingora_core::protocols::l4::stream::Stream as L4Stream;
use pingora_core::server::{ListenFds, RuntimeOpts, ShutdownWatch};
use pingora_core::services::Service as ServiceTrait;
use pingora_core::services::listening::Service;

/// Bytes Pingora sets aside to read from each connection; its default, 64 KiB, is most of an idle stream's memory. Heads
/// and bodies are read past it, into buffers of at least 4 KiB; only the look for a client that has left goes through it.
const READ_BUFFER: usize = 512;

/// Why nobody can be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on `{address}`: {reason}")]
pub struct ListenError {
    address: Listen,
    reason: io::Error,
}

/// A socket that clients can connect to already.
#[derive(Debug)]
pub struct Bound {
    /// As bound: with the port that was chosen where 0 was asked for.
    pub address: Listen,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Sockets that the service manager opened, with their names; each can be taken once.
#[derive(Debug, Default)]
pub struct Inherited(pub Vec<(String, OwnedFd)>);

impl Inherited {
    fn take(&mut self, wanted: &str) -> io::Result<OwnedFd> {
        let is_it = |(name, _): &(String, OwnedFd)| name == wanted;
        match self.0.iter().filter(|one| is_it(one)).count() {
            0 => Err(io::Error::other(format!(
                "no socket of this name was handed over (of {})",
                self.0.len()
            ))),
            1 => Ok(self.0.swap_remove(self.0.iter().position(is_it).expect("counted")).1),
            count => Err(io::Error::other(format!("{count} sockets of this name, one is needed"))),
        }
    }
}

impl Bound {
    /// Binds `address`, or takes it from those `inherited`; a name is bound at its first address that can be.
    ///
    /// # Errors
    /// If none can be: in use, not ours, not allowed, not handed over.
    pub fn bind(address: &Listen, inherited: &mut Inherited) -> Result<Self, ListenError> {
        let bound = match address {
            Listen::Tcp(at) => tcp(at),
            Listen::Unix(path) => unix(path),
            Listen::Inherited(name) => inherited.take(name).and_then(taken),
        };
        bound.map_err(|reason| ListenError { address: address.clone(), reason })
    }

    /// The same socket once more: it listens until both are closed.
    ///
    /// # Errors
    /// If the process may not have another descriptor.
    pub fn try_clone(&self) -> Result<Self, ListenError> {
        let socket = match &self.socket {
            Socket::Tcp(socket) => socket.try_clone().map(Socket::Tcp),
            Socket::Unix(socket) => socket.try_clone().map(Socket::Unix),
        };
        let address = self.address.clone();
        match socket {
            Ok(socket) => Ok(Self { address, socket }),
            Err(reason) => Err(ListenError { address, reason }),
        }
    }

    /// The next connection of the queue, as Pingora takes them.
    ///
    /// # Errors
    /// If there is none now.
    pub fn accept(&self) -> io::Result<Stream> {
        let mut stream: L4Stream = match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                tokio::net::TcpStream::from_std(stream)?.into()
            }
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                tokio::net::UnixStream::from_std(stream)?.into()
            }
        };
        stream.set_nodelay().map_err(io::Error::other)?;
        Ok(Box::new(stream))
    }

    fn into_fd(self) -> RawFd {
        match self.socket {
            Socket::Tcp(socket) => socket.into_raw_fd(),
            Socket::Unix(socket) => socket.into_raw_fd(),
        }
    }
}

fn tcp(at: &HostPort) -> io::Result<Bound> {
    let addresses = at.resolve()?;
    let socket = TcpListener::bind(addresses.as_slice())?;
    // A blocking socket would stall the accept loop.
    socket.set_nonblocking(true)?;
    let local = socket.local_addr()?;
    let address = Listen::Tcp(HostPort { host: local.ip().to_string(), port: local.port() });
    Ok(Bound { address, socket: Socket::Tcp(socket) })
}

/// A socket that listens already and does not block.
fn taken(socket: OwnedFd) -> io::Result<Bound> {
    let socket = TcpListener::from(socket);
    if let Ok(local) = socket.local_addr() {
        let address = Listen::Tcp(HostPort { host: local.ip().to_string(), port: local.port() });
        return Ok(Bound { address, socket: Socket::Tcp(socket) });
    }
    let socket = UnixListener::from(OwnedFd::from(socket));
    let local = socket.local_addr()?;
    let path = local
        .as_pathname()
        .ok_or_else(|| io::Error::other("neither TCP nor a Unix socket with a path"))?;
    Ok(Bound { address: Listen::Unix(path.to_owned()), socket: Socket::Unix(socket) })
}

fn unix(path: &Path) -> io::Result<Bound> {
    let socket = match UnixListener::bind(path) {
        // What a process that was killed left behind; a socket somebody serves is not touched.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    socket.set_nonblocking(true)?;
    // Who may connect is decided by the folder's permissions.
    std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    Ok(Bound { address: Listen::Unix(path.to_owned()), socket: Socket::Unix(socket) })
}

fn is_abandoned(path: &Path) -> bool {
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    UnixStream::connect(path).is_err_and(refused)
}

/// A Pingora service on a socket that is bound already.
pub struct Listening<A> {
    service: Service<A>,
    bound: Option<Bound>,
}

impl<A> Listening<A> {
    /// Lets `service` listen on `bound`.
    pub fn new(mut service: Service<A>, bound: Bound) -> Self {
        let config = match &bound.address {
            Listen::Unix(path) => {
                let config = ListenerConfig::uds(key(&bound.address));
                match std::fs::metadata(path) {
                    // Pingora sets a mode in any case: the one it has, which a socket unit may have chosen.
                    Ok(file) => config.permissions(file.permissions()),
                    Err(_) => config,
                }
            }
            Listen::Tcp(_) | Listen::Inherited(_) => ListenerConfig::tcp(key(&bound.address)),
        };
        let buffers = L4BufferSettings::default().read(READ_BUFFER);
        service.add_listener(config.l4_buffer(buffers));
        Self { service, bound: Some(bound) }
    }
}

/// The name under which Pingora looks for the socket.
fn key(address: &Listen) -> String {
    match address {
        Listen::Tcp(at) => at.to_string(),
        Listen::Unix(path) => path.to_string_lossy().into_owned(),
        Listen::Inherited(name) => name.clone(),
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServiceTrait for Listening<A> {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
    ) {
        if let (Some(fds), Some(bound)) = (&fds, self.bound.take()) {
            let name = key(&bound.address);
            fds.lock().add(name, bound.into_fd());
        }
        self.service.start_service(fds, shutdown, listeners_per_fd).await;
    }

    fn name(&self) -> &str {
        self.service.name()
    }

    fn threads(&self) -> Option<usize> {
        self.service.threads
    }

    fn runtime_opts_override(&self, global: &RuntimeOpts) -> Option<RuntimeOpts> {
        ServiceTrait::runtime_opts_override(&self.service, global)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        self.service.listen_addresses()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(address: &Listen) -> Result<Bound, ListenError> {
        Bound::bind(address, &mut Inherited::default())
    }

    #[test]
    fn a_socket_that_was_handed_over_is_taken_by_its_name_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("http.sock");
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().to_string();
        let unix = UnixListener::bind(&path).unwrap();
        let handed = [("admin", tcp.into()), ("http", unix.into())];
        let mut inherited =
            Inherited(handed.map(|(name, fd): (&str, OwnedFd)| (name.to_owned(), fd)).into());
        let mut take = |text: &str| Bound::bind(&text.parse().unwrap(), &mut inherited);
        assert_eq!(take("systemd:admin").unwrap().address.to_string(), port);
        assert_eq!(take("systemd:http").unwrap().address, Listen::Unix(path));
        let error = take("systemd:http").unwrap_err().to_string();
        assert!(error.contains("`systemd:http`") && error.contains("handed over"), "{error}");
    }

    #[test]
    fn a_port_in_use_is_named_and_port_zero_becomes_a_real_one() {
        let first = bind(&Listen::loopback(0)).unwrap();
        let Listen::Tcp(at) = &first.address else { panic!("not TCP") };
        assert_ne!(at.port, 0);
        let error = bind(&first.address).unwrap_err().to_string();
        assert!(error.contains(&format!("`{at}`")) && error.contains("in use"), "{error}");
    }

    #[test]
    fn an_abandoned_socket_file_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = Listen::Unix(folder.path().join("router.sock"));
        drop(bind(&path).unwrap());
        let served = bind(&path).unwrap();
        assert!(bind(&path).unwrap_err().to_string().contains("in use"));
        drop(served);
    }
}
