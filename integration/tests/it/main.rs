//! End-to-end tests of the real binaries; a module a topic.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod checkpoints;
mod engine_golden;
mod golden;
