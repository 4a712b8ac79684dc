//! `/metrics`: what each of the last steps did, as TensorRT-LLM's iteration statistics; each step is given out once.
//!
//! Keys of what does not exist here are there as well, `null` or 0, since readers of upstream's look for them.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use baton_shared::text::strftime::strftime;
use serde_json::{Value, json};

use super::worker::Worker;
use crate::engine::iterations::Iteration;
use crate::kv::pool::{BlockCounts, CacheCounts};

/// `GET /metrics`
pub async fn iterations(State(worker): State<Arc<Worker>>) -> Json<Vec<Value>> {
    let steps = worker.engine.take_iterations();
    Json(steps.iter().map(|step| entry(step, worker.limits.block_tokens)).collect())
}

fn entry(step: &Iteration, block_tokens: u32) -> Value {
    let Iteration {
        number,
        at,
        latency,
        admitted,
        waited,
        active,
        queued,
        completed,
        contexts,
        generations,
        paused,
        context_tokens,
        blocks,
        cache,
        missed,
        max_sequences,
        max_tokens,
    } = *step;
    json!({
        "timestamp": timestamp(at),
        "iter": number,
        "iterLatencyMS": latency.as_secs_f64() * 1e3,
        "newActiveRequestsQueueLatencyMS": waited.as_secs_f64() * 1e3,
        "numNewActiveRequests": admitted,
        "numActiveRequests": active,
        "numQueuedRequests": queued,
        "numCompletedRequests": completed,
        "maxNumActiveRequests": max_sequences,
        "maxBatchSizeStatic": max_sequences,
        "maxBatchSizeTunerRecommended": 0,
        "maxBatchSizeRuntime": max_sequences,
        "maxNumTokensStatic": max_tokens,
        "maxNumTokensTunerRecommended": 0,
        "maxNumTokensRuntime": max_tokens,
        "gpuMemUsage": 0,
        "cpuMemUsage": 0,
        "pinnedMemUsage": 0,
        "kvCacheStats": kv_cache(&blocks, &cache, missed, block_tokens),
        "crossKvCacheStats": null,
        "staticBatchingStats": null,
        "inflightBatchingStats": {
            "numScheduledRequests": contexts + generations,
            "numContextRequests": contexts,
            "numGenRequests": generations,
            "numPausedRequests": paused,
            "numCtxTokens": context_tokens,
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        },
        "specDecodingStats": null,
    })
}

fn kv_cache(blocks: &BlockCounts, cache: &CacheCounts, missed: u64, block_tokens: u32) -> Value {
    let BlockCounts { free, used, leased, in_flight, quarantined } = *blocks;
    let taken = used + leased + in_flight + quarantined;
    let CacheCounts { cached: _, reused, evicted: _, allocated } = *cache;
    let looked_for = reused + missed;
    let hit_rate = if looked_for == 0 { 0.0 } else { reused as f64 / looked_for as f64 };
    json!({
        "maxNumBlocks": free + taken,
        "freeNumBlocks": free,
        "usedNumBlocks": taken,
        "tokensPerBlock": block_tokens,
        "allocTotalBlocks": allocated + reused,
        "allocNewBlocks": allocated,
        "reusedBlocks": reused,
        "missedBlocks": missed,
        "cacheHitRate": hit_rate,
    })
}

/// `MM-DD-YYYY HH:MM:SS.µµµµµµ`, in UTC.
fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = strftime("%m-%d-%Y %T", since.as_secs()).expect("it knows these directives");
    format!("{seconds}.{:06}", since.subsec_micros())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_step_has_the_keys_that_readers_of_upstreams_look_for() {
        let step = Iteration {
            number: 3,
            at: UNIX_EPOCH + Duration::from_micros(951_782_400_000_007),
            latency: Duration::from_millis(12),
            admitted: 2,
            waited: Duration::from_millis(5),
            active: 4,
            queued: 1,
            completed: 6,
            contexts: 2,
            generations: 2,
            paused: 1,
            context_tokens: 64,
            blocks: BlockCounts { free: 5, leased: 2, ..BlockCounts::default() },
            cache: CacheCounts { cached: 4, reused: 3, evicted: 0, allocated: 9 },
            missed: 1,
            max_sequences: 64,
            max_tokens: 128,
        };
        let shown = entry(&step, 32);
        assert_eq!(shown["timestamp"], "02-29-2000 00:00:00.000007");
        assert_eq!((&shown["iter"], &shown["iterLatencyMS"]), (&json!(3), &json!(12.0)));
        assert_eq!(shown["newActiveRequestsQueueLatencyMS"], 5.0);
        let cache = &shown["kvCacheStats"];
        assert_eq!((&cache["maxNumBlocks"], &cache["usedNumBlocks"]), (&json!(7), &json!(2)));
        assert_eq!(
            (&cache["allocTotalBlocks"], &cache["cacheHitRate"]),
            (&json!(12), &json!(0.75))
        );
        let batch = &shown["inflightBatchingStats"];
        assert_eq!(
            (&batch["numScheduledRequests"], &batch["numCtxTokens"]),
            (&json!(4), &json!(64))
        );
        for key in [
            "cpuMemUsage",
            "gpuMemUsage",
            "pinnedMemUsage",
            "maxBatchSizeRuntime",
            "maxBatchSizeStatic",
            "maxBatchSizeTunerRecommended",
            "maxNumActiveRequests",
            "maxNumTokensRuntime",
            "maxNumTokensStatic",
            "maxNumTokensTunerRecommended",
            "numActiveRequests",
            "numCompletedRequests",
            "numNewActiveRequests",
            "numQueuedRequests",
            "staticBatchingStats",
        ] {
            assert!(shown.get(key).is_some(), "{key}");
        }
    }
}
