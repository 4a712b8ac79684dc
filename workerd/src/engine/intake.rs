//! What the engine thread makes of its commands: which requests are let in, and what ends them from outside.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use baton_shared::id::DisaggRequestId;
use baton_shared::wire::error::ErrorCode;

use super::output::{FinishReason, OutputEvent};
use super::run::{Engine, tell_failure};
use super::sequence::{Kind, Sequence, Source};
use super::sequences::SeqId;
use super::{Command, Phase, QueuePlace, Submission};
use crate::kv::lease::LeaseEnd;

/// Requests by the id both phases share. Both may live here at once, if this worker hands over to itself.
#[derive(Debug, Default)]
pub(super) struct LiveRequests {
    contexts: HashMap<DisaggRequestId, SeqId>,
    generations: HashMap<DisaggRequestId, SeqId>,
}

impl LiveRequests {
    fn add(&mut self, kind: Kind, id: SeqId) {
        match kind {
            Kind::Whole => None,
            Kind::Context(request) => self.contexts.insert(request, id),
            Kind::Generation(request) => self.generations.insert(request, id),
        };
    }

    fn remove(&mut self, kind: Kind) {
        match kind {
            Kind::Whole => None,
            Kind::Context(request) => self.contexts.remove(&request),
            Kind::Generation(request) => self.generations.remove(&request),
        };
    }

    fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Whole => false,
            Kind::Context(request) => self.contexts.contains_key(&request),
            Kind::Generation(request) => self.generations.contains_key(&request),
        }
    }

    fn with(&self, request: DisaggRequestId) -> impl Iterator<Item = SeqId> + use<> {
        let context = self.contexts.get(&request).copied();
        context.into_iter().chain(self.generations.get(&request).copied())
    }
}

impl Engine {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission, place) => self.accept(*submission, place),
            Command::Sweep => self.sweep(),
            Command::Release(request) => self.release(request),
            Command::EndLease(lease) => {
                self.leases.end(lease, LeaseEnd::Released);
            }
            Command::Mover(event) => self.hear(event),
            Command::Drain => self.is_draining = true,
        }
    }

    fn accept(&mut self, submission: Submission, place: QueuePlace) {
        if submission.output.is_closed() {
            return;
        }
        if let Err((code, message)) = self.check(&submission) {
            return tell_failure(&submission.output, code, message);
        }
        let none = self.scheduler.pool.none();
        let (now, timeout) = (Instant::now(), self.config.queue_timeout);
        let sequence = Sequence::new(submission, place, none, self.incarnation, now, timeout);
        if self.live.has(sequence.kind) {
            let message = "a request with this `disagg_request_id` is under way";
            return tell_failure(&sequence.output, ErrorCode::DuplicateRequest, message);
        }
        match sequence.finish(self.scheduler.limits.max_len) {
            Some(reason) => self.finish_at_once(&sequence, reason),
            None => {
                let kind = sequence.kind;
                let id = self.scheduler.enqueue(sequence);
                self.live.add(kind, id);
            }
        }
    }

    /// A generation pass whose tokens are all there already: nobody needs its blocks.
    fn finish_at_once(&mut self, sequence: &Sequence, reason: FinishReason) {
        if let Some(Source::Local(record)) = &sequence.source
            && let Some(leased) = &record.lease
        {
            self.leases.end(leased.lease, LeaseEnd::Released);
        }
        sequence.output.push(OutputEvent::Started { cached_tokens: 0, waited: Duration::ZERO });
        sequence.output.push(OutputEvent::Finished(reason));
    }

    fn check(&self, submission: &Submission) -> Result<(), (ErrorCode, String)> {
        let Submission { prompt, salt: _, stop, phase, sampling: _, output: _ } = submission;
        if self.is_draining {
            let message = "the engine takes no new requests".to_owned();
            return Err((ErrorCode::Unavailable, message));
        }
        self.check_prompt(prompt)?;
        if stop.max_tokens == 0 {
            return Err((ErrorCode::InvalidRequest, "`max_tokens` must be at least 1".to_owned()));
        }
        match phase {
            Phase::Whole => Ok(()),
            Phase::Context(request) => self.check_context(*request, prompt),
            Phase::Generation { request: _, first, record } => {
                let vocab = self.backend.caps().vocab;
                let fits = record.lease.is_some()
                    && record.prompt_tokens as usize == prompt.len()
                    && !first.is_empty()
                    && first.iter().all(|token| *token < vocab);
                let message = "the hand-over record does not fit the request".to_owned();
                if fits { Ok(()) } else { Err((ErrorCode::KvStateInvalid, message)) }
            }
        }
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), (ErrorCode, String)> {
        let vocab = self.backend.caps().vocab;
        let max_len = self.scheduler.limits.max_len;
        if prompt.is_empty() {
            return Err((ErrorCode::InvalidRequest, "the prompt has no tokens".to_owned()));
        }
        if let Some(token) = prompt.iter().find(|token| **token >= vocab) {
            let message = format!("prompt token {token} is not below the vocabulary's {vocab}");
            return Err((ErrorCode::InvalidRequest, message));
        }
        if prompt.len() >= max_len as usize {
            let message = format!(
                "the prompt has {} tokens, prompt and output together may have {max_len}",
                prompt.len()
            );
            return Err((ErrorCode::ContextLengthExceeded, message));
        }
        Ok(())
    }

    fn check_context(
        &self,
        request: DisaggRequestId,
        prompt: &[u32],
    ) -> Result<(), (ErrorCode, String)> {
        let limits = &self.scheduler.limits;
        let leasable = limits.max_leased_blocks as usize * limits.block_tokens as usize;
        if prompt.len() > leasable {
            let message = format!(
                "the prompt has {} tokens, a context pass may keep {leasable} for its reader",
                prompt.len()
            );
            return Err((ErrorCode::ContextLengthExceeded, message));
        }
        if self.leases.has_request(request) {
            let message = "blocks are leased under this `disagg_request_id`".to_owned();
            return Err((ErrorCode::DuplicateRequest, message));
        }
        if self.leases.is_released(request) {
            let message = "the request was released before it began".to_owned();
            return Err((ErrorCode::KvLeaseGone, message));
        }
        Ok(())
    }

    /// Ends every request whose receiver is gone.
    fn sweep(&mut self) {
        let all = self.scheduler.sequences().iter();
        let closed = all.filter(|(_, sequence)| sequence.output.is_closed());
        let closed: Vec<SeqId> = closed.map(|(id, _)| id).collect();
        closed.into_iter().for_each(|id| drop(self.take_out(id)));
    }

    fn release(&mut self, request: DisaggRequestId) {
        self.leases.release(request);
        for id in self.live.with(request) {
            self.fail(id, ErrorCode::KvLeaseGone, "the request was released");
        }
    }

    /// Ends a sequence by an error.
    pub(super) fn fail(&mut self, id: SeqId, code: ErrorCode, message: impl Into<String>) {
        if let Some(sequence) = self.take_out(id) {
            tell_failure(&sequence.output, code, message);
        }
    }

    /// Takes a sequence out of everything, wherever it stands; its blocks are freed as soon as nothing touches them.
    pub(super) fn take_out(&mut self, id: SeqId) -> Option<Sequence> {
        let sequence = self.scheduler.remove(id)?;
        self.live.remove(sequence.kind);
        self.since.completed += 1;
        if let Some((pull, found)) = self.pulls.abandon(id) {
            drop(found);
            self.puller.cancel(pull);
        }
        Some(sequence)
    }
}
