//! Where a server is reached: a TCP address or a Unix socket.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// An address of either kind; cheap to copy.
#[derive(Clone, Copy, Debug)]
pub enum At {
    /// Host and port.
    Tcp(SocketAddr),
    /// A socket's file.
    Unix(&'static Path),
}

/// A connection of either kind.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

impl At {
    /// The socket at `path`, which is kept until the process ends.
    pub fn unix(path: PathBuf) -> Self {
        Self::Unix(Box::leak(path.into_boxed_path()))
    }

    /// A new connection.
    ///
    /// # Errors
    /// If nobody listens.
    pub async fn connect(self) -> io::Result<Box<dyn Wire>> {
        Ok(match self {
            Self::Tcp(address) => Box::new(TcpStream::connect(address).await?),
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

impl From<SocketAddr> for At {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

/// As in a `Host` header.
impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(_) => f.write_str("localhost"),
        }
    }
}
