//! The engine thread's start and life.

use std::sync::Arc;

use baton_shared::id::Incarnation;

use super::{Door, EngineConfig, Puller};
use crate::backend::Backend;
use crate::handover::PeerAddress;
use crate::kv::region::EpochPage;

/// What the engine owns or speaks through.
pub struct Parts {
    /// Computes; its pool is what the block ids mean.
    pub backend: Box<dyn Backend>,
    /// Device of the pool, for records: `None` = host memory.
    pub device: Option<u32>,
    /// Registered with the transport that serves reads. One word for each block is always enough.
    pub epochs: EpochPage,
    /// How readers reach the pool and the epoch page.
    pub serve: PeerAddress,
    /// This start of the process.
    pub incarnation: Incarnation,
    /// Fetches blocks.
    pub puller: Box<dyn Puller>,
}

/// An engine that has a handle but no thread yet.
pub struct EngineSeat {
    door: Arc<Door>,
    config: EngineConfig,
}

impl EngineSeat {
    pub(super) fn new(door: Arc<Door>, config: EngineConfig) -> Self {
        Self { door, config }
    }
}
