//! What Baton's router and worker agree on. No async runtime and no HTTP stack live here: only data, its
//! meaning, and pure functions over it.
//!
//! Reading order: [`id`] and [`role`] name things; [`wire`] is what travels over HTTP; [`kv`] describes
//! cached keys and values and the hand-over record; [`config`] reads files; [`text`] turns text into
//! tokens and back (feature `text`); [`telemetry`], [`os`] and [`notify`] are what both daemons need of the system;
//! [`metric`] and [`process`] are what they count by.

pub mod config;
mod expected;
pub mod id;
mod journal;
pub mod kv;
pub mod metric;
pub mod notify;
pub mod os;
pub mod process;
pub mod role;
pub mod telemetry;
#[cfg(feature = "text")]
pub mod text;
pub mod wire;
