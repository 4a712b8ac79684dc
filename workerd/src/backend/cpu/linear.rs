//! Products of weights with the activations of many rows: which tiles of rows, which runs of panels, who takes them.
//!
//! A row's result depends on nothing but that row: tiles and runs only say who computes what when.

use std::ops::Range;

use super::attention;
use super::kernels::{Kernels, LANES, QUANT, QuantBlock, TOKENS, Tile, wants_quantised};
use super::pieces::{Grid, Pieces, Split};
use super::repack::Panels;
use super::threads::Threads;
use crate::model::{Weight, WeightType};

/// The threads, what each of them owns, and the kernels they run.
#[derive(Debug)]
pub struct Team {
    /// Which loops.
    pub kernels: &'static Kernels,
    /// Who.
    pub threads: Threads,
    /// One a thread.
    pub scratch: Vec<Scratch>,
}

/// A thread's own memory.
#[derive(Debug, Default)]
pub struct Scratch {
    /// One row of activations.
    pub row: Vec<f32>,
    /// What a product kernel gives.
    pub product: Vec<f32>,
    /// For attention.
    pub attention: attention::Scratch,
}

impl Team {
    /// Calls `body` with each piece; see [`Threads::each`].
    pub fn each<P: Pieces>(
        &mut self,
        pieces: P,
        body: impl Fn(&mut Scratch, usize, P::Piece) + Sync,
    ) {
        self.threads.each(&mut self.scratch, pieces, body);
    }
}

/// How rows fall into tiles that one kernel call takes.
#[derive(Debug, Default)]
pub struct Tiling {
    /// Where each tile's rows end.
    row_ends: Vec<usize>,
    /// The same with each tile filled up to a size that kernels have.
    token_ends: Vec<usize>,
}

impl Tiling {
    /// For `rows` rows.
    pub fn set(&mut self, rows: usize) {
        self.row_ends.clear();
        self.token_ends.clear();
        let (mut row, mut token) = (0, 0);
        while row < rows {
            let left = rows - row;
            // The largest size that is at least three quarters full.
            let size = TOKENS.iter().rev().find(|&&size| left * 4 >= size * 3);
            let size = size.copied().unwrap_or(1);
            row += size.min(left);
            token += size;
            self.row_ends.push(row);
            self.token_ends.push(token);
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.row_ends.last().copied().unwrap_or(0)
    }

    /// Where each tile's rows end.
    pub fn row_ends(&self) -> &[usize] {
        &self.row_ends
    }

    fn tokens(&self) -> usize {
        self.token_ends.last().copied().unwrap_or(0)
    }

    /// Each tile: its rows, its tokens.
    fn tiles(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        (0..self.row_ends.len()).map(|tile| (self.rows_of(tile), run(&self.token_ends, tile)))
    }

    fn rows_of(&self, tile: usize) -> Range<usize> {
        run(&self.row_ends, tile)
    }
}

fn run(ends: &[usize], index: usize) -> Range<usize> {
    let start = index.checked_sub(1).map_or(0, |before| ends[before]);
    start..ends[index]
}

/// Which forms of activations a product takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    quantised: bool,
    float: bool,
}

/// Inputs of a product, tile by tile, `[k][token]`.
#[derive(Debug, Default)]
pub struct Activations {
    cols: usize,
    quantised: Vec<QuantBlock>,
    float: Vec<f32>,
}

impl Activations {
    /// Fills them tile by tile: `source` gets the tile's piece of `beside` and the row's number within the tile and in
    /// all, and writes the row's `cols` elements.
    pub fn fill<P: Pieces>(
        &mut self,
        team: &mut Team,
        tiling: &Tiling,
        (forms, cols): (Forms, usize),
        beside: P,
        source: impl Fn(&mut P::Piece, usize, usize, &mut [f32]) + Sync,
    ) {
        let blocks = if forms.quantised { cols / QUANT } else { 0 };
        let columns = if forms.float { cols } else { 0 };
        self.cols = cols;
        grow(&mut self.quantised, tiling.tokens() * blocks);
        grow(&mut self.float, tiling.tokens() * columns);
        let quantised = Split::at(&mut self.quantised, &tiling.token_ends, blocks);
        let float = Split::at(&mut self.float, &tiling.token_ends, columns);
        let kernels = team.kernels;
        team.each(
            (beside, (quantised, float)),
            |scratch, tile, (mut beside, (quantised, float))| {
                let tokens = run(&tiling.token_ends, tile).len();
                grow(&mut scratch.row, cols);
                let values = &mut scratch.row[..cols];
                for (at, row) in tiling.rows_of(tile).enumerate() {
                    source(&mut beside, at, row, values);
                    if forms.quantised {
                        (kernels.quantise)(values, &mut quantised[at..], tokens);
                    }
                    for (value, column) in values.iter().zip(float.chunks_exact_mut(tokens)) {
                        column[at] = *value;
                    }
                }
            },
        );
    }

