//! The two hops made by hand: what a worker answers when a record is wrong, late or of a dead worker.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use baton_integration::client::{Answer, Client};
use baton_integration::cluster::{Cluster, Plan};
use baton_integration::eventually::eventually;
use serde_json::{Value, json};
use toml::toml;

use crate::support::{READY, Running, STOP, all_free, blocks, complete, start, token_ids};
use crate::tiny::{self, Tiny};

pub const PATH: &str = "/v1/completions";

fn context_request(model: &Tiny, prompt: &[u64], id: u64) -> Value {
    json!({"model": model.name, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": true,
        "disaggregated_params": {"request_type": "context_only", "disagg_request_id": id}})
}

/// The generation request that follows from a context answer.
pub fn generation_request(request: &Value, answer: &Value) -> Value {
    let mut request = request.clone();
    request["prompt"] = answer["prompt_token_ids"].clone();
    request["disaggregated_params"] = answer["choices"][0]["disaggregated_params"].clone();
    request["disaggregated_params"]["request_type"] = json!("generation_only");
    request["disaggregated_params"]["ctx_usage"] = answer["usage"].clone();
    request
}

struct Pair {
    running: Running,
    model: Tiny,
}

async fn pair(worker: toml::Table) -> Pair {
    let model = tiny::model(4);
    Pair { running: start(&model.path, 1, 1, worker).await, model }
}

impl Pair {
    fn contexts(&self) -> Client {
        self.running.cluster.workers[0].client()
    }

    fn generations(&self) -> Client {
        self.running.cluster.workers[1].client()
    }

    /// A context pass under `id`; the generation request that would follow.
    async fn hop(&self, prompt: &[u64], id: u64) -> Value {
        let request = context_request(&self.model, prompt, id);
        let answer = self.contexts().post(PATH, &request).await.unwrap().ok().unwrap();
        generation_request(&request, &answer)
    }

    async fn generate(&self, request: &Value) -> Answer {
        self.generations().post(PATH, request).await.unwrap()
    }

    async fn release(&self, id: u64) {
        let body = json!({"disagg_request_id": id});
        let answer = self.contexts().post("/v1/disagg/release", &body).await.unwrap();
        assert_eq!(answer.status, 200);
    }
}

const ID: u64 = 1 << 41;

#[tokio::test]
async fn a_lease_is_read_once() {
    let pair = pair(toml::Table::new()).await;
    let request = pair.hop(&token_ids(1, 70, pair.model.vocab), ID).await;
    assert_eq!(blocks(&pair.running.cluster.workers[0], "leased").await, 3.0);
    assert_eq!(pair.generate(&request).await.status, 200);
    // The reader's word travels beside its answer.
    all_free(&pair.running.cluster, Duration::from_secs(2)).await;
    let again = pair.generate(&request).await;
    assert_eq!((again.status, again.error_code().unwrap()), (503, "kv_lease_gone".into()));
    all_free(&pair.running.cluster, Duration::from_secs(2)).await;
    pair.running.stop();
}

#[tokio::test]
async fn a_released_or_expired_lease_is_gone() {
    let pair = pair(toml! { [handover]
    lease_timeout = "1s"
    pull_timeout = "900ms" })
    .await;
    let prompt = token_ids(2, 70, pair.model.vocab);
    let request = pair.hop(&prompt, ID).await;
    pair.release(ID).await;
    pair.release(ID).await;
    let gone = pair.generate(&request).await;
    assert_eq!((gone.status, gone.error_code().unwrap()), (503, "kv_lease_gone".into()));
    let request = pair.hop(&prompt, ID + 1).await;
    all_free(&pair.running.cluster, Duration::from_secs(3)).await;
    let gone = pair.generate(&request).await;
    assert_eq!((gone.status, gone.error_code().unwrap()), (503, "kv_lease_gone".into()));
    all_free(&pair.running.cluster, Duration::from_secs(2)).await;
    pair.running.stop();
}

#[tokio::test]
async fn a_release_before_the_context_pass_leaves_a_tombstone() {
    let pair = pair(toml::Table::new()).await;
    pair.release(ID).await;
    let request = context_request(&pair.model, &[1, 2, 3], ID);
    let answer = pair.contexts().post(PATH, &request).await.unwrap();
    assert_ne!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    all_free(&pair.running.cluster, Duration::from_secs(2)).await;
    pair.running.stop();
}

#[tokio::test]
async fn a_second_live_request_with_the_same_id_is_refused() {
    let pair = pair(toml::Table::new()).await;
    let prompt = token_ids(3, 40, pair.model.vocab);
    let request = pair.hop(&prompt, ID).await;
    let twice = context_request(&pair.model, &prompt, ID);
    let answer = pair.contexts().post(PATH, &twice).await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (409, "duplicate_request".into()));
    assert_eq!(pair.generate(&request).await.status, 200, "the first one is untouched");
    pair.running.stop();
}

