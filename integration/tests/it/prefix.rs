//! The prefix cache: a beginning that is known is neither computed nor fetched again, and no bit changes.

use std::time::Duration;

use baton_integration::cluster::Member;
use baton_shared::id::Incarnation;
use baton_shared::kv::block_hash::{BlockExtra, v1_block_key};
use baton_workerd::backend::Backend;
use baton_workerd::backend::cpu::{CpuBackend, CpuOptions, Simd};
use baton_workerd::engine::output::{OutputEvent, OutputReceiver, TokenOut, channel};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::{
    EngineConfig, EngineHandle, Parts, Phase, Puller, StepPace, StopRule, Submission, engine,
};
use baton_workerd::handover::{PeerAddress, PullId, PullJob};
use baton_workerd::kv::region::EpochPage;
use baton_workerd::model::{self, Model};
use serde_json::{Value, json};

use crate::support::{all_free, complete, metrics, start, token_ids};
use crate::tiny;

const BLOCK_TOKENS: u32 = 32;

/// One engine on a CPU back end, without peers.
struct Engine {
    handle: EngineHandle,
}

struct NoPeers;

impl Puller for NoPeers {
    fn pull(&mut self, job: PullJob) -> Result<(), PullJob> {
        Err(job)
    }

    fn cancel(&mut self, _: PullId) {}
}

impl Engine {
    fn new(model: &Model, blocks: u32, config: EngineConfig) -> Self {
        let options = CpuOptions {
            threads: 2,
            max_sequences: 16,
            max_batch_tokens: 1024,
            blocks,
            block_tokens: BLOCK_TOKENS,
            simd: Simd::Auto,
        };
        let backend = CpuBackend::new(model, &options).unwrap();
        let (handle, seat) = engine(config);
        let epochs = EpochPage::new(backend.pool().layout.blocks as usize).unwrap();
        let serve = PeerAddress { agent: "none".to_owned(), metadata: Vec::new() };
        let incarnation = Incarnation::random();
        let puller = Box::new(NoPeers);
        seat.start(Parts { backend: Box::new(backend), epochs, serve, incarnation, puller })
            .unwrap();
        Self { handle }
    }

    fn ask(&self, (prompt, max_tokens): &(Vec<u32>, u32)) -> OutputReceiver {
        let (output, receiver) = channel(*max_tokens as usize + 8);
        let seed = prompt.len() as u64;
        let sampling = SamplingParams {
            temperature: if seed.is_multiple_of(2) { 0.0 } else { 0.9 },
            seed,
            frequency_penalty: 0.3,
            logprobs: Some(20),
            ..SamplingParams::default()
        };
        let stop = StopRule { max_tokens: *max_tokens, stop_ids: Vec::new() };
        let prompt = prompt.clone();
        let phase = Phase::Whole;
        let request = Submission { prompt, salt: None, sampling, stop, phase, output };
        self.handle.submit(request).unwrap();
        receiver
    }
}

/// All tokens with their log-probabilities.
async fn tokens(mut receiver: OutputReceiver) -> Vec<TokenOut> {
    let mut tokens = Vec::new();
    while let Some(event) = receiver.next().await {
        match event {
            OutputEvent::Token(token) => tokens.push(token),
            OutputEvent::Failed { code, message } => panic!("{code:?}: {message}"),
            OutputEvent::Started { .. }
            | OutputEvent::ContextDone(_)
            | OutputEvent::Finished(_) => {}
        }
    }
    tokens
}

/// Prompts of which some begin alike, with lengths around the borders of blocks.
fn asks(vocab: u64) -> Vec<(Vec<u32>, u32)> {
    let ids = |seed, count| token_ids(seed, count, vocab).into_iter().map(|id| id as u32);
    let stem: Vec<u32> = ids(1, 200).collect();
    let lengths = [(1, 0), (31, 1), (32, 0), (33, 2), (64, 1), (96, 40), (150, 3), (200, 56)];
    let prompt = |(seed, (shared, own)): (u64, (usize, usize))| {
        let prompt = stem[..shared].iter().copied().chain(ids(seed, own));
        (prompt.collect(), 6 + seed as u32)
    };
    (50..).zip(lengths).map(|(seed, length)| prompt((seed, length))).collect()
}

