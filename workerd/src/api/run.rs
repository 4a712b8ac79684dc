//! One answer while it is made: pieces from the engine, or from what a context pass left.
//!
//! Dropping a [`Run`] cancels its request. Until [`Run::start`] returns nothing may be sent to the client, so every
//! error before has its HTTP status.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_shared::kv::block_hash::CacheSalt;
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::usage::Usage;

use super::answer::{Assembler, Piece};
use super::error::ApiError;
use super::job::Job;
use super::takeover::Takeover;
use super::worker::Worker;
use crate::engine::output::{FinishReason, OutputEvent, OutputReceiver, channel};
use crate::engine::{Phase, Submission, SubmitError};
use crate::metrics::Decoded;

/// Events a request has besides its tokens.
const OTHER_EVENTS: usize = 8;

/// One answer on its way.
pub struct Run {
    worker: Arc<Worker>,
    assembler: Assembler,
    /// Text of the context pass's tokens, first to go out.
    ready: Option<Piece>,
    /// The rest; `None` = the last piece is out or in `ready`.
    rest: Option<OutputReceiver>,
    prompt_tokens: u32,
    cached_tokens: u32,
    clock: Clock,
}

/// Measures first and later tokens.
struct Clock {
    arrived: Instant,
    /// When the engine took it, to compute the prompt; `None` = that was done elsewhere.
    admitted: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: u32,
}

impl Run {
    /// Hands the request to the engine and waits until it is admitted (a generation pass: until its blocks are
    /// here and good).
    ///
    /// # Errors
    /// What the engine refuses it for.
    pub async fn start(
        worker: &Arc<Worker>,
        job: Job,
        takeover: Option<Takeover>,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let rules = job.answer_rules(worker);
        let stop = job.stop_rule(&rules);
        let mut run = Self {
            worker: Arc::clone(worker),
            assembler: Assembler::new(Arc::clone(&worker.texts), rules),
            ready: None,
            rest: None,
            prompt_tokens: job.prompt_tokens(),
            cached_tokens: 0,
            clock: Clock { arrived, admitted: None, first: None, last: None, tokens: 0 },
        };
        let phase = match takeover {
            None => Phase::Whole,
            Some(takeover) => match run.take_over(takeover, job.max_tokens) {
                Some(phase) => phase,
                None => return Ok(run),
            },
        };
        let is_takeover = matches!(phase, Phase::Generation { .. });
        let (output, mut rest) = channel(stop.max_tokens as usize + OTHER_EVENTS);
        let Job { request, prompt, .. } = job;
        worker.engine.submit(Submission {
            prompt,
            salt: request.salt.as_deref().map(CacheSalt::of),
            sampling: request.sampling,
            stop,
            phase,
            output,
        })?;
        let (cached, waited) = started(&mut rest).await?;
        worker.metrics.queued(waited);
        if !is_takeover {
            run.cached_tokens = cached;
            run.clock.admitted = Some(Instant::now());
        }
        run.rest = Some(rest);
        Ok(run)
    }

    /// Puts the context pass's tokens first; what is left for the engine, if anything.
    fn take_over(&mut self, takeover: Takeover, max_tokens: u32) -> Option<Phase> {
        let Takeover { request, first, record, usage } = takeover;
        if let Some(usage) = usage {
            self.prompt_tokens = usage.prompt_tokens;
            self.cached_tokens =
                usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
        }
        let mut ready = Piece::default();
        for token in &first {
            ready.extend(self.assembler.token(token));
            if ready.end.is_some() {
                break;
            }
        }
        let is_all = record.lease.is_none() || self.assembler.tokens() >= max_tokens;
        if ready.end.is_none() && is_all {
            ready.extend(self.assembler.end(FinishReason::Length));
        }
        let is_over = ready.end.is_some();
        self.ready = Some(ready);
        let first = first.iter().map(|token| token.id).collect();
        (!is_over).then(|| Phase::Generation { request, first, record: Box::new(record) })
    }

    /// The next piece that has something for the client; `None` after the one with an end.
    ///
    /// # Errors
    /// The engine gave up; nothing follows.
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        if let Some(piece) = self.ready.take() {
            self.tick();
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        while let Some(rest) = &mut self.rest {
            let event = rest.next().await;
            let piece = match event {
                Some(OutputEvent::Token(token)) => {
                    self.tick();
                    self.assembler.token(&token)
                }
                Some(OutputEvent::Finished(reason)) => self.assembler.end(reason),
                other => {
                    self.rest = None;
                    return Err(unexpected(other));
                }
            };
            if piece.end.is_some() {
                self.rest = None;
                self.count_decode();
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// The whole answer.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn whole(&mut self) -> Result<Piece, ApiError> {
        let mut answer = Piece::default();
        while let Some(piece) = self.next().await? {
            answer.extend(piece);
        }
        Ok(answer)
    }

    /// Token counts so far.
    pub fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.cached_tokens, self.assembler.tokens())
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let metrics = &self.worker.metrics;
        match self.clock.last {
            None => {
                metrics.first_token(now - self.clock.arrived);
                if let Some(admitted) = self.clock.admitted {
                    metrics.prefilled(now - admitted);
                }
                self.clock.first = Some(now);
            }
            Some(last) => metrics.next_token(now - last),
        }
        self.clock.last = Some(now);
        self.clock.tokens += 1;
    }

    fn count_decode(&self) {
        let Clock { first, last, tokens, .. } = self.clock;
        if let (Some(first), Some(last)) = (first, last) {
            let decoded = Decoded { took: last - first, later: tokens - 1 };
            self.worker.metrics.decoded(decoded);
        }
    }
}

/// Waits for admission; prompt tokens found in the prefix cache, and how long the engine let it wait.
async fn started(output: &mut OutputReceiver) -> Result<(u32, Duration), ApiError> {
    match output.next().await {
        Some(OutputEvent::Started { cached_tokens, waited }) => Ok((cached_tokens, waited)),
        other => Err(unexpected(other)),
    }
}

/// An event that ends the request: a failure, or one that must not come here.
pub fn unexpected(event: Option<OutputEvent>) -> ApiError {
    match event {
        Some(OutputEvent::Failed { code, message }) => ApiError::new(code, message),
        other => {
            tracing::error!(?other, "the engine broke its contract");
            ApiError::new(ErrorCode::Internal, "the engine ended the request without a reason")
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
