//! Keys and values into the pool, and attention over it.
//!
//! Both always go through the pool as bf16: a token sees the keys of its own step as any later one does. A query goes
//! through each span of 256 positions in tiles of 32, in order, and merges what the spans give, in order, whatever the
//! pool's block size, whoever asks beside it, and whether the spans are computed one after the other or apart.

use std::ops::Range;

use super::cache::{Cache, Kind};
use super::kernels::attention::{ATTENTION_TILE, Attention as Kernels, Running};
use super::kernels::scalar::exp;
use super::linear::{Team, grow};
use super::pieces::grid::Grid;
use super::pieces::{Chain, Count, Either, Pieces, Split};
use super::places::{Part, Places, SPAN};
use super::rope;

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

    /// Query heads that share a KV head.
    pub fn group(self) -> usize {
        self.queries / self.keys
    }
}

/// What the spans of rows that are computed span by span give; grows to the largest step seen.
#[derive(Debug, Default)]
pub struct Parts {
    /// `[part][KV head][query of the group][head_dim]`.
    out: Vec<f32>,
    /// `[part][KV head][query of the group]`.
    running: Vec<Running>,
}

/// A thread's own memory; in cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Scratch {
    /// A vector or a tile of keys or values as stored.
    stored: Vec<u16>,
    /// A tile's keys, `[head_dim][32]`.
    keys: Vec<f32>,
    /// A tile's values, `[32][head_dim]`.
    values: Vec<f32>,
    /// `[query][head_dim]`.
    queries: Vec<f32>,
    /// What the span gives so far, `[query][head_dim]`.
    out: Vec<f32>,
    /// One a query.
    running: Vec<Running>,
    /// What the spans before it gave, `[query][head_dim]`.
    merged: Vec<f32>,
    /// One a query.
    merged_running: Vec<Running>,
}

/// Attention of a step's rows in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Heads.
    pub heads: Heads,
    /// The rows.
    pub places: &'a Places,
    /// The layer's cache.
    pub cache: Cache<'a>,
    /// `[row][queries, keys, values]`, not yet turned by position.
    pub qkv: &'a [f32],
}

