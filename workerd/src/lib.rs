//! `baton-workerd`: one inference daemon.
//!
//! Arrows: `api → engine → {kv, backend}`; `engine → handover → {kv, Transport}`; `backend`, `kv` and `handover`
//! know nothing of HTTP. Reading order: [`engine`] (the loop), [`kv`] (whose blocks), [`backend`] (what a step
//! computes), [`handover`] (how blocks move), [`api`] (what a client sees).

pub mod api;
pub mod assemble;
pub mod backend;
pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod failpoint;
pub mod gpu_usage;
pub mod handover;
pub mod kv;
pub mod log_level;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod text;
