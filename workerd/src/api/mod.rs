//! What a client sees: OpenAI's endpoints, and what routers and operators ask of a worker.

pub mod error;
