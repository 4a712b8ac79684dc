//! The whole path: who computed, what moved, and that nothing is left behind.

use std::time::Duration;

use baton_integration::files;
use serde_json::json;

use crate::support::{all_free, complete, metrics, start};

/// 2 x 30 layers x 3 heads x 64 elements x 2 bytes x 32 tokens.
const SMOLLM2_BLOCK: f64 = 737_280.0;

#[tokio::test]
async fn the_context_worker_computes_the_prompt_and_the_generation_worker_only_pulls_it() {
    let model = files::demo_model().unwrap();
    let running = start(&model, 1, 1, toml::Table::new()).await;
    let client = running.cluster.client();
    let prompt = "The quick brown fox jumps over the lazy dog. ".repeat(12);
    let request = json!({"model": "SmolLM2-135M-Instruct", "prompt": prompt,
        "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let answer = complete(client, &request, true).await;
    let [prompt_tokens, completion, _] = answer.usage;
    assert_eq!(completion, 8);
    let blocks = prompt_tokens.div_ceil(32) as f64;
    assert!(blocks > 3.0, "{prompt_tokens} prompt tokens");

    let [context, generation] = &running.cluster.workers[..] else { panic!("two workers") };
    let (context, generation) = (metrics(context).await, metrics(generation).await);
    let tokens = |of: &baton_integration::scrape::Metrics, source| {
        of.sum("baton_worker_prompt_tokens_total", &[("source", source)])
    };
    assert_eq!(tokens(&context, "computed"), prompt_tokens as f64);
    assert_eq!(tokens(&generation, "computed"), 0.0);
    assert_eq!(tokens(&generation, "pulled"), prompt_tokens as f64);
    let moved = generation.sum("baton_worker_handover_bytes_total", &[]);
    assert_eq!(moved, blocks * SMOLLM2_BLOCK);
    let descriptors = generation.sum("baton_worker_handover_descriptors_total", &[]);
    // A fresh pool gives neighbours, so all of it is one run.
    let bound = 1.0 + (moved / f64::from(16 << 20)).ceil();
    assert!((1.0..=bound).contains(&descriptors), "{descriptors} descriptors");
    assert_eq!(generation.sum("baton_worker_handover_failures_total", &[]), 0.0);
    all_free(&running.cluster, Duration::from_secs(2)).await;
    running.stop();
}
