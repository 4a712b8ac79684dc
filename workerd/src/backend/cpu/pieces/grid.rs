//! Rectangles of matrices, none of which shares an element with another.
#![expect(unsafe_code, reason = "disjoint rectangles of one buffer are handed to several threads")]

use std::marker::PhantomData;
use std::ops::Range;

use super::Pieces;

/// A row-major matrix cut into rectangles: runs of rows by runs of columns, columns fastest.
#[derive(Debug)]
pub struct Grid<'a> {
    base: *mut f32,
    columns: usize,
    bands: &'a [Range<usize>],
    runs: Runs,
    owner: PhantomData<&'a mut [f32]>,
}

/// How columns fall into runs of whole units: in equal shares, each of `wide` runs of several units and then of single
/// ones; what is left over is single units at the end.
#[derive(Clone, Copy, Debug)]
struct Runs {
    /// Columns of a unit.
    unit: usize,
    /// Units of a wide run.
    units: usize,
    shares: usize,
    /// Units of a share.
    share: usize,
    /// Wide runs of a share.
    wide: usize,
    /// Runs at the end of a share that are left to its thread.
    kept: usize,
}

impl Runs {
    /// Runs of a share.
    fn of_share(self) -> usize {
        self.wide + self.share - self.wide * self.units
    }
}

// SAFETY: a `Grid` gives out disjoint rectangles of `f32`, each once.
unsafe impl Sync for Grid<'_> {}

impl<'a> Grid<'a> {
    /// Runs of rows `bands` by runs of `width` columns, the last one perhaps narrower.
    ///
    /// # Panics
    /// If `width` or `columns` is 0, the bands do not ascend, or one passes the matrix's end.
    pub fn new(
        matrix: &'a mut [f32],
        columns: usize,
        bands: &'a [Range<usize>],
        width: usize,
    ) -> Self {
        Self::cut(
            matrix,
            columns,
            bands,
            Runs { unit: width, units: 1, shares: 0, share: 0, wide: 0, kept: 0 },
        )
    }

    /// The same in `shares` equal shares of runs of `units` times `unit` columns that end in single units, so that threads
    /// which begin with a share each, and then help each other but with the last `kept` runs, end together.
    ///
    /// # Panics
    /// If `unit`, `units`, `shares` or `columns` is 0, the bands do not ascend, or one passes the matrix's end.
    pub fn tapered(
        matrix: &'a mut [f32],
        columns: usize,
        bands: &'a [Range<usize>],
        (unit, units): (usize, usize),
        (shares, kept): (usize, usize),
    ) -> Self {
        let share = columns / unit / shares;
        // Single units are a sixteenth of a share, or what one more run would be.
        let wide = share.saturating_sub(units.max(share / 16)) / units;
        Self::cut(matrix, columns, bands, Runs { unit, units, shares, share, wide, kept })
    }

    fn cut(matrix: &'a mut [f32], columns: usize, bands: &'a [Range<usize>], runs: Runs) -> Self {
        assert!(runs.unit > 0 && columns > 0);
        assert!(bands.iter().all(|band| band.start <= band.end), "pieces end in order");
        assert!(bands.is_sorted_by(|a, b| a.end <= b.start), "pieces end in order");
        let end = bands.last().map_or(0, |band| band.end);
        assert!(end <= matrix.len() / columns, "pieces lie in the buffer");
        Self { base: matrix.as_mut_ptr(), columns, bands, runs, owner: PhantomData }
    }

    /// Rectangles beside each other.
    pub fn across(&self) -> usize {
        let Runs { unit, shares, share, .. } = self.runs;
        shares * self.runs.of_share() + self.columns.div_ceil(unit) - shares * share
    }

    /// First column of a run; that of the run behind the last is the number of columns.
    fn column(&self, run: usize) -> usize {
        let Runs { unit, units, shares, share, wide, .. } = self.runs;
        let of = run.checked_div(self.runs.of_share()).map_or(0, |of| of.min(shares));
        let run = run - of * self.runs.of_share();
        let wide = if of < shares { run.min(wide) } else { 0 };
        ((of * share + wide * units + run - wide) * unit).min(self.columns)
    }
}

// SAFETY: rectangles of one matrix with ascending bands of rows and separate columns; the matrix is borrowed for `'a`.
unsafe impl<'a> Pieces for Grid<'a> {
    type Piece = Rectangle<'a, f32>;

    fn count(&self) -> usize {
        self.bands.len() * self.across()
    }

    fn kept(&self) -> usize {
        self.runs.kept
    }

    fn share_end(&self, thread: usize, threads: usize) -> usize {
        let is_share = self.bands.len() == 1 && self.runs.shares == threads && thread + 1 < threads;
        let pieces = if is_share { self.runs.of_share() * threads } else { self.count() };
        pieces * (thread + 1) / threads
    }

    unsafe fn piece(&self, index: usize) -> Rectangle<'a, f32> {
        let (band, run) = (index / self.across(), index % self.across());
        let Range { start: first_row, end } = self.bands[band];
        let column = self.column(run);
        Rectangle {
            // SAFETY: row and column are inside the matrix by the checks at construction.
            base: unsafe { self.base.add(first_row * self.columns + column) },
            first_row,
            rows: end - first_row,
            column,
            width: self.column(run + 1) - column,
            stride: self.columns,
            owner: PhantomData,
        }
    }
}

/// Some columns of one of several matrices.
#[derive(Clone, Debug)]
pub struct TileRun {
    /// The matrix: its columns' numbers in all.
    pub tile: Range<usize>,
    /// The columns: some of these.
    pub columns: Range<usize>,
}

