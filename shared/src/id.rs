//! A type for each identity, and how request ids are minted.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Position of a block in one worker's pool; meaningless on any other worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockIndex(pub u32);

/// The id both phases of a request share (`disagg_request_id`), in `[2^40, 2^63 - 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DisaggRequestId(pub u64);

impl fmt::Display for DisaggRequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which start of a worker process this is: 16 random bytes, drawn once.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub [u8; 16]);

/// Names one lease; whoever knows it may end the lease, so it is 128 random bits and never logged.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub [u8; 16]);

impl Incarnation {
    /// A fresh one.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl LeaseId {
    /// A fresh one, from a cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incarnation({self})")
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseId(..)")
    }
}

/// A worker's name: the configured one, else its address. `[A-Za-z0-9._:\[\]/-]`, 1 to 255 characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WorkerId(String);

/// A name that [`WorkerId`] does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("worker name `{0}` is not 1 to 255 characters of A-Z a-z 0-9 . _ : [ ] / -")]
pub struct InvalidWorkerId(pub String);

impl WorkerId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for WorkerId {
    type Err = InvalidWorkerId;

    fn from_str(name: &str) -> Result<Self, InvalidWorkerId> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._:[]/-".contains(&b);
        if (1..=255).contains(&name.len()) && name.bytes().all(legal) {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidWorkerId(name.to_owned()))
        }
    }
}

impl TryFrom<String> for WorkerId {
    type Error = InvalidWorkerId;

    fn try_from(name: String) -> Result<Self, InvalidWorkerId> {
        name.parse()
    }
}

impl From<WorkerId> for String {
    fn from(id: WorkerId) -> Self {
        id.0
    }
}

/// Mints [`DisaggRequestId`]s as TensorRT-LLM main does: `0 | ms(39) | node(8) | process(6) | counter(10)`,
/// folded into `[2^40, 2^63 - 1)` (ids below 2^40 are a worker's own).
#[derive(Debug)]
pub struct IdMint {
    node: u8,
    process: u8,
    counter: AtomicU64,
}

impl IdMint {
    /// `process` counts modulo 64.
    pub fn new(node: u8, process: u8) -> Self {
        Self { node, process: process & 63, counter: AtomicU64::new(0) }
    }

    /// The next id; `now_ms` is any millisecond clock that rises. Unique for 1,024 ids a millisecond.
    pub fn next(&self, now_ms: u64) -> DisaggRequestId {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) & 0x3ff;
        let raw = ((now_ms & ((1 << 39) - 1)) << 24)
            | (u64::from(self.node) << 16)
            | (u64::from(self.process) << 10)
            | counter;
        const LOW: u64 = 1 << 40;
        const HIGH: u64 = (1 << 63) - 1;
        DisaggRequestId(raw % (HIGH - LOW) + LOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minted_ids_differ_and_stay_out_of_the_local_range() {
        let mint = IdMint::new(255, 63);
        let ids: std::collections::HashSet<_> =
            (0..1024).map(|_| mint.next((1 << 39) - 1)).collect();
        assert_eq!(ids.len(), 1024);
        assert!(ids.iter().all(|id| ((1 << 40)..(1 << 63) - 1).contains(&id.0)));
    }

    #[test]
    fn a_worker_name_with_a_space_or_without_characters_is_refused() {
        assert!("ctx-a:8001".parse::<WorkerId>().is_ok());
        for bad in ["", "a b", "ü", &"x".repeat(256)] {
            assert_eq!(bad.parse::<WorkerId>(), Err(InvalidWorkerId(bad.to_owned())));
        }
    }
}
