//! What the router counts. Labels come from closed sets; handles are made once, so counting is an atomic addition. What
//! is known of each worker now is written from the table when somebody asks, so the series of a removed worker go with
//! it. Names and help texts are in `rows`.

mod labels;
mod rows;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_shared::metric::{Metric, Registry, escaped};
use baton_shared::process;
use baton_shared::telemetry::BUILD;
use metrics::{Counter, Histogram};
use sha2::{Digest, Sha256};

pub use self::labels::{Endpoint, HopOutcome, ReloadOutcome, RequestOutcome};
pub use self::rows::TABLE;
use crate::config::RouterConfig;
use crate::table::reload::Source;
use crate::table::worker::Worker;
use crate::table::{Phase, RoutingTable};

/// Handles of one router's metrics, and their text form.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    handles: Handles,
    last_reload: LastReload,
}

struct Handles {
    requests: [[Counter; 5]; 2],
    request_seconds: [Histogram; 2],
    first_token_seconds: [Histogram; 2],
    queue_seconds: [Histogram; 2],
    hops: [[Counter; 8]; 2],
    hop_seconds: [Histogram; 2],
    hop_first_seconds: [Histogram; 2],
    retries: [Counter; 2],
    early_stops: Counter,
    local_prefills: Counter,
    releases: Counter,
    orphaned_kv: Counter,
    refused: Counter,
    reloads: [[Counter; 3]; 4],
    upstream: Upstream,
}

/// Names that TensorRT-LLM's orchestrator has for the same quantities (`/prometheus/metrics`).
struct Upstream {
    total: [Counter; 2],
    error: [Counter; 2],
    retry: [Counter; 2],
    completed: [Counter; 2],
    first: [Histogram; 2],
    complete: [Histogram; 2],
    requests: Counter,
    stream: Counter,
    nonstream: Counter,
    responses: Counter,
}

/// How the last reload went, and when one was last accepted, in milliseconds since the epoch.
#[derive(Debug)]
struct LastReload {
    is_good: AtomicBool,
    accepted_ms: AtomicU64,
}

