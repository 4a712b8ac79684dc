//! Whether a back end can run a model, and whether a step plan keeps the contract: checked before memory is touched, and
//! the same for all of them.

use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::KvLayout;

use super::cpu::kernels::LANES;
use super::{BackendError, Caps, StepTicket};
use crate::engine::step::{Input, Slot, StepPlan, StepSeq};
use crate::model::{Blocks, Layer, Model, ModelSpec, Scales, Weight};

/// Whether all shapes agree and are multiples of what the kernels take.
///
/// # Errors
/// Says which number or tensor is wrong.
pub fn model(model: &Model) -> Result<(), String> {
    spec(&model.spec)?;
    if model.layers.len() != model.spec.layers as usize {
        return Err(format!("{} blocks, not {}", model.layers.len(), model.spec.layers));
    }
    ends(&model.spec, &model.embedding, &model.final_norm, model.head.as_ref())?;
    model.layers.iter().try_for_each(|block| layer(&model.spec, block))
}

/// The numbers of [`model()`].
///
/// # Errors
/// Says which is wrong.
pub fn spec(spec: &ModelSpec) -> Result<(), String> {
    for (name, value) in [("hidden", spec.hidden), ("ffn", spec.ffn), ("head_dim", spec.head_dim)] {
        if value == 0 || !(value as usize).is_multiple_of(LANES) {
            return Err(format!("`{name}` is {value}, not a multiple of {LANES}"));
        }
    }
    if spec.heads == 0 || spec.kv_heads == 0 || !spec.heads.is_multiple_of(spec.kv_heads) {
        return Err(format!("{} heads cannot share {} kv heads", spec.heads, spec.kv_heads));
    }
    if spec.layers == 0 {
        return Err("no blocks".into());
    }
    Ok(())
}

/// What is before and after the blocks.
///
/// # Errors
/// Says which tensor is wrong.
pub fn ends(
    spec: &ModelSpec,
    embedding: &Weight,
    final_norm: &[f32],
    head: Option<&Weight>,
) -> Result<(), String> {
    let (hidden, vocab) = (spec.hidden as usize, spec.vocab as usize);
    matrix("embedding", embedding, vocab, hidden)?;
    if let Some(head) = head {
        matrix("head", head, vocab, hidden)?;
    }
    vector("final norm", final_norm, hidden)
}

/// A block.
///
/// # Errors
/// Says which tensor is wrong.
pub fn layer(spec: &ModelSpec, layer: &Layer) -> Result<(), String> {
    let size = spec.head_dim as usize;
    let (queries, keys) = (spec.heads as usize * size, spec.kv_heads as usize * size);
    let (hidden, ffn) = (spec.hidden as usize, spec.ffn as usize);
    vector("attention norm", &layer.attn_norm, hidden)?;
    matrix("q", &layer.q, queries, hidden)?;
    matrix("k", &layer.k, keys, hidden)?;
    matrix("v", &layer.v, keys, hidden)?;
    if let Some(bias) = &layer.qkv_bias {
        vector("qkv bias", bias, queries + 2 * keys)?;
    }
    for norm in layer.qk_norm.iter().flatten() {
        vector("head norm", norm, size)?;
    }
    matrix("o", &layer.o, hidden, queries)?;
    vector("ffn norm", &layer.ffn_norm, hidden)?;
    matrix("gate", &layer.gate, ffn, hidden)?;
    matrix("up", &layer.up, ffn, hidden)?;
    matrix("down", &layer.down, hidden, ffn)
}

fn vector(name: &str, vector: &[f32], len: usize) -> Result<(), String> {
    if vector.len() == len {
        return Ok(());
    }
    Err(format!("`{name}` has {} elements, not {len}", vector.len()))
}

fn matrix(name: &str, weight: &Weight, rows: usize, cols: usize) -> Result<(), String> {
    if (weight.rows, weight.cols) != (rows, cols) {
        return Err(format!("`{name}` is {}x{}, not {rows}x{cols}", weight.rows, weight.cols));
    }
    let (block, _) = weight.dtype.block();
    if !cols.is_multiple_of(block as usize) {
        return Err(format!("`{name}` has {cols} columns, not a multiple of {block}"));
    }
    if weight.bytes.len() != rows * weight.dtype.row_bytes(cols) {
        return Err(format!("`{name}` has {} bytes", weight.bytes.len()));
    }
    let (found, expected) = match &weight.scales {
        Scales::One | Scales::Tensor(_) => (1, 1),
        Scales::Rows(scales) => (scales.len(), rows),
        Scales::Blocks(blocks) if blocks.shape.contains(&0) => (blocks.scales.len(), 0),
        Scales::Blocks(blocks) => {
            (blocks.scales.len(), Blocks::grid(blocks.shape, rows, cols).iter().product())
        }
    };
    if found != expected {
        return Err(format!("`{name}` has {found} scales, not {expected}"));
    }
    Ok(())
}

/// What a plan has named so far: for each slot and block the number of the check that met it last. Kept from step to step.
#[derive(Debug, Default)]
pub struct Seen {
    check: u64,
    slots: Vec<u64>,
    blocks: Vec<u64>,
}

impl Seen {
    /// For so many slots and blocks.
    pub fn new(slots: u32, blocks: u32) -> Self {
        Self { check: 0, slots: vec![0; slots as usize], blocks: vec![0; blocks as usize] }
    }

