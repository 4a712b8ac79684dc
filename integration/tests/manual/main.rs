//! The documentation, held against what it speaks of: reference pages, links, and the commands it tells people to run.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod blocks;
mod commands;
mod configuration;
mod environment;
mod errors;
mod fresh_root;
mod http;
mod links;
mod page;
mod sources;

use std::time::Duration;

/// Loading a model on a busy machine.
const READY: Duration = Duration::from_secs(180);
/// An idle daemon ends at once.
const STOP: Duration = Duration::from_secs(20);
