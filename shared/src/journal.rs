//! Log lines on standard error. Where that is the journal, each has its priority in front, as `sd-daemon(3)` says: the
//! journal takes it off, so that `journalctl -p warning` works and a JSON line stays one.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Where lines go.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    is_journal: bool,
}

/// One line.
#[derive(Debug)]
pub struct Line {
    priority: Option<u8>,
}

impl Lines {
    /// To standard error.
    pub fn to_stderr() -> Self {
        let stream = std::env::var("JOURNAL_STREAM").ok();
        let own = fs::metadata("/proc/self/fd/2").ok();
        let is_journal = stream.zip(own).is_some_and(|(stream, own)| {
            // Inherited by children too, whose standard error may be another.
            stream == format!("{}:{}", own.dev(), own.ino())
        });
        Self { is_journal }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { priority: None }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        Line { priority: self.is_journal.then(|| priority(*meta.level())) }
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

impl Write for Line {
    /// The subscriber writes a whole line at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        match self.priority {
            None => stderr.write_all(line)?,
            Some(priority) => {
                // One call, so that no other process's line comes in between.
                let prefix = [b'<', b'0' + priority, b'>'];
                stderr.write_all(&[&prefix, line].concat())?;
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_news_have_smaller_numbers() {
        let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG];
        assert_eq!(levels.map(priority), [3, 4, 6, 7]);
    }
}
