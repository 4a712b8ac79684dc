//! What one step computes, as flat arrays that are reused from step to step: no allocation on the step path.
//!
//! A back end keeps per-slot sampler state (parameters, token counts, the last sampled token), so a step can be
//! submitted before the one before it was read: its input is then [`Input::Last`].

use std::ops::Range;

use baton_shared::id::BlockIndex;

use super::sampling::SamplingParams;

/// A place in the back end's batch, `0..Caps::max_sequences`. A sequence keeps its slot while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// One step: decodes first, then prefill chunks.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Slots that begin with this step; earlier state of these slots is forgotten.
    pub opens: Vec<SlotOpen>,
    /// One entry a sequence, each slot at most once.
    pub seqs: Vec<StepSeq>,
    /// Input token ids of all [`Input::Tokens`], back to back.
    pub tokens: Vec<u32>,
    /// Block tables of all sequences, back to back; each covers positions `0..start + input length`.
    pub tables: Vec<BlockIndex>,
}

/// A slot's sampler state at its beginning.
#[derive(Clone, Debug)]
pub struct SlotOpen {
    /// Which.
    pub slot: Slot,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// All tokens known so far: prompt, then what was generated (a context pass's first token, or what a
    /// preempted sequence had). For penalties; and `history.len() - prompt_len` is the next output position,
    /// which seeds the random number.
    pub history: Vec<u32>,
    /// How many of `history` are prompt.
    pub prompt_len: u32,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct StepSeq {
    /// Which slot.
    pub slot: Slot,
    /// Position of the first input token.
    pub start: u32,
    /// The input.
    pub input: Input,
    /// Its blocks, in `StepPlan::tables`.
    pub table: Range<u32>,
    /// Whether a token is sampled after the last input token (false: a prefill chunk that is not the last).
    pub sample: bool,
}

/// Input of one sequence.
#[derive(Clone, Debug)]
pub enum Input {
    /// These, in `StepPlan::tokens`; at least one.
    Tokens(Range<u32>),
    /// One token: the slot's own last sample, which the host may not have seen yet.
    Last,
}

/// What came of a step: one entry for each sequence with `sample`, in the plan's order.
#[derive(Clone, Debug, Default)]
pub struct StepOut {
    /// Sampled tokens.
    pub samples: Vec<Sampled>,
    /// Alternatives of all samples, back to back: `(token, natural-log probability)`, best first.
    pub top: Vec<(u32, f32)>,
}

/// One sampled token.
#[derive(Clone, Debug)]
pub struct Sampled {
    /// Whose.
    pub slot: Slot,
    /// Vocabulary id.
    pub token: u32,
    /// Natural-log probability by the model, before temperature and penalties; 0 where none was asked for.
    pub logprob: f32,
    /// 1 = most probable; 0 where no log-probabilities were asked for.
    pub rank: u32,
    /// Its alternatives, in `StepOut::top`.
    pub top: Range<u32>,
}

impl StepPlan {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let Self { opens, seqs, tokens, tables } = self;
        opens.clear();
        seqs.clear();
        tokens.clear();
        tables.clear();
    }

    /// Input tokens of all sequences.
    pub fn rows(&self) -> usize {
        self.seqs.iter().map(|seq| seq.input.len() as usize).sum()
    }
}

impl Input {
    /// Tokens.
    #[expect(clippy::len_without_is_empty, reason = "an input has at least one token")]
    pub fn len(&self) -> u32 {
        match self {
            Self::Tokens(range) => range.end - range.start,
            Self::Last => 1,
        }
    }
}

impl StepOut {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let Self { samples, top } = self;
        samples.clear();
        top.clear();
    }
}