    fn tile(&self, dtype: WeightType, tokens: Range<usize>) -> Tile<'_> {
        if wants_quantised(dtype) {
            let blocks = self.cols / QUANT;
            Tile::Quantised(&self.quantised[tokens.start * blocks..tokens.end * blocks])
        } else {
            Tile::Float(&self.float[tokens.start * self.cols..tokens.end * self.cols])
        }
    }
}

/// Makes `buffer` at least `len` long; never shorter, so that steps do not allocate.
pub fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// Weights that share their input, their outputs side by side.
#[derive(Debug)]
pub struct Linear {
    parts: Vec<Panels>,
    rows: usize,
    cols: usize,
}

impl Linear {
    /// Of weights of equal `cols`; all but the last have a multiple of 8 rows.
    ///
    /// # Panics
    /// If they have not: the caller has checked the model's shape.
    pub fn new(weights: &[&Weight]) -> Self {
        let cols = weights[0].cols;
        let rows = weights.iter().map(|weight| weight.rows).sum();
        assert!(weights.iter().all(|weight| weight.cols == cols), "weights share their input");
        let (_, before) = weights.split_last().expect("at least one weight");
        assert!(before.iter().all(|weight| weight.rows % LANES == 0), "whole panels");
        Self { parts: weights.iter().map(|weight| Panels::new(weight)).collect(), rows, cols }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The forms of activations that [`Linear::apply`] takes.
    pub fn forms(&self) -> Forms {
        let quantised = |part: &Panels| wants_quantised(part.dtype);
        Forms {
            quantised: self.parts.iter().any(quantised),
            float: !self.parts.iter().all(quantised),
        }
    }

    /// A row of the weights as numbers, into `out` (`cols` elements).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let mut row = row;
        for part in &self.parts {
            if row < part.rows {
                return part.row(row, out);
            }
            row -= part.rows;
        }
        panic!("a row of the weights");
    }

    /// `out[row][output]` for all rows of the tiling.
    pub fn apply(
        &self,
        team: &mut Team,
        tiling: &Tiling,
        activations: &Activations,
        out: &mut [f32],
    ) {
        let panels = self.rows.div_ceil(LANES);
        // Runs are short enough that the threads end together, long enough that taking one costs nothing.
        let run = (panels / (team.threads.count() * 4)).clamp(1, LONGEST_RUN);
        let kernels = team.kernels;
        let rows = 0..tiling.rows();
        let out = &mut out[..self.rows * rows.end];
        let grid = Grid::new(out, self.rows, std::slice::from_ref(&rows), run * LANES);
        team.each(grid, |scratch, _, mut rectangle| {
            let columns = rectangle.columns();
            let mut first = 0;
            for part in &self.parts {
                let panels = overlap(columns.clone(), first..first + part.rows);
                let left = first.max(columns.start) - columns.start;
                first += part.rows;
                if panels.is_empty() {
                    continue;
                }
                let width = part.rows.min(panels.end * LANES) - panels.start * LANES;
                for (rows, tokens) in tiling.tiles() {
                    let count = tokens.len();
                    grow(&mut scratch.product, panels.len() * count * LANES);
                    let product = &mut scratch.product[..panels.len() * count * LANES];
                    let tile = activations.tile(part.dtype, tokens);
                    kernels.product(part.dtype, part.bytes(panels.clone()), tile, count, product);
                    for (at, row) in rows.enumerate() {
                        let out = &mut rectangle.row(row)[left..left + width];
                        let product = product.chunks_exact(count * LANES);
                        for (out, product) in out.chunks_mut(LANES).zip(product) {
                            out.copy_from_slice(&product[at * LANES..][..out.len()]);
                        }
                    }
                }
            }
        });
    }
}

/// Panels a thread takes at a time: their weights stay in its first cache while it goes through the tiles.
const LONGEST_RUN: usize = 8;

/// Which panels of a part (that covers `part` of the outputs) lie in `columns`.
fn overlap(columns: Range<usize>, part: Range<usize>) -> Range<usize> {
    let start = columns.start.clamp(part.start, part.end) - part.start;
    let end = columns.end.clamp(part.start, part.end) - part.start;
    start / LANES..end.div_ceil(LANES)
}
