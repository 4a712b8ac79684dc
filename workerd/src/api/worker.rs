//! What every handler shares: one worker's identity, limits and parts.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use baton_shared::id::{DisaggRequestId, IdMint, Incarnation, WorkerId};
use baton_shared::kv::block_hash::EventHashAlgorithm;
use baton_shared::role::Role;
use baton_shared::wire::auth::Keys;
use baton_shared::wire::error::ErrorCode;

use super::error::ApiError;
use crate::engine::EngineHandle;
use crate::handover::mover::MoverHandle;
use crate::metrics::Metrics;
use crate::text::Texts;

/// One worker, as its API sees it.
pub struct Worker {
    /// The way in to the engine.
    pub engine: EngineHandle,
    /// Tokenizer and template.
    pub texts: Arc<dyn Texts>,
    /// Names clients may use for the model, at least one.
    pub names: Vec<String>,
    /// What it is for.
    pub role: Role,
    /// Who it is in records.
    pub id: WorkerId,
    /// Where peers reach it, `host:port`.
    pub address: String,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Checks and signs what comes from and goes to peers.
    pub keys: Keys,
    /// What makes two workers' caches the same.
    pub fingerprint: [u8; 32],
    /// What fits.
    pub limits: Limits,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Fetches blocks; knows which peers need not be asked who they are.
    pub mover: MoverHandle,
    /// Ids for routers that send none.
    pub mint: IdMint,
    /// Unix seconds of its start.
    pub started: u64,
    /// How events of the prefix cache name blocks.
    pub event_hash: EventHashAlgorithm,
}

/// What a worker can hold, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, prompt and output together.
    pub max_len: u32,
    /// All blocks of the pool.
    pub pool_tokens: u32,
    /// What leases may hold.
    pub leasable_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
}

impl Worker {
    /// Refuses a model that is not served here.
    ///
    /// # Errors
    /// [`ErrorCode::ModelNotFound`].
    pub fn check_model(&self, name: &str) -> Result<(), ApiError> {
        if self.names.iter().any(|served| served == name) {
            return Ok(());
        }
        let shown: String = name.chars().take(100).collect();
        let served = self.names.join("`, `");
        let rule = format!("= `{shown}` is not served here, `{served}` is");
        Err(ApiError::member("model", rule).with_code(ErrorCode::ModelNotFound))
    }

    /// An id for a request that has none.
    pub fn mint_request(&self) -> DisaggRequestId {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.mint.next(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Unix seconds now.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
