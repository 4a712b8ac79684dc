//! Logs, and what ties the logs of several daemons together: the request id and W3C's `traceparent`.
//!
//! Logs go to standard error, one event a line, with its priority in front where that is the journal. Which id a request has is decided where it enters; every later
//! hop takes it over.

use std::fmt;
use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt as log_format, reload};

use crate::journal::Lines;

/// `log.format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON lines otherwise.
    #[default]
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `log.level` cannot be read.
    #[error(
        "`{level}` is not a log level: must be error, warn, info, debug, trace or off, or `info,target=debug`"
    )]
    Level {
        /// As given.
        level: String,
    },
    /// Another subscriber is there already, or is gone.
    #[error("logs were set up before")]
    Twice,
}

/// Changes the level of a running process.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Starts logging to standard error.
///
/// # Errors
/// If `level` is none, or a subscriber is there already.
pub fn init(format: LogFormat, level: &str) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let is_terminal = std::io::stderr().is_terminal();
    let as_json = match format {
        LogFormat::Auto => !is_terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let lines = log_format::layer().with_writer(Lines::to_stderr()).with_ansi(is_terminal);
    let lines = if as_json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.boxed()
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    subscriber.try_init().map_err(|_| LogError::Twice)?;
    Ok(LogHandle { filter: handle })
}

impl LogHandle {
    /// Logs at `level` from now on.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let filter = filter(level)?;
        self.filter.reload(filter).map_err(|_| LogError::Twice)
    }
}

/// Whether `level` can be given to [`init`].
pub fn check_level(level: &str) -> Result<(), LogError> {
    filter(level).map(|_| ())
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    // A bare word that is no level would be read as a target that logs everything.
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let refuse = || LogError::Level { level: level.to_owned() };
    let is_plain = |part: &str| LEVELS.contains(&part.trim().to_ascii_lowercase().as_str());
    let is_known = |part: &str| part.contains('=') || is_plain(part);
    if !level.split(',').all(is_known) {
        return Err(refuse());
    }
    // The bindings call every expected failure an error; what matters of them is in our own lines.
    EnvFilter::try_new(format!("nixl_sys=off,{level}")).map_err(|_| refuse())
}

/// Names one request in the logs of all daemons it passes: `x-request-id`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// Longest id taken over from a client.
    pub const LONGEST: usize = 128;

    /// The client's id if it is 1 to 128 harmless characters.
    pub fn accept(given: &str) -> Option<Self> {
        Self::is_sane(given).then(|| Self(given.to_owned()))
    }

    /// The client's id if it is 1 to 128 harmless characters, else a fresh one.
    pub fn accept_or_mint(given: Option<&str>) -> Self {
        given.and_then(Self::accept).unwrap_or_else(Self::mint)
    }

    /// A fresh one: 32 random hexadecimal digits.
    pub fn mint() -> Self {
        Self(std::str::from_utf8(&hex::<32>(rand::random())).unwrap_or_default().to_owned())
    }

    /// As it goes into the header.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_sane(id: &str) -> bool {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&b);
        (1..=Self::LONGEST).contains(&id.len()) && id.bytes().all(legal)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// W3C trace context, level 1: which trace a request belongs to, and which span caused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// The whole trace; not zero.
    pub trace_id: u128,
    /// The span that caused this one; not zero.
    pub parent_id: u64,
    /// Whether the caller records it.
    pub sampled: bool,
}

impl TraceParent {
    /// Reads the header; `None` where the standard says to start a trace of one's own.
    pub fn parse(header: &str) -> Option<Self> {
        const LENGTH: usize = 55;
        let header = header.trim();
        let lower_hex = |part: &str, digits: usize| {
            let legal = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
            (part.len() == digits && part.bytes().all(legal)).then_some(())
        };
        let mut parts = header.split('-');
        let (version, trace, parent, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        lower_hex(version, 2)?;
        lower_hex(trace, 32)?;
        lower_hex(parent, 16)?;
        lower_hex(flags, 2)?;
        // A later version may append parts; version 0 may not, and 255 is never one.
        if version == "ff" || (version == "00" && header.len() != LENGTH) {
            return None;
        }
        let parsed = Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            parent_id: u64::from_str_radix(parent, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        (parsed.trace_id != 0 && parsed.parent_id != 0).then_some(parsed)
    }

    /// A trace of our own that nobody records yet.
    pub fn fresh() -> Self {
        Self { trace_id: rand::random::<u128>().max(1), parent_id: random_span(), sampled: false }
    }

    /// What to send on: same trace, our own span as the cause.
    pub fn child(self) -> Self {
        Self { parent_id: random_span(), ..self }
    }
}

/// The last `N` hexadecimal digits. Every request is given ids, so without the detours of `{:x}`.
fn hex<const N: usize>(mut number: u128) -> [u8; N] {
    let mut digits = [0; N];
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
    digits
}

fn random_span() -> u64 {
    rand::random::<u64>().max(1)
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = *b"00-................................-................-00";
        text[3..35].copy_from_slice(&hex::<32>(self.trace_id));
        text[36..52].copy_from_slice(&hex::<16>(self.parent_id.into()));
        text[54] += u8::from(self.sampled);
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

/// What was built: version, and the commit where the build knew it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BuildInfo {
    /// Of the workspace.
    pub version: &'static str,
    /// `BATON_GIT_HASH` at build time.
    pub commit: Option<&'static str>,
}

/// This build.
pub const BUILD: BuildInfo =
    BuildInfo { version: env!("CARGO_PKG_VERSION"), commit: option_env!("BATON_GIT_HASH") };

impl fmt::Display for BuildInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.commit {
            Some(commit) => write!(f, "{} ({commit})", self.version),
            None => f.write_str(self.version),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_trace_header_is_printed_as_it_was_read() {
        let parent = TraceParent::parse(HEADER).unwrap();
        assert_eq!(parent.to_string(), HEADER);
        assert!(parent.sampled);
    }

    #[test]
    fn a_child_keeps_the_trace_and_has_its_own_span() {
        let parent = TraceParent::parse(HEADER).unwrap();
        let child = parent.child();
        assert_eq!((child.trace_id, child.sampled), (parent.trace_id, true));
        assert_ne!(child.parent_id, parent.parent_id);
        assert_eq!(
            TraceParent::parse(&TraceParent::fresh().to_string()).map(|t| t.sampled),
            Some(false)
        );
    }

    #[test]
    fn malformed_trace_headers_are_left_behind() {
        for bad in [
            "",
            "00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra";
        assert!(TraceParent::parse(later).is_some());
    }

    #[test]
    fn a_clients_request_id_is_kept_unless_it_could_do_harm() {
        assert_eq!(RequestId::accept_or_mint(Some("abc-1:2/3")).as_str(), "abc-1:2/3");
        let long = "x".repeat(129);
        for bad in [None, Some(""), Some("a b"), Some("a\r\nb"), Some("ü"), Some(long.as_str())] {
            let minted = RequestId::accept_or_mint(bad);
            assert_eq!(minted.as_str().len(), 32);
        }
        assert_ne!(RequestId::mint(), RequestId::mint());
    }

    #[test]
    fn only_levels_and_directives_are_log_levels() {
        for good in ["info", "WARN", "off", "info,baton_router=debug"] {
            assert!(check_level(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "info,loud", "baton_router=loud"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
