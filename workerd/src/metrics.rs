//! What a worker counts. Counters and gauges of the engine are read from its status when they are asked for; what only an
//! event shows (a latency, how a request ended) is recorded when it happens. Labels come from closed sets. Names and help
//! texts are in `rows`.

mod rows;

use std::time::Duration;

use baton_shared::metric::{Metric, Registry};
use baton_shared::process;
use baton_shared::role::Role;
use baton_shared::telemetry::BUILD;
use baton_shared::wire::error::ErrorCode;
use metrics::Histogram;

pub use self::rows::TABLE;
use crate::backend::cuda::sys::nvml::Usage;
use crate::engine::iterations::Iteration;
use crate::engine::status::EngineStatus;
use crate::handover::MoverEvent;
use crate::handover::mover::MoverFigures;

/// Where a worker's metrics are kept; one a worker, so that two in one process do not mix.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Of TensorRT-LLM's series: `model_name`.
    model: String,
    times: Times,
}

/// Handles of the histograms that something is recorded in often.
struct Times {
    handover: Histogram,
    /// By phase.
    request: [Histogram; 3],
    inter_token: Histogram,
    step: Twin,
    step_sequences: Histogram,
    queue: Twin,
    prefill: Twin,
    first_token: Twin,
    upstream: Upstream,
}

/// One quantity under our name and TensorRT-LLM's.
struct Twin(Histogram, Histogram);

/// What has TensorRT-LLM's name only, or is told apart in another way.
struct Upstream {
    request: Histogram,
    per_token: Histogram,
    decode: Histogram,
}

/// How the tokens of one answer came.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    /// From the first token to the last.
    pub took: Duration,
    /// Tokens after the first.
    pub later: u32,
}

impl Twin {
    fn record(&self, time: Duration) {
        self.0.record(time);
        self.1.record(time);
    }
}