    /// Notes it in `marks`; false if this check has met it before.
    fn note(check: u64, marks: &mut [u64], number: u32) -> bool {
        std::mem::replace(&mut marks[number as usize], check) != check
    }
}

/// Whether a plan is within the back end's limits. `last` gives the last token of a slot that was opened before.
///
/// # Errors
/// [`BackendError::InvalidPlan`].
pub fn plan(
    plan: &StepPlan,
    caps: &Caps,
    layout: &KvLayout,
    seen: &mut Seen,
    last: impl Fn(Slot) -> Option<Option<u32>>,
) -> Result<(), BackendError> {
    seen.check += 1;
    sizes(plan, caps)
        .and_then(|()| slots(plan, caps, seen, last))
        .and_then(|()| blocks(plan, layout, seen))
        .map_err(BackendError::InvalidPlan)
}

fn sizes(plan: &StepPlan, caps: &Caps) -> Result<(), String> {
    if plan.seqs.len() > caps.max_sequences as usize {
        return Err(format!("{} sequences, at most {}", plan.seqs.len(), caps.max_sequences));
    }
    if plan.seqs.is_empty() {
        return Err("no sequence".into());
    }
    let mut rows = 0_u64;
    for seq in &plan.seqs {
        rows += match &seq.input {
            Input::Last => 1,
            Input::Tokens(range) => {
                if range.start >= range.end || range.end as usize > plan.tokens.len() {
                    return Err(format!("tokens {range:?} of {}", plan.tokens.len()));
                }
                u64::from(range.end - range.start)
            }
        };
    }
    if rows > u64::from(caps.max_batch_tokens) {
        return Err(format!("{rows} tokens, at most {}", caps.max_batch_tokens));
    }
    match plan.tokens.iter().find(|&&token| token >= caps.vocab) {
        Some(&token) => Err(unknown(token, caps)),
        None => Ok(()),
    }
}

fn slots(
    plan: &StepPlan,
    caps: &Caps,
    seen: &mut Seen,
    last: impl Fn(Slot) -> Option<Option<u32>>,
) -> Result<(), String> {
    let used = plan.opens.iter().map(|open| open.slot).chain(plan.seqs.iter().map(|seq| seq.slot));
    if let Some(Slot(slot)) = used.into_iter().find(|slot| slot.0 >= caps.max_sequences) {
        return Err(format!("slot {slot} of {}", caps.max_sequences));
    }
    for StepSeq { slot, input, .. } in &plan.seqs {
        if !Seen::note(seen.check, &mut seen.slots, slot.0) {
            return Err(format!("slot {} twice", slot.0));
        }
        let opened = plan.opens.iter().rev().find(|open| open.slot == *slot);
        let last = match opened {
            Some(open) => open.history.last().copied(),
            None => last(*slot).ok_or_else(|| format!("slot {} was never opened", slot.0))?,
        };
        match (input, last) {
            (Input::Tokens(_), _) => {}
            (Input::Last, None) => return Err(format!("slot {} has no last token", slot.0)),
            (Input::Last, Some(token)) if token >= caps.vocab => return Err(unknown(token, caps)),
            (Input::Last, Some(_)) => {}
        }
    }
    Ok(())
}

fn unknown(token: u32, caps: &Caps) -> String {
    format!("token {token} of a vocabulary of {}", caps.vocab)
}

/// Every table covers its sequence with blocks of the pool; no block is written for two sequences.
fn blocks(plan: &StepPlan, layout: &KvLayout, seen: &mut Seen) -> Result<(), String> {
    for seq in &plan.seqs {
        let range = seq.table.start as usize..seq.table.end as usize;
        let Some(table) = plan.tables.get(range) else {
            return Err(format!("table {:?} of {}", seq.table, plan.tables.len()));
        };
        if let Some(block) = table.iter().find(|block| block.0 >= layout.blocks) {
            return Err(format!("block {} of {}", block.0, layout.blocks));
        }
        let tokens = u64::from(layout.block_tokens);
        let end = u64::from(seq.start) + u64::from(seq.input.len());
        if table.len() as u64 * tokens < end {
            return Err(format!("{} blocks for {end} tokens", table.len()));
        }
        let first = (u64::from(seq.start) / tokens) as usize;
        let last = end.div_ceil(tokens) as usize;
        let mut written = table[first..last].iter();
        if let Some(block) = written.find(|b| !Seen::note(seen.check, &mut seen.blocks, b.0)) {
            return Err(format!("block {} is written twice", block.0));
        }
    }
    Ok(())
}

/// Whether blocks that are to be copied are of the pool.
///
/// # Errors
/// [`BackendError::InvalidPlan`].
pub fn copies(pairs: &[(BlockIndex, BlockIndex)], layout: &KvLayout) -> Result<(), BackendError> {
    let mut named = pairs.iter().flat_map(|(from, to)| [from, to]);
    match named.find(|block| block.0 >= layout.blocks) {
        None => Ok(()),
        Some(block) => {
            let message = format!("block {} of {}", block.0, layout.blocks);
            Err(BackendError::InvalidPlan(message))
        }
    }
}

/// Says that `ticket` is not the step to be collected next.
pub fn not_oldest(ticket: StepTicket, oldest: Option<StepTicket>) -> BackendError {
    let oldest = oldest.map(|oldest| oldest.0);
    BackendError::InvalidPlan(format!("collecting step {}, the oldest is {oldest:?}", ticket.0))
}
