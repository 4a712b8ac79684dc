//! Per-request output buffer: the engine appends and wakes, never waits; a slow client stalls nobody.

use baton_shared::kv::record::LeasedBlocks;
use baton_shared::wire::error::ErrorCode;

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// Vocabulary id.
    pub id: u32,
    /// Natural-log probability; 0 where none was asked for.
    pub logprob: f32,
    /// 1 = most probable; 0 where none was asked for.
    pub rank: u32,
    /// `(token, log-probability)`, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a receiver sees, in this order: `Started`, `Token`…, for a context pass `ContextDone`, then `Finished`; or `Failed` at any point, last.
#[derive(Clone, Debug)]
pub enum OutputEvent {
    /// The request was admitted; for a generation pass: its blocks have arrived and were checked. Nothing may be sent to the client before.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// The next token.
    Token(TokenOut),
    /// The context pass is over and this is what a reader may fetch; `None`: the text ended with its first token (stop id, or `max_tokens` 1).
    ContextDone(Option<LeasedBlocks>),
    /// The sequence ended by itself.
    Finished(FinishReason),
    /// It ended by an error.
    Failed {
        /// What the client is told.
        code: ErrorCode,
        /// In words.
        message: String,
    },
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id, which is the last `Token` sent.
    Stop,
    /// `max_tokens`, or the model's longest sequence.
    Length,
}

/// The engine's end.
#[derive(Debug)]
pub struct OutputSender {}