impl std::fmt::Debug for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Times").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Nothing counted yet; `model` is the name clients use.
    pub fn new(role: Role, model: &str) -> Self {
        let registry = Registry::new(&TABLE.concat());
        let metrics =
            Self { times: Times::new(&registry, model), registry, model: model.to_owned() };
        metrics.set(&rows::INFO, &[role.as_str(), model], 1.0);
        let commit = BUILD.commit.unwrap_or("unknown");
        metrics.set(&rows::BUILD_INFO, &[BUILD.version, commit], 1.0);
        // A series that begins at 1 has no increase that an alert could see.
        let outcomes = ["ok", ErrorCode::QueueFull.code(), ErrorCode::ClientGone.code()];
        for endpoint in rows::ENDPOINTS {
            for (phase, outcome) in
                rows::PHASES.iter().flat_map(|phase| outcomes.map(|one| (phase, one)))
            {
                metrics.count(&rows::REQUESTS, &[endpoint, phase, outcome], 0);
            }
        }
        for code in rows::FAILURES {
            metrics.count(&rows::HANDOVER_FAILURES, &[code.code()], 0);
        }
        metrics.count(&rows::UPSTREAM_SUCCESS, &metrics.upstream(), 0);
        for status in rows::STATUSES {
            metrics.count(&rows::UPSTREAM_ERROR, &[model, rows::ENGINE, status], 0);
        }
        metrics
    }

    /// A request ended, `took` after its arrival.
    pub fn request_ended(
        &self,
        endpoint: &'static str,
        phase: &'static str,
        outcome: Result<(), ErrorCode>,
        took: Duration,
    ) {
        let name = outcome.map_or_else(ErrorCode::code, |()| "ok");
        self.registry.counter(&rows::REQUESTS, &[endpoint, phase, name]).increment(1);
        match outcome {
            Ok(()) => {
                let phase = rows::PHASES.iter().position(|one| *one == phase);
                self.times.request[phase.unwrap_or(0)].record(took);
                self.times.upstream.request.record(took);
                self.registry.counter(&rows::UPSTREAM_SUCCESS, &self.upstream()).increment(1);
            }
            // Nobody saw a status.
            Err(ErrorCode::ClientGone) => {}
            Err(code) => {
                let labels = [&self.model, rows::ENGINE, &code.status().to_string()];
                self.registry.counter(&rows::UPSTREAM_ERROR, &labels).increment(1);
            }
        }
    }

    /// A request was admitted after this long.
    pub fn queued(&self, waited: Duration) {
        self.times.queue.record(waited);
    }

    /// A prompt was computed here: its first token came this long after its admission.
    pub fn prefilled(&self, took: Duration) {
        self.times.prefill.record(took);
    }

    /// A request's first token came this long after the request.
    pub fn first_token(&self, after: Duration) {
        self.times.first_token.record(after);
    }

    /// A later token came this long after the one before it.
    pub fn next_token(&self, after: Duration) {
        self.times.inter_token.record(after);
    }

    /// An answer has all of its tokens.
    pub fn decoded(&self, decoded: Decoded) {
        let Decoded { took, later } = decoded;
        self.times.upstream.decode.record(took);
        if later > 0 {
            self.times.upstream.per_token.record(took / later);
        }
    }

    /// The engine has done a step.
    pub fn step(&self, step: &Iteration) {
        self.times.step.record(step.latency);
        self.times.step_sequences.record(step.contexts + step.generations);
    }

    /// What the mover tells the engine, on its way there.
    pub fn mover_said(&self, event: &MoverEvent) {
        match event {
            MoverEvent::Pulled { elapsed, .. } => self.times.handover.record(*elapsed),
            MoverEvent::PullFailed { .. }
            | MoverEvent::Settled { .. }
            | MoverEvent::LeaseRead(_)
            | MoverEvent::Lost => {}
        }
    }

    /// What is used of a GPU; `None` where it cannot be told any more.
    pub fn gpu(&self, ordinal: u32, usage: Option<&Usage>) {
        let device = format!("cuda:{ordinal}");
        let set = |row, value: f64| self.set(row, &[&device], value);
        set(&rows::GPU_USED, usage.map_or(f64::NAN, |usage| usage.used as f64));
        set(&rows::GPU_TOTAL, usage.map_or(f64::NAN, |usage| usage.total as f64));
        match usage.map(|usage| usage.busy) {
            Some(Some(busy)) => set(&rows::GPU_BUSY, busy),
            // A part of a GPU never had a value.
            Some(None) => {}
            None => set(&rows::GPU_BUSY, f64::NAN),
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self, status: &EngineStatus, mover: MoverFigures) -> String {
        self.publish(status);
        self.publish_upstream(status);
        self.publish_mover(mover);
        let mut text = self.registry.render();
        process::write(&mut text);
        text
    }

    /// Sorts recorded times into their buckets; without it they pile up until somebody renders.
    pub fn upkeep(&self) {
        self.registry.upkeep();
    }

    fn publish(&self, status: &EngineStatus) {
        let EngineStatus {
            is_alive,
            is_draining,
            heartbeat_age,
            running,
            waiting,
            pulling,
            leases,
            tombstones,
            blocks,
            cache,
            events_dropped,
            totals,
        } = status;
        for (row, value) in [
            (rows::RUNNING, *running as f64),
            (rows::WAITING, *waiting as f64),
            (rows::PULLING, *pulling as f64),
            (rows::LEASES, *leases as f64),
            (rows::TOMBSTONES, *tombstones as f64),
            (rows::ACCEPTING, f64::from(*is_alive && !is_draining)),
            (rows::CACHED, f64::from(cache.cached)),
            (rows::HEARTBEAT_SECONDS, heartbeat_age.as_secs_f64()),
        ] {
            self.set(&row, &[], value);
        }
        let counts =
            [blocks.free, blocks.used, blocks.leased, blocks.in_flight, blocks.quarantined];
        for (state, count) in rows::STATES.into_iter().zip(counts) {
            self.set(&rows::BLOCKS, &[state], f64::from(count));
        }
        for (row, value) in [
            (rows::GENERATED_TOKENS, totals.generated),
            (rows::STEPS, totals.steps),
            (rows::PREEMPTIONS, totals.preemptions),
            (rows::EVICTED, cache.evicted),
            (rows::EVENTS_DROPPED, *events_dropped),
            (rows::HANDOVERS, totals.pulls),
            (rows::HANDOVER_BYTES, totals.pulled_bytes),
            (rows::HANDOVER_DESCRIPTORS, totals.pulled_descriptors),
        ] {
            self.count(&row, &[], value);
        }
        let tokens = [totals.prompt_computed, totals.prompt_prefix, totals.prompt_pulled];
        for (source, value) in rows::SOURCES.into_iter().zip(tokens) {
            self.count(&rows::PROMPT_TOKENS, &[source], value);
        }
        let ended = &totals.leases_ended;
        let ended = [ended.pulled, ended.released, ended.expired];
        for (end, value) in rows::ENDS.into_iter().zip(ended) {
            self.count(&rows::LEASES_ENDED, &[end], value);
        }
        for (code, value) in &totals.pull_failures {
            self.count(&rows::HANDOVER_FAILURES, &[code.code()], *value);
        }
    }

    /// The same quantities under TensorRT-LLM's names.
    fn publish_upstream(&self, status: &EngineStatus) {
        let EngineStatus { blocks, totals, running, waiting, .. } = status;
        let labels = self.upstream();
        let prompt = totals.prompt_computed + totals.prompt_prefix + totals.prompt_pulled;
        for (row, value) in [
            (rows::UPSTREAM_PROMPT, prompt),
            (rows::UPSTREAM_CACHED, totals.prompt_prefix),
            (rows::UPSTREAM_GENERATED, totals.generated),
        ] {
            self.count(&row, &labels, value);
        }
        let free = f64::from(blocks.free);
        let busy = [blocks.used, blocks.leased, blocks.in_flight, blocks.quarantined];
        let busy: f64 = busy.into_iter().map(f64::from).sum();
        for (row, value) in [
            (rows::UPSTREAM_RUNNING, *running as f64),
            (rows::UPSTREAM_WAITING, *waiting as f64),
            (rows::UPSTREAM_HIT_RATE, totals.prompt_prefix as f64 / prompt.max(1) as f64),
            (rows::UPSTREAM_UTILIZATION, busy / (free + busy).max(1.0)),
            (rows::UPSTREAM_MAX_BLOCKS, free + busy),
            (rows::UPSTREAM_FREE_BLOCKS, free),
            (rows::UPSTREAM_USED_BLOCKS, busy),
        ] {
            self.set(&row, &labels, value);
        }
    }

    fn publish_mover(&self, figures: MoverFigures) {
        let MoverFigures { rebuilds, peers } = figures;
        self.count(&rows::HANDOVER_REBUILDS, &[], rebuilds);
        for (transport, count) in
            rows::TRANSPORTS.into_iter().zip([peers.shared_memory, peers.network])
        {
            self.count(&rows::HANDOVER_PEERS, &[transport], count);
        }
    }

    /// Labels of TensorRT-LLM's series.
    fn upstream(&self) -> [&str; 2] {
        [&self.model, rows::ENGINE]
    }

    fn count(&self, row: &Metric, labels: &[&str], total: u64) {
        self.registry.counter(row, labels).absolute(total);
    }

    fn set(&self, row: &Metric, labels: &[&str], value: f64) {
        self.registry.gauge(row, labels).set(value);
    }
}

