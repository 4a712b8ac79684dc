//! `/kv_cache_events`: what entered and left the prefix cache, as TensorRT-LLM writes it; each event is given out once.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use baton_shared::kv::block_hash::EventHashAlgorithm;
use serde_json::{Value, json};

use super::worker::Worker;
use crate::kv::events::{KvChange, KvEvent, StoredBlock};

/// Upstream's priority of blocks nobody gave one.
const PRIORITY: u32 = 35;
/// Device memory: the only level there is.
const LEVEL: u32 = 0;

/// `GET` and `POST /kv_cache_events`
pub async fn kv_cache_events(State(worker): State<Arc<Worker>>) -> Json<Vec<Value>> {
    let events = worker.engine.take_events();
    let shape = Shape { algorithm: worker.event_hash, window: worker.limits.max_len };
    Json(events.into_iter().map(|event| shape.event(event)).collect())
}

/// What all events say alike.
struct Shape {
    algorithm: EventHashAlgorithm,
    /// Positions attention looks back at most.
    window: u32,
}

impl Shape {
    fn event(&self, event: KvEvent) -> Value {
        let KvEvent { id, change } = event;
        let data = match change {
            KvChange::Created { blocks } => {
                json!({ "type": "created", "num_blocks_per_cache_level": [blocks, 0] })
            }
            KvChange::Stored { parent, blocks } => {
                let parent = parent.map(|parent| self.algorithm.wire(parent));
                let blocks: Vec<Value> =
                    blocks.into_iter().map(|block| self.block(block)).collect();
                json!({ "type": "stored", "parent_hash": parent, "blocks": blocks })
            }
            KvChange::Removed(hashes) => {
                let hashes: Vec<Value> =
                    hashes.into_iter().map(|hash| self.algorithm.wire(hash)).collect();
                json!({ "type": "removed", "block_hashes": hashes })
            }
        };
        json!({
            "event_id": id,
            "data": data,
            "window_size": self.window,
            "hash_algo": self.algorithm.as_str(),
        })
    }

    fn block(&self, block: StoredBlock) -> Value {
        let StoredBlock { hash, tokens } = block;
        let token = |id| json!({ "type": "unique_token", "token_id": id, "token_extra_id": 0 });
        let tokens: Vec<Value> = tokens.into_iter().map(token).collect();
        json!({
            "type": "stored_block",
            "block_hash": self.algorithm.wire(hash),
            "tokens": tokens,
            "cache_level": LEVEL,
            "priority": PRIORITY,
        })
    }
}

#[cfg(test)]
mod tests {
    use baton_shared::kv::block_hash::EventHash;

    use super::*;

    #[test]
    fn events_are_shaped_as_upstreams() {
        let shape = Shape { algorithm: EventHashAlgorithm::V1BlockKey, window: 4096 };
        let key = EventHash::Key(639_116_666_879_492);
        let blocks = vec![StoredBlock { hash: key, tokens: vec![1000] }];
        let common = |id: u64, data: Value| json!({"event_id": id, "data": data, "window_size": 4096, "hash_algo": "v1_block_key"});
        for (id, change, data) in [
            (
                0,
                KvChange::Created { blocks: 101_230 },
                json!({"type": "created", "num_blocks_per_cache_level": [101_230, 0]}),
            ),
            (
                1,
                KvChange::Stored { parent: None, blocks },
                json!({"type": "stored", "parent_hash": null, "blocks": [{
                    "type": "stored_block", "block_hash": 639_116_666_879_492_u64,
                    "tokens": [{"type": "unique_token", "token_id": 1000, "token_extra_id": 0}],
                    "cache_level": 0, "priority": 35}]}),
            ),
            (
                2,
                KvChange::Removed(vec![key]),
                json!({"type": "removed", "block_hashes": [639_116_666_879_492_u64]}),
            ),
        ] {
            assert_eq!(shape.event(KvEvent { id, change }), common(id, data));
        }
    }
}
