//! Which workers a request goes to, and in which of their languages.

use serde_json::{Value, json};

use super::testing::*;
use crate::config::{DialectChoice, PolicyName, RouterConfig};

fn ask(prompt: &str) -> Value {
    json!({"model": "M", "prompt": prompt, "max_tokens": 4})
}

/// A completion request in a conversation that a header names.
fn in_conversation(id: &str, prompt: &str) -> Vec<u8> {
    let request = String::from_utf8(completion(&ask(prompt))).unwrap();
    request.replacen("\r\n", &format!("\r\nX-Correlation-ID: {id}\r\n"), 1).into_bytes()
}

/// A worker for both phases.
async fn both() -> Scripted {
    Scripted::start(|_, ask| match ask.body["disaggregated_params"]["request_type"].as_str() {
        Some("context_only") => Act::Answer(200, handed_over(ask)),
        _ => served(ask),
    })
    .await
}

fn short_prompts_stay(config: &mut RouterConfig) {
    config.routing.max_local_prefill_length = 10;
}

#[tokio::test]
async fn a_short_prompt_goes_whole_to_one_generation_worker_and_a_long_one_to_both() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&generation], short_prompts_stay).await;
    for stream in [false, true] {
        let mut body = ask("hello");
        body["stream"] = json!(stream);
        // What a client says of the protocol reaches no worker.
        body["disaggregated_params"] =
            json!({"request_type": "generation_only", "first_gen_tokens": [1]});
        assert_eq!(scene.ask(&body).await.status, 200);
        let told = generation.asks().pop().unwrap();
        body["disaggregated_params"] = Value::Null;
        assert_eq!(told.body, body);
        assert!(!told.head.contains("x-trtllm-disagg-auth"), "{}", told.head);
    }
    assert!(context.asks().is_empty());
    assert_eq!(scene.ask(&ask(&"hello ".repeat(10))).await.status, 200);
    assert_eq!((context.asks().len(), generation.asks().len()), (1, 3));
    let told = generation.asks().pop().unwrap();
    assert_eq!(told.body["disaggregated_params"]["request_type"], "generation_only");
}

#[tokio::test]
async fn a_prompt_of_which_a_generation_worker_has_seen_nearly_all_is_left_to_it() {
    let context = Scripted::context().await;
    let (a, b) = (Scripted::generation().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&a, &b], |config| {
        config.routing.max_local_prefill_length = 200;
        config.generation.policy = PolicyName::Prefix;
    })
    .await;
    let local = |worker: &Scripted| {
        let whole = |ask: &Ask| ask.body["disaggregated_params"].is_null();
        worker.asks().iter().filter(|ask| whole(ask)).count()
    };
    let first = "Once upon a time. ".repeat(200);
    assert_eq!(scene.ask(&ask(&first)).await.status, 200);
    assert_eq!((context.asks().len(), local(&a) + local(&b)), (1, 0));
    // What was said goes on: an eighth at most of what was seen does not count as seen.
    let second = format!("{first} And then it ended.");
    assert_eq!(scene.ask(&ask(&second)).await.status, 200);
    assert_eq!((context.asks().len(), local(&a) + local(&b)), (1, 1));
    assert!(a.asks().len() == 2 || b.asks().len() == 2, "by the one that has seen it");
    let other = "Another story. ".repeat(240);
    let mut salted = ask(&second);
    salted["cache_salt"] = json!("mine");
    for (number, unseen) in [ask(&other), salted].iter().enumerate() {
        assert_eq!(scene.ask(unseen).await.status, 200);
        assert_eq!((context.asks().len(), local(&a) + local(&b)), (number + 2, 1));
    }
}

#[tokio::test]
async fn a_short_prompt_goes_on_to_another_generation_worker_when_one_fails() {
    let context = Scripted::context().await;
    let bad = Scripted::start(|_, _| refusal(500, "internal_error")).await;
    let good = Scripted::generation().await;
    let scene = scene(&[&context], &[&bad, &good], short_prompts_stay).await;
    for _ in 0..3 {
        assert_eq!(scene.ask(&ask("hello")).await.status, 200);
    }
    assert!(!bad.asks().is_empty() && context.asks().is_empty());
}

#[tokio::test]
async fn a_worker_that_misses_a_record_for_a_short_prompt_gets_one() {
    let context = Scripted::context().await;
    let generation = Scripted::start(|number, ask| match number {
        0 => refusal(503, "kv_lease_gone"),
        _ => served(ask),
    })
    .await;
    let scene = scene(&[&context], &[&generation], short_prompts_stay).await;
    assert_eq!(scene.ask(&ask("hello")).await.status, 200);
    assert_eq!((context.asks().len(), generation.asks().len()), (1, 2));
}

#[tokio::test]
async fn one_server_in_both_roles_serves_short_and_long_prompts() {
    let server = both().await;
    let scene = scene(&[&server], &[&server], short_prompts_stay).await;
    assert_eq!(scene.ask(&ask("hello")).await.status, 200);
    assert_eq!(server.asks().len(), 1);
    assert_eq!(scene.ask(&ask(&"hello ".repeat(10))).await.status, 200);
    assert_eq!(server.asks().len(), 3);
}

