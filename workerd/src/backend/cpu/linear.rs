//! Products of weights with the activations of many rows: which tiles of rows, which runs of panels, who takes them.
//!
//! A row's result depends on nothing but that row: tiles and runs only say who computes what when.

use std::ops::Range;

use super::arena::{Arena, OutOfMemory};
use super::attention;
use super::kernels::{Kernels, QUANT, QuantBlock, ROWS, TOKENS, Tile, wants_quantised};
use super::pieces::Pieces;
use super::pieces::grid::{Grid, TileRun, Tiles};
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
    /// The same, quantised.
    blocks: Vec<QuantBlock>,
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
    /// What a thread fills at a time: some rows of a tile.
    runs: Vec<TileRun>,
    /// Where their rows end.
    run_ends: Vec<usize>,
}

impl Tiling {
    /// For `rows` rows: as few tiles as there can be, of about the same size.
    pub fn set(&mut self, rows: usize) {
        let tiles = rows.div_ceil(TOKENS);
        self.row_ends.clear();
        self.row_ends.extend((1..=tiles).map(|tile| tile * rows / tiles));
        self.runs.clear();
        self.run_ends.clear();
        for tile in 0..tiles {
            let rows = run(&self.row_ends, tile);
            for first in rows.clone().step_by(FILLED_ROWS) {
                let end = rows.end.min(first + FILLED_ROWS);
                self.runs.push(TileRun { tile: rows.clone(), columns: first..end });
                self.run_ends.push(end);
            }
        }
    }

    /// Where the rows of each piece of [`Activations::fill`] end.
    pub fn run_ends(&self) -> &[usize] {
        &self.run_ends
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.row_ends.last().copied().unwrap_or(0)
    }

    /// Where each tile's rows end.
    pub fn row_ends(&self) -> &[usize] {
        &self.row_ends
    }

    /// Rows of each tile.
    fn tiles(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.row_ends.len()).map(|tile| run(&self.row_ends, tile))
    }
}