impl std::fmt::Debug for Handles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handles").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero, in a registry of their own.
    pub fn new() -> Self {
        let registry = Registry::new(&TABLE.concat());
        let last_reload =
            LastReload { is_good: AtomicBool::new(true), accepted_ms: AtomicU64::new(now_ms()) };
        Self { handles: Handles::new(&registry), registry, last_reload }
    }

    /// A request for a completion was accepted.
    pub fn request_started(&self) {
        self.handles.upstream.requests.increment(1);
    }

    /// Whether the request wants a stream is known.
    pub fn request_is(&self, stream: bool) {
        let upstream = &self.handles.upstream;
        let counter = if stream { &upstream.stream } else { &upstream.nonstream };
        counter.increment(1);
    }

    /// A request ended; `took` from its head on.
    pub fn request_ended(&self, endpoint: Endpoint, outcome: RequestOutcome, took: Duration) {
        self.handles.requests[endpoint as usize][outcome as usize].increment(1);
        self.handles.request_seconds[endpoint as usize].record(took.as_secs_f64());
        self.handles.upstream.responses.increment(1);
    }

    /// The first byte of an answer's body went to the client, `after` the request's head.
    pub fn first_token(&self, endpoint: Endpoint, after: Duration) {
        self.handles.first_token_seconds[endpoint as usize].record(after.as_secs_f64());
    }

    /// A try waited this long for a worker.
    pub fn queued(&self, phase: Phase, waited: Duration) {
        self.handles.queue_seconds[phase as usize].record(waited.as_secs_f64());
    }

    /// A worker's answer has begun, `after` the exchange.
    pub fn hop_begun(&self, phase: Phase, after: Duration) {
        self.handles.hop_first_seconds[phase as usize].record(after.as_secs_f64());
        self.handles.upstream.first[phase as usize].record(after.as_secs_f64());
    }

    /// An exchange with a worker ended.
    pub fn hop(&self, phase: Phase, outcome: HopOutcome, took: Duration) {
        let (handles, upstream) = (&self.handles, &self.handles.upstream);
        handles.hops[phase as usize][outcome as usize].increment(1);
        upstream.total[phase as usize].increment(1);
        upstream.completed[phase as usize].increment(1);
        match outcome {
            HopOutcome::Ok => {
                handles.hop_seconds[phase as usize].record(took.as_secs_f64());
                upstream.complete[phase as usize].record(took.as_secs_f64());
            }
            HopOutcome::Cancelled => {}
            HopOutcome::Refused
            | HopOutcome::Failed
            | HopOutcome::TimedOut
            | HopOutcome::Busy
            | HopOutcome::Rejected
            | HopOutcome::Handover => upstream.error[phase as usize].increment(1),
        }
    }

    /// The next exchange repeats a failed one.
    pub fn retry(&self, phase: Phase) {
        self.handles.retries[phase as usize].increment(1);
        self.handles.upstream.retry[phase as usize].increment(1);
    }

    /// The text ended with the first token.
    pub fn early_stop(&self) {
        self.handles.early_stops.increment(1);
    }

    /// A short prompt was left to a generation worker.
    pub fn local_prefill(&self) {
        self.handles.local_prefills.increment(1);
    }

    /// A lease was given back.
    pub fn released(&self) {
        self.handles.releases.increment(1);
    }

    /// A lease could not be given back.
    pub fn orphaned_kv(&self) {
        self.handles.orphaned_kv.increment(1);
    }

    /// Somebody wanted another table.
    pub fn reload(&self, source: Source, outcome: ReloadOutcome) {
        self.handles.reloads[source as usize][outcome as usize].increment(1);
        let is_good = outcome != ReloadOutcome::Refused;
        self.last_reload.is_good.store(is_good, Ordering::Relaxed);
        if is_good {
            self.last_reload.accepted_ms.store(now_ms(), Ordering::Relaxed);
        }
    }

    /// A request was refused because too many were in flight.
    pub fn refused(&self) {
        self.handles.refused.increment(1);
    }

    /// Moves samples out of the histograms' buffers; to be called every few seconds.
    pub fn upkeep(&self) {
        self.registry.upkeep();
    }

    /// Prometheus' text form: everything counted, and the workers of `table` as they are at `now`.
    pub fn render(&self, table: &RoutingTable, now: Duration, in_flight: usize) -> String {
        let mut text = self.registry.render();
        let config = &table.config;
        let accepted = self.last_reload.accepted_ms.load(Ordering::Relaxed);
        let is_good = self.last_reload.is_good.load(Ordering::Relaxed);
        for (row, value) in [
            (rows::IN_FLIGHT, in_flight as f64),
            (rows::MAX_IN_FLIGHT, config.limits.max_in_flight as f64),
            (rows::TABLE_VERSION, table.version as f64),
            (rows::CONFIG_HASH, config_hash(config)),
            (rows::RELOAD_GOOD, f64::from(is_good)),
            (rows::RELOAD_TIME, accepted as f64 / 1000.0),
        ] {
            row.write_one(&mut text, value);
        }
        let build = [("version", BUILD.version), ("commit", BUILD.commit.unwrap_or("unknown"))];
        rows::BUILD_INFO.write(&mut text, [(braced(&build), 1.0)]);
        let usable = |phase: Phase| {
            let usable = table.pool(phase).iter();
            let usable = usable.filter(|worker| is_up(worker, now)).count();
            (braced(&[("role", phase.as_str())]), usable as f64)
        };
        rows::USABLE.write(&mut text, Phase::ALL.map(usable));
        write_workers(&mut text, table, now);
        process::write(&mut text);
        text
    }
}