#[tokio::test]
async fn the_cpu_gives_the_same_bits_alone_with_a_prefix_hit_in_any_chunks_and_after_a_preemption()
{
    let tiny = tiny::model(4);
    let model = model::load(&tiny.path).unwrap();
    let asks = asks(tiny.vocab);
    let off = EngineConfig { prefix_cache: false, ..EngineConfig::default() };
    let alone = Engine::new(&model, 64, off);
    let mut expected = Vec::new();
    for ask in &asks {
        expected.push(tokens(alone.ask(ask)).await);
    }
    let prompts: u64 = asks.iter().map(|(prompt, _)| prompt.len() as u64).sum();
    assert_eq!(alone.handle.status().totals.prompt_computed, prompts);

    let default = EngineConfig::default();
    let pace = StepPace { target: Duration::from_micros(500), row: Duration::from_micros(20) };
    let chunks = |max_batch_tokens| EngineConfig { max_batch_tokens, ..EngineConfig::default() };
    for (name, blocks, config) in [
        ("whole prompts", 64, default.clone()),
        ("steps of 16 tokens", 64, chunks(16)),
        ("steps of 39 tokens", 64, chunks(39)),
        ("steps of about 500 us", 64, EngineConfig { pace: Some(pace), ..default.clone() }),
        ("a pool that is too small", 17, default),
    ] {
        let engine = Engine::new(&model, blocks, config);
        for round in 0..2 {
            let open: Vec<_> = asks.iter().map(|ask| engine.ask(ask)).collect();
            for ((ask, expected), receiver) in asks.iter().zip(&expected).zip(open) {
                let length = ask.0.len();
                assert_eq!(&tokens(receiver).await, expected, "{name}, {round}, {length} tokens");
            }
        }
        let totals = engine.handle.status().totals;
        assert!(totals.prompt_prefix > prompts / 2, "{name}: {totals:?}");
        assert_eq!(totals.preemptions > 0, blocks == 17, "{name}: {totals:?}");
    }
}

/// Prompt tokens of a worker by source: computed, prefix, pulled.
async fn prompt_tokens(worker: &Member) -> [f64; 3] {
    let metrics = metrics(worker).await;
    ["computed", "prefix", "pulled"]
        .map(|source| metrics.sum("baton_worker_prompt_tokens_total", &[("source", source)]))
}

/// Two prompts of 1,000 equal tokens and 50 of their own each, as requests.
fn long_prompts(model: &str, vocab: u64) -> [Value; 2] {
    let stem = token_ids(77, 1_000, vocab);
    [1, 2].map(|seed| {
        let prompt: Vec<u64> = stem.iter().copied().chain(token_ids(seed, 50, vocab)).collect();
        json!({"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0,
            "ignore_eos": true, "logprobs": 3})
    })
}

