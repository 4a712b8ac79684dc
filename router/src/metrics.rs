//! Every metric of the router, with its help text. Labels come from closed sets; handles are made once, so
//! counting is an atomic addition. What is known of each worker now is written from the table when somebody
//! asks, so the series of a removed worker go with it.

use std::fmt::Write as _;
use std::time::Duration;

use metrics::{
    Counter, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::table::reload::Source;
use crate::table::{Phase, RoutingTable};

/// How one exchange with a worker ended: the `outcome` label of `baton_router_hops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopOutcome {
    /// 2xx, to the end.
    Ok,
    /// No connection.
    Refused,
    /// 5xx, reset, nonsense.
    Failed,
    /// No answer in time.
    TimedOut,
    /// It had no room: 429, 503.
    Busy,
    /// A 4xx that went to the client.
    Rejected,
    /// One of the hand-over codes.
    Handover,
    /// The client left.
    Cancelled,
}

impl HopOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::Refused,
        Self::Failed,
        Self::TimedOut,
        Self::Busy,
        Self::Rejected,
        Self::Handover,
        Self::Cancelled,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Busy => "busy",
            Self::Rejected => "rejected",
            Self::Handover => "handover",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Which route a request took: the `endpoint` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Completions, Self::Chat];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

/// How a reload ended: the `outcome` label of `baton_router_reloads_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadOutcome {
    /// There is a new table.
    Applied,
    /// Nothing differed.
    Unchanged,
    /// A mistake, or a key that needs a restart.
    Refused,
}

impl ReloadOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 3] = [Self::Applied, Self::Unchanged, Self::Refused];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

/// How a request ended: the `outcome` label of `baton_router_requests_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// 2xx, to the end.
    Ok,
    /// 4xx.
    ClientError,
    /// 5xx.
    ServerError,
    /// The answer broke off after its head.
    Aborted,
    /// The client left.
    ClientGone,
}

impl RequestOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 5] =
        [Self::Ok, Self::ClientError, Self::ServerError, Self::Aborted, Self::ClientGone];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Aborted => "aborted",
            Self::ClientGone => "client_gone",
        }
    }
}

/// Bounds of latency histograms, in seconds.
const SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 320.0,
];

/// Handles of one router's metrics, and their text form.
pub struct Metrics {
    handle: PrometheusHandle,
    requests: [[Counter; 5]; 2],
    request_seconds: [Histogram; 2],
    first_token_seconds: [Histogram; 2],
    hops: [[Counter; 8]; 2],
    hop_seconds: [Histogram; 2],
    retries: [Counter; 2],
    early_stops: Counter,
    local_prefills: Counter,
    releases: Counter,
    orphaned_kv: Counter,
    refused_load: Counter,
    reloads: [[Counter; 3]; 4],
    upstream: Upstream,
}