#[tokio::test]
async fn a_record_that_was_changed_or_is_of_another_request_is_refused() {
    let pair = pair(toml::Table::new()).await;
    let request = pair.hop(&token_ids(4, 70, pair.model.vocab), ID).await;
    let params = &request["disaggregated_params"];
    let record = STANDARD.decode(params["encoded_opaque_state"].as_str().unwrap()).unwrap();
    let refused = async |request: &Value, what: &str| {
        let answer = pair.generate(request).await;
        let code = answer.error_code().unwrap();
        assert_eq!((answer.status, code.as_str()), (400, "kv_state_invalid"), "{what}");
    };
    let with = |bytes: &[u8]| {
        let mut request = request.clone();
        request["disaggregated_params"]["encoded_opaque_state"] = json!(STANDARD.encode(bytes));
        request
    };
    // Every byte and length is tried beside the code; here some of them over HTTP.
    for at in (0..record.len()).step_by(37) {
        let mut changed = record.clone();
        changed[at] ^= 1;
        refused(&with(&changed), &format!("byte {at} flipped")).await;
        refused(&with(&record[..at]), &format!("cut to {at} bytes")).await;
    }
    let mut other = request.clone();
    other["prompt"][0] = json!(0);
    other["prompt"][1] = json!(0);
    refused(&other, "another prompt").await;
    let mut other = request.clone();
    other["disaggregated_params"]["disagg_request_id"] = json!(ID + 1);
    refused(&other, "another id").await;
    let mut other = request.clone();
    other["disaggregated_params"]["first_gen_tokens"] = json!([4_000_000_000u32]);
    refused(&other, "a first token outside the vocabulary").await;
    assert_eq!(pair.generate(&request).await.status, 200, "the process lives and the lease too");
    pair.running.stop();
}

#[tokio::test]
async fn a_record_of_another_model_is_incompatible() {
    let pair = pair(toml::Table::new()).await;
    let other = tiny::model(8);
    let folder = tempfile::tempdir().unwrap();
    let mut plan =
        Plan::local(&other.path, 0, 1, &toml! { served_model_names = ["tiny-4"] }).unwrap();
    plan.router = None;
    let foreign = Cluster::start(&plan, folder.path(), READY).await.unwrap();
    let request = pair.hop(&token_ids(5, 70, pair.model.vocab), ID).await;
    let answer = foreign.workers[0].client().post(PATH, &request).await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (409, "kv_incompatible".into()));
    foreign.stop(STOP).unwrap();
    pair.release(ID).await;
    pair.running.stop();
}

#[tokio::test]
async fn a_dead_context_worker_is_named_unreachable() {
    let mut pair = pair(toml::Table::new()).await;
    let request = pair.hop(&token_ids(6, 70, pair.model.vocab), ID).await;
    let context = &mut pair.running.cluster.workers[0].process;
    context.signal("KILL").unwrap();
    context.wait(Duration::from_secs(5)).unwrap();
    let answer = pair.generate(&request).await;
    let code = answer.error_code().unwrap();
    assert!(["kv_peer_unreachable", "kv_transfer_timeout"].contains(&code.as_str()), "{code}");
    let generation = &pair.running.cluster.workers[1];
    eventually(Duration::from_secs(2), "its blocks are free again", || async {
        (blocks(generation, "free").await > 0.0
            && blocks(generation, "used").await == 0.0
            && blocks(generation, "in_flight").await == 0.0)
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_router_computes_again_when_a_context_worker_dies() {
    let model = tiny::model(4);
    let mut running = start(&model.path, 2, 1, toml::Table::new()).await;
    let client = running.cluster.client();
    let request = json!({"model": model.name, "prompt": token_ids(7, 300, model.vocab),
        "max_tokens": 6, "temperature": 0, "ignore_eos": true});
    let expected = complete(client, &request, false).await;
    running.context(0).process.signal("KILL").unwrap();
    for _ in 0..6 {
        assert_eq!(complete(client, &request, false).await, expected);
    }
    running.cluster.workers.remove(0);
    all_free(&running.cluster, Duration::from_secs(3)).await;
    running.stop();
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_keeps_its_lease_readable() {
    let mut pair = pair(toml::Table::new()).await;
    let request = pair.hop(&token_ids(8, 70, pair.model.vocab), ID).await;
    pair.running.cluster.workers[0].process.signal("TERM").unwrap();
    let contexts = pair.contexts();
    eventually(Duration::from_secs(5), "it refuses work", || async {
        (contexts.get("/health").await.ok()?.status == 503).then_some(())
    })
    .await;
    let plain = json!({"model": pair.model.name, "prompt": [1], "max_tokens": 1});
    assert_eq!(contexts.post(PATH, &plain).await.unwrap().error_code().unwrap(), "unavailable");
    assert_eq!(pair.generate(&request).await.status, 200);
    let status = pair.running.cluster.workers[0].process.wait(Duration::from_secs(5)).unwrap();
    assert!(status.success(), "{status}");
    pair.running.cluster.workers.remove(0);
    pair.running.stop();
}