/// Row-major matrices of equal height, one behind another, each cut into runs of columns over its whole height.
#[derive(Debug)]
pub struct Tiles<'a, T> {
    base: *mut T,
    height: usize,
    runs: &'a [TileRun],
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Tiles` gives out disjoint rectangles, each once: as sending the `&mut T` in them.
unsafe impl<T: Send> Sync for Tiles<'_, T> {}

impl<'a, T> Tiles<'a, T> {
    /// Matrices of `height` rows.
    ///
    /// # Panics
    /// If the runs' columns do not ascend, one is not of its matrix, or matrices overlap or pass the buffer's end.
    pub fn new(buffer: &'a mut [T], height: usize, runs: &'a [TileRun]) -> Self {
        let inside = |run: &TileRun| {
            let TileRun { tile, columns } = run;
            tile.start <= columns.start && columns.start <= columns.end && columns.end <= tile.end
        };
        assert!(runs.iter().all(inside), "columns are of their matrix");
        let apart = |a: &TileRun, b: &TileRun| {
            a.columns.end <= b.columns.start && (a.tile == b.tile || a.tile.end <= b.tile.start)
        };
        assert!(runs.is_sorted_by(apart), "pieces end in order");
        let end = runs.last().map_or(0, |run| run.tile.end);
        assert!(
            end.checked_mul(height).is_some_and(|end| end <= buffer.len()),
            "pieces lie in the buffer"
        );
        Self { base: buffer.as_mut_ptr(), height, runs, owner: PhantomData }
    }
}

// SAFETY: other columns of one matrix, or another matrix, by the checks at construction; the buffer is borrowed for `'a`.
unsafe impl<'a, T: Send> Pieces for Tiles<'a, T> {
    type Piece = Rectangle<'a, T>;

    fn count(&self) -> usize {
        self.runs.len()
    }

    unsafe fn piece(&self, index: usize) -> Rectangle<'a, T> {
        let TileRun { tile, columns } = &self.runs[index];
        let column = columns.start - tile.start;
        Rectangle {
            // SAFETY: inside the buffer by the checks at construction, also where the height is 0.
            base: unsafe {
                self.base.add(tile.start * self.height + column.min(tile.len() * self.height))
            },
            first_row: 0,
            rows: self.height,
            column,
            width: columns.len(),
            stride: tile.len(),
            owner: PhantomData,
        }
    }
}

/// One rectangle of a matrix.
#[derive(Debug)]
pub struct Rectangle<'a, T> {
    base: *mut T,
    first_row: usize,
    rows: usize,
    column: usize,
    width: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

impl<T> Rectangle<'_, T> {
    /// Numbers of its rows in the matrix.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.rows
    }

    /// Numbers of its columns in the matrix.
    pub fn columns(&self) -> Range<usize> {
        self.column..self.column + self.width
    }

    /// Its part of its `row`th row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: inside the matrix by the checks of what gave it out, shared with no other rectangle, and borrowed from `self`.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(row * self.stride), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_covers_each_element_once() {
        let (rows, columns) = (11, 13);
        let mut matrix = vec![0.0_f32; rows * columns];
        let grid = Grid::new(&mut matrix, columns, &[0..4, 4..4, 4..9, 9..11], 5);
        assert_eq!(grid.count(), 4 * 3);
        for index in 0..grid.count() {
            // SAFETY: each index once.
            let mut part = unsafe { grid.piece(index) };
            for row in 0..part.rows().len() {
                let number = (part.rows().start + row) * columns + part.columns().start;
                for (at, value) in part.row(row).iter_mut().enumerate() {
                    *value += (number + at + 1) as f32;
                }
            }
        }
        assert!(matrix.iter().enumerate().all(|(at, &value)| value == (at + 1) as f32));
    }

    #[test]
    fn runs_that_taper_cover_each_column_once_and_each_share_ends_in_single_units() {
        for (columns, shares) in [1, 7, 8, 9, 96, 577, 1000].into_iter().zip(1..).chain([(500, 2)])
        {
            let mut matrix = vec![0.0_f32; columns];
            let band = 0..1;
            let bands = std::slice::from_ref(&band);
            let grid = Grid::tapered(&mut matrix, columns, bands, (8, 3), (shares, 2));
            let mut index = 0;
            for thread in 0..shares {
                let end = grid.share_end(thread, shares);
                let mut last = 0;
                while index < end {
                    // SAFETY: each index once.
                    let mut part = unsafe { grid.piece(index) };
                    if columns / 8 >= shares {
                        let first = columns / 8 / shares * thread * 8;
                        assert!(part.columns().start >= first);
                    }
                    assert!(part.columns().start.is_multiple_of(8));
                    part.row(0).iter_mut().for_each(|value| *value += 1.0);
                    last = part.columns().len();
                    index += 1;
                }
                assert!(last <= 8);
            }
            assert_eq!(index, grid.count());
            assert!(matrix.iter().all(|&value| value == 1.0), "{columns}");
        }
    }

    #[test]
    fn runs_of_tiles_cover_each_element_once() {
        let run = |tile: Range<usize>, columns| TileRun { tile, columns };
        let runs = [run(0..5, 0..2), run(0..5, 2..5), run(5..8, 5..8)];
        let mut buffer = vec![0_u8; 8 * 3];
        let tiles = Tiles::new(&mut buffer, 3, &runs);
        for index in 0..tiles.count() {
            // SAFETY: each index once.
            let mut part = unsafe { tiles.piece(index) };
            for row in 0..3 {
                part.row(row).iter_mut().for_each(|value| *value += 1 + index as u8);
            }
        }
        let first = [1, 1, 2, 2, 2].repeat(3);
        assert_eq!(buffer, [first, vec![3; 9]].concat());
    }
}
