//! Steps out and tokens in: what each sample means to its request.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use baton_shared::id::DisaggRequestId;
use baton_shared::kv::record::LeasedBlocks;
use baton_shared::wire::error::ErrorCode;

use tracing::Span;

use super::iterations::Iteration;
use super::output::{FinishReason, OutputEvent, TokenOut};
use super::run::Engine;
use super::scheduler::PlannedStep;
use super::sequence::Kind;
use super::sequences::SeqId;
use super::step::{Sampled, StepOut};
use crate::backend::{BackendError, StepTicket};
use crate::failpoint::{self, Point};
use crate::handover::offer::{self, OfferedLease};
use crate::kv::lease::LeaseEnd;
use crate::kv::pool::Blocks;

/// A step that was submitted and not collected.
pub(super) struct Flight {
    ticket: StepTicket,
    step: PlannedStep,
    begun: Instant,
}

/// What happened since the last step was collected.
#[derive(Debug, Default)]
pub(super) struct Since {
    /// Requests admitted.
    pub admitted: u32,
    /// Time they had waited, together.
    pub waited: Duration,
    /// Requests that ended.
    pub completed: u32,
}

impl Engine {
    /// Plans a step and gives it to the back end; false if there is nothing to compute.
    pub(super) fn submit(&mut self) -> Result<bool, BackendError> {
        let mut step = self.spare_steps.pop().unwrap_or_default();
        if !self.scheduler.plan(&mut self.plan, &mut step) {
            self.spare_steps.push(step);
            return Ok(false);
        }
        failpoint::reach(Point::Step);
        let begun = Instant::now();
        let ticket = self.backend.submit(&self.plan)?;
        self.totals.steps += 1;
        self.totals.prompt_computed += step.prompt_tokens;
        self.flights.push_back(Flight { ticket, step, begun });
        Ok(true)
    }

    /// Waits for the oldest step and tells its tokens.
    pub(super) fn collect(&mut self) -> Result<(), BackendError> {
        let Some(Flight { ticket, step, begun }) = self.flights.pop_front() else { return Ok(()) };
        let mut out = std::mem::take(&mut self.out);
        self.backend.collect(ticket, &mut out)?;
        let latency = begun.elapsed();
        let wanted = step.samplers().count();
        if out.samples.len() != wanted {
            let got = out.samples.len();
            let message = format!("step {} gave {got} samples, not {wanted}", step.number);
            return Err(BackendError::Device(message));
        }
        if let Some(pace) = &mut self.scheduler.pace {
            pace.observe(step.work, latency);
        }
        self.scheduler.collected(&step);
        for (id, sampled) in step.samplers().zip(&out.samples) {
            self.publish(id, sampled, &out);
        }
        self.out = out;
        self.remember(&step, latency);
        self.spare_steps.push(step);
        Ok(())
    }

    fn remember(&mut self, step: &PlannedStep, latency: Duration) {
        let Since { admitted, waited, completed } = std::mem::take(&mut self.since);
        self.door.iterations.add(Iteration {
            number: step.number,
            at: SystemTime::now(),
            latency,
            admitted,
            waited,
            active: self.scheduler.running() as u32,
            queued: self.door.waiting(),
            completed,
            contexts: step.prefills,
            generations: step.parts.len() as u32 - step.prefills,
            paused: step.preempted,
            context_tokens: step.prompt_tokens,
            blocks: self.scheduler.pool.counts(),
            cache: self.scheduler.pool.cache_counts(),
            missed: self.scheduler.missed_blocks,
            max_sequences: self.scheduler.limits.max_sequences,
            max_tokens: self.scheduler.limits.max_batch_tokens,
        });
    }

    /// A sequence that left meanwhile does not want its token.
    fn publish(&mut self, id: SeqId, sampled: &Sampled, out: &StepOut) {
        let max_len = self.scheduler.limits.max_len;
        let Some(sequence) = self.scheduler.get_mut(id) else { return };
        sequence.pending -= 1;
        sequence.tokens.push(sampled.token);
        let (kind, finish) = (sequence.kind, sequence.finish(max_len));
        if !sequence.output.push(OutputEvent::Token(token_out(sampled, out))) {
            return drop(self.take_out(id));
        }
        self.totals.generated += 1;
        match (kind, finish) {
            (Kind::Whole | Kind::Generation(_), None) => {}
            (Kind::Whole | Kind::Generation(_), Some(reason)) => self.finish(id, reason),
            (Kind::Context(_), Some(reason)) => {
                self.tell(id, OutputEvent::ContextDone(None));
                self.finish(id, reason);
            }
            (Kind::Context(request), None) => self.finish_context(id, request),
        }
    }

    /// The prompt's blocks are complete: they wait for their reader. Transports wait for no device, but the step that
    /// gave the first token was collected, and those with the rest of the prompt before it: all is written, however
    /// many later steps are under way. None of them writes these blocks, as a context pass gets one sample only.
    fn finish_context(&mut self, id: SeqId, request: DisaggRequestId) {
        let blocks = self.scheduler.take_blocks(id);
        failpoint::reach(Point::ContextComputed);
        let span = self.scheduler.get_mut(id).map(|sequence| sequence.output.span().clone());
        let leased = span.unwrap_or_else(Span::none).in_scope(|| self.lease(request, blocks));
        let Some(leased) = leased else {
            return self.fail(id, ErrorCode::Internal, "the blocks could not be leased");
        };
        let lease = leased.lease;
        failpoint::reach(Point::ContextLeased);
        if self.tell(id, OutputEvent::ContextDone(Some(leased))) {
            self.finish(id, FinishReason::Length);
        } else {
            self.leases.end(lease, LeaseEnd::Released);
            drop(self.take_out(id));
        }
    }

    fn lease(&mut self, request: DisaggRequestId, blocks: Blocks) -> Option<LeasedBlocks> {
        let ids = blocks.ids().to_vec();
        let expires = Instant::now() + self.config.lease_timeout;
        let expires_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
            + self.config.lease_timeout;
        let grant = self.leases.grant(request, blocks, expires).ok()?;
        tracing::debug!(%request, blocks = ids.len(), "blocks leased");
        let offered = OfferedLease {
            lease: grant.lease,
            expires_unix_ms: u64::try_from(expires_unix.as_millis()).unwrap_or(u64::MAX),
            epoch_address: grant.epoch_address,
            epoch: grant.epoch,
        };
        Some(offer::leased_blocks(offered, &self.serve, &self.kv, &ids))
    }

    fn finish(&mut self, id: SeqId, reason: FinishReason) {
        self.tell(id, OutputEvent::Finished(reason));
        drop(self.take_out(id));
    }

    pub(super) fn tell(&mut self, id: SeqId, event: OutputEvent) -> bool {
        self.scheduler.get_mut(id).is_some_and(|sequence| sequence.output.push(event))
    }
}

fn token_out(sampled: &Sampled, out: &StepOut) -> TokenOut {
    let Sampled { slot: _, token, logprob, rank, top } = sampled;
    let top = out.top[top.start as usize..top.end as usize].to_vec();
    TokenOut { id: *token, logprob: *logprob, rank: *rank, top }
}