/// Names that TensorRT-LLM's orchestrator has for the same quantities (`/prometheus/metrics`).
struct Upstream {
    total: [Counter; 2],
    error: [Counter; 2],
    retry: [Counter; 2],
    completed: [Counter; 2],
    requests: Counter,
    stream: Counter,
    nonstream: Counter,
    responses: Counter,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
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
        let suffix = Matcher::Suffix("_seconds".to_owned());
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(suffix, &SECONDS)
            .expect("the list of bounds is not empty")
            .build_recorder();
        let made = Registry(&recorder);
        Self {
            handle: recorder.handle(),
            requests: Endpoint::ALL.map(|endpoint| {
                RequestOutcome::ALL.map(|outcome| {
                    let labels = [("endpoint", endpoint.as_str()), ("outcome", outcome.as_str())];
                    made.counter("baton_router_requests_total", "Requests that ended.", &labels)
                })
            }),
            request_seconds: Endpoint::ALL.map(|endpoint| {
                let help = "Time from a request's head to the end of its answer.";
                let labels = [("endpoint", endpoint.as_str())];
                made.histogram("baton_router_request_seconds", help, &labels)
            }),
            first_token_seconds: Endpoint::ALL.map(|endpoint| {
                let help = "Time from a request's head to the first byte of its answer's body.";
                let labels = [("endpoint", endpoint.as_str())];
                made.histogram("baton_router_time_to_first_token_seconds", help, &labels)
            }),
            hops: Phase::ALL.map(|phase| {
                HopOutcome::ALL.map(|outcome| {
                    let labels = [("role", phase.as_str()), ("outcome", outcome.as_str())];
                    made.counter("baton_router_hops_total", "Exchanges with workers.", &labels)
                })
            }),
            hop_seconds: Phase::ALL.map(|phase| {
                let help = "Time of an exchange with a worker that went well.";
                made.histogram("baton_router_hop_seconds", help, &[("role", phase.as_str())])
            }),
            retries: Phase::ALL.map(|phase| {
                let help = "Exchanges that repeated a failed one, on whichever worker.";
                made.counter("baton_router_retries_total", help, &[("role", phase.as_str())])
            }),
            early_stops: made.counter(
                "baton_router_early_stops_total",
                "Requests whose text ended with the first token, answered without a generation worker.",
                &[],
            ),
            local_prefills: made.counter(
                "baton_router_local_prefills_total",
                "Requests whose short prompt was left to the generation worker.",
                &[],
            ),
            releases: made.counter(
                "baton_router_releases_total",
                "Leases given back because nobody wants them: released, or read for nobody.",
                &[],
            ),
            orphaned_kv: made.counter(
                "baton_router_orphaned_kv_total",
                "Leases that could not be given back and stay until they expire.",
                &[],
            ),
            refused_load: made.counter(
                "baton_router_refused_total",
                "Requests refused because too many were in flight.",
                &[],
            ),
            reloads: Source::ALL.map(|source| {
                ReloadOutcome::ALL.map(|outcome| {
                    let help = "Times the configuration was read or put again.";
                    let labels = [("source", source.as_str()), ("outcome", outcome.as_str())];
                    made.counter("baton_router_reloads_total", help, &labels)
                })
            }),
            upstream: Upstream::new(&made),
        }
    }

    /// A request for a completion was accepted.
    pub fn request_started(&self) {
        self.upstream.requests.increment(1);
    }

    /// Whether the request wants a stream is known.
    pub fn request_is(&self, stream: bool) {
        let counter = if stream { &self.upstream.stream } else { &self.upstream.nonstream };
        counter.increment(1);
    }

    /// A request ended; `took` from its head on.
    pub fn request_ended(&self, endpoint: Endpoint, outcome: RequestOutcome, took: Duration) {
        self.requests[endpoint as usize][outcome as usize].increment(1);
        self.request_seconds[endpoint as usize].record(took.as_secs_f64());
        self.upstream.responses.increment(1);
    }

    /// The first byte of an answer's body went to the client, `after` the request's head.
    pub fn first_token(&self, endpoint: Endpoint, after: Duration) {
        self.first_token_seconds[endpoint as usize].record(after.as_secs_f64());
    }

    /// An exchange with a worker ended.
    pub fn hop(&self, phase: Phase, outcome: HopOutcome, took: Duration) {
        self.hops[phase as usize][outcome as usize].increment(1);
        self.upstream.total[phase as usize].increment(1);
        self.upstream.completed[phase as usize].increment(1);
        match outcome {
            HopOutcome::Ok => self.hop_seconds[phase as usize].record(took.as_secs_f64()),
            HopOutcome::Cancelled => {}
            HopOutcome::Refused
            | HopOutcome::Failed
            | HopOutcome::TimedOut
            | HopOutcome::Busy
            | HopOutcome::Rejected
            | HopOutcome::Handover => self.upstream.error[phase as usize].increment(1),
        }
    }

    /// The next exchange repeats a failed one.
    pub fn retry(&self, phase: Phase) {
        self.retries[phase as usize].increment(1);
        self.upstream.retry[phase as usize].increment(1);
    }

    /// The text ended with the first token.
    pub fn early_stop(&self) {
        self.early_stops.increment(1);
    }

    /// A short prompt was left to a generation worker.
    pub fn local_prefill(&self) {
        self.local_prefills.increment(1);
    }

    /// A lease was given back.
    pub fn released(&self) {
        self.releases.increment(1);
    }

    /// A lease could not be given back.
    pub fn orphaned_kv(&self) {
        self.orphaned_kv.increment(1);
    }

    /// Somebody wanted another table.
    pub fn reload(&self, source: Source, outcome: ReloadOutcome) {
        self.reloads[source as usize][outcome as usize].increment(1);
    }

    /// A request was refused because too many were in flight.
    pub fn refused(&self) {
        self.refused_load.increment(1);
    }

    /// Moves samples out of the histograms' buffers; to be called every few seconds.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Prometheus' text form: everything counted, and the workers of `table` as they are at `now`.
    pub fn render(&self, table: &RoutingTable, now: Duration, in_flight: usize) -> String {
        let mut text = self.handle.render();
        gauge(&mut text, "baton_router_in_flight", "Requests being served.");
        line(&mut text, "baton_router_in_flight", "", in_flight as u64);
        gauge(&mut text, "baton_router_table_version", "Version of the routing table in use.");
        line(&mut text, "baton_router_table_version", "", table.version);
        let labels: Vec<_> = Phase::ALL
            .into_iter()
            .flat_map(|phase| table.pool(phase).iter().map(move |worker| (phase, worker)))
            .map(|(phase, worker)| {
                // A worker's name has no character that would need escaping.
                (format!("{{worker=\"{}\",role=\"{}\"}}", worker.id, phase.as_str()), worker)
            })
            .collect();
        gauge(&mut text, "baton_router_worker_up", "1 = requests may be sent there.");
        for (labels, worker) in &labels {
            let up = worker.health.condition(now).is_usable() && !worker.is_drained();
            line(&mut text, "baton_router_worker_up", labels, u64::from(up));
        }
        gauge(&mut text, "baton_router_worker_in_flight", "Requests on a worker, of all roles.");
        for (labels, worker) in &labels {
            let value = u64::from(worker.in_flight());
            line(&mut text, "baton_router_worker_in_flight", labels, value);
        }
        gauge(&mut text, "baton_router_worker_queued_tokens", "Prompt tokens of those, estimated.");
        for (labels, worker) in &labels {
            line(&mut text, "baton_router_worker_queued_tokens", labels, worker.queued_tokens());
        }
        text
    }
}