impl Handles {
    fn new(made: &Registry) -> Self {
        let endpoint = |row: &'static Metric| {
            Endpoint::ALL.map(|endpoint| made.histogram(row, &[endpoint.as_str()]))
        };
        let phase =
            |row: &'static Metric| Phase::ALL.map(|phase| made.histogram(row, &[phase.as_str()]));
        Self {
            requests: Endpoint::ALL.map(|endpoint| {
                RequestOutcome::ALL.map(|outcome| {
                    made.counter(&rows::REQUESTS, &[endpoint.as_str(), outcome.as_str()])
                })
            }),
            request_seconds: endpoint(&rows::REQUEST_SECONDS),
            first_token_seconds: endpoint(&rows::FIRST_TOKEN_SECONDS),
            queue_seconds: phase(&rows::QUEUE_SECONDS),
            hops: Phase::ALL.map(|phase| {
                HopOutcome::ALL
                    .map(|outcome| made.counter(&rows::HOPS, &[phase.as_str(), outcome.as_str()]))
            }),
            hop_seconds: phase(&rows::HOP_SECONDS),
            hop_first_seconds: phase(&rows::HOP_FIRST_SECONDS),
            retries: Phase::ALL.map(|phase| made.counter(&rows::RETRIES, &[phase.as_str()])),
            early_stops: made.counter(&rows::EARLY_STOPS, &[]),
            local_prefills: made.counter(&rows::LOCAL_PREFILLS, &[]),
            releases: made.counter(&rows::RELEASES, &[]),
            orphaned_kv: made.counter(&rows::ORPHANED_KV, &[]),
            refused: made.counter(&rows::REFUSED, &[]),
            reloads: Source::ALL.map(|source| {
                ReloadOutcome::ALL.map(|outcome| {
                    made.counter(&rows::RELOADS, &[source.as_str(), outcome.as_str()])
                })
            }),
            upstream: Upstream::new(made),
        }
    }
}

impl Upstream {
    fn new(made: &Registry) -> Self {
        let counters = |rows: [Metric; 2]| rows.map(|row| made.counter(&row, &[]));
        let histograms = |rows: [Metric; 2]| rows.map(|row| made.histogram(&row, &[]));
        Self {
            total: counters(rows::UPSTREAM_TOTAL),
            error: counters(rows::UPSTREAM_ERROR),
            retry: counters(rows::UPSTREAM_RETRY),
            completed: counters(rows::UPSTREAM_COMPLETED),
            first: histograms(rows::UPSTREAM_FIRST),
            complete: histograms(rows::UPSTREAM_COMPLETE),
            requests: made.counter(&rows::UPSTREAM_REQUESTS, &[]),
            stream: made.counter(&rows::UPSTREAM_STREAM, &[]),
            nonstream: made.counter(&rows::UPSTREAM_NONSTREAM, &[]),
            responses: made.counter(&rows::UPSTREAM_RESPONSES, &[]),
        }
    }
}

fn write_workers(text: &mut String, table: &RoutingTable, now: Duration) {
    let labelled: Vec<_> = Phase::ALL
        .into_iter()
        .flat_map(|phase| table.pool(phase).iter().map(move |worker| (phase, worker)))
        .map(|(phase, worker)| {
            let labels = [("worker", worker.id.as_str()), ("role", phase.as_str())];
            (braced(&labels), worker)
        })
        .collect();
    let each = |value: fn(&Worker, Duration) -> f64| {
        labelled.iter().map(move |(labels, worker)| (labels.clone(), value(worker, now)))
    };
    rows::WORKER_UP.write(text, each(|worker, now| f64::from(is_up(worker, now))));
    rows::WORKER_IN_FLIGHT.write(text, each(|worker, _| f64::from(worker.in_flight())));
    rows::WORKER_QUEUED.write(text, each(|worker, _| worker.queued_tokens() as f64));
}

fn is_up(worker: &Worker, now: Duration) -> bool {
    worker.health.condition(now).is_usable() && !worker.is_drained()
}

