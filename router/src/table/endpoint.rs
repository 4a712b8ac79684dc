//! Where a worker is: `host:port` or a Unix socket. Decides how a `url` is spelled; connecting is the client's.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A worker's address as configured, before name resolution.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Name or IP literal (without brackets) and port.
    Tcp {
        /// Name, IPv4 or IPv6.
        host: String,
        /// Not zero.
        port: u16,
    },
    /// Absolute path of a stream socket.
    Unix(PathBuf),
}

/// A `url` that is not one of the spellings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEndpoint {
    /// Not understood.
    #[error("`{0}` is not `host:port`, `http://host:port` or `unix:/path`")]
    Form(String),
    /// TLS towards workers.
    #[error("`{0}`: https towards workers is not available yet")]
    Tls(String),
}

impl Endpoint {
    /// What goes into the `Host` header.
    pub fn authority(&self) -> String {
        match self {
            Self::Tcp { .. } => self.to_string(),
            Self::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(url: &str) -> Result<Self, InvalidEndpoint> {
        let bad = || InvalidEndpoint::Form(url.to_owned());
        if let Some(path) = url.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() { Ok(Self::Unix(path)) } else { Err(bad()) };
        }
        if url.starts_with("https://") {
            return Err(InvalidEndpoint::Tls(url.to_owned()));
        }
        let rest = url.strip_prefix("http://").unwrap_or(url);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match bracketed {
            Some(v6) if v6.parse::<std::net::Ipv6Addr>().is_ok() => v6,
            Some(_) => return Err(bad()),
            None => host,
        };
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        if host.is_empty() || (bracketed.is_none() && !host.bytes().all(legal)) {
            return Err(bad());
        }
        match port.parse() {
            Ok(port) if port != 0 => Ok(Self::Tcp { host: host.to_owned(), port }),
            Ok(_) | Err(_) => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spellings_of_one_address_are_one_endpoint() {
        let plain: Endpoint = "localhost:8001".parse().unwrap();
        assert_eq!("http://localhost:8001/".parse(), Ok(plain.clone()));
        assert_eq!(plain.to_string(), "localhost:8001");
        let v6: Endpoint = "[::1]:8001".parse().unwrap();
        assert_eq!(v6, Endpoint::Tcp { host: "::1".to_owned(), port: 8001 });
        assert_eq!(v6.authority(), "[::1]:8001");
        let unix: Endpoint = "unix:/run/w.sock".parse().unwrap();
        assert_eq!((unix.to_string().as_str(), unix.authority().as_str()), ("unix:/run/w.sock", "localhost"));
    }

    #[test]
    fn anything_else_is_refused_with_the_url_in_the_message() {
        for url in ["", "localhost", "localhost:0", "localhost:99999", "::1:8001", "a b:1", "unix:rel", "http://h:1/v1", "[x]:1"] {
            let error = url.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{url}`")), "{error}");
        }
        assert!(matches!("https://h:1".parse::<Endpoint>(), Err(InvalidEndpoint::Tls(_))));
    }
}