impl Upstream {
    fn new(made: &Registry<'_>) -> Self {
        let prefixes = ["ctx", "gen"];
        let each = |name: &str, help: &'static str| {
            prefixes
                .map(|prefix| made.counter(format!("{prefix}_{name}_requests_total"), help, &[]))
        };
        let one = |name: &'static str, help: &'static str| made.counter(name, help, &[]);
        Self {
            total: each("total", "As TensorRT-LLM counts: requests sent to servers of this role."),
            error: each("error", "As TensorRT-LLM counts: of those, the ones that failed."),
            retry: each("retry", "As TensorRT-LLM counts: of those, the ones that were repeats."),
            completed: each("completed", "As TensorRT-LLM counts: of those, the ones that ended."),
            requests: one("total_requests_total", "As TensorRT-LLM counts: requests of clients."),
            stream: one(
                "stream_requests_total",
                "As TensorRT-LLM counts: of those, with a stream.",
            ),
            nonstream: one(
                "nonstream_requests_total",
                "As TensorRT-LLM counts: of those, without.",
            ),
            responses: one("total_responses_total", "As TensorRT-LLM counts: answers to clients."),
        }
    }
}

/// Makes handles in one recorder, without the process-wide one.
struct Registry<'a>(&'a PrometheusRecorder);

const METADATA: Metadata<'static> =
    Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

impl Registry<'_> {
    fn counter(
        &self,
        name: impl Into<SharedString>,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Counter {
        let name = KeyName::from(name.into());
        self.0.describe_counter(name.clone(), None, help.into());
        self.0.register_counter(&key(name, labels), &METADATA)
    }

    fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &'static str)],
    ) -> Histogram {
        let name = KeyName::from(name);
        self.0.describe_histogram(name.clone(), Some(Unit::Seconds), help.into());
        self.0.register_histogram(&key(name, labels), &METADATA)
    }
}

fn key(name: KeyName, labels: &[(&'static str, &'static str)]) -> Key {
    let labels: Vec<_> = labels.iter().map(|(name, value)| Label::new(*name, *value)).collect();
    Key::from_parts(name, labels)
}

fn gauge(text: &mut String, name: &str, help: &str) {
    write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n").expect("a string takes all");
}

fn line(text: &mut String, name: &str, labels: &str, value: u64) {
    writeln!(text, "{name}{labels} {value}").expect("a string takes all");
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
}