/// Labels as they stand between the braces.
fn braced(labels: &[(&str, &str)]) -> String {
    let labels = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
    labels.collect::<Vec<_>>().join(",")
}

/// The first 48 bits of its hash: a number that a float holds.
fn config_hash(config: &RouterConfig) -> f64 {
    let text = toml::to_string(config).unwrap_or_default();
    let digest = Sha256::digest(text.as_bytes());
    digest[..6].iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte)) as f64
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RouterConfig, ServerEntry};
    use crate::table::Table;

    fn table() -> Table {
        let mut config = RouterConfig::default();
        config.context.servers = vec![ServerEntry::new("localhost:1".parse().unwrap())];
        config.generation.servers = vec![ServerEntry::new("localhost:2".parse().unwrap())];
        Table::new(config).unwrap()
    }

    #[test]
    fn the_names_checks_rely_on_are_there_before_anything_happened() {
        let (metrics, table) = (Metrics::new(), table());
        let text = metrics.render(&table.snapshot(), table.now(), 3);
        for line in [
            "baton_router_hops_total{role=\"context\",outcome=\"ok\"} 0",
            "baton_router_hops_total{role=\"generation\",outcome=\"cancelled\"} 0",
            "baton_router_orphaned_kv_total 0",
            "baton_router_worker_up{worker=\"localhost:1\",role=\"context\"} 0",
            "baton_router_in_flight 3",
            "baton_router_usable_workers{role=\"generation\"} 0",
            "ctx_total_requests_total 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn each_series_counts_its_own_label() {
        let (metrics, table) = (Metrics::new(), table());
        for (n, outcome) in HopOutcome::ALL.into_iter().enumerate() {
            (0..=n).for_each(|_| metrics.hop(Phase::Generation, outcome, Duration::from_millis(2)));
        }
        metrics.first_token(Endpoint::Chat, Duration::from_millis(2));
        let text = metrics.render(&table.snapshot(), table.now(), 0);
        for (n, outcome) in HopOutcome::ALL.into_iter().enumerate() {
            let outcome = outcome.as_str();
            let line = format!(
                "baton_router_hops_total{{role=\"generation\",outcome=\"{outcome}\"}} {}",
                n + 1
            );
            assert!(text.contains(&line), "{line}");
        }
        let bucket =
            "baton_router_time_to_first_token_seconds_bucket{endpoint=\"chat\",le=\"0.0025\"} 1";
        assert!(text.contains(bucket), "{text}");
    }

    #[test]
    fn every_metric_has_a_help_line() {
        let (metrics, table) = (Metrics::new(), table());
        metrics.request_ended(Endpoint::Chat, RequestOutcome::Ok, Duration::from_millis(2));
        let text = metrics.render(&table.snapshot(), table.now(), 0);
        for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(text.contains(&format!("# HELP {name} ")), "{name}");
        }
    }

    #[test]
    fn a_refused_reload_leaves_the_time_of_the_last_good_one() {
        let (metrics, table) = (Metrics::new(), table());
        let lines = || {
            let text = metrics.render(&table.snapshot(), table.now(), 0);
            let of = |name: &str| {
                let mut lines = text.lines();
                lines
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
                    .unwrap()
                    .to_owned()
            };
            (of(rows::RELOAD_GOOD.name), of(rows::RELOAD_TIME.name))
        };
        let (good, at_start) = lines();
        metrics.reload(Source::File, ReloadOutcome::Refused);
        assert_eq!((good.as_str(), lines()), ("1", ("0".to_owned(), at_start)));
        metrics.reload(Source::Admin, ReloadOutcome::Unchanged);
        assert_eq!(lines().0, "1");
    }

    #[test]
    fn another_configuration_has_another_hash() {
        let mut config = RouterConfig::default();
        let before = config_hash(&config);
        assert_eq!(before, config_hash(&RouterConfig::default()));
        config.routing.attempts += 1;
        assert_ne!(before, config_hash(&config));
    }
}
