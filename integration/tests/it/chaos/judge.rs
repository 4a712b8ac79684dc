//! Requests of the trials, what one worker alone answers to them, and what became of them.

use std::time::{Duration, Instant};

use baton_integration::client::Client;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::fire::scene::PATH;
use crate::support::{Outcome, complete, outcome, token_ids};
use crate::tiny::Tiny;

/// Every request ends within this, whatever happens.
const DEADLINE: Duration = Duration::from_secs(20);

/// A request and its right answer.
#[derive(Clone, Debug)]
pub struct Question {
    request: Value,
    expected: Outcome,
}

/// Questions of many kinds, answered by the worker at `reference`.
pub async fn questions(
    random: &mut StdRng,
    count: usize,
    model: &Tiny,
    reference: Client,
) -> Vec<Question> {
    let mut questions = Vec::new();
    for index in 0..count {
        let length = [1, 31, 32, 33, 100, 300, 700][index % 7];
        let mut request = json!({"model": model.name, "ignore_eos": true,
            "prompt": token_ids(random.random(), length, model.vocab),
            "max_tokens": random.random_range(1..16), "temperature": 0});
        if index % 3 == 1 {
            request["temperature"] = json!(0.8);
            request["top_p"] = json!(0.9);
            request["seed"] = json!(index);
        }
        if index % 5 == 2 {
            request["logprobs"] = json!(2);
        }
        let expected = complete(reference, &request, false).await;
        questions.push(Question { request, expected });
    }
    questions
}

/// What became of a question; an error is what must not happen.
pub async fn ask(client: Client, question: &Question, stream: bool) -> Result<Verdict, String> {
    let begun = Instant::now();
    let asked = tokio::time::timeout(DEADLINE, answer(client, question, stream)).await;
    let verdict = asked.map_err(|_| format!("no end within {DEADLINE:?}"))?;
    verdict.map_err(|error| format!("after {:?}: {error}", begun.elapsed()))
}

/// How a request may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As one worker would have answered.
    Right,
    /// After its first byte, with an error, and right so far.
    BrokenOff,
}

async fn answer(client: Client, question: &Question, stream: bool) -> Result<Verdict, String> {
    let Question { request, expected } = question;
    if !stream {
        let answer = client.post(PATH, request).await.map_err(|error| format!("{error:#}"))?;
        let body = answer.ok().map_err(|error| format!("{error:#}"))?;
        return same(&outcome(std::slice::from_ref(&body), &body["usage"]), expected);
    }
    let mut request = request.clone();
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let mut stream = client.stream(PATH, &request).await.map_err(|error| format!("{error:#}"))?;
    if stream.status != 200 {
        let answer = stream.whole().await.map_err(|error| format!("{error:#}"))?;
        return Err(format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)));
    }
    let mut events = Vec::new();
    loop {
        let event: Value = match stream.event().await {
            Ok(Some(text)) if text == "[DONE]" => break,
            Ok(Some(text)) => serde_json::from_str(&text).map_err(|error| error.to_string())?,
            Ok(None) => return Err("the stream ended without a word".to_owned()),
            Err(error) => return Err(format!("no error event before {error:#}")),
        };
        if event.get("error").is_some() {
            let text: String = events
                .iter()
                .filter_map(|one: &Value| one["choices"][0]["text"].as_str())
                .collect();
            return if expected.text.starts_with(&text) {
                Ok(Verdict::BrokenOff)
            } else {
                Err(format!("broke off after a wrong `{text}`, not of `{}`", expected.text))
            };
        }
        events.push(event);
    }
    let (last, chunks) = events.split_last().ok_or("an empty stream")?;
    same(&outcome(chunks, &last["usage"]), expected)
}

fn same(got: &Outcome, expected: &Outcome) -> Result<Verdict, String> {
    if got == expected {
        Ok(Verdict::Right)
    } else {
        Err(format!("{got:?} instead of {expected:?}"))
    }
}