#[tokio::test]
async fn a_second_prompt_with_the_same_1000_tokens_computes_and_fetches_only_the_rest() {
    // Full blocks of the 1,000 tokens that both have.
    const KNOWN: f64 = 992.0;
    const REST: f64 = 1_050.0 - KNOWN;
    let model = tiny::model(4);
    let requests = long_prompts(&model.name, model.vocab);
    let off: toml::Table = toml::from_str("[kv]\nprefix_cache = false").unwrap();
    let plain = start(&model.path, 1, 1, off).await;
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(complete(plain.cluster.client(), request, false).await);
        assert_eq!(prompt_tokens(&plain.cluster.workers[0]).await[1], 0.0);
    }
    plain.stop();

    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let [context, generation] = &running.cluster.workers[..] else { panic!("two workers") };
    let moved =
        || async { metrics(generation).await.sum("baton_worker_handover_bytes_total", &[]) };
    let first = complete(running.cluster.client(), &requests[0], false).await;
    assert_eq!(first, expected[0]);
    assert_eq!(prompt_tokens(context).await, [1_050.0, 0.0, 0.0]);
    assert_eq!(prompt_tokens(generation).await, [0.0, 0.0, 1_050.0]);
    let whole = moved().await;
    let second = complete(running.cluster.client(), &requests[1], true).await;
    assert_eq!(second, expected[1]);
    assert_eq!(prompt_tokens(context).await, [1_050.0 + REST, KNOWN, 0.0]);
    assert_eq!(prompt_tokens(generation).await, [0.0, KNOWN, 1_050.0 + REST]);
    // 33 blocks, then two.
    assert_eq!((moved().await - whole) * 33.0, whole * 2.0);
    all_free(&running.cluster, Duration::from_secs(5)).await;

    // One worker alone says so in its usage; its events name the blocks as a router would.
    let answer =
        context.client().post("/v1/completions", &requests[1]).await.unwrap().ok().unwrap();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 1_024);
    assert_eq!(answer["choices"][0]["text"], expected[1].text);
    let events = context.client().post("/kv_cache_events", &json!({})).await.unwrap().ok().unwrap();
    let prompt: Vec<u32> = serde_json::from_value(requests[0]["prompt"].clone()).unwrap();
    let named = |event: &Value| event["data"]["blocks"].as_array().cloned().unwrap_or_default();
    let stored: Vec<Value> = events.as_array().unwrap().iter().flat_map(named).collect();
    let mut parent = 0;
    for (block, tokens) in stored.iter().zip(prompt.chunks_exact(BLOCK_TOKENS as usize)) {
        parent = v1_block_key(parent, tokens, BlockExtra::default());
        assert_eq!(block["block_hash"], parent);
    }
    // 32 of the first prompt, one of the second.
    assert!(stored.len() >= 33, "{} blocks", stored.len());
    all_free(&running.cluster, Duration::from_secs(5)).await;
    running.stop();
}

#[tokio::test]
async fn prompts_of_two_salts_share_nothing() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let [mut request, _] = long_prompts(&model.name, model.vocab);
    let mut answers = Vec::new();
    for salt in ["one", "two"] {
        request["cache_salt"] = json!(salt);
        answers.push(complete(running.cluster.client(), &request, false).await);
    }
    assert_eq!(answers[0], answers[1]);
    for worker in &running.cluster.workers {
        assert_eq!(prompt_tokens(worker).await[1], 0.0);
    }
    running.stop();
}

#[tokio::test]
async fn a_prompt_that_is_known_as_a_whole_moves_nothing_and_its_lease_ends_as_read() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let [context, generation] = &running.cluster.workers[..] else { panic!("two workers") };
    let request = json!({"model": model.name, "prompt": token_ids(5, 1_024, model.vocab),
        "max_tokens": 9, "temperature": 0.8, "seed": 3, "ignore_eos": true});
    let counted = |name: &'static str, labels: &'static [(&str, &str)]| async move {
        (metrics(context).await.sum(name, labels), metrics(generation).await.sum(name, labels))
    };
    let first = complete(running.cluster.client(), &request, false).await;
    let (_, bytes) = counted("baton_worker_handover_bytes_total", &[]).await;
    let again = complete(running.cluster.client(), &request, true).await;
    assert_eq!(again, first);
    assert_eq!(prompt_tokens(generation).await, [0.0, 1_024.0, 1_024.0]);
    assert_eq!(counted("baton_worker_handover_bytes_total", &[]).await, (0.0, bytes));
    assert_eq!(counted("baton_worker_handovers_total", &[]).await, (0.0, 2.0));
    all_free(&running.cluster, Duration::from_secs(5)).await;
    let ended = counted("baton_worker_leases_ended_total", &[("end", "pulled")]).await;
    assert_eq!(ended, (2.0, 0.0));
    // The context worker must compute the last token, with the block it is in.
    assert_eq!(prompt_tokens(context).await, [1_056.0, 992.0, 0.0]);
    running.stop();
}