impl Times {
    fn new(registry: &Registry, model: &str) -> Self {
        let own = |row| registry.histogram(row, &[]);
        let upstream = |row| registry.histogram(row, &[model, rows::ENGINE]);
        Self {
            handover: own(&rows::HANDOVER_SECONDS),
            request: rows::PHASES.map(|phase| registry.histogram(&rows::REQUEST_SECONDS, &[phase])),
            inter_token: own(&rows::INTER_TOKEN_SECONDS),
            step: Twin(own(&rows::STEP_SECONDS), upstream(&rows::UPSTREAM_STEP)),
            step_sequences: own(&rows::STEP_SEQUENCES),
            queue: Twin(own(&rows::QUEUE_SECONDS), upstream(&rows::UPSTREAM_QUEUE)),
            prefill: Twin(own(&rows::PREFILL_SECONDS), upstream(&rows::UPSTREAM_PREFILL)),
            first_token: Twin(
                own(&rows::FIRST_TOKEN_SECONDS),
                upstream(&rows::UPSTREAM_FIRST_TOKEN),
            ),
            upstream: Upstream {
                request: upstream(&rows::UPSTREAM_REQUEST),
                per_token: upstream(&rows::UPSTREAM_PER_TOKEN),
                decode: upstream(&rows::UPSTREAM_DECODE),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::PullId;

    fn line<'a>(text: &'a str, series: &str) -> Option<&'a str> {
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
    }

    #[test]
    fn what_checks_rely_on_is_there_from_the_first_moment() {
        let text = Metrics::new(Role::Context, "M")
            .render(&EngineStatus::default(), MoverFigures::default());
        for series in [
            "baton_worker_kv_blocks{state=\"free\"}",
            "baton_worker_kv_blocks{state=\"used\"}",
            "baton_worker_kv_blocks{state=\"leased\"}",
            "baton_worker_kv_blocks{state=\"in_flight\"}",
            "baton_worker_kv_blocks{state=\"quarantined\"}",
            "baton_worker_prompt_tokens_total{source=\"computed\"}",
            "baton_worker_prompt_tokens_total{source=\"prefix\"}",
            "baton_worker_prompt_tokens_total{source=\"pulled\"}",
            "baton_worker_handover_bytes_total",
            "baton_worker_handover_descriptors_total",
            "baton_worker_handover_peers_total{transport=\"shared_memory\"}",
            "baton_worker_handover_peers_total{transport=\"network\"}",
            "baton_worker_handover_rebuilds_total",
            "baton_worker_tombstones",
        ] {
            assert_eq!(line(&text, series), Some("0"), "{series}\n{text}");
        }
        assert_eq!(line(&text, "baton_worker_handover_seconds_count"), Some("0"), "{text}");
    }

    #[test]
    fn every_series_has_a_help_text() {
        let metrics = Metrics::new(Role::Both, "M");
        metrics.request_ended("completions", "whole", Ok(()), Duration::from_millis(2));
        let mut status = EngineStatus::default();
        status.totals.pull_failures.push((ErrorCode::KvLeaseGone, 2));
        let text = metrics.render(&status, MoverFigures::default());
        for kind in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = kind.split(' ').next().unwrap();
            assert!(text.contains(&format!("# HELP {name} ")), "{name}");
        }
        let failures = "baton_worker_handover_failures_total{code=\"kv_lease_gone\"}";
        assert_eq!(line(&text, failures), Some("2"));
    }

