//! Keys and values into the pool, and attention over it.
//!
//! Both always go through the pool as bf16: a token sees the keys of its own step as any later one does. A query goes
//! through the tiles of 32 positions in order, whatever the pool's block size, whoever asks beside it.

use baton_shared::id::BlockIndex;

use super::kernels::{ATTENTION_TILE, Running};
use super::linear::{Scratch, Team, grow};
use super::pieces::{Grid, Split};
use super::rope;
use crate::kv::region::KvRegion;

/// Rows of a sequence that share the keys and values they read.
pub const QUERY_ROWS: usize = 16;

/// Counts of heads and their size.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads; divides `queries`.
    pub keys: usize,
    /// Elements of a head; a multiple of 8.
    pub size: usize,
}

impl Heads {
    /// Elements of a row of queries, keys and values.
    pub fn row(self) -> usize {
        (self.queries + 2 * self.keys) * self.size
    }

    /// Elements of a row of queries.
    pub fn query_row(self) -> usize {
        self.queries * self.size
    }
}

/// Where a step's rows belong.
#[derive(Debug, Default)]
pub struct Places {
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Where each row's block table begins in the plan's.
    pub tables: Vec<usize>,
    /// Where the runs of at most [`QUERY_ROWS`] rows of one sequence end.
    pub query_ends: Vec<usize>,
    /// Sines of each row's angles.
    pub sines: Vec<f32>,
    /// Cosines of each row's angles.
    pub cosines: Vec<f32>,
}

impl Places {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let Self { positions, tables, query_ends, sines, cosines } = self;
        positions.clear();
        tables.clear();
        query_ends.clear();
        sines.clear();
        cosines.clear();
    }

    /// Adds a sequence's rows.
    pub fn push(&mut self, start: u32, rows: usize, table: usize, frequencies: &[f64]) {
        let first = self.positions.len();
        self.positions.extend((start..).take(rows));
        self.tables.resize(first + rows, table);
        let runs = (0..rows).step_by(QUERY_ROWS);
        self.query_ends.extend(runs.map(|run| first + (run + QUERY_ROWS).min(rows)));
        let pairs = frequencies.len();
        self.sines.resize((first + rows) * pairs, 0.0);
        self.cosines.resize((first + rows) * pairs, 0.0);
        for row in first..first + rows {
            let turn = row * pairs..(row + 1) * pairs;
            let (sines, cosines) = (&mut self.sines[turn.clone()], &mut self.cosines[turn]);
            rope::angles(self.positions[row], frequencies, sines, cosines);
        }
    }
}

/// The pool, one layer of it, and the plan's block tables.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// The pool.
    pub pool: &'a KvRegion,
    /// Which layer.
    pub layer: u32,
    /// All block tables, back to back; checked against the pool.
    pub tables: &'a [BlockIndex],
}

/// What lies in the pool for a token and head.
#[derive(Clone, Copy, Debug)]
enum Part {
    Key = 0,
    Value = 1,
}

impl Cache<'_> {
    /// Offset of a position's vector, and how many positions follow it directly, itself included.
    fn place(&self, table: usize, position: usize, head: usize, part: Part) -> (usize, usize) {
        let layout = &self.pool.layout;
        let tokens = layout.block_tokens as usize;
        let block = self.tables[table + position / tokens];
        let head = layout.heads.start + head as u32;
        let base = layout.offset(block, layout.layers.start + self.layer, head, part as u32);
        let vector = layout.head_dim as usize * layout.dtype.bytes() as usize;
        (base as usize + position % tokens * vector, tokens - position % tokens)
    }

    fn store(&self, table: usize, position: usize, head: usize, part: Part, vector: &[u16]) {
        let (offset, _) = self.place(table, position, head, part);
        self.pool.region.write_elements(offset, vector);
    }

    /// Reads `tokens` positions from `first` on, as f32.
    fn load(
        &self,
        (table, first, tokens): (usize, usize, usize),
        (head, part): (usize, Part),
        stored: &mut [u16],
        into: &mut [f32],
    ) {
        let size = self.pool.layout.head_dim as usize;
        let mut done = 0;
        while done < tokens {
            let (offset, run) = self.place(table, first + done, head, part);
            let run = run.min(tokens - done);
            self.pool.region.read_elements(offset, &mut stored[done * size..(done + run) * size]);
            done += run;
        }
        for (into, stored) in into.iter_mut().zip(&stored[..tokens * size]) {
            *into = f32::from_bits(u32::from(*stored) << 16);
        }
    }
}

