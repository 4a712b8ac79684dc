//! Steps out and tokens in: what each sample means to its request.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use baton_shared::id::DisaggRequestId;
use baton_shared::kv::record::LeasedBlocks;
use baton_shared::wire::error::ErrorCode;

use super::output::{FinishReason, OutputEvent, TokenOut};
use super::run::{Engine, Flight};
use super::sequence::{Kind, SeqId};
use super::step::{Sampled, StepOut};
use crate::backend::BackendError;
use crate::failpoint::{self, Point};
use crate::handover::offer::{self, OfferedLease};
use crate::kv::lease::LeaseEnd;
use crate::kv::pool::Blocks;

impl Engine {
    /// Plans a step and gives it to the back end; false if there is nothing to compute.
    pub(super) fn submit(&mut self) -> Result<bool, BackendError> {
        let Some(step) = self.scheduler.plan(&mut self.plan) else { return Ok(false) };
        failpoint::reach(Point::Step);
        let ticket = self.backend.submit(&self.plan)?;
        self.totals.steps += 1;
        self.totals.prompt_computed += step.prompt_tokens;
        self.flights.push_back(Flight { ticket, step });
        Ok(true)
    }

    /// Waits for the oldest step and tells its tokens.
    pub(super) fn collect(&mut self) -> Result<(), BackendError> {
        let Some(Flight { ticket, step }) = self.flights.pop_front() else { return Ok(()) };
        let mut out = std::mem::take(&mut self.out);
        self.backend.collect(ticket, &mut out)?;
        if out.samples.len() != step.samplers.len() {
            let (got, wanted) = (out.samples.len(), step.samplers.len());
            let message = format!("step {} gave {got} samples, not {wanted}", step.number);
            return Err(BackendError::Device(message));
        }
        self.scheduler.collected(step.number);
        for (id, sampled) in step.samplers.iter().zip(&out.samples) {
            self.publish(*id, sampled, &out);
        }
        self.out = out;
        Ok(())
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

    /// The prompt's blocks are complete: they wait for their reader.
    fn finish_context(&mut self, id: SeqId, request: DisaggRequestId) {
        let blocks = self.scheduler.take_blocks(id);
        failpoint::reach(Point::ContextComputed);
        let Some(leased) = self.lease(request, blocks) else {
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

    fn tell(&mut self, id: SeqId, event: OutputEvent) -> bool {
        self.scheduler.get_mut(id).is_some_and(|sequence| sequence.output.push(event))
    }
}

fn token_out(sampled: &Sampled, out: &StepOut) -> TokenOut {
    let Sampled { slot: _, token, logprob, rank, top } = sampled;
    let top = out.top[top.start as usize..top.end as usize].to_vec();
    TokenOut { id: *token, logprob: *logprob, rank: *rank, top }
}