/// Rows of a tile that a thread fills at a time: few, so that a small step keeps all threads busy.
const FILLED_ROWS: usize = 2;

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
    /// Fills them, some rows of a tile at a time: `source` gets these rows' piece of `beside` and the row's number among
    /// them and in all, and writes the row's `cols` elements.
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
        grow(&mut self.quantised, tiling.rows() * blocks);
        grow(&mut self.float, tiling.rows() * columns);
        let quantised = Tiles::new(&mut self.quantised, blocks, &tiling.runs);
        let float = Tiles::new(&mut self.float, columns, &tiling.runs);
        let kernels = team.kernels;
        team.each(
            (beside, (quantised, float)),
            |scratch, index, (mut beside, (mut quantised, mut float))| {
                grow(&mut scratch.row, cols);
                grow(&mut scratch.blocks, blocks);
                let (values, blocks) = (&mut scratch.row[..cols], &mut scratch.blocks[..blocks]);
                for (at, row) in run(&tiling.run_ends, index).enumerate() {
                    source(&mut beside, at, row, values);
                    if forms.quantised {
                        (kernels.quantise)(values, blocks, 1);
                        for (k, block) in blocks.iter().enumerate() {
                            quantised.row(k)[at] = *block;
                        }
                    }
                    if forms.float {
                        for (k, value) in values.iter().enumerate() {
                            float.row(k)[at] = *value;
                        }
                    }
                }
            },
        );
    }

    fn tile(&self, dtype: WeightType, rows: &Range<usize>) -> Tile<'_> {
        if wants_quantised(dtype) {
            let blocks = self.cols / QUANT;
            Tile::Quantised(&self.quantised[rows.start * blocks..rows.end * blocks])
        } else {
            Tile::Float(&self.float[rows.start * self.cols..rows.end * self.cols])
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
    /// Of weights of equal `cols`, in memory of the arena.
    ///
    /// # Errors
    /// If there is no such memory.
    ///
    /// # Panics
    /// If they have not: the caller has checked the model's shape.
    pub fn new(weights: &[&Weight], arena: &mut Arena) -> Result<Self, OutOfMemory> {
        let cols = weights[0].cols;
        let rows = weights.iter().map(|weight| weight.rows).sum();
        assert!(weights.iter().all(|weight| weight.cols == cols), "weights share their input");
        let parts = weights.iter().map(|weight| Panels::new(weight, arena));
        Ok(Self { parts: parts.collect::<Result<_, _>>()?, rows, cols })
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

    /// Panels of a piece of [`Linear::apply`]: few enough that the threads end together, so many that taking one costs
    /// nothing.
    fn run(&self, threads: &Threads) -> usize {
        (self.rows.div_ceil(ROWS) / (threads.count() * 4)).clamp(1, LONGEST_RUN)
    }

    /// Has threads that wait fetch what they will read of these weights.
    fn fetch_ahead(&self, threads: &Threads) {
        let share = self.rows / ROWS / threads.count() * ROWS;
        for thread in 0..threads.count() {
            let mut row = thread * share;
            for part in &self.parts {
                if row < part.rows {
                    let panel = row / ROWS;
                    let most = (share / ROWS).min(FETCHED_AHEAD / part.bytes(0..1).len());
                    let end = part.count().min(panel + most.max(1));
                    threads.fetch_ahead(thread, part.bytes(panel..end));
                    break;
                }
                row -= part.rows;
            }
        }
    }

    /// `out[row][output]` for all rows of the tiling; `next` are the weights that will be applied then.
    pub fn apply(
        &self,
        team: &mut Team,
        tiling: &Tiling,
        activations: &Activations,
        out: &mut [f32],
        next: &Linear,
    ) {
        let run = self.run(&team.threads);
        next.fetch_ahead(&team.threads);
        let kernels = team.kernels;
        let rows = 0..tiling.rows();
        let out = &mut out[..self.rows * rows.end];
        let grid = Grid::tapered(
            out,
            self.rows,
            std::slice::from_ref(&rows),
            (ROWS, run),
            (team.threads.count(), KEPT / rows.end.max(1)),
        );
        team.each(grid, |scratch, _, mut rectangle| {
            let columns = rectangle.columns();
            let mut first = 0;
            for part in &self.parts {
                let wanted = overlap(&columns, first..first + part.rows);
                first += part.rows;
                if wanted.is_empty() {
                    continue;
                }
                let left = first - part.rows + wanted.start - columns.start;
                // Where parts do not end with whole panels, a panel may be computed for two runs.
                let panels = wanted.start / ROWS..wanted.end.div_ceil(ROWS);
                let whole = wanted == (panels.start * ROWS..panels.end * ROWS);
                for rows in tiling.tiles() {
                    if whole && rows.len() == 1 {
                        let out = &mut rectangle.row(rows.start)[left..left + wanted.len()];
                        let tile = activations.tile(part.dtype, &rows);
                        kernels.product(part.dtype, part.bytes(panels.clone()), tile, 1, out);
                        continue;
                    }
                    let size = rows.len() * ROWS;
                    grow(&mut scratch.product, panels.len() * size);
                    let product = &mut scratch.product[..panels.len() * size];
                    let tile = activations.tile(part.dtype, &rows);
                    let bytes = part.bytes(panels.clone());
                    kernels.product(part.dtype, bytes, tile, rows.len(), product);
                    for (at, row) in rows.enumerate() {
                        let out = &mut rectangle.row(row)[left..left + wanted.len()];
                        let products = product.chunks_exact(size);
                        let products = products.map(|panel| &panel.as_chunks::<ROWS>().0[at]);
                        if whole {
                            // Copies of a length known beforehand are no calls.
                            let outs = out.as_chunks_mut::<ROWS>().0.iter_mut();
                            outs.zip(products).for_each(|(out, product)| *out = *product);
                            continue;
                        }
                        for (panel, product) in panels.clone().zip(products) {
                            let lanes = overlap(&wanted, panel * ROWS..(panel + 1) * ROWS);
                            let to = panel * ROWS + lanes.start - wanted.start;
                            out[to..to + lanes.len()].copy_from_slice(&product[lanes]);
                        }
                    }
                }
            }
        });
    }
}

/// Bytes of weights that wait in a thread's second cache at most.
const FETCHED_AHEAD: usize = 384 << 10;

/// Panels a thread takes at a time: their weights stay in its second cache while it goes through the tiles.
const LONGEST_RUN: usize = 8;

/// Panels at the end of a thread's share that it is not helped with, where there is one row: fewer the longer they take.
const KEPT: usize = 3;

/// Which of the numbers `part` lie in `wanted`, counted from the start of `part`.
fn overlap(wanted: &Range<usize>, part: Range<usize>) -> Range<usize> {
    let start = wanted.start.clamp(part.start, part.end) - part.start;
    let end = wanted.end.clamp(part.start, part.end) - part.start;
    start..end
}
