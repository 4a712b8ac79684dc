//! What travels over HTTP: OpenAI's bodies, TensorRT-LLM's `disaggregated_params`, errors, and what signs them.

pub mod auth;
pub mod chat;
pub mod completion;
pub mod disagg;
pub mod error;
pub mod models;
pub mod request;
pub mod token_ids;
pub mod usage;