    #[test]
    fn counters_follow_the_engine_and_times_are_counted_once() {
        let metrics = Metrics::new(Role::Generation, "M");
        let pulled = MoverEvent::Pulled {
            id: PullId(1),
            bytes: 7,
            descriptors: 1,
            elapsed: Duration::from_millis(3),
        };
        metrics.mover_said(&pulled);
        metrics.first_token(Duration::from_millis(5));
        let mut status = EngineStatus::default();
        for _ in 0..2 {
            status.totals.pulled_bytes += 7;
            let text = metrics.render(&status, MoverFigures::default());
            let bytes = status.totals.pulled_bytes.to_string();
            assert_eq!(line(&text, "baton_worker_handover_bytes_total"), Some(&*bytes));
            assert_eq!(line(&text, "baton_worker_handover_seconds_count"), Some("1"));
            assert_eq!(line(&text, "baton_worker_time_to_first_token_seconds_count"), Some("1"));
        }
    }

    #[test]
    fn every_status_of_an_error_is_a_value_of_its_label() {
        for code in ErrorCode::ALL.into_iter().filter(|code| *code != ErrorCode::ClientGone) {
            assert!(rows::STATUSES.contains(&&*code.status().to_string()), "{code:?}");
        }
    }

    #[test]
    fn the_same_quantity_has_the_same_value_under_both_names() {
        let metrics = Metrics::new(Role::Both, "M");
        metrics.queued(Duration::from_millis(3));
        metrics.decoded(Decoded { took: Duration::from_millis(9), later: 3 });
        metrics.request_ended("chat", "generation", Ok(()), Duration::from_millis(7));
        metrics.request_ended("chat", "whole", Err(ErrorCode::QueueFull), Duration::ZERO);
        let mut status = EngineStatus::default();
        (status.blocks.free, status.blocks.used, status.blocks.leased) = (1, 2, 1);
        (status.totals.prompt_computed, status.totals.prompt_prefix) = (30, 10);
        let text = metrics.render(&status, MoverFigures::default());
        let labels = "model_name=\"M\",engine_type=\"baton\"";
        for (series, value) in [
            ("baton_worker_queue_seconds_sum".to_owned(), "0.003"),
            (format!("trtllm_request_queue_time_seconds_sum{{{labels}}}"), "0.003"),
            (format!("trtllm_time_per_output_token_seconds_sum{{{labels}}}"), "0.003"),
            (format!("trtllm_e2e_request_latency_seconds_sum{{{labels}}}"), "0.007"),
            ("baton_worker_request_seconds_sum{phase=\"generation\"}".to_owned(), "0.007"),
            (format!("trtllm_request_success_total{{{labels}}}"), "1"),
            (format!("trtllm_request_error_total{{{labels},http_code=\"429\"}}"), "1"),
            (format!("trtllm_kv_cache_utilization{{{labels}}}"), "0.75"),
            (format!("trtllm_kv_cache_hit_rate{{{labels}}}"), "0.25"),
        ] {
            assert_eq!(line(&text, &series), Some(value), "{series}\n{text}");
        }
    }
}
