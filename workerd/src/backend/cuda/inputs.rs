//! A step's inputs as one stretch of `u32`s, so that one copy brings them to the device. What is fixed in size comes
//! first: for a decode step of a bucket everything lies where the bucket's graph looks for it.

use std::ops::Range;

use super::sys::launch::{OPEN_BYTES, TILE_ROWS};
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Input, SlotOpen, StepPlan, StepSeq};

/// Of a row that is nobody's; of a token that only the device knows.
const NONE: u32 = u32::MAX;

/// Where in the stretch things are, in words. For so many rows, sampled rows, tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Rows of a step, filled up to a bucket.
    pub rows: u32,
    /// Rows that sample, filled up.
    pub sampled: u32,
    /// Tiles of prefill attention.
    pub tiles: u32,
}

impl Places {
    /// Behind so many stretches of rows, of sampled rows and of tiles; each begins at 16 bytes.
    fn after(self, rows: u32, sampled: u32, tiles: u32) -> usize {
        let align = |words: u32| words.next_multiple_of(4) as usize;
        rows as usize * align(self.rows)
            + sampled as usize * align(self.sampled)
            + tiles as usize * 4 * self.tiles as usize
    }

    /// Tokens of rows.
    pub fn tokens(self) -> usize {
        self.after(0, 0, 0)
    }
    /// Slots of rows.
    pub fn slots(self) -> usize {
        self.after(1, 0, 0)
    }
    /// Positions of rows.
    pub fn positions(self) -> usize {
        self.after(2, 0, 0)
    }
    /// Where rows' block tables begin.
    pub fn starts(self) -> usize {
        self.after(3, 0, 0)
    }
    /// Rows that sample.
    pub fn sampled_rows(self) -> usize {
        self.after(4, 0, 0)
    }
    /// Their slots.
    pub fn sampled_slots(self) -> usize {
        self.after(4, 1, 0)
    }
    /// Tiles, four words each.
    pub fn tile_words(self) -> usize {
        self.after(4, 2, 0)
    }
    /// Block tables, and then what opens slots.
    pub fn tables(self) -> usize {
        self.after(4, 2, 1)
    }
}

/// What a step is for the kernels.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// Sequences at the front with one row each.
    pub decodes: u32,
    /// All rows.
    pub rows: u32,
    /// Rows that sample.
    pub sampled: u32,
    /// First row, rows, position of the first, where the block table begins.
    pub tiles: Vec<[u32; 4]>,
}

impl Inputs {
    /// Looks at a step whose plan was checked.
    pub fn look(&mut self, step: &StepPlan) {
        self.tiles.clear();
        let is_decode = |seq: &&StepSeq| seq.input.len() == 1;
        self.decodes = step.seqs.iter().take_while(is_decode).count() as u32;
        self.rows = step.rows() as u32;
        self.sampled = step.seqs.iter().filter(|seq| seq.sample).count() as u32;
        let mut row = self.decodes;
        for seq in &step.seqs[self.decodes as usize..] {
            let len = seq.input.len();
            for first in (0..len).step_by(TILE_ROWS as usize) {
                let count = (len - first).min(TILE_ROWS);
                self.tiles.push([row + first, count, seq.start + first, seq.table.start]);
            }
            row += len;
        }
        // What takes longest starts first.
        self.tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2] + tile[1]));
    }

    /// Whether it only decodes: every row is a sequence that samples.
    pub fn is_decode(&self) -> bool {
        self.decodes == self.rows && self.sampled == self.rows
    }

    /// Exact places.
    pub fn places(&self) -> Places {
        Places { rows: self.rows, sampled: self.sampled, tiles: self.tiles.len() as u32 }
    }

    /// Writes all words but what opens slots into `out`; returns the words used. `places` may have more rows than there
    /// are: the rest is nobody's.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn write(&self, step: &StepPlan, places: Places, out: &mut [u8]) -> usize {
        let words = |range: Range<usize>| range.start * 4..range.end * 4;
        let end = places.tables() + step.tables.len();
        let mut put = |at: usize, value: u32| {
            out[words(at..at + 1)].copy_from_slice(&value.to_le_bytes());
        };
        let (mut row, mut sampled) = (0, 0);
        for seq in &step.seqs {
            for number in 0..seq.input.len() {
                let token = match &seq.input {
                    Input::Tokens(range) => step.tokens[(range.start + number) as usize],
                    Input::Last => NONE,
                };
                put(places.tokens() + row, token);
                put(places.slots() + row, seq.slot.0);
                put(places.positions() + row, seq.start + number);
                put(places.starts() + row, seq.table.start);
                row += 1;
            }
            if seq.sample {
                put(places.sampled_rows() + sampled, row as u32 - 1);
                put(places.sampled_slots() + sampled, seq.slot.0);
                sampled += 1;
            }
        }
        for row in row..places.rows as usize {
            put(places.tokens() + row, 0);
            put(places.slots() + row, 0);
            put(places.positions() + row, NONE);
            put(places.starts() + row, 0);
        }
        for number in sampled..places.sampled as usize {
            put(places.sampled_rows() + number, number as u32);
            put(places.sampled_slots() + number, NONE);
        }
        for (tile, number) in self.tiles.iter().zip(0..) {
            for (word, at) in tile.iter().zip(0..) {
                put(places.tile_words() + 4 * number + at, *word);
            }
        }
        for (block, at) in step.tables.iter().zip(places.tables()..) {
            put(at, block.0);
        }
        end
    }
}

