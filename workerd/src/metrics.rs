//! Every metric of a worker, with its help text.
//!
//! Counters and gauges of the engine are read from its status when they are asked for; what only an event shows (a
//! latency, how a request ended) is recorded when it happens. Labels come from closed sets.

use std::time::Duration;

use baton_shared::role::Role;
use baton_shared::telemetry::BUILD;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

use crate::backend::cuda::sys::nvml::Usage;
use crate::engine::status::EngineStatus;
use crate::handover::MoverEvent;
use crate::handover::mover::MoverFigures;

const REQUESTS: &str = "baton_worker_requests_total";
const RUNNING: &str = "baton_worker_requests_running";
const WAITING: &str = "baton_worker_requests_waiting";
const PULLING: &str = "baton_worker_requests_pulling";
const BLOCKS: &str = "baton_worker_kv_blocks";
const LEASES: &str = "baton_worker_leases";
const LEASES_ENDED: &str = "baton_worker_leases_ended_total";
const PROMPT_TOKENS: &str = "baton_worker_prompt_tokens_total";
const GENERATED_TOKENS: &str = "baton_worker_generated_tokens_total";
const STEPS: &str = "baton_worker_steps_total";
const PREEMPTIONS: &str = "baton_worker_preemptions_total";
const HANDOVERS: &str = "baton_worker_handovers_total";
const HANDOVER_BYTES: &str = "baton_worker_handover_bytes_total";
const HANDOVER_DESCRIPTORS: &str = "baton_worker_handover_descriptors_total";
const HANDOVER_FAILURES: &str = "baton_worker_handover_failures_total";
const HANDOVER_SECONDS: &str = "baton_worker_handover_seconds";
const FIRST_TOKEN_SECONDS: &str = "baton_worker_time_to_first_token_seconds";
const INTER_TOKEN_SECONDS: &str = "baton_worker_inter_token_seconds";
const HEARTBEAT_SECONDS: &str = "baton_worker_engine_heartbeat_age_seconds";
const HANDOVER_PEERS: &str = "baton_worker_handover_peers_total";
const HANDOVER_REBUILDS: &str = "baton_worker_handover_rebuilds_total";
const TOMBSTONES: &str = "baton_worker_tombstones";
const CACHED: &str = "baton_worker_prefix_cache_blocks";
const EVICTED: &str = "baton_worker_prefix_cache_evictions_total";
const EVENTS_DROPPED: &str = "baton_worker_kv_events_dropped_total";
const GPU_USED: &str = "baton_worker_gpu_memory_used_bytes";
const GPU_TOTAL: &str = "baton_worker_gpu_memory_total_bytes";
const GPU_BUSY: &str = "baton_worker_gpu_utilization_ratio";
const INFO: &str = "baton_worker_info";

const COUNTERS: [(&str, &str); 14] = [
    (
        REQUESTS,
        "Requests that ended, by endpoint, phase and outcome (ok, client_gone, or the error code).",
    ),
    (LEASES_ENDED, "Leases that ended, by how: pulled, released or expired."),
    (
        PROMPT_TOKENS,
        "Prompt tokens by where their keys and values came from: computed, prefix or pulled.",
    ),
    (GENERATED_TOKENS, "Tokens generated."),
    (STEPS, "Engine steps."),
    (PREEMPTIONS, "Sequences whose blocks were taken away, to be computed again."),
    (HANDOVERS, "KV hand-overs fetched from another worker."),
    (HANDOVER_BYTES, "Bytes of keys and values fetched from other workers."),
    (HANDOVER_DESCRIPTORS, "Transfer descriptors posted for them."),
    (HANDOVER_FAILURES, "Hand-overs that failed, by error code."),
    (
        HANDOVER_PEERS,
        "Peers by the transport their blocks come by: shared_memory (copied out of the peer) or network.",
    ),
    (EVICTED, "Blocks of the prefix cache that lost their content to another use."),
    (EVENTS_DROPPED, "Events of the prefix cache that were dropped because nobody asked for them."),
    (HANDOVER_REBUILDS, "Times the moving agent was rebuilt because transfers did not end."),
];

