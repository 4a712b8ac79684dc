//! What clients do: stay for their answer, leave at some moment, ask for what must be refused, or make both hops by
//! hand and change their mind.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use baton_integration::client::{Answer, Client};
use baton_integration::cluster::Cluster;
use bytes::Bytes;
use http::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::support::{Outcome, complete, outcome, token_ids};
use crate::tiny::Tiny;

const PATH: &str = "/v1/completions";
const RELEASE: &str = "/v1/disagg/release";
/// Different requests whose answers are known.
const KNOWN: u64 = 16;
/// The longest that a client waits before it leaves.
const LONGEST_STAY: Duration = Duration::from_millis(80);
/// What a client may be told when too much goes wrong at once.
const EXCUSES: [&str; 4] =
    ["context_failed", "generation_failed", "generation_aborted", "no_workers"];
/// Ids of passes made by hand; a router's are far from them.
const FIRST_ID: u64 = 1 << 41;

/// Requests by number.
pub struct Deeds {
    seed: u64,
    router: Client,
    contexts: [Client; 2],
    known: Vec<(Value, Outcome)>,
}

/// How requests ended.
#[derive(Debug, Default)]
pub struct Tally {
    /// Whole answers, all right.
    pub answered: u64,
    /// Clients that left.
    pub left: u64,
    /// Requests refused for what they are.
    pub refused: u64,
    /// Context passes released by hand.
    pub released: u64,
    /// Failures by code.
    pub failed: BTreeMap<String, u64>,
}

impl Deeds {
    /// Asks a worker for the right answers.
    pub async fn new(seed: u64, cluster: &Cluster, model: &Tiny) -> Self {
        let mut known = Vec::new();
        for number in 0..KNOWN {
            let request = json!({"model": model.name, "temperature": 0, "ignore_eos": true,
                "prompt": token_ids(number, 10 + number as usize * 25, model.vocab),
                "max_tokens": 2 + number % 7});
            let answer = complete(cluster.workers[0].client(), &request, false).await;
            assert_eq!(complete(cluster.client(), &request, false).await, answer);
            known.push((request, answer));
        }
        let contexts = [0, 1].map(|index| cluster.workers[index].client());
        Self { seed, router: cluster.client(), contexts, known }
    }

    /// Does what the request of this number does.
    pub async fn act(&self, index: u64, tally: &mut Tally) {
        let mut random = StdRng::seed_from_u64(self.seed.wrapping_add(index));
        let (request, right) = &self.known[random.random_range(0..self.known.len())];
        let stream = random.random();
        match random.random_range(0..100) {
            0..40 => self.stay(request, right, stream, tally).await,
            40..80 => self.leave(request, stream, &mut random, tally).await,
            80..90 => self.be_refused(request, &mut random, tally).await,
            90.. => self.change_mind(request, index, &mut random, tally).await,
            ..0 => unreachable!("a percentage"),
        }
    }

    async fn stay(&self, request: &Value, right: &Outcome, stream: bool, tally: &mut Tally) {
        match ask(self.router, request, stream).await {
            Ok(answer) => {
                assert_eq!(answer, *right, "{request}");
                tally.answered += 1;
            }
            Err(code) => tally.fail(code),
        }
    }

    /// After some time, or in mid-stream.
    async fn leave(&self, request: &Value, stream: bool, random: &mut StdRng, tally: &mut Tally) {
        let mut request = request.clone();
        request["stream"] = json!(stream);
        request["max_tokens"] = json!(200);
        let (events, stay) =
            (random.random_range(1..5), random.random_range(Duration::ZERO..LONGEST_STAY));
        let answer = async {
            let mut answer = self.router.stream(PATH, &request).await?;
            for _ in 0..events {
                answer.event().await?;
            }
            anyhow::Ok(())
        };
        // Whatever it saw: the client is gone.
        let _ = tokio::time::timeout(stay, answer).await;
        tally.left += 1;
    }

    async fn be_refused(&self, request: &Value, random: &mut StdRng, tally: &mut Tally) {
        let mut request = request.clone();
        let (body, code) = match random.random_range(0..3) {
            0 => (Bytes::from_static(b"{\"model\": \"x\", \"prompt\": "), "invalid_request"),
            1 => {
                request["prompt"] = json!(vec![5; 5000]);
                (Bytes::from(request.to_string()), "context_length_exceeded")
            }
            _ => {
                request["model"] = json!("another");
                (Bytes::from(request.to_string()), "model_not_found")
            }
        };
        let answer = self.router.send(Method::POST, PATH, &[], body).await.unwrap();
        let answer = answer.whole().await.unwrap();
        match answer.error_code().unwrap() {
            said if said == code => tally.refused += 1,
            said => tally.fail(said),
        }
    }

    /// A context pass that is released: after it, before it, or twice.
    async fn change_mind(
        &self,
        request: &Value,
        index: u64,
        random: &mut StdRng,
        tally: &mut Tally,
    ) {
        let context = self.contexts[random.random_range(0..2)];
        let id = FIRST_ID + index;
        let mut request = request.clone();
        request["disaggregated_params"] =
            json!({"request_type": "context_only", "disagg_request_id": id});
        let is_early = random.random();
        if is_early {
            release(context, id).await;
        }
        let answer = context.post(PATH, &request).await.unwrap();
        if is_early {
            assert_eq!(
                (answer.status, answer.error_code().unwrap()),
                (503, "kv_lease_gone".into())
            );
        } else {
            assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
            for _ in 0..random.random_range(1..3) {
                release(context, id).await;
            }
        }
        tally.released += 1;
    }
}

async fn release(context: Client, id: u64) {
    let answer = context.post(RELEASE, &json!({"disagg_request_id": id})).await.unwrap();
    assert_eq!(answer.status, 200);
}

/// The whole answer, or the code of the error.
async fn ask(client: Client, request: &Value, stream: bool) -> Result<Outcome, String> {
    let failed = |answer: &Answer| answer.error_code().unwrap();
    if !stream {
        let answer = client.post(PATH, request).await.unwrap();
        let body = answer.ok().map_err(|_| failed(&answer))?;
        return Ok(outcome(std::slice::from_ref(&body), &body["usage"]));
    }
    let mut request = request.clone();
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let answer = client.stream(PATH, &request).await.unwrap();
    if answer.status != 200 {
        return Err(failed(&answer.whole().await.unwrap()));
    }
    // The router's last event says so, and then the framing breaks.
    let events = answer.events().await.map_err(|_| "generation_aborted".to_owned())?;
    let (last, chunks) = events.split_last().context("events").unwrap();
    Ok(outcome(chunks, &last["usage"]))
}

impl Tally {
    fn fail(&mut self, code: String) {
        *self.failed.entry(code).or_default() += 1;
    }

    /// Takes in another's.
    pub fn add(&mut self, other: Self) {
        let Self { answered, left, refused, released, failed } = other;
        self.answered += answered;
        self.left += left;
        self.refused += refused;
        self.released += released;
        for (code, count) in failed {
            *self.failed.entry(code).or_default() += count;
        }
    }

    /// Failures have an excuse and are few: a router's tries can all meet a fault.
    pub fn is_good(&self) {
        let unexcused = self.failed.keys().find(|code| !EXCUSES.contains(&code.as_str()));
        assert!(unexcused.is_none(), "{self:?}");
        let failed: u64 = self.failed.values().sum();
        assert!(failed * 25 <= self.answered, "more than one in 25 failed: {self:?}");
    }
}