/// What opens slots, as the kernel reads it, and the histories that it counts, one behind the other.
pub fn write_opens(opens: &[SlotOpen], records: &mut Vec<u8>, history: &mut Vec<u8>) {
    records.clear();
    history.clear();
    for open in opens {
        let is_counted = open.sampling.has_penalties();
        let from = history.len() / 4;
        if is_counted {
            history.extend(open.history.iter().flat_map(|token| token.to_le_bytes()));
        }
        write_state(open, is_counted, records);
        let length = if is_counted { open.history.len() } else { 0 };
        for word in [open.slot.0, from as u32, length as u32, open.prompt_len] {
            records.extend(word.to_le_bytes());
        }
        debug_assert!(records.len().is_multiple_of(OPEN_BYTES));
    }
}

/// `struct Slot` of `kernels/prelude.cuh`.
fn write_state(open: &SlotOpen, is_counted: bool, out: &mut Vec<u8>) {
    let SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        seed,
        frequency_penalty,
        presence_penalty,
        repetition_penalty,
        logprobs,
    } = &open.sampling;
    let position = (open.history.len() as u64).saturating_sub(u64::from(open.prompt_len));
    out.extend(seed.to_le_bytes());
    out.extend(position.to_le_bytes());
    for number in
        [temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty]
    {
        out.extend(number.to_le_bytes());
    }
    let logprobs = logprobs.map_or(0, |alternatives| alternatives + 1);
    let last = open.history.last().copied().unwrap_or(0);
    for word in [*top_k, logprobs, u32::from(is_counted), last, 0, 0] {
        out.extend(word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use baton_shared::id::BlockIndex;

    use super::*;
    use crate::engine::step::Slot;

    fn plan() -> StepPlan {
        let seq = |slot, start, input, table, sample| StepSeq {
            slot: Slot(slot),
            start,
            input,
            table,
            sample,
        };
        StepPlan {
            opens: Vec::new(),
            seqs: vec![
                seq(3, 40, Input::Last, 0..2, true),
                seq(1, 7, Input::Tokens(0..1), 2..3, true),
                seq(2, 5, Input::Tokens(1..301), 3..13, false),
            ],
            tokens: (100..401).collect(),
            tables: (0..13).map(|at| BlockIndex(20 + at)).collect(),
        }
    }

    #[test]
    fn a_mixed_step_has_its_decodes_in_front_and_long_inputs_in_tiles() {
        let step = plan();
        let mut inputs = Inputs::default();
        inputs.look(&step);
        assert_eq!((inputs.decodes, inputs.rows, inputs.sampled), (2, 302, 2));
        assert!(!inputs.is_decode());
        assert_eq!(inputs.tiles, [[258, 44, 261, 3], [130, 128, 133, 3], [2, 128, 5, 3]]);
        let places = inputs.places();
        let mut out = vec![0xee; 4 * (places.tables() + 13)];
        assert_eq!(inputs.write(&step, places, &mut out), places.tables() + 13);
        let word = |at: usize| u32::from_le_bytes(out[4 * at..][..4].try_into().unwrap());
        assert_eq!([word(0), word(1), word(2), word(301)], [NONE, 100, 101, 400]);
        let positions = places.positions();
        assert_eq!([word(positions), word(positions + 2), word(positions + 301)], [40, 5, 304]);
        assert_eq!([word(places.starts()), word(places.starts() + 301)], [0, 3]);
        assert_eq!([word(places.sampled_rows()), word(places.sampled_rows() + 1)], [0, 1]);
        assert_eq!([word(places.sampled_slots()), word(places.sampled_slots() + 1)], [3, 1]);
        assert_eq!(word(places.tile_words() + 4), 130);
        assert_eq!([word(places.tables()), word(places.tables() + 12)], [20, 32]);
    }

    #[test]
    fn a_bucket_is_filled_up_with_rows_of_nobody() {
        let mut step = plan();
        step.seqs.truncate(2);
        let mut inputs = Inputs::default();
        inputs.look(&step);
        assert!(inputs.is_decode());
        let places = Places { rows: 4, sampled: 4, tiles: 0 };
        let mut out = vec![0xee; 4 * (places.tables() + 13)];
        inputs.write(&step, places, &mut out);
        let word = |at: usize| u32::from_le_bytes(out[4 * at..][..4].try_into().unwrap());
        for row in [2, 3] {
            assert_eq!(word(places.positions() + row), NONE);
            assert_eq!(word(places.sampled_slots() + row), NONE);
            assert_eq!(word(places.sampled_rows() + row), row as u32);
        }
    }

    #[test]
    fn a_slot_opens_with_its_history_only_where_tokens_are_counted() {
        let open =
            |sampling| SlotOpen { slot: Slot(2), sampling, history: vec![5, 6, 7], prompt_len: 2 };
        let counted = SamplingParams { presence_penalty: 0.5, ..SamplingParams::greedy() };
        let (mut records, mut history) = (Vec::new(), Vec::new());
        write_opens(&[open(SamplingParams::greedy()), open(counted)], &mut records, &mut history);
        assert_eq!((records.len(), history.len()), (2 * OPEN_BYTES, 12));
        let word = |at: usize| u32::from_le_bytes(records[4 * at..][..4].try_into().unwrap());
        let second = OPEN_BYTES / 4;
        assert_eq!([word(2), word(13), word(12)], [1, 7, 0]);
        assert_eq!([word(16), word(17), word(18), word(19)], [2, 0, 0, 2]);
        assert_eq!([word(second + 12), word(second + 18), word(second + 19)], [1, 3, 2]);
    }
}
