//! Clients that leave: whatever they had is free within a second and a step, on all workers together.

mod phases;

use std::time::Duration;

use baton_integration::cluster::set;
use serde_json::json;

use crate::support::{all_free, complete, note, start, token_ids};
use crate::tiny;

/// Longest step of a tiny model that computes at most [`STEP_TOKENS`] tokens, a failpoint's 20 ms included, on a
/// machine that has other things to do.
const STEP: Duration = Duration::from_millis(100);
const STEP_TOKENS: i64 = 64;
/// After the last client left.
const FREE_WITHIN: Duration = Duration::from_secs(1).saturating_add(STEP);

#[tokio::test]
async fn two_hundred_clients_that_leave_at_random_moments_leave_nothing_behind() {
    let model = tiny::model(4);
    let mut worker = toml::Table::new();
    set(&mut worker, &["engine", "max_batch_tokens"], STEP_TOKENS);
    let running = start(&model.path, 1, 1, worker).await;
    let client = running.cluster.client();
    let mut leaving = tokio::task::JoinSet::new();
    for index in 0..200u64 {
        let request = json!({"model": model.name, "stream": index % 2 == 0, "ignore_eos": true,
            "prompt": token_ids(index, 10 + (index as usize * 7) % 400, model.vocab),
            "max_tokens": 200, "temperature": 0});
        // Spread over all phases: queued, context, between the hops, pull, stream.
        let after = Duration::from_micros(token_ids(index + 1000, 1, 150_000)[0]);
        leaving.spawn(async move {
            let whole = async {
                let mut answer = client.stream("/v1/completions", &request).await?;
                while answer.event().await?.is_some() {}
                anyhow::Ok(())
            };
            drop(tokio::time::timeout(after, whole).await);
        });
        if index % 8 == 7 {
            while leaving.len() > 8 {
                leaving.join_next().await;
            }
        }
    }
    while leaving.join_next().await.is_some() {}
    let free_after = all_free(&running.cluster, FREE_WITHIN).await;
    note(format_args!("free after {free_after:?}"));
    let request = json!({"model": model.name, "prompt": [1, 2, 3], "max_tokens": 4});
    assert_eq!(complete(client, &request, false).await.usage[0], 3, "it still serves");
    running.stop();
}