impl Layer<'_> {
    /// Stores the new keys and values and lets each row attend to its sequence up to its own position: into
    /// `out[row][query head]`, or into `parts`; [`Layer::gather`] knows which.
    pub fn attend(&self, team: &mut Team, parts: &mut Parts, out: &mut [f32]) {
        let Self { heads, places, .. } = *self;
        team.each(Count(places.crowded.len().div_ceil(STORED_ROWS)), |scratch, at, ()| {
            for row in places.crowded[at * STORED_ROWS..].iter().take(STORED_ROWS) {
                self.store(&mut scratch.attention, *row, 0..heads.keys);
            }
        });
        let kernels = team.kernels.attention;
        let (group, count) = (heads.group(), places.parts.len() * heads.keys);
        let width = group * heads.size;
        grow(&mut parts.out, count * width);
        grow(&mut parts.running, count * group);
        let whole = Grid::new(out, heads.query_row(), &places.runs, width);
        let out = Split::even(&mut parts.out[..count * width], width);
        let running = Split::even(&mut parts.running[..count * group], group);
        let runs = whole.count();
        team.each(Chain(whole, (out, running)), |scratch, index, piece| {
            let scratch = &mut scratch.attention;
            match piece {
                Either::First(mut rectangle) => {
                    let (rows, columns) = (rectangle.rows(), rectangle.columns());
                    self.whole(kernels, scratch, rows.clone(), columns.start / width);
                    for (row, merged) in scratch.merged.chunks_exact(width).enumerate() {
                        rectangle.row(row).copy_from_slice(merged);
                    }
                }
                Either::Second((out, running)) => {
                    let (part, head) = ((index - runs) / heads.keys, (index - runs) % heads.keys);
                    let Part { row, span } = places.parts[part];
                    self.prefetch(row, head, Kind::Key, span * SPAN..places.end(row));
                    if span + 1 == places.spans(row) {
                        self.store(scratch, row, head..head + 1);
                    }
                    self.prefetch(row, head, Kind::Value, span * SPAN..places.end(row));
                    self.turn(scratch, row..row + 1, head);
                    self.span(kernels, scratch, row..row + 1, head, span);
                    out.copy_from_slice(&scratch.out);
                    running.copy_from_slice(&scratch.running);
                }
            }
        });
    }

    /// What a row attended to: `[query head]`.
    pub fn gather(&self, row: usize, parts: &Parts, attended: &[f32], out: &mut [f32]) {
        let Heads { queries, size, .. } = self.heads;
        let Some(first) = self.places.first_parts[row] else {
            return out.copy_from_slice(&attended[row * queries * size..][..queries * size]);
        };
        for (query, out) in out.chunks_exact_mut(size).enumerate() {
            let mut merged = Running::START;
            for part in first..first + self.places.spans(row) {
                let at = part * queries + query;
                merge(&mut merged, out, parts.running[at], &parts.out[at * size..][..size]);
            }
            out.iter_mut().for_each(|out| *out /= merged.sum);
        }
    }

    /// All spans of some rows, the queries of a KV head: into `scratch.merged`.
    fn whole(&self, kernels: Kernels, scratch: &mut Scratch, rows: Range<usize>, head: usize) {
        let Self { heads, places, .. } = *self;
        self.prefetch(rows.start, head, Kind::Key, 0..places.end(rows.start));
        if places.is_alone(rows.start) {
            self.store(scratch, rows.start, head..head + 1);
        }
        self.prefetch(rows.start, head, Kind::Value, 0..places.end(rows.start));
        self.turn(scratch, rows.clone(), head);
        scratch.merged_running.clear();
        scratch.merged_running.resize(rows.len() * heads.group(), Running::START);
        grow(&mut scratch.merged, rows.len() * heads.group() * heads.size);
        scratch.merged.truncate(rows.len() * heads.group() * heads.size);
        for span in 0..places.spans(rows.end - 1) {
            self.span(kernels, scratch, rows.clone(), head, span);
            let before = rows.clone().take_while(|row| places.spans(*row) <= span).count();
            let (outs, parts) = (scratch.merged.chunks_exact_mut(heads.size), &scratch.out);
            let queries = outs.zip(parts.chunks_exact(heads.size));
            let runnings = scratch.merged_running.iter_mut().zip(&scratch.running);
            let queries = queries.zip(runnings).skip(before * heads.group());
            for ((out, part), (merged, running)) in queries {
                merge(merged, out, *running, part);
            }
        }
        let outs = scratch.merged.chunks_exact_mut(heads.size);
        for (out, running) in outs.zip(&scratch.merged_running) {
            out.iter_mut().for_each(|out| *out /= running.sum);
        }
    }

    /// One span of some rows, the queries of a KV head (turned before): into `scratch.out` and `scratch.running`.
    fn span(
        &self,
        kernels: Kernels,
        scratch: &mut Scratch,
        rows: Range<usize>,
        head: usize,
        span: usize,
    ) {
        let Self { heads: Heads { size, .. }, places, cache, .. } = *self;
        let (group, table) = (self.heads.group(), places.tables[rows.start]);
        let Scratch { stored, keys, values, queries, out, running, .. } = scratch;
        running.clear();
        running.resize(rows.len() * group, Running::START);
        out.clear();
        out.resize(rows.len() * group * size, 0.0);
        for buffer in [&mut *keys, &mut *values] {
            grow(buffer, ATTENTION_TILE * size);
        }
        grow(stored, ATTENTION_TILE * size);
        let tile = ATTENTION_TILE * size;
        let end = places.end(rows.end - 1).min((span + 1) * SPAN);
        for first in (span * SPAN..end).step_by(ATTENTION_TILE) {
            let tokens = ATTENTION_TILE.min(end - first);
            let next = first + ATTENTION_TILE..end;
            cache.load((table, first, tokens), head, Kind::Key, stored);
            self.prefetch(rows.start, head, Kind::Key, next.clone());
            (kernels.transpose)(&stored[..tile], &mut keys[..tile]);
            cache.load((table, first, tokens), head, Kind::Value, stored);
            (kernels.widen)(&stored[..tokens * size], &mut values[..tokens * size]);
            self.prefetch(rows.start, head, Kind::Value, next);
            let mut attend = |rows: Range<usize>, tokens: usize| {
                let running = &mut running[rows.start * group..rows.end * group];
                let vectors = rows.start * group * size..rows.end * group * size;
                let (queries, out) = (&queries[vectors.clone()], &mut out[vectors]);
                (kernels.attend)(queries, &keys[..tile], &values[..tile], tokens, running, out);
            };
            // Positions ascend: rows that see a part of the tile only come before those that see all of it.
            let seen =
                |at: usize| (places.positions[rows.start + at] as usize + 1).saturating_sub(first);
            let mut at = 0;
            while at < rows.len() && seen(at) < ATTENTION_TILE {
                if seen(at) > 0 {
                    attend(at..at + 1, seen(at));
                }
                at += 1;
            }
            if at < rows.len() {
                attend(at..rows.len(), ATTENTION_TILE);
            }
        }
    }

    /// Has the first tile of some positions that a row sees fetched, if there is one.
    fn prefetch(&self, row: usize, head: usize, kind: Kind, positions: Range<usize>) {
        let tokens = positions.len().min(ATTENTION_TILE);
        if tokens > 0 {
            self.cache.prefetch((self.places.tables[row], positions.start, tokens), head, kind);
        }
    }

    /// Some rows' queries of a KV head, turned by their positions and scaled for the softmax: into `scratch.queries`.
    fn turn(&self, scratch: &mut Scratch, rows: Range<usize>, head: usize) {
        let Heads { size, .. } = self.heads;
        let width = self.heads.group() * size;
        let scale = 1.0 / (size as f32).sqrt();
        grow(&mut scratch.queries, rows.len() * width);
        for (row, queries) in rows.zip(scratch.queries.chunks_exact_mut(width)) {
            queries.copy_from_slice(&self.qkv[row * self.heads.row() + head * width..][..width]);
            let (sines, cosines) = self.places.angles(row);
            for query in queries.chunks_exact_mut(size) {
                rope::turn(query, sines, cosines, scale);
            }
        }
    }

    /// Stores a row's keys, turned by its position, and values.
    fn store(&self, scratch: &mut Scratch, row: usize, heads: Range<usize>) {
        let Self { heads: Heads { queries, keys, size }, places, cache, .. } = *self;
        let (position, table) = (places.positions[row] as usize, places.tables[row]);
        let (sines, cosines) = places.angles(row);
        let row = &self.qkv[row * self.heads.row()..][..self.heads.row()];
        let vector = |number: usize| &row[number * size..][..size];
        grow(&mut scratch.keys, size);
        grow(&mut scratch.stored, size);
        let stored = &mut scratch.stored[..size];
        for head in heads {
            let key = &mut scratch.keys[..size];
            key.copy_from_slice(vector(queries + head));
            rope::turn(key, sines, cosines, 1.0);
            narrow(key, stored);
            cache.store(table, position, head, Kind::Key, stored);
            narrow(vector(queries + keys + head), stored);
            cache.store(table, position, head, Kind::Value, stored);
        }
    }
}

/// Rows whose keys and values are stored at a time.
const STORED_ROWS: usize = 8;

/// Adds a later span to what earlier ones gave; the first one replaces it.
fn merge(merged: &mut Running, out: &mut [f32], part: Running, part_out: &[f32]) {
    if merged.sum == 0.0 {
        *merged = part;
        return out.copy_from_slice(part_out);
    }
    let max = if merged.max > part.max { merged.max } else { part.max };
    let shrink = |from: f32| if from == max { 1.0 } else { exp(from - max) };
    let (old, new) = (shrink(merged.max), shrink(part.max));
    *merged = Running { max, sum: merged.sum * old + part.sum * new };
    for (out, part) in out.iter_mut().zip(part_out) {
        *out = *out * old + part * new;
    }
}

/// Rounds to bf16, ties to even; what is not a number stays so.
fn narrow(values: &[f32], stored: &mut [u16]) {
    for (stored, value) in stored.iter_mut().zip(values) {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        *stored = if value.is_nan() { quiet } else { rounded } as u16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_the_nearest_bf16() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let mut stored = [0];
                narrow(&[value], &mut stored);
                assert_eq!(stored[0], half::bf16::from_f32(value).to_bits(), "{value}");
            }
        }
    }
}