const GAUGES: [(&str, &str); 12] = [
    (RUNNING, "Requests that are being computed."),
    (WAITING, "Requests that wait for blocks or a slot."),
    (PULLING, "Requests whose blocks are being fetched."),
    (BLOCKS, "KV blocks by state."),
    (CACHED, "Blocks that can be found by their tokens, free ones included."),
    (LEASES, "Leases held for a reader."),
    (TOMBSTONES, "Requests remembered because they were released; the oldest are forgotten."),
    (HEARTBEAT_SECONDS, "Time since the engine thread last showed itself."),
    (
        GPU_USED,
        "Memory of the GPU that is used, by all processes; not a number once it cannot be told.",
    ),
    (GPU_TOTAL, "Memory of the GPU."),
    (GPU_BUSY, "Share of the last moments in which the GPU ran a kernel, of any process."),
    (INFO, "Constant 1; the labels say what runs."),
];

const HISTOGRAMS: [(&str, &str, &[f64]); 3] = [
    (HANDOVER_SECONDS, "Time of a hand-over, from the decision to fetch to the last byte.", &SHORT),
    (FIRST_TOKEN_SECONDS, "Time from a request's arrival to its first token.", &LONG),
    (INTER_TOKEN_SECONDS, "Time between two tokens of a request.", &SHORT),
];

const SHORT: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const LONG: [f64; 14] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0];

const METADATA: Metadata<'static> = Metadata::new("baton_worker", Level::INFO, None);

