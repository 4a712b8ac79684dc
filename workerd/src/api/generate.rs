//! Both endpoints that generate text, from the body to the answer.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request as HttpRequest, header};
use axum::response::{IntoResponse, Response};
use baton_shared::wire::auth::DISAGG_HEADER;
use baton_shared::wire::error::ErrorCode;
use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::context;
use super::counted::Counted;
use super::error::ApiError;
use super::events;
use super::job::Job;
use super::request::{Delivery, Endpoint, Part, Request};
use super::run::Run;
use super::shape::Envelope;
use super::takeover::Takeover;
use super::worker::Worker;
use crate::failpoint::{self, Point};

/// Largest body.
const MAX_BODY: usize = 32 << 20;
/// Longer bodies are read off the threads that serve connections.
const LONG_BODY: usize = 256 << 10;
/// Upstream's mark of a body that is no JSON.
const MSGPACK_HEADER: &str = "x-trtllm-msgpack";
/// A body must be whole after this.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// `POST /v1/completions`
pub async fn completions(
    State(worker): State<Arc<Worker>>,
    request: HttpRequest<Body>,
) -> Response {
    serve(worker, Endpoint::Completions, request).await
}

/// `POST /v1/chat/completions`
pub async fn chat(State(worker): State<Arc<Worker>>, request: HttpRequest<Body>) -> Response {
    serve(worker, Endpoint::Chat, request).await
}

/// One request's panic stays one request's.
async fn serve(worker: Arc<Worker>, endpoint: Endpoint, request: HttpRequest<Body>) -> Response {
    let answer = AssertUnwindSafe(answer(worker, endpoint, request)).catch_unwind();
    match answer.await {
        Ok(response) => response,
        Err(_) => {
            tracing::error!("a request's task panicked");
            ApiError::new(ErrorCode::Internal, "this request met a bug").into_response()
        }
    }
}

async fn answer(worker: Arc<Worker>, endpoint: Endpoint, request: HttpRequest<Body>) -> Response {
    let arrived = Instant::now();
    let mut counted = Counted::new(Arc::clone(&worker), endpoint, arrived);
    let (head, body) = request.into_parts();
    let job = match prepare(&worker, endpoint, &head.headers, body, &mut counted).await {
        Ok(job) => job,
        Err(error) => return refuse(error, counted),
    };
    let authentication = head.headers.get(DISAGG_HEADER).and_then(|value| value.to_str().ok());
    match generate(&worker, job, authentication, arrived).await {
        Ok(Generated::Whole(response)) => {
            counted.succeeded();
            response
        }
        Ok(Generated::Stream(run, envelope, usage)) => {
            events::respond(*run, envelope, usage, counted)
        }
        Err(error) => refuse(error, counted),
    }
}

/// What a request came to.
enum Generated {
    Whole(Response),
    Stream(Box<Run>, Envelope, super::request::StreamUsage),
}

async fn prepare(
    worker: &Worker,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: Body,
    counted: &mut Counted,
) -> Result<Job, ApiError> {
    let body = read_body(headers, body).await?;
    let is_long = body.len() > LONG_BODY;
    let parse = move || Request::parse(endpoint, &body, rand::random());
    let request = if is_long { off_the_loop(parse).await? } else { parse()? };
    counted.is_part(&request.part);
    worker.check_model(&request.model)?;
    Job::prepare(worker, request).await
}

async fn generate(
    worker: &Arc<Worker>,
    mut job: Job,
    authentication: Option<&str>,
    arrived: Instant,
) -> Result<Generated, ApiError> {
    let takeover = match std::mem::replace(&mut job.request.part, Part::Whole) {
        Part::Whole => None,
        Part::Context { request, ids_in_base64 } => {
            let response = context::serve(worker, job, request, ids_in_base64, arrived).await?;
            return Ok(Generated::Whole(response));
        }
        Part::Generation(params) => {
            let wants_scores = job.request.sampling.logprobs.is_some();
            let (prompt, salt) = (&job.prompt, job.request.salt.as_deref());
            let takeover =
                Takeover::check(worker, &params, prompt, salt, wants_scores, authentication)?;
            failpoint::arrive(Point::GenerationChecked).await;
            takeover.confirm_peer(worker).await?;
            failpoint::arrive(Point::GenerationConfirmed).await;
            Some(takeover)
        }
    };
    let envelope = Envelope::new(job.request.endpoint, job.request.model.clone());
    let delivery = job.request.delivery;
    let mut run = Run::start(worker, job, takeover, arrived).await?;
    match delivery {
        Delivery::Stream(usage) => Ok(Generated::Stream(Box::new(run), envelope, usage)),
        Delivery::Whole => {
            let answer = run.whole().await?;
            let body = envelope.whole(answer, run.usage())?;
            let mut response = Response::new(Body::from(body));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            Ok(Generated::Whole(response))
        }
    }
}

/// Runs what takes long beside the threads that serve connections.
///
/// # Errors
/// What the work gives.
pub async fn off_the_loop<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(ApiError::new(ErrorCode::Internal, "this request met a bug")))
}

/// The body, if it is not compressed, not too long, and comes in time.
///
/// # Errors
/// [`ErrorCode::UnsupportedEncoding`], [`ErrorCode::BodyTooLarge`], [`ErrorCode::BodyTimeout`].
pub async fn read_body(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        let message = "the body must not be compressed";
        return Err(ApiError::new(ErrorCode::UnsupportedEncoding, message));
    }
    if headers.contains_key(MSGPACK_HEADER) {
        let message = "MessagePack is not available yet: send JSON";
        return Err(ApiError::new(ErrorCode::UnsupportedEncoding, message));
    }
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect());
    match collected.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body is longer than {MAX_BODY} bytes");
            Err(ApiError::new(ErrorCode::BodyTooLarge, message))
        }
        Ok(Err(error)) => {
            Err(ApiError::new(ErrorCode::InvalidRequest, format!("the body broke off: {error}")))
        }
        Err(_) => {
            let message = format!("the body was not whole after {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::new(ErrorCode::BodyTimeout, message))
        }
    }
}

fn refuse(error: ApiError, mut counted: Counted) -> Response {
    counted.failed(error.code);
    if error.code.status() >= 500 {
        tracing::debug!(code = error.code.code(), message = error.message, "request failed");
    }
    error.into_response()
}
