//! Clients that leave: whatever they had is free within a second and a step.

use std::time::Duration;

use serde_json::json;

use crate::support::{all_free, complete, start, token_ids};
use crate::tiny;

#[tokio::test]
async fn two_hundred_clients_that_leave_at_random_moments_leave_nothing_behind() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
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
    all_free(&running.cluster, Duration::from_secs(2)).await;
    let request = json!({"model": model.name, "prompt": [1, 2, 3], "max_tokens": 4});
    assert_eq!(complete(client, &request, false).await.usage[0], 3, "it still serves");
    running.stop();
}