/// Turns queries (scaled for the softmax) and keys by their positions, and stores keys and values.
pub fn store(team: &mut Team, heads: Heads, places: &Places, cache: Cache<'_>, qkv: &mut [f32]) {
    let pairs = heads.size / 2;
    let scale = 1.0 / (heads.size as f32).sqrt();
    let rows = &mut qkv[..places.positions.len() * heads.row()];
    team.each(Split::even(rows, heads.row()), |scratch, row, qkv| {
        let (position, table) = (places.positions[row] as usize, places.tables[row]);
        let sines = &places.sines[row * pairs..][..pairs];
        let cosines = &places.cosines[row * pairs..][..pairs];
        let (queries, rest) = qkv.split_at_mut(heads.query_row());
        let (keys, values) = rest.split_at_mut(heads.keys * heads.size);
        for query in queries.chunks_exact_mut(heads.size) {
            rope::turn(query, sines, cosines, scale);
        }
        for (head, key) in keys.chunks_exact_mut(heads.size).enumerate() {
            rope::turn(key, sines, cosines, 1.0);
            let stored = narrow(key, scratch);
            cache.store(table, position, head, Part::Key, stored);
        }
        for (head, value) in values.chunks_exact(heads.size).enumerate() {
            let stored = narrow(value, scratch);
            cache.store(table, position, head, Part::Value, stored);
        }
    });
}

/// `out[row][query head]`: each row attends to its sequence up to its own position.
pub fn attend(
    team: &mut Team,
    heads: Heads,
    places: &Places,
    cache: Cache<'_>,
    qkv: &[f32],
    out: &mut [f32],
) {
    let group = heads.queries / heads.keys;
    let kernels = team.kernels;
    let matrix = &mut out[..places.positions.len() * heads.query_row()];
    let grid = Grid::new(matrix, heads.query_row(), &places.query_ends, group * heads.size);
    team.each(grid, |scratch, _, mut rectangle| {
        let (rows, columns) = (rectangle.rows(), rectangle.columns());
        let key_head = columns.start / (group * heads.size);
        let table = places.tables[rows.start];
        for row in 0..rows.len() {
            rectangle.row(row).fill(0.0);
        }
        let length = places.positions[rows.end - 1] as usize + 1;
        let Scratch { stored, keys, values, running, .. } = scratch;
        running.clear();
        running.resize(rows.len() * group, Running::START);
        grow(stored, ATTENTION_TILE * heads.size);
        grow(keys, ATTENTION_TILE * heads.size);
        grow(values, ATTENTION_TILE * heads.size);
        let keys = &mut keys[..ATTENTION_TILE * heads.size];
        let values = &mut values[..ATTENTION_TILE * heads.size];
        for first in (0..length).step_by(ATTENTION_TILE) {
            let run = (table, first, ATTENTION_TILE.min(length - first));
            cache.load(run, (key_head, Part::Key), stored, keys);
            cache.load(run, (key_head, Part::Value), stored, values);
            for (at, row) in rows.clone().enumerate() {
                let seen = (places.positions[row] as usize + 1).saturating_sub(first);
                if seen == 0 {
                    continue;
                }
                let queries = &qkv[row * heads.row() + columns.start..][..columns.len()];
                let queries = queries.chunks_exact(heads.size);
                let outs = rectangle.row(at).chunks_exact_mut(heads.size);
                let running = &mut running[at * group..][..group];
                for ((query, out), running) in queries.zip(outs).zip(running) {
                    let tokens = seen.min(ATTENTION_TILE);
                    (kernels.attend)(query, keys, values, tokens, running, out);
                }
            }
        }
        for at in 0..rows.len() {
            let outs = rectangle.row(at).chunks_exact_mut(heads.size);
            for (out, running) in outs.zip(&running[at * group..]) {
                out.iter_mut().for_each(|out| *out /= running.sum);
            }
        }
    });
}

/// Rounds to bf16, ties to even.
fn narrow<'a>(values: &[f32], scratch: &'a mut Scratch) -> &'a [u16] {
    grow(&mut scratch.stored, values.len());
    let stored = &mut scratch.stored[..values.len()];
    for (stored, value) in stored.iter_mut().zip(values) {
        *stored = half::bf16::from_f32(*value).to_bits();
    }
    stored
}
