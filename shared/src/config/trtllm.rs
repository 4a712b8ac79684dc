//! TensorRT-LLM's files as they are: `disagg_config.yaml` for the router, the worker YAML of `trtllm-serve
//! --config` for a worker.
//!
//! Every key of upstream is in one of the tables of [`keys`]: it is mapped to a field here, accepted without
//! effect, or not available yet. Anything else is a mistake. What a field means for a daemon is that daemon's
//! business.

mod disagg;
mod keys;
mod worker;

pub use disagg::{DisaggConfig, LoadBalancing, ServerSection};
pub use worker::WorkerSettings;
