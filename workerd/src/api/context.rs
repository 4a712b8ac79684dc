//! A context pass: prompt and first token here, the blocks kept for whoever goes on.
//!
//! Always holds: a lease is either named in an answer that was handed to the connection, or ended.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::header;
use axum::response::Response;
use baton_shared::id::DisaggRequestId;
use baton_shared::kv::block_hash::CacheSalt;
use baton_shared::kv::record::{LeasedBlocks, Record, prompt_hash};
use baton_shared::wire::completion::FinishReason;
use baton_shared::wire::disagg::{DisaggregatedParams, FirstLogProbs, TokenLogProb};
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::token_ids;
use baton_shared::wire::usage::Usage;
use futures_util::stream;

use super::answer::{Assembler, End, LOWEST, Piece};
use super::error::ApiError;
use super::job::Job;
use super::run::unexpected;
use super::shape::{Envelope, PromptIds};
use super::worker::Worker;
use crate::engine::output::{OutputEvent, OutputReceiver, TokenOut, channel};
use crate::engine::{EngineHandle, Phase, Submission};
use crate::failpoint::{self, Point};

/// Events of a context pass: start, token, blocks, end.
const EVENTS: usize = 8;

/// What a context pass came to.
struct Outcome {
    piece: Piece,
    first: Vec<TokenOut>,
    lease: Option<LeaseGuard>,
    /// Whether the text ended with its first token: nobody will go on.
    is_over: bool,
    cached_tokens: u32,
    tokens: u32,
}

/// Ends its lease on drop, unless the answer that names it has left.
struct LeaseGuard {
    engine: EngineHandle,
    blocks: LeasedBlocks,
    is_delivered: bool,
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        if !self.is_delivered {
            self.engine.end_lease(self.blocks.lease);
        }
    }
}

/// Computes the prompt and answers with what the next worker needs.
///
/// # Errors
/// What the engine refuses it for.
pub async fn serve(
    worker: &Arc<Worker>,
    job: Job,
    request: Option<u64>,
    ids_in_base64: bool,
    arrived: Instant,
) -> Result<Response, ApiError> {
    let request = request.map_or_else(|| worker.mint_request(), DisaggRequestId);
    let rules = job.answer_rules(worker);
    let (output, receiver) = channel(EVENTS);
    worker.engine.submit(Submission {
        prompt: job.prompt.clone(),
        salt: job.request.salt.as_deref().map(CacheSalt::of),
        sampling: job.request.sampling.clone(),
        stop: job.stop_rule(&rules),
        phase: Phase::Context(request),
        output,
    })?;
    let assembler = Assembler::new(Arc::clone(&worker.texts), rules);
    let mut outcome = collect(worker, receiver, assembler, arrived).await?;
    let prompt_tokens = job.prompt_tokens();
    if outcome.is_over {
        // Whatever the engine kept: the engine knows no stop strings.
        outcome.lease = None;
    }
    let leased = outcome.lease.as_ref().map(|guard| guard.blocks.clone());
    let state = if outcome.is_over { None } else { Some(record(worker, &job, request, leased)?) };
    let params = params(&outcome, &job, request, state);
    let ids = if ids_in_base64 {
        PromptIds::Base64(token_ids::encode(&job.prompt))
    } else {
        PromptIds::Plain(job.prompt)
    };
    let usage = Usage::new(prompt_tokens, outcome.cached_tokens, outcome.tokens);
    let envelope = Envelope::new(job.request.endpoint, job.request.model);
    let body = envelope.context(outcome.piece, usage, ids, params)?;
    failpoint::arrive(Point::ContextAnswer).await;
    Ok(deliver(body, outcome.lease))
}

/// Waits for the pass's end.
async fn collect(
    worker: &Worker,
    mut output: OutputReceiver,
    mut assembler: Assembler,
    arrived: Instant,
) -> Result<Outcome, ApiError> {
    let metrics = &worker.metrics;
    let mut admitted = arrived;
    let mut piece = Piece::default();
    let mut first = Vec::new();
    let mut lease = None;
    let mut cached_tokens = 0;
    loop {
        match output.next().await {
            Some(OutputEvent::Started { cached_tokens: cached, waited }) => {
                cached_tokens = cached;
                admitted = Instant::now();
                metrics.queued(waited);
            }
            Some(OutputEvent::Token(token)) => {
                metrics.first_token(arrived.elapsed());
                metrics.prefilled(admitted.elapsed());
                piece.extend(assembler.token(&token));
                first.push(token);
            }
            Some(OutputEvent::ContextDone(blocks)) => {
                let engine = worker.engine.clone();
                lease = blocks.map(|blocks| LeaseGuard { engine, blocks, is_delivered: false });
            }
            Some(OutputEvent::Finished(reason)) => {
                let is_over = piece.end.is_some();
                if !is_over {
                    // What an unfinished character or stop string becomes is for the next worker to see.
                    piece.extend(assembler.end(reason));
                    piece.end = Some(End { reason: FinishReason::Length, stop: None });
                }
                let tokens = assembler.tokens();
                return Ok(Outcome { piece, first, lease, is_over, cached_tokens, tokens });
            }
            other => return Err(unexpected(other)),
        }
    }
}

/// `encoded_opaque_state`.
fn record(
    worker: &Worker,
    job: &Job,
    request: DisaggRequestId,
    lease: Option<LeasedBlocks>,
) -> Result<String, ApiError> {
    let record = Record {
        worker: worker.id.clone(),
        address: worker.address.clone(),
        incarnation: worker.incarnation,
        request,
        prompt_hash: prompt_hash(&job.prompt, job.request.salt.as_deref()),
        fingerprint: worker.fingerprint,
        prompt_tokens: job.prompt_tokens(),
        lease,
    };
    record
        .encode_text(&worker.keys)
        .map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))
}

fn params(
    outcome: &Outcome,
    job: &Job,
    request: DisaggRequestId,
    state: Option<String>,
) -> DisaggregatedParams {
    let wants_scores = job.request.sampling.logprobs.is_some();
    DisaggregatedParams {
        request_type: "context_only".to_owned(),
        first_gen_tokens: Some(outcome.first.iter().map(|token| token.id).collect()),
        first_gen_log_probs: wants_scores.then(|| outcome.first.iter().map(scores).collect()),
        ctx_request_id: Some(request.0),
        encoded_opaque_state: state,
        disagg_request_id: Some(request.0),
        ctx_dp_rank: Some(0),
        schedule_style: Some(0),
        ..DisaggregatedParams::default()
    }
}

/// The sampled token's log-probability, then the alternatives'.
fn scores(token: &TokenOut) -> FirstLogProbs {
    let finite = |logprob: f32| logprob.max(LOWEST);
    let own = TokenLogProb {
        token_id: token.id,
        logprob: finite(token.logprob),
        rank: Some(token.rank).filter(|rank| *rank > 0),
    };
    let others = token.top.iter().zip(1..).map(|((token_id, logprob), rank)| TokenLogProb {
        token_id: *token_id,
        logprob: finite(*logprob),
        rank: Some(rank),
    });
    FirstLogProbs::List(std::iter::once(own).chain(others).collect())
}

/// An answer that keeps its lease until it is handed to the connection.
fn deliver(body: Vec<u8>, lease: Option<LeaseGuard>) -> Response {
    let length = body.len();
    let once = stream::once(async move {
        if let Some(mut guard) = lease {
            guard.is_delivered = true;
        }
        Ok::<_, std::convert::Infallible>(body)
    });
    let mut response = Response::new(Body::from_stream(once));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, header::HeaderValue::from(length));
    response
}
