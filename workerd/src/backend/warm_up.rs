//! The first steps of a back end, before anybody waits for an answer: memory that grows with steps grows, code and
//! tables come into the caches.

use baton_shared::id::BlockIndex;

use super::{Backend, BackendError};
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};

/// Longest prompt of it: larger steps take too long for a start.
pub const LONGEST: u32 = 512;

/// A prompt of the largest step, and a token after it. What they leave in the pool belongs to nobody.
///
/// # Errors
/// [`BackendError`]: it would fail later too.
pub fn warm_up(backend: &mut dyn Backend) -> Result<(), BackendError> {
    let layout = &backend.pool().layout;
    let room = layout.blocks.saturating_mul(layout.block_tokens);
    let rows = backend.caps().max_batch_tokens.min(LONGEST).min(room.saturating_sub(1)).max(1);
    let block_tokens = layout.block_tokens;
    let seq = |start: u32, input: Input| {
        let table = 0..(start + input.len()).div_ceil(block_tokens);
        StepSeq { slot: Slot(0), start, input, table, sample: true }
    };
    let tables = |seq: &StepSeq| seq.table.clone().map(BlockIndex).collect();
    let tokens = vec![0; rows as usize];
    let open = SlotOpen {
        slot: Slot(0),
        sampling: SamplingParams::greedy(),
        history: tokens.clone(),
        prompt_len: rows,
    };
    let prompt = seq(0, Input::Tokens(0..rows));
    let mut plan =
        StepPlan { opens: vec![open], tables: tables(&prompt), seqs: vec![prompt], tokens };
    let mut out = StepOut::default();
    let ticket = backend.submit(&plan)?;
    backend.collect(ticket, &mut out)?;
    if rows < room {
        let next = seq(rows, Input::Last);
        plan.clear();
        plan.tables = tables(&next);
        plan.seqs = vec![next];
        let ticket = backend.submit(&plan)?;
        backend.collect(ticket, &mut out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Caps;
    use crate::backend::fake::{FakeBackend, FakeConfig};

    #[test]
    fn any_pool_and_any_batch_can_be_warmed_up() {
        // The fake refuses plans that break the contract, and knows what blocks must hold.
        for (blocks, block_tokens, batch) in [(1, 1, 1), (1, 32, 1), (1, 32, 64), (40, 32, 4096)] {
            let caps = Caps { max_sequences: 1, max_batch_tokens: batch, vocab: 97, lag: 0 };
            let config = FakeConfig { blocks, block_tokens, caps };
            let mut backend = FakeBackend::new(config).unwrap();
            warm_up(&mut backend).unwrap();
        }
    }
}
