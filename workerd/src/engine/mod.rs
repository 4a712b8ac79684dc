//! The engine: the only way in is [`EngineHandle`]; one thread an instance owns scheduler, block tables and back end.

pub mod output;
pub mod run;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod step;

use baton_shared::id::{DisaggRequestId, LeaseId};
use baton_shared::kv::record::Record;

use output::OutputSender;
use sampling::SamplingParams;

/// One request, as the engine sees it: tokens in, tokens out. Text is the caller's business.
#[derive(Debug)]
pub struct Submission {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When the engine ends the sequence by itself.
    pub stop: StopRule,
    /// Which part of the request is done here.
    pub phase: Phase,
    /// Where tokens go. Dropping its receiver cancels the request.
    pub output: OutputSender,
}

/// Ends that need no text. (Stop strings are matched by the receiver, which then drops its end.)
#[derive(Clone, Debug)]
pub struct StopRule {
    /// Generated tokens at most, first token of a context pass included. At least 1.
    pub max_tokens: u32,
    /// Tokens that end the text: the model's EOS ids (none with `ignore_eos`) and `stop_token_ids`.
    pub stop_ids: Vec<u32>,
}

/// Which part of a request runs here.
#[derive(Debug)]
pub enum Phase {
    /// All of it.
    Whole,
    /// Prefill and one token; the blocks stay leased for a reader under this id.
    Context(DisaggRequestId),
    /// Blocks come from a context worker, then decode. `first` are the tokens it sampled (at least one); the
    /// receiver already has them, the engine sends what follows. The record was checked and has a lease.
    Generation {
        /// The id both phases share.
        request: DisaggRequestId,
        /// Tokens already generated.
        first: Vec<u32>,
        /// Where the blocks are.
        record: Box<Record>,
    },
}

/// What the engine thread is told.
#[derive(Debug)]
pub enum Command {
    /// A new request.
    Submit(Box<Submission>),
    /// A receiver was dropped: look for closed outputs now rather than at the next step.
    Sweep,
    /// `POST /v1/disagg/release`: ends whatever has this id (queued, computing or leased) and leaves a tombstone.
    Release(DisaggRequestId),
    /// A lease that will not be read: its answer could not be written, or a stop string ended the text.
    EndLease(LeaseId),
    /// News from the mover thread.
    Mover(crate::handover::MoverEvent),
    /// Refuse new requests, finish running ones, keep leases until read or expired, then end the thread.
    Drain,
}