#[tokio::test]
async fn a_conversation_that_a_header_names_stays_on_its_workers() {
    let (a, b, c) = (both().await, both().await, both().await);
    let workers = [&a, &b, &c];
    let scene = scene(&workers, &workers, |config| {
        config.context.policy = PolicyName::Conversation;
        config.generation.policy = PolicyName::Conversation;
    })
    .await;
    for round in 0..4 {
        for conversation in ["one", "two", "three", "four"] {
            let request = in_conversation(conversation, &format!("{conversation} {round}"));
            assert_eq!(scene.raw(&request).await.status, 200);
        }
    }
    for conversation in ["one", "two", "three", "four"] {
        let of_it = |worker: &&Scripted| {
            let asks = worker.asks();
            let passes = asks.iter().filter(|ask| {
                ask.body["prompt"]
                    .as_str()
                    .is_some_and(|text| text.split(' ').next() == Some(conversation))
            });
            passes.count()
        };
        let mut counts: Vec<usize> = workers.iter().map(of_it).collect();
        counts.sort_unstable();
        assert_eq!(counts, [0, 0, 4], "{conversation}");
    }
}

#[tokio::test]
async fn prompts_that_begin_alike_meet_on_one_context_worker() {
    let (a, b) = (Scripted::context().await, Scripted::context().await);
    let generation = Scripted::generation().await;
    let scene = scene(&[&a, &b], &[&generation], |config| {
        config.context.policy = PolicyName::KvCacheAware;
    })
    .await;
    for number in 0..6 {
        let system = if number % 2 == 0 { "You are a pirate. " } else { "You are a poet. " };
        let prompt = format!("{}Question {number}", system.repeat(100));
        assert_eq!(scene.ask(&ask(&prompt)).await.status, 200);
    }
    for worker in [&a, &b] {
        let mut kinds: Vec<bool> = worker
            .asks()
            .iter()
            .map(|ask| ask.body["prompt"].as_str().unwrap().contains("pirate"))
            .collect();
        assert_eq!(kinds.len(), 3);
        kinds.dedup();
        assert_eq!(kinds.len(), 1);
    }
}

/// A worker that refuses members of the protocol that it does not know, as TensorRT-LLM's do.
async fn strict(known: Vec<&'static str>, answer: fn(&Ask) -> Act) -> Scripted {
    Scripted::start(move |_, ask| {
        let params = ask.body["disaggregated_params"].as_object().unwrap();
        match params.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => {
                let message = format!("extra field {name}");
                Act::Answer(400, json!({"object": "error", "message": message}))
            }
            None => answer(ask),
        }
    })
    .await
}

#[tokio::test]
async fn workers_of_an_older_age_are_spoken_to_in_their_own_language() {
    const V12: [&str; 5] = [
        "request_type",
        "first_gen_tokens",
        "ctx_request_id",
        "encoded_opaque_state",
        "draft_tokens",
    ];
    const V13_EARLY: [&str; 4] =
        ["disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint", "schedule_style"];
    fn passed(mut params: Value) -> Act {
        params["request_type"] = json!("context_only");
        params["encoded_opaque_state"] = json!("QQ==");
        let choice = json!({"index": 0, "text": "A", "finish_reason": "length",
            "disaggregated_params": params});
        Act::Answer(
            200,
            json!({"id": "cmpl-1", "prompt_token_ids": [1, 2, 3], "choices": [choice],
            "usage": {"prompt_tokens": 3}}),
        )
    }
    fn passed_12(_: &Ask) -> Act {
        passed(json!({"first_gen_tokens": [65], "ctx_request_id": 5, "draft_tokens": null}))
    }
    fn passed_13(ask: &Ask) -> Act {
        let id = ask.id();
        passed(json!({"first_gen_tokens": [65], "ctx_request_id": id, "draft_tokens": null,
            "disagg_request_id": id, "ctx_dp_rank": 0, "ctx_info_endpoint": null, "schedule_style": 0}))
    }
    let early = [V12.as_slice(), &V13_EARLY].concat();
    for (dialect, known, answer) in [
        (DialectChoice::Trtllm12, V12.to_vec(), passed_12 as fn(&Ask) -> Act),
        (DialectChoice::Trtllm13, early, passed_13),
    ] {
        let context = strict(known.clone(), answer).await;
        let generation = strict(known, served).await;
        let old = |config: &mut RouterConfig| {
            config.context.servers[0].dialect = dialect;
            config.generation.servers[0].dialect = dialect;
        };
        let spoken = scene(&[&context], &[&generation], old).await;
        for stream in [false, true] {
            let mut body = ask("hello");
            body["stream"] = json!(stream);
            assert_eq!(spoken.ask(&body).await.status, 200, "{dialect:?}");
        }
        let told = &generation.asks()[0].body["disaggregated_params"];
        assert_eq!(told["encoded_opaque_state"], "QQ==");
        let is_13 = dialect == DialectChoice::Trtllm13;
        let id = if is_13 { json!(context.asks()[0].id()) } else { json!(5) };
        assert_eq!(told["ctx_request_id"], id);

        let misunderstood = scene(&[&context], &[&generation], |_| ()).await;
        let read = misunderstood.ask(&ask("hello")).await;
        assert_eq!(read.status, 400, "taken for main, the same workers refuse");
    }
}
