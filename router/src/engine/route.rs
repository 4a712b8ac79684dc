//! Both hops of one request, until there is something for the client: tries, waits, and gives back what is left
//! behind. Knows nothing of the client's connection: when the client leaves, this future is dropped, and its guards
//! cancel the workers and release the lease.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_shared::wire::error::ErrorCode;
use bytes::Bytes;
use tokio::time::{Instant, timeout, timeout_at};

use super::ctx::request_id;
use super::hop::{self, Fault, Hop};
use super::lease::{Lease, Terms};
use super::plan::{self, Blame, Next, Progress, Record};
use super::reply::Reply;
use super::{Shared, Trail};
use crate::client::head::ContentType;
use crate::client::{self, Exchange};
use crate::config::RouterConfig;
use crate::dialect::era::Era;
use crate::dialect::trtllm::{ClientRequest, ContextAnswer};
use crate::dialect::{early, tells_what_is_gone};
use crate::health::Outcome;
use crate::metrics::HopOutcome;
use crate::policy::{Features, Tried};
use crate::table::Phase;
use crate::table::worker::Worker;

/// First pause when every worker said it has no room, or failed; doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// How often a worker that has been silent for too long is looked at again.
const RECHECK: Duration = Duration::from_secs(1);

/// What the client gets.
#[derive(Debug)]
pub(super) enum Routed {
    /// A whole answer, good or bad.
    Reply(Reply),
    /// A whole event stream, made from a context answer.
    Events(Bytes),
    /// An event stream that has begun.
    Stream(Box<Stream>),
}

/// A generation worker's stream, its first bytes already here.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) exchange: Exchange,
    pub(super) first: Bytes,
    pub(super) hop: Hop,
    pub(super) worker: Arc<Worker>,
}

/// One request on its way.
pub(super) struct Route<'a> {
    pub(super) shared: &'a Shared,
    pub(super) config: &'a RouterConfig,
    pub(super) request: &'a ClientRequest,
    /// Header lines that go to every worker.
    pub(super) lines: &'a str,
    pub(super) deadline: Instant,
    pub(super) trail: &'a mut Trail,
    phase: Phase,
    features: Features,
    progress: Progress,
    queues: [Queue; 2],
}

/// How long a request has been waiting for room in one phase.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    since: Option<Instant>,
    rounds: u32,
    /// The last refusal was for load.
    busy: bool,
    retry_after: Option<u32>,
}

/// What came of the generation phase.
enum Generated {
    Routed(Routed),
    /// The record is worth nothing, and this is to blame; a new context pass is due.
    Lost(Blame),
}

