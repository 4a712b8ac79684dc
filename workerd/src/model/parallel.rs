//! Work at load time that falls into rows: shared out over the cores there are. No result depends on how.

use std::num::NonZeroUsize;
use std::thread::available_parallelism;

/// Below this a thread costs more than it saves, bytes.
const WORTH_A_THREAD: usize = 256 << 10;

/// Calls `body` with the number and the bytes of each row of `out` (`row_bytes` long).
///
/// # Panics
/// With what `body` panics with; if `row_bytes` is 0.
pub fn each_row(out: &mut [u8], row_bytes: usize, body: impl Fn(usize, &mut [u8]) + Sync) {
    let rows = out.len().div_ceil(row_bytes);
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = cores.min(out.len() / WORTH_A_THREAD).max(1);
    let share = rows.div_ceil(threads).max(1);
    let run = |first: usize, out: &mut [u8]| {
        out.chunks_mut(row_bytes).enumerate().for_each(|(at, row)| body(first + at, row));
    };
    if threads == 1 {
        return run(0, out);
    }
    std::thread::scope(|scope| {
        for (part, out) in out.chunks_mut(share * row_bytes).enumerate() {
            scope.spawn(move || run(part * share, out));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_given_once_with_its_number() {
        for (rows, row_bytes) in [(0, 8), (1, 8), (7, 3), (4099, 1024)] {
            let mut out = vec![0; rows * row_bytes];
            each_row(&mut out, row_bytes, |row, bytes| {
                bytes.iter_mut().for_each(|byte| *byte += 1 + (row % 100) as u8);
            });
            let mut numbers = out.chunks_exact(row_bytes).enumerate();
            assert!(numbers.all(|(row, b)| b.iter().all(|b| *b == 1 + (row % 100) as u8)));
        }
    }
}
