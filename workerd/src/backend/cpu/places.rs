//! Where a step's rows belong: their positions, block tables and angles, and who shares attention's work.
//!
//! Rows of one sequence that lie side by side go through the cache together, in runs. A row that is alone (a sequence
//! that decodes) and sees more than one span falls into parts, one a span, so that a long sequence keeps all threads
//! busy. None of this changes a bit: every row goes through its spans one after the other, or as if.

use std::ops::{Range, RangeInclusive};

use super::attention::Heads;
use super::rope;

/// Positions whose softmax stands on its own; those of the spans before are merged with it in order.
pub const SPAN: usize = 256;
/// Queries of a KV head that share the keys and values they read: with fewer, fetching those would weigh; more would
/// not stay in the second cache.
const RUN_QUERIES: RangeInclusive<usize> = 48..=128;
/// Runs a thread gets at least where rows are many, so that the threads end together.
const RUNS_EACH: usize = 6;

/// A step's rows; reused from step to step.
#[derive(Debug, Default)]
pub struct Places {
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Where each row's block table begins in the plan's.
    pub tables: Vec<usize>,
    /// Rows that have others of their sequence beside them, in order.
    pub crowded: Vec<usize>,
    /// Rows that are computed together and whole, in order.
    pub runs: Vec<Range<usize>>,
    /// What is computed span by span, a row's spans in order.
    pub parts: Vec<Part>,
    /// Each row's first part, if it has any.
    pub first_parts: Vec<Option<usize>>,
    /// Sines of each row's angles.
    pub sines: Vec<f32>,
    /// Cosines of each row's angles.
    pub cosines: Vec<f32>,
}

/// One span of a row that is alone.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Which row.
    pub row: usize,
    /// Which span.
    pub span: usize,
}

impl Places {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let Self { positions, tables, crowded, runs, parts, first_parts, sines, cosines } = self;
        positions.clear();
        tables.clear();
        crowded.clear();
        runs.clear();
        parts.clear();
        first_parts.clear();
        sines.clear();
        cosines.clear();
    }

    /// Adds a sequence's rows, for `threads` threads.
    pub fn push(
        &mut self,
        (start, rows, table): (u32, usize, usize),
        heads: Heads,
        frequencies: &[f64],
        threads: usize,
    ) {
        let first = self.positions.len();
        let end = first + rows;
        self.positions.extend((start..).take(rows));
        self.tables.resize(end, table);
        self.first_parts.resize(end, None);
        self.turn(first..end, frequencies);
        let spans = self.spans(first);
        if rows == 1 && spans > 1 {
            self.first_parts[first] = Some(self.parts.len());
            self.parts.extend((0..spans).map(|span| Part { row: first, span }));
            return;
        }
        if rows > 1 {
            self.crowded.extend(first..end);
        }
        let queries = rows * heads.queries / (threads * RUNS_EACH);
        let queries = queries.clamp(*RUN_QUERIES.start(), *RUN_QUERIES.end());
        let runs = rows.div_ceil((queries / heads.group()).max(1));
        let cut = |run: usize| first + run * rows / runs;
        self.runs.extend((0..runs).map(|run| cut(run)..cut(run + 1)));
    }

    /// Positions that a row sees: itself and those before.
    pub fn end(&self, row: usize) -> usize {
        self.positions[row] as usize + 1
    }

    /// Spans that a row sees.
    pub fn spans(&self, row: usize) -> usize {
        self.positions[row] as usize / SPAN + 1
    }

    /// Whether a row is its sequence's only one in this step.
    pub fn is_alone(&self, row: usize) -> bool {
        self.crowded.binary_search(&row).is_err()
    }

    /// A row's sines and cosines.
    pub fn angles(&self, row: usize) -> (&[f32], &[f32]) {
        let pairs = self.sines.len() / self.positions.len();
        let turn = row * pairs..(row + 1) * pairs;
        (&self.sines[turn.clone()], &self.cosines[turn])
    }

    fn turn(&mut self, rows: Range<usize>, frequencies: &[f64]) {
        let pairs = frequencies.len();
        self.sines.resize(rows.end * pairs, 0.0);
        self.cosines.resize(rows.end * pairs, 0.0);
        for row in rows {
            let turn = row * pairs..(row + 1) * pairs;
            let (sines, cosines) = (&mut self.sines[turn.clone()], &mut self.cosines[turn]);
            rope::angles(self.positions[row], frequencies, sines, cosines);
        }
    }
}