/// Where a worker's metrics are kept; one a worker, so that two in one process do not mix.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handover: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new(role: Role) -> Self {
        let builder =
            HISTOGRAMS.into_iter().fold(PrometheusBuilder::new(), |builder, histogram| {
                let (name, _, buckets) = histogram;
                builder
                    .set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
                    .expect("the buckets are not empty")
            });
        let recorder = builder.build_recorder();
        for (name, help) in COUNTERS {
            recorder.describe_counter(name.into(), None, help.into());
        }
        for (name, help) in GAUGES {
            recorder.describe_gauge(name.into(), None, help.into());
        }
        for (name, help, _) in HISTOGRAMS {
            recorder.describe_histogram(name.into(), None, help.into());
        }
        let histogram = |name| recorder.register_histogram(&Key::from_name(name), &METADATA);
        let metrics = Self {
            handover: histogram(HANDOVER_SECONDS),
            first_token: histogram(FIRST_TOKEN_SECONDS),
            inter_token: histogram(INTER_TOKEN_SECONDS),
            recorder,
        };
        let labels = [("version", BUILD.version), ("role", role.as_str())];
        metrics.gauge(INFO, &labels).set(1.0);
        metrics
    }

    /// A request ended. `outcome` is `ok` or an error code.
    pub fn request_ended(
        &self,
        endpoint: &'static str,
        phase: &'static str,
        outcome: &'static str,
    ) {
        let labels = [("endpoint", endpoint), ("phase", phase), ("outcome", outcome)];
        self.counter(REQUESTS, &labels).increment(1);
    }

    /// A request's first token came this long after the request.
    pub fn first_token(&self, after: Duration) {
        self.first_token.record(after);
    }

    /// A later token came this long after the one before it.
    pub fn next_token(&self, after: Duration) {
        self.inter_token.record(after);
    }

    /// What the mover tells the engine, on its way there.
    pub fn mover_said(&self, event: &MoverEvent) {
        match event {
            MoverEvent::Pulled { elapsed, .. } => self.handover.record(*elapsed),
            MoverEvent::PullFailed { .. }
            | MoverEvent::Settled { .. }
            | MoverEvent::LeaseRead(_)
            | MoverEvent::Lost => {}
        }
    }

    /// What is used of a GPU; `None` where it cannot be told any more.
    pub fn gpu(&self, ordinal: u32, usage: Option<&Usage>) {
        let device = format!("cuda:{ordinal}");
        let set = |name, value: f64| {
            let key = Key::from_parts(name, vec![Label::new("device", device.clone())]);
            self.recorder.register_gauge(&key, &METADATA).set(value);
        };
        set(GPU_USED, usage.map_or(f64::NAN, |usage| usage.used as f64));
        set(GPU_TOTAL, usage.map_or(f64::NAN, |usage| usage.total as f64));
        match usage.map(|usage| usage.busy) {
            Some(Some(busy)) => set(GPU_BUSY, busy),
            // A part of a GPU never had a value.
            Some(None) => {}
            None => set(GPU_BUSY, f64::NAN),
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self, status: &EngineStatus, mover: MoverFigures) -> String {
        self.publish(status);
        self.publish_mover(mover);
        self.recorder.handle().render()
    }

    /// Sorts recorded times into their buckets; without it they pile up until somebody renders.
    pub fn upkeep(&self) {
        self.recorder.handle().run_upkeep();
    }

    fn publish(&self, status: &EngineStatus) {
        let EngineStatus {
            is_alive: _,
            is_draining: _,
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
        for (name, value) in [
            (RUNNING, running),
            (WAITING, waiting),
            (PULLING, pulling),
            (LEASES, leases),
            (TOMBSTONES, tombstones),
        ] {
            self.gauge(name, &[]).set(*value as f64);
        }
        self.gauge(CACHED, &[]).set(f64::from(cache.cached));
        self.gauge(HEARTBEAT_SECONDS, &[]).set(heartbeat_age.as_secs_f64());
        for (state, count) in [
            ("free", blocks.free),
            ("used", blocks.used),
            ("leased", blocks.leased),
            ("in_flight", blocks.in_flight),
            ("quarantined", blocks.quarantined),
        ] {
            self.gauge(BLOCKS, &[("state", state)]).set(f64::from(count));
        }
        for (name, value) in [
            (GENERATED_TOKENS, totals.generated),
            (STEPS, totals.steps),
            (PREEMPTIONS, totals.preemptions),
            (EVICTED, cache.evicted),
            (EVENTS_DROPPED, *events_dropped),
            (HANDOVERS, totals.pulls),
            (HANDOVER_BYTES, totals.pulled_bytes),
            (HANDOVER_DESCRIPTORS, totals.pulled_descriptors),
        ] {
            self.counter(name, &[]).absolute(value);
        }
        for (source, value) in [
            ("computed", totals.prompt_computed),
            ("prefix", totals.prompt_prefix),
            ("pulled", totals.prompt_pulled),
        ] {
            self.counter(PROMPT_TOKENS, &[("source", source)]).absolute(value);
        }
        for (end, value) in [
            ("pulled", totals.leases_ended.pulled),
            ("released", totals.leases_ended.released),
            ("expired", totals.leases_ended.expired),
        ] {
            self.counter(LEASES_ENDED, &[("end", end)]).absolute(value);
        }
        for (code, value) in &totals.pull_failures {
            self.counter(HANDOVER_FAILURES, &[("code", code.code())]).absolute(*value);
        }
    }

    fn publish_mover(&self, figures: MoverFigures) {
        let MoverFigures { rebuilds, peers } = figures;
        self.counter(HANDOVER_REBUILDS, &[]).absolute(rebuilds);
        for (transport, count) in
            [("shared_memory", peers.shared_memory), ("network", peers.network)]
        {
            self.counter(HANDOVER_PEERS, &[("transport", transport)]).absolute(count);
        }
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
    let labels: Vec<Label> =
        labels.iter().map(|(name, value)| Label::from_static_parts(name, value)).collect();
    Key::from_parts(name, labels)
}

#[cfg(test)]
mod tests {
    use baton_shared::wire::error::ErrorCode;

    use super::*;
    use crate::handover::PullId;

    fn line<'a>(text: &'a str, series: &str) -> Option<&'a str> {
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
    }

    #[test]
    fn what_checks_rely_on_is_there_from_the_first_moment() {
        let text =
            Metrics::new(Role::Context).render(&EngineStatus::default(), MoverFigures::default());
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
        let metrics = Metrics::new(Role::Both);
        metrics.request_ended("completions", "whole", "ok");
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
        let metrics = Metrics::new(Role::Generation);
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
}