impl<'a> Route<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        config: &'a RouterConfig,
        request: &'a ClientRequest,
        features: Features,
        lines: &'a str,
        deadline: Instant,
        trail: &'a mut Trail,
    ) -> Self {
        let progress = Progress::new(config.routing.attempts);
        let (phase, queues) = (Phase::Context, [Queue::default(); 2]);
        Self { shared, config, request, lines, deadline, trail, phase, features, progress, queues }
    }

    /// Goes as far as the first bytes for the client, at most until the request's deadline.
    pub(super) async fn run(mut self) -> Routed {
        let deadline = self.deadline;
        let result = timeout_at(deadline, self.passes()).await;
        result.unwrap_or_else(|_| {
            let limit = self.config.routing.request_timeout.duration();
            let phase = self.phase.as_str();
            let message =
                format!("the request took longer than {limit:?}, it was in the {phase} phase");
            Routed::Reply(Reply::error(plan::timed_out(self.phase), &message))
        })
    }

    async fn passes(&mut self) -> Routed {
        // Who failed is not forgotten in the next pass.
        let (mut tried, mut tried_after) = (Tried::default(), Tried::default());
        if self.is_local() {
            self.shared.metrics.local_prefill();
            // Otherwise the worker said that there is no record: there was none, so take the long way.
            if let Generated::Routed(routed) = self.generation(None, &mut tried_after).await {
                return routed;
            }
        }
        loop {
            let (lease, answer) = match self.context(&mut tried).await {
                Ok(passed) => passed,
                Err(routed) => return routed,
            };
            // From here on the lease ends before what it can be read by.
            let mut lease = lease;
            lease.answered(&answer);
            if answer.is_finished() {
                lease.settle();
                return self.early_stop(&answer);
            }
            match self.generation(Some((&mut lease, &answer)), &mut tried_after).await {
                Generated::Routed(routed) => return routed,
                Generated::Lost(Blame::Context) => {
                    self.shared.table.report(&lease.worker, Outcome::Failed);
                    tried.doubt(&lease.worker);
                }
                Generated::Lost(Blame::Nobody | Blame::Generation) => tried.forget(&lease.worker),
            }
            self.shared.metrics.retry(Phase::Context);
        }
    }

    /// Whether so little of the prompt is left to compute that one generation worker does all of it.
    fn is_local(&self) -> bool {
        let most = self.config.routing.max_local_prefill_length;
        let prompt = self.features.prompt_tokens;
        let seen = || self.shared.table.seen_tokens(Phase::Generation, &self.features);
        most > 0 && (prompt <= most || prompt.saturating_sub(seen()) <= most)
    }

    fn early_stop(&self, answer: &ContextAnswer) -> Routed {
        self.shared.metrics.early_stop();
        if self.request.stream {
            let usage = self.request.wants_usage();
            return Routed::Events(early::events(answer, self.request.api, usage));
        }
        Routed::Reply(Reply::json(200, early::whole(answer)))
    }

    /// Asks context workers until one has computed the prompt.
    async fn context(&mut self, tried: &mut Tried) -> Result<(Lease<'a>, ContextAnswer), Routed> {
        self.phase = Phase::Context;
        loop {
            let worker = self.choose(tried).await?;
            tried.add(&worker);
            self.trail.context = Some(Arc::clone(&worker));
            self.trail.passes += 1;
            let terms = Terms {
                releaser: &self.shared.releaser,
                orphans: self.config.routing.orphaned_kv,
                request: self.request,
                lines: self.lines,
            };
            let mut lease = Lease::new(terms, &worker);
            let hop = self.begin(&worker);
            let limit = self.config.routing.context_timeout.duration();
            let asked = timeout(limit, self.ask_context(&worker, &mut lease)).await;
            match asked.unwrap_or_else(|_| Err(Fault::late(limit))) {
                Ok(answer) => {
                    hop.begun();
                    hop.end(HopOutcome::Ok);
                    self.shared.table.report(&worker, Outcome::Served);
                    return Ok((lease, answer));
                }
                Err(fault) => {
                    if fault.answered {
                        lease.settle();
                    }
                    match self.after(&worker, hop, fault, Record::Whole, tried)? {
                        Step::Again | Step::ContextPass(_) => {
                            self.shared.metrics.retry(Phase::Context);
                        }
                    }
                }
            }
        }
    }

    async fn ask_context(
        &self,
        worker: &Worker,
        lease: &mut Lease<'_>,
    ) -> Result<ContextAnswer, Fault> {
        let head = worker.heads.get(self.request.api.target());
        let mut sent = None;
        let body = || {
            let id = self.shared.mint_id();
            lease.sent(id);
            sent = Some(id);
            self.request.context(id, Era::of(worker.dialect()))
        };
        let addresses = hop::addresses(worker);
        let exchange = client::send(&addresses, head, self.lines.as_bytes(), body);
        let exchange = exchange.await.map_err(|error| Fault::broken(&error))?;
        let exchange = hop::accepted(exchange).await?;
        let answer = hop::whole(exchange, self.config.limits.max_context_answer.as_usize()).await?;
        let sent = sent.ok_or_else(|| Fault::nonsense("it came before the request"))?;
        let answer = ContextAnswer::parse(answer, sent).map_err(Fault::nonsense)?;
        if answer.id != sent {
            lease.renamed(answer.id);
        }
        Ok(answer)
    }

    /// Asks generation workers until one has begun to answer, or the record is lost. Without a record they are to do
    /// the whole request.
    async fn generation(
        &mut self,
        record: Option<(&mut Lease<'_>, &ContextAnswer)>,
        tried: &mut Tried,
    ) -> Generated {
        self.phase = Phase::Generation;
        let (mut lease, answer) = record.unzip();
        let lines =
            answer.map(|answer| hop::generation_lines(&self.shared.keys, self.lines, answer));
        let lines = lines.as_deref().unwrap_or(self.lines);
        loop {
            let worker = match self.choose(tried).await {
                Ok(worker) => worker,
                Err(routed) => return Generated::Routed(routed),
            };
            tried.add(&worker);
            self.trail.generation = Some(Arc::clone(&worker));
            let hop = self.begin(&worker);
            let body = match answer {
                Some(answer) => self.request.generation(answer, Era::of(worker.dialect())),
                None => self.request.whole(),
            };
            let mut nothing = Record::Whole;
            let record = lease.as_mut().map_or(&mut nothing, |lease| &mut lease.record);
            let before = *record;
            match self.ask_generation(&worker, lines, &body, record).await {
                Ok(Begun::Whole(reply)) => {
                    lease.as_mut().into_iter().for_each(|lease| lease.settle());
                    hop.begun();
                    hop.end(HopOutcome::Ok);
                    self.shared.table.report(&worker, Outcome::Served);
                    return Generated::Routed(Routed::Reply(reply));
                }
                Ok(Begun::Stream(exchange, first)) => {
                    lease.as_mut().into_iter().for_each(|lease| lease.settle());
                    hop.begun();
                    self.shared.table.report(&worker, Outcome::Served);
                    let stream = Stream { exchange, first, hop, worker };
                    return Generated::Routed(Routed::Stream(Box::new(stream)));
                }
                Err(fault) => {
                    let record = match &mut lease {
                        Some(lease) => {
                            if fault.is_turned_away() {
                                lease.record = before;
                            }
                            lease.record.for_next(tells_what_is_gone(lease.worker.dialect()))
                        }
                        None => Record::Whole,
                    };
                    match self.after(&worker, hop, fault, record, tried) {
                        Ok(Step::ContextPass(blame)) => {
                            if blame != Blame::Generation {
                                tried.forget(&worker);
                            }
                            return Generated::Lost(blame);
                        }
                        Ok(Step::Again) => self.shared.metrics.retry(Phase::Generation),
                        Err(routed) => return Generated::Routed(routed),
                    }
                }
            }
        }
    }

    async fn ask_generation(
        &self,
        worker: &Worker,
        lines: &str,
        body: &[Bytes],
        record: &mut Record,
    ) -> Result<Begun, Fault> {
        let head = worker.heads.get(self.request.api.target());
        let addresses = hop::addresses(worker);
        // Pinned here: as an argument, it would be in that future twice.
        let work = std::pin::pin!(async {
            let body = || {
                *record = Record::Doubtful;
                body.to_vec()
            };
            let exchange = client::send(&addresses, head, lines.as_bytes(), body);
            let exchange = exchange.await.map_err(|error| Fault::broken(&error))?;
            let mut exchange = hop::accepted(exchange).await?;
            *record = Record::Read;
            let is_stream = exchange.head().content_type == ContentType::EventStream;
            if !self.request.stream {
                if is_stream {
                    return Err(Fault::nonsense("an event stream that nobody asked for"));
                }
                let (status, kind) = (exchange.head().status, exchange.head().content_type.clone());
                // Bounded like the other whole answers that are held in memory.
                let max = self.config.limits.max_context_answer.as_usize();
                let body = hop::whole(exchange, max).await?;
                return Ok(Begun::Whole(Reply::forwarded(status, &kind, body)));
            }
            if !is_stream {
                return Err(Fault::nonsense("no event stream"));
            }
            match std::future::poll_fn(|cx| exchange.poll_next(cx)).await {
                Ok(Some(first)) => Ok(Begun::Stream(exchange, first)),
                Ok(None) => Err(Fault::nonsense("an empty event stream")),
                Err(error) => Err(Fault::broken(&error)),
            }
        });
        self.patiently(worker, work).await
    }

    /// Waits `first_token_timeout` for the first byte. A whole answer has its first byte at its end, so there a
    /// silent worker is given up only when its probes fail too (or the request's deadline passes).
    async fn patiently<T>(
        &self,
        worker: &Worker,
        mut work: Pin<&mut impl Future<Output = Result<T, Fault>>>,
    ) -> Result<T, Fault> {
        let limit = self.config.routing.first_token_timeout.duration();
        let mut wait = limit;
        loop {
            if let Ok(done) = timeout(wait, work.as_mut()).await {
                return done;
            }
            let alive = worker.health.condition(self.shared.table.now()).is_usable();
            if self.request.stream || !alive {
                return Err(Fault::late(limit));
            }
            wait = RECHECK;
        }
    }

    fn begin(&self, worker: &Worker) -> Hop {
        Hop::begin(&self.shared.metrics, self.phase, worker.begin(self.features.prompt_tokens))
    }

    /// Notes how a hop went wrong and decides what is next; an error is what the client gets.
    fn after(
        &mut self,
        worker: &Arc<Worker>,
        hop: Hop,
        fault: Fault,
        record: Record,
        tried: &Tried,
    ) -> Result<Step, Routed> {
        let Fault { trouble, health, counted, message, reply, retry_after, answered: _ } = fault;
        let phase = self.phase;
        hop.end(counted);
        self.shared.table.report(worker, health);
        let next = self.progress.after(phase, trouble, record, self.is_better_expected(tried));
        let request_id = request_id(self.lines);
        tracing::debug!(
            request_id, worker = %worker.id, phase = phase.as_str(), why = message, ?next, "hop went wrong"
        );
        match next {
            Next::Again { busy } => {
                let queue = &mut self.queues[phase as usize];
                queue.busy = busy;
                queue.retry_after = queue.retry_after.max(retry_after);
                Ok(Step::Again)
            }
            Next::ContextPass { blame } => Ok(Step::ContextPass(blame)),
            Next::Forward => {
                let nothing = || Reply::error(plan::failed(phase), &message);
                Err(Routed::Reply(reply.unwrap_or_else(nothing)))
            }
            Next::GiveUp(code) => {
                let text = format!("{} worker `{}`: {message}", phase.as_str(), worker.id);
                tracing::warn!(request_id, worker = %worker.id, code = code.code(), why = message, "gave up");
                Err(Routed::Reply(Reply::error(code, &text)))
            }
        }
    }

    /// A worker for this phase, and how long that took.
    async fn choose(&mut self, tried: &mut Tried) -> Result<Arc<Worker>, Routed> {
        let since = Instant::now();
        let chosen = self.find(tried).await;
        self.shared.metrics.queued(self.phase, since.elapsed());
        chosen
    }

    /// A worker for this phase from the newest table. Waits up to `queue_timeout` for one that is usable and has room,
    /// and as long for another one before a worker that has failed this request is asked again; when all have, only
    /// for a moment.
    async fn find(&mut self, tried: &mut Tried) -> Result<Arc<Worker>, Routed> {
        let (phase, table) = (self.phase, &self.shared.table);
        loop {
            let picked = table.pick(phase, &self.features, tried);
            let is_better_expected = self.is_better_expected(tried);
            let queue = &mut self.queues[phase as usize];
            if let Some(worker) = &picked
                && !(tried.contains(worker) && queue.busy || tried.has_failed(worker))
            {
                return Ok(Arc::clone(worker));
            }
            let since = *queue.since.get_or_insert_with(Instant::now);
            let deadline = since + self.config.routing.queue_timeout.duration();
            let Some(worker) = picked else {
                if table.wait_usable(phase, deadline).await {
                    continue;
                }
                return Err(self.no_worker("is usable"));
            };
            if !queue.busy && is_better_expected {
                let other = |other: &Worker| !tried.has_failed(other);
                if table.wait_usable_where(phase, deadline, other).await {
                    continue;
                }
                return Ok(worker);
            }
            let pause = PAUSES.0 * 2u32.saturating_pow(queue.rounds.min(8));
            let until = Instant::now() + pause.min(PAUSES.1);
            if until >= deadline {
                return if queue.busy { Err(self.no_worker("has room")) } else { Ok(worker) };
            }
            tokio::time::sleep_until(until).await;
            (queue.rounds, queue.busy) = (queue.rounds + 1, false);
            *tried = Tried::default();
        }
    }

    /// Whether a worker that has not failed this request may come back into use.
    fn is_better_expected(&self, tried: &Tried) -> bool {
        let table = self.shared.table.snapshot();
        table.pool(self.phase).iter().any(|other| !tried.has_failed(other))
    }

    fn no_worker(&self, what: &str) -> Routed {
        let message = format!("no {} worker {what}", self.phase.as_str());
        let reply = Reply::error(ErrorCode::NoWorkers, &message);
        let retry_after = self.queues[self.phase as usize].retry_after.or(reply.retry_after);
        Routed::Reply(Reply { retry_after, ..reply })
    }
}

/// What a generation worker's answer has begun as.
enum Begun {
    Whole(Reply),
    Stream(Exchange, Bytes),
}

/// What is next after a hop that went wrong.
enum Step {
    /// The same phase on another worker.
    Again,
    /// A new context pass.
    ContextPass(Blame),
}
