//! Clients: what they ask, and what they see of time.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use baton_integration::client::Client;
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::Setting;
use crate::rounds::quantile;

/// No measurement takes longer.
const PATIENCE: Duration = Duration::from_secs(180);
/// English text of this project.
const TEXT: &str = include_str!("../../tests/fixtures/perplexity.txt");

/// Prompts that nobody has asked before: a server's cache of earlier ones is not what is measured.
pub struct Prompts {
    ids: Vec<u32>,
    next: Cell<usize>,
    /// What servers call the model.
    model: String,
}

/// Sent at a time by so many clients, each one after another.
#[derive(Clone, Copy)]
pub struct Crowd {
    /// Clients.
    pub clients: usize,
    /// Requests of each.
    pub requests: usize,
    /// Prompt tokens.
    pub prompt: usize,
    /// Generated tokens.
    pub answer: u32,
}

/// What running streams see while long prompts arrive.
#[derive(Clone, Copy, Debug)]
pub struct Disturbed {
    /// 99 % of the gaps between two tokens of a stream are not longer, seconds.
    pub p99_gap: f64,
    /// Tokens a second of all streams together.
    pub tokens: f64,
    /// Until a long prompt's first token, median, seconds.
    pub first_token: f64,
}

impl Prompts {
    /// For a model's own tokenizer.
    ///
    /// # Errors
    /// If the model has none.
    pub fn new(setting: &Setting) -> Result<Self> {
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&setting.model)?)?;
        let ids = tokenizer.encode(TEXT, false)?;
        // The name is not asked back by `llama-server`; ours is made from the file's.
        let stem = setting.model.file_stem().context("a model file")?.to_string_lossy();
        let (name, _) = stem.rsplit_once(['.', '-']).unwrap_or((&stem, ""));
        Ok(Self { ids, next: Cell::new(0), model: name.to_owned() })
    }

    /// The next one.
    fn take(&self, tokens: usize) -> Vec<u32> {
        let from = self.next.get();
        // A stride that is prime to the length: each begins elsewhere.
        self.next.set(from + 101);
        (0..tokens).map(|i| self.ids[(from + i) % self.ids.len()]).collect()
    }

    fn request(&self, prompt: usize, answer: u32) -> Value {
        json!({
            "model": self.model, "prompt": self.take(prompt), "max_tokens": answer, "temperature": 0,
            "ignore_eos": true, "stream": true,
        })
    }
}

impl Crowd {
    /// Generated tokens a second of all together.
    ///
    /// # Errors
    /// If a request fails.
    pub async fn generate(self, prompts: &Prompts, address: SocketAddr) -> Result<f64> {
        let begun = Instant::now();
        let client = async |_| {
            let mut tokens = 0;
            for _ in 0..self.requests {
                tokens +=
                    stream(prompts.request(self.prompt, self.answer), address, &|_| {}).await?;
            }
            anyhow::Ok(tokens)
        };
        let all = try_join_all((0..self.clients).map(client));
        let tokens = tokio::time::timeout(PATIENCE, all).await.context("a crowd's answers")??;
        let expected = self.clients * self.requests * self.answer as usize;
        let tokens: usize = tokens.into_iter().sum();
        // An event may carry several tokens, where one alone is no whole character.
        ensure!(tokens * 10 >= expected * 9, "{tokens} events for {expected} tokens");
        Ok(expected as f64 / begun.elapsed().as_secs_f64())
    }
}

/// `streams` run; then `prompts` long ones of `length` tokens arrive one after another.
///
/// # Errors
/// If a request fails, or the streams end before.
pub async fn disturb(
    asked: &Prompts,
    address: SocketAddr,
    streams: usize,
    prompts: usize,
    length: usize,
) -> Result<Disturbed> {
    let room = crate::servers::ROOM - 64;
    let seen: Vec<RefCell<Vec<Instant>>> = (0..streams).map(|_| RefCell::default()).collect();
    let running = Notify::new();
    let over = Notify::new();
    let run = async {
        let streams = seen.iter().map(|seen| {
            let note = |at| {
                seen.borrow_mut().push(at);
                running.notify_one();
            };
            let request = asked.request(64, room - 64);
            async move { stream(request, address, &note).await }
        });
        tokio::select! {
            ended = try_join_all(streams) => {
                ended.context("a running stream")?;
                anyhow::bail!("the streams ended before the prompts did")
            }
            () = over.notified() => Ok(()),
        }
    };
    let prompt = async {
        while !seen.iter().all(|seen| seen.borrow().len() >= 8) {
            running.notified().await;
        }
        let begun = Instant::now();
        let mut firsts = Vec::new();
        for _ in 0..prompts {
            let asked_at = Instant::now();
            let first = Cell::new(None);
            let note = |at: Instant| first.set(first.get().or(Some(at)));
            stream(asked.request(length, 4), address, &note).await.context("a long prompt")?;
            firsts.push((first.get().context("a first token")? - asked_at).as_secs_f64());
        }
        let ended = Instant::now();
        over.notify_one();
        anyhow::Ok((begun, ended, firsts))
    };
    let both = async { tokio::try_join!(run, prompt) };
    let ((), (begun, ended, mut firsts)) =
        tokio::time::timeout(PATIENCE, both).await.context("prompts beside streams")??;
    let mut gaps = Vec::new();
    let mut tokens = 0;
    for seen in &seen {
        let seen = seen.borrow();
        tokens += seen.iter().filter(|at| (begun..ended).contains(at)).count();
        // A gap that the end cuts off counts as far as it goes: none would be seen of a stream that stands still.
        let points = seen.iter().copied().filter(|at| *at < ended).chain([ended]);
        let points: Vec<Instant> = points.collect();
        let within = points.windows(2).filter(|two| two[1] > begun);
        gaps.extend(within.map(|two| (two[1] - two[0].max(begun)).as_secs_f64()));
    }
    let seconds = (ended - begun).max(Duration::from_millis(1)).as_secs_f64();
    Ok(Disturbed {
        p99_gap: quantile(&mut gaps, 0.99),
        tokens: tokens as f64 / seconds,
        first_token: quantile(&mut firsts, 0.5),
    })
}

/// Streams one answer: how many events carried text; `seen` hears of each as it comes.
async fn stream(request: Value, address: SocketAddr, seen: &dyn Fn(Instant)) -> Result<usize> {
    let mut stream = Client::new(address).stream("/v1/completions", &request).await?;
    if stream.status != 200 {
        let answer = stream.whole().await?;
        anyhow::bail!("status {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    let (mut events, mut buffer) = (0, Vec::new());
    while let Some(piece) = stream.piece().await? {
        buffer.extend_from_slice(&piece);
        while let Some(end) = buffer.windows(2).position(|two| two == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            if carries_text(&event)? {
                seen(Instant::now());
                events += 1;
            }
        }
    }
    Ok(events)
}

/// Whether an event has a piece of the answer in it; servers send comments and closing events as well.
fn carries_text(event: &[u8]) -> Result<bool> {
    let Some(data) = event.strip_prefix(b"data: ") else { return Ok(false) };
    if data.starts_with(b"[DONE]") {
        return Ok(false);
    }
    let event: Value = serde_json::from_slice(data).context("an event is JSON")?;
    ensure!(event["error"].is_null(), "the answer broke off: {event}");
    Ok(event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()))
}
