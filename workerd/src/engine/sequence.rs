//! One request's way through the engine: what is known, what is computed, what it holds.
//!
//! Always: `computed + 1 <= tokens + pending` once it runs, and its blocks cover every computed position.

use std::time::{Duration, Instant};

use baton_shared::id::{DisaggRequestId, Incarnation};
use baton_shared::kv::record::Record;

use super::output::{FinishReason, OutputSender};
use super::sampling::SamplingParams;
use super::step::Slot;
use super::{Phase, QueuePlace, StopRule, Submission};
use crate::kv::pool::Blocks;
use crate::kv::prefix::Chain;

/// What the sequence is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A plain request.
    Whole,
    /// One token, then a lease.
    Context(DisaggRequestId),
    /// What follows a context pass.
    Generation(DisaggRequestId),
}

/// Where the blocks of a generation pass come from.
#[derive(Debug)]
pub(super) enum Source {
    /// A lease of this very engine.
    Local(Box<Record>),
    /// Another worker.
    Remote(Box<Record>),
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It has no blocks.
    Waiting,
    /// Its blocks are on their way (held by the pull).
    Pulling,
    /// It has blocks, but no slot.
    Ready,
    /// It takes part in steps.
    Running(Slot),
}

/// One request.
#[derive(Debug)]
pub(super) struct Sequence {
    pub kind: Kind,
    pub place: Place,
    /// Blocks to be fetched before anything is computed; taken at admission.
    pub source: Option<Source>,
    /// Prompt, then what was generated and read back.
    pub tokens: Vec<u32>,
    pub prompt_len: u32,
    /// Positions whose keys and values are in the blocks, once all submitted steps have run.
    pub computed: u32,
    /// Samples submitted and not read back.
    pub pending: u32,
    /// Positions below this are prompt (or lost by a preemption) when they are computed.
    pub prefill_end: u32,
    pub blocks: Blocks,
    /// How many of them the prefix cache had when it was admitted.
    pub found: u32,
    /// How far its full blocks were named for the prefix cache.
    pub chain: Chain,
    /// Whether the back end has been told of the slot.
    pub is_open: bool,
    /// The first step it can take part in since it got its slot.
    pub first_step: u64,
    /// The newest step it takes part in.
    pub last_step: u64,
    pub sampling: SamplingParams,
    pub stop: StopRule,
    pub output: OutputSender,
    /// Until it is first admitted.
    pub queued: Option<QueuePlace>,
    pub arrived: Instant,
    /// Until it was admitted.
    pub waited: Duration,
    /// Past this it does not wait for blocks any longer; never once it was admitted.
    pub deadline: Option<Instant>,
}

impl Sequence {
    pub(super) fn new(
        submission: Submission,
        queued: QueuePlace,
        blocks: Blocks,
        own: Incarnation,
        arrived: Instant,
        queue_timeout: Duration,
    ) -> Self {
        let Submission { prompt: mut tokens, salt, sampling, stop, phase, output } = submission;
        let prompt_len = tokens.len() as u32;
        let (kind, source) = match phase {
            Phase::Whole => (Kind::Whole, None),
            Phase::Context(request) => (Kind::Context(request), None),
            Phase::Generation { request, first, record } => {
                tokens.extend(first);
                let is_local = record.incarnation == own;
                let source = if is_local { Source::Local } else { Source::Remote };
                (Kind::Generation(request), Some(source(record)))
            }
        };
        let deadline = match kind {
            // Nothing else could serve it sooner: it waits for its turn.
            Kind::Whole => None,
            Kind::Context(_) | Kind::Generation(_) => Some(arrived + queue_timeout),
        };
        Self {
            kind,
            place: Place::Waiting,
            source,
            tokens,
            prompt_len,
            computed: 0,
            pending: 0,
            prefill_end: prompt_len,
            blocks,
            found: 0,
            chain: Chain::new(salt),
            is_open: false,
            first_step: 0,
            last_step: 0,
            sampling,
            stop,
            output,
            queued: Some(queued),
            arrived,
            waited: Duration::ZERO,
            deadline,
        }
    }

    /// Tokens read back or to be read back.
    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32 + self.pending
    }

    /// Tokens that no step has taken as input yet.
    pub(super) fn inputs(&self) -> u32 {
        self.len() - self.computed
    }

    /// Whether its next input is one token after others: its newest.
    pub(super) fn is_decoding(&self) -> bool {
        self.inputs() == 1 && self.computed > 0
    }

    /// Whether one more token may be sampled, whatever the pending ones turn out to be.
    pub(super) fn wants_sample(&self, max_len: u32) -> bool {
        self.len() < self.longest(max_len)
    }

    /// Tokens it can have at most, prompt and output together.
    pub(super) fn longest(&self, max_len: u32) -> u32 {
        let max_tokens = match self.kind {
            Kind::Context(_) => 1,
            Kind::Whole | Kind::Generation(_) => self.stop.max_tokens,
        };
        self.prompt_len.saturating_add(max_tokens).min(max_len)
    }

    /// Why the text ends with the newest token, if it does.
    pub(super) fn finish(&self, max_len: u32) -> Option<FinishReason> {
        let generated = self.tokens.get(self.prompt_len as usize..)?;
        let last = generated.last()?;
        if self.stop.stop_ids.contains(last) {
            return Some(FinishReason::Stop);
        }
        let is_full = generated.len() >= self.stop.max_tokens as usize
            || self.tokens.len() >= max_len as usize;
        is_full.then_some(FinishReason::Length)
    }

    /// Full blocks that may be taken from the prefix cache instead of being computed or fetched. The last token known
    /// must be computed, unless what follows it is known.
    pub(super) fn reusable_blocks(&self, block_tokens: u32) -> u32 {
        match self.source {
            None => (self.len() - 1) / block_tokens,
            Some(Source::Remote(_)) => self.prompt_len / block_tokens,
            Some(Source::Local(_)) => 0,
        }
    }

    /// Blocks it must get to be admitted: for all tokens known, less those that a lease of our own brings.
    pub(super) fn admission_blocks(&self, block_tokens: u32) -> u32 {
        let all = self.len().div_ceil(block_tokens);
        match self.source {
            Some(Source::Local(_)) => all - self.prompt_len.div_ceil(block_tokens),
            Some(Source::Remote(_)) | None => all,
        }
    }
}
