//! What the engine thread spends on deciding: nanoseconds for a turn of its loop without the back end, in which every
//! running sequence decodes a token; and for a sequence that leaves and another that is admitted with a prefix hit.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_workerd::engine::rehearsal::Rehearsal;

/// Turns of one measurement; each sequence grows by as many tokens.
const TURNS: u32 = 2_000;
const PROMPT: u32 = 1_000;

fn main() {
    println!(
        "{:>10} {:>14} {:>20} {:>24}",
        "sequences", "ns a turn", "ns a sequence", "ns more with a turnover"
    );
    for sequences in [1, 64, 256] {
        let plain = best(sequences, false);
        let turned = best(sequences, true);
        let each = plain / f64::from(sequences);
        println!("{sequences:>10} {plain:>14.0} {each:>20.1} {:>24.0}", turned - plain);
    }
}

/// Nanoseconds a turn, the best of several: what the machine does beside only ever adds.
fn best(sequences: u32, turns_over: bool) -> f64 {
    let once = |_| {
        let mut rehearsal = Rehearsal::new(sequences, PROMPT, PROMPT + TURNS + sequences + 8);
        let begun = Instant::now();
        for _ in 0..TURNS {
            if turns_over {
                rehearsal.turn_over();
            }
            black_box(rehearsal.step());
        }
        begun.elapsed() / TURNS
    };
    let least: Option<Duration> = (0..7).map(once).min();
    least.unwrap_or_default().as_nanos() as f64
}
