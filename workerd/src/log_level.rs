//! SIGHUP: the configuration is read again, for its `log.level`; all else is read at the start only. A mistake changes
//! nothing. A worker without a file, or on a terminal, which says so when it is closed, ends as any program does.

use std::io::IsTerminal as _;

use baton_shared::telemetry::LogHandle;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Args;
use crate::config::WorkerConfig;

/// What a SIGHUP came to.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    /// Logs go on as they are.
    Same,
    /// Logs are to have this level.
    Level(String),
}

/// Follows `log.level` of the file that `args` name from now on; `running` is what was read at the start. To be called
/// inside a runtime.
///
/// # Errors
/// If the system lets nobody wait for the signal.
pub fn follow(args: Args, running: WorkerConfig, log: LogHandle) -> std::io::Result<()> {
    if args.config.is_none() || std::io::stderr().is_terminal() {
        return Ok(());
    }
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut running = running;
    tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            let read = args.clone().load(|name| std::env::var(name).ok());
            let read = match read {
                Ok(config) => compare(&running, config),
                Err(error) => {
                    tracing::error!(%error, "configuration refused, the old one stays");
                    continue;
                }
            };
            match read {
                Read::Same => tracing::info!("the log's level stays: nothing differs"),
                Read::Level(level) => match log.set_level(&level) {
                    Ok(()) => {
                        tracing::info!(level, "new log level");
                        running.log.level = level;
                    }
                    Err(error) => tracing::error!(%error, "the log's level stays"),
                },
            }
        }
    });
    Ok(())
}

fn compare(running: &WorkerConfig, mut read: WorkerConfig) -> Read {
    let level = std::mem::replace(&mut read.log.level, running.log.level.clone());
    if read != *running {
        tracing::warn!("all but `log.level` is read at the start only: restart the worker");
    }
    if level == running.log.level { Read::Same } else { Read::Level(level) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_level_is_followed() {
        let running = WorkerConfig::default();
        let mut other = running.clone();
        other.server.max_queue += 1;
        assert_eq!(compare(&running, other.clone()), Read::Same);
        other.log.level = "debug".to_owned();
        assert_eq!(compare(&running, other), Read::Level("debug".to_owned()));
    }
}
