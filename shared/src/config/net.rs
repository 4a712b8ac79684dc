//! Addresses in configuration: where a daemon listens, and where a worker is reached.
//!
//! Decides the spelling only. Names are resolved by whoever connects or binds, as an address may change while
//! a daemon runs.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A host name or IP address with a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    /// 0 = any free one; only where a daemon listens.
    pub port: u16,
}

/// Where a daemon listens: `127.0.0.1:8001`, `localhost:8001`, `[::1]:8001`, `unix:/path`, `systemd:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Listen {
    /// TCP.
    Tcp(HostPort),
    /// A Unix socket.
    Unix(PathBuf),
    /// The socket of this name that the service manager opened (`FileDescriptorName=`).
    Inherited(String),
}

/// Where a worker is reached: `host:port`, `http://host:port`, `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// Plain HTTP over TCP.
    Tcp(HostPort),
    /// Plain HTTP over a Unix socket.
    Unix(PathBuf),
}

/// Why an address is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidAddress(String);

impl HostPort {
    /// Whether only this machine can reach it. A name other than `localhost` counts as reachable from outside.
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(address) => address.is_loopback(),
            Err(_) => self.host.eq_ignore_ascii_case("localhost"),
        }
    }

    /// All addresses the name has now, IPv4 first. Blocks while a name server is asked.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let mut all: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        all.sort_by_key(SocketAddr::is_ipv6);
        Ok(all)
    }
}

impl Listen {
    /// Whether only this machine can reach it. An inherited socket counts as reachable from outside.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Tcp(address) => address.is_loopback(),
            Self::Unix(_) => true,
            Self::Inherited(_) => false,
        }
    }

    /// A TCP address of this machine; for defaults.
    pub fn loopback(port: u16) -> Self {
        Self::Tcp(HostPort { host: "127.0.0.1".to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Inherited(name) => write!(f, "systemd:{name}"),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for HostPort {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let refuse =
            || InvalidAddress("must be `host:port`, as in `127.0.0.1:8001` or `[::1]:8001`".into());
        let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(six) => match six.parse::<std::net::Ipv6Addr>() {
                Ok(_) => six,
                Err(_) => return Err(refuse()),
            },
            None if is_host_name(host) => host,
            None => return Err(refuse()),
        };
        let all_digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        match port.parse() {
            Ok(port) if all_digits => Ok(Self { host: host.to_owned(), port }),
            Ok(_) | Err(_) => {
                Err(InvalidAddress(format!("port `{port}` must be a whole number up to 65535")))
            }
        }
    }
}

/// Letters, digits, `-`, `_` and `.`: every IPv4 address and every name a resolver takes.
fn is_host_name(host: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=253).contains(&host.len()) && host.bytes().all(legal)
}

/// The path of `unix:/path`, if the text starts so.
fn unix_path(text: &str) -> Option<Result<PathBuf, InvalidAddress>> {
    // The kernel's limit for a socket's path, with its closing zero.
    const LONGEST: usize = 107;
    let path = text.strip_prefix("unix:")?;
    let path = path.strip_prefix("//").unwrap_or(path);
    Some(if !path.starts_with('/') {
        Err(InvalidAddress(
            "a Unix socket must be an absolute path, as in `unix:/run/x.sock`".into(),
        ))
    } else if path.len() > LONGEST {
        Err(InvalidAddress(format!("a Unix socket's path may have at most {LONGEST} bytes")))
    } else {
        Ok(PathBuf::from(path))
    })
}

impl FromStr for Listen {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if let Some(name) = text.strip_prefix("systemd:") {
            // What `FileDescriptorName=` takes.
            let legal = |b: u8| (b' '..=b'~').contains(&b) && b != b':';
            if !(1..=255).contains(&name.len()) || !name.bytes().all(legal) {
                let rule = "an inherited socket must be named as in `systemd:http`";
                return Err(InvalidAddress(rule.into()));
            }
            return Ok(Self::Inherited(name.to_owned()));
        }
        match unix_path(text) {
            Some(path) => path.map(Self::Unix),
            None => text.parse().map(Self::Tcp),
        }
    }
}

impl FromStr for Endpoint {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if let Some(path) = unix_path(text) {
            return path.map(Self::Unix);
        }
        if text.starts_with("https://") {
            return Err(InvalidAddress("`https://` towards a worker is not available yet".into()));
        }
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let address: HostPort = rest.strip_suffix('/').unwrap_or(rest).parse()?;
        if address.port == 0 {
            return Err(InvalidAddress("port 0 cannot be reached".into()));
        }
        Ok(Self::Tcp(address))
    }
}

impl TryFrom<String> for Listen {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

impl TryFrom<String> for Endpoint {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.to_string()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_as_they_were_written() {
        let all =
            ["127.0.0.1:8001", "localhost:0", "[::1]:8001", "unix:/run/baton.sock", "systemd:http"];
        for text in all {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["ctx-a.example:80", "unix:/run/w.sock", "[fe80::1]:9"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_worker_url_may_carry_its_scheme() {
        let bare: Endpoint = "localhost:8001".parse().unwrap();
        assert_eq!("http://localhost:8001".parse(), Ok(bare.clone()));
        assert_eq!("http://localhost:8001/".parse(), Ok(bare));
    }

    #[test]
    fn malformed_addresses_are_refused() {
        let bad = ["", "localhost", ":80", "a b:80", "h:", "h:+1", "h:70000", "::1:80", "[x]:80"];
        for text in bad {
            assert!(text.parse::<Listen>().is_err(), "{text}");
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        for text in ["https://h:1", "h:0", "http://h:1/path", "http://h", "ftp://h:1", "unix:x"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        for text in ["systemd:", "systemd:a:b", "systemd:a\n"] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        for text in ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/x"] {
            assert!(text.parse::<Listen>().unwrap().is_loopback(), "{text}");
        }
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example:1", "systemd:http"] {
            assert!(!text.parse::<Listen>().unwrap().is_loopback(), "{text}");
        }
    }
}
