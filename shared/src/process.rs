//! What the system knows of this process, by the names that every Prometheus client library gives it.
//!
//! Read when somebody asks. (The crate `metrics-process` rounds the CPU time to whole seconds or makes it a gauge, and
//! writes to a process-wide recorder.)

use std::fs;
use std::time::{Duration, UNIX_EPOCH};

use crate::metric::Metric;
use crate::os;

const CPU: Metric = Metric::counter(
    "process_cpu_seconds_total",
    "CPU time that the process has used, in user and system mode.",
);
const RESIDENT: Metric =
    Metric::gauge("process_resident_memory_bytes", "Memory of the process that is in RAM.");
const VIRTUAL: Metric =
    Metric::gauge("process_virtual_memory_bytes", "Memory that the process has mapped.");
const OPEN_FILES: Metric = Metric::gauge("process_open_fds", "File descriptors that are open.");
const MAX_FILES: Metric =
    Metric::gauge("process_max_fds", "File descriptors that may be open (`LimitNOFILE=`).");
const START: Metric = Metric::gauge("process_start_time_seconds", "When the process was started.");

/// All rows.
pub const TABLE: [Metric; 6] = [CPU, RESIDENT, VIRTUAL, OPEN_FILES, MAX_FILES, START];

/// Writes all of them; what the system does not tell is left out.
pub fn write(text: &mut String) {
    CPU.write_one(text, os::cpu_time().as_secs_f64());
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let values = [
        (RESIDENT, kilobytes(&status, "VmRSS:")),
        (VIRTUAL, kilobytes(&status, "VmSize:")),
        (OPEN_FILES, fs::read_dir("/proc/self/fd").ok().map(|all| all.count() as f64)),
        (MAX_FILES, max_files(&fs::read_to_string("/proc/self/limits").unwrap_or_default())),
        (START, start().map(|since| since.as_secs_f64())),
    ];
    for (row, value) in values {
        if let Some(value) = value {
            row.write_one(text, value);
        }
    }
}

fn kilobytes(status: &str, key: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix(" kB")?.parse::<f64>().ok().map(|kilobytes| kilobytes * 1024.0)
}

/// The soft limit.
fn max_files(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Since the epoch.
fn start() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let ticks = start_ticks(&stat)? as f64;
    let boot = os::boot_time()?.duration_since(UNIX_EPOCH).ok()?;
    Some(boot + Duration::from_secs_f64(ticks / os::clock_ticks()))
}

/// Field 22 of `proc_pid_stat(5)`. The program's name, field 2, may hold spaces and brackets.
fn start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn every_row_has_a_value_on_linux_and_it_is_a_sane_one() {
        let mut text = String::new();
        write(&mut text);
        let value = |row: Metric| {
            let line = text.lines().find_map(|line| line.strip_prefix(row.name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{} is not in\n{text}", row.name)).parse::<f64>().unwrap()
        };
        assert!(TABLE.map(value).into_iter().all(|value| value > 0.0), "{text}");
        assert!(value(RESIDENT) < value(VIRTUAL));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value(START);
        assert!((-2.0..86_400.0).contains(&age), "started {age} s ago");
    }

    #[test]
    fn a_programs_name_may_hold_anything() {
        let rest = (3..=30).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_ticks(&format!("1 (a) b (c)) {rest}")), Some(22));
    }
}
