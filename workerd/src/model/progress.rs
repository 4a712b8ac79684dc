//! How far something long has come: a bar on a terminal, lines in the log elsewhere, nothing where it is short.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// What is over before this shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two lines of the log.
const LINES: Duration = Duration::from_secs(5);
const STYLE: &str = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Bytes done of bytes in all.
#[derive(Debug)]
pub struct Progress {
    what: String,
    total: u64,
    done: u64,
    begun: Instant,
    told: Instant,
    is_terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `what` is being done to `total` bytes, `done` of them before.
    pub fn new(what: impl Into<String>, total: u64, done: u64) -> Self {
        let now = Instant::now();
        let is_terminal = std::io::stderr().is_terminal();
        Self { what: what.into(), total, done, begun: now, told: now, is_terminal, bar: None }
    }

    /// `bytes` more are done.
    pub fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.begun.elapsed() < PATIENCE {
            return;
        }
        if self.is_terminal {
            let bar = self.bar.get_or_insert_with(|| bar(&self.what, self.total));
            bar.set_position(self.done);
        } else if self.told.elapsed() >= LINES {
            self.told = Instant::now();
            let percent = self.done.saturating_mul(100) / self.total.max(1);
            tracing::info!(
                what = self.what,
                percent,
                bytes = self.done,
                of = self.total,
                "progress"
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, total: u64) -> ProgressBar {
    // The template is a constant; without it the default style is as good.
    let style =
        ProgressStyle::with_template(STYLE).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style).with_message(what.to_owned())
}
