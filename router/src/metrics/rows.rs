//! Every metric of the router. A row that is not in [`TABLE`] cannot be documented, so all are.

use baton_shared::metric::bounds::{FIRST_TOKEN, REQUEST, SHORT};
use baton_shared::metric::{Label, Metric, Values};
use baton_shared::process;

use super::{Endpoint, HopOutcome, ReloadOutcome, RequestOutcome};
use crate::table::Phase;
use crate::table::reload::Source;

const ENDPOINT: Label =
    Label { name: "endpoint", values: Values::Of(|| Endpoint::ALL.map(Endpoint::as_str).to_vec()) };
const ROLE: Label =
    Label { name: "role", values: Values::Of(|| Phase::ALL.map(Phase::as_str).to_vec()) };
const REQUEST_OUTCOME: Label = Label {
    name: "outcome",
    values: Values::Of(|| RequestOutcome::ALL.map(RequestOutcome::as_str).to_vec()),
};
const HOP_OUTCOME: Label = Label {
    name: "outcome",
    values: Values::Of(|| HopOutcome::ALL.map(HopOutcome::as_str).to_vec()),
};
const RELOAD_OUTCOME: Label = Label {
    name: "outcome",
    values: Values::Of(|| ReloadOutcome::ALL.map(ReloadOutcome::as_str).to_vec()),
};
const SOURCE: Label =
    Label { name: "source", values: Values::Of(|| Source::ALL.map(Source::as_str).to_vec()) };
const WORKER: Label =
    Label { name: "worker", values: Values::Configured("the server's `name`, else its url") };
const VERSION: Label = Label { name: "version", values: Values::Configured("of the build") };
const COMMIT: Label =
    Label { name: "commit", values: Values::Configured("of the build, or `unknown`") };

pub(super) const REQUESTS: Metric =
    Metric::counter("baton_router_requests_total", "Requests for completions that ended.")
        .by(&[ENDPOINT, REQUEST_OUTCOME]);
pub(super) const REQUEST_SECONDS: Metric = Metric::histogram(
    "baton_router_request_seconds",
    &REQUEST,
    "Time from a request's head to the end of its answer.",
)
.by(&[ENDPOINT]);
pub(super) const FIRST_TOKEN_SECONDS: Metric = Metric::histogram(
    "baton_router_time_to_first_token_seconds",
    &FIRST_TOKEN,
    "Time from a request's head to the first byte of its answer's body, of answers that went well.",
)
.by(&[ENDPOINT]);
pub(super) const QUEUE_SECONDS: Metric = Metric::histogram(
    "baton_router_queue_seconds",
    &SHORT,
    "Time a try waited for a usable worker with room.",
)
.by(&[ROLE]);
pub(super) const HOPS: Metric =
    Metric::counter("baton_router_hops_total", "Exchanges with workers that ended.")
        .by(&[ROLE, HOP_OUTCOME]);
pub(super) const HOP_SECONDS: Metric = Metric::histogram(
    "baton_router_hop_seconds",
    &REQUEST,
    "Time of an exchange with a worker that went well.",
)
.by(&[ROLE]);
pub(super) const HOP_FIRST_SECONDS: Metric = Metric::histogram(
    "baton_router_hop_first_byte_seconds",
    &FIRST_TOKEN,
    "Time from a try's begin to a worker's whole answer or first event.",
)
.by(&[ROLE]);
pub(super) const RETRIES: Metric = Metric::counter(
    "baton_router_retries_total",
    "Exchanges that repeated a failed one, on whichever worker.",
)
.by(&[ROLE]);
pub(super) const EARLY_STOPS: Metric = Metric::counter(
    "baton_router_early_stops_total",
    "Requests whose text ended with the first token, answered without a generation worker.",
);
pub(super) const LOCAL_PREFILLS: Metric = Metric::counter(
    "baton_router_local_prefills_total",
    "Requests whose short prompt was left to the generation worker.",
);
pub(super) const RELEASES: Metric = Metric::counter(
    "baton_router_releases_total",
    "Leases given back because nobody wants them: released, or read for nobody.",
);
pub(super) const ORPHANED_KV: Metric = Metric::counter(
    "baton_router_orphaned_kv_total",
    "Leases that could not be given back and stay until they expire.",
);
pub(super) const REFUSED: Metric = Metric::counter(
    "baton_router_refused_total",
    "Requests refused because too many were in flight (`limits.max_in_flight`).",
);
pub(super) const RELOADS: Metric =
    Metric::counter("baton_router_reloads_total", "Times the configuration was read or put again.")
        .by(&[SOURCE, RELOAD_OUTCOME]);
pub(super) const IN_FLIGHT: Metric =
    Metric::gauge("baton_router_in_flight", "Requests for completions being served.");
pub(super) const MAX_IN_FLIGHT: Metric =
    Metric::gauge("baton_router_max_in_flight", "`limits.max_in_flight` of the table in use.");
pub(super) const TABLE_VERSION: Metric = Metric::gauge(
    "baton_router_table_version",
    "Version of the routing table in use, counted from 1 at the start.",
);
pub(super) const CONFIG_HASH: Metric = Metric::gauge(
    "baton_router_config_hash",
    "The first 48 bits of the SHA-256 hash of the configuration in use: equal where routers agree.",
);
pub(super) const RELOAD_GOOD: Metric = Metric::gauge(
    "baton_router_config_last_reload_successful",
    "1 = the last configuration that was read or put was accepted.",
);
pub(super) const RELOAD_TIME: Metric = Metric::gauge(
    "baton_router_config_last_reload_success_timestamp_seconds",
    "When a configuration was last accepted.",
);
pub(super) const USABLE: Metric =
    Metric::gauge("baton_router_usable_workers", "Workers that requests may be sent to.")
        .by(&[ROLE]);
pub(super) const WORKER_UP: Metric =
    Metric::gauge("baton_router_worker_up", "1 = requests may be sent there.").by(&[WORKER, ROLE]);
pub(super) const WORKER_IN_FLIGHT: Metric =
    Metric::gauge("baton_router_worker_in_flight", "Requests on a worker, of all roles.")
        .by(&[WORKER, ROLE]);
pub(super) const WORKER_QUEUED: Metric =
    Metric::gauge("baton_router_worker_queued_tokens", "Prompt tokens of those, estimated.")
        .by(&[WORKER, ROLE]);
pub(super) const BUILD_INFO: Metric =
    Metric::gauge("baton_router_build_info", "Constant 1; the labels say what runs.")
        .by(&[VERSION, COMMIT]);

pub(super) const UPSTREAM_TOTAL: [Metric; 2] = [
    Metric::counter(
        "ctx_total_requests_total",
        "TensorRT-LLM's name: exchanges with context servers.",
    ),
    Metric::counter(
        "gen_total_requests_total",
        "TensorRT-LLM's name: exchanges with generation servers.",
    ),
];
pub(super) const UPSTREAM_ERROR: [Metric; 2] = [
    Metric::counter(
        "ctx_error_requests_total",
        "TensorRT-LLM's name: of those, the ones that failed.",
    ),
    Metric::counter(
        "gen_error_requests_total",
        "TensorRT-LLM's name: of those, the ones that failed.",
    ),
];
pub(super) const UPSTREAM_RETRY: [Metric; 2] = [
    Metric::counter(
        "ctx_retry_requests_total",
        "TensorRT-LLM's name: of those, the ones that were repeats.",
    ),
    Metric::counter(
        "gen_retry_requests_total",
        "TensorRT-LLM's name: of those, the ones that were repeats.",
    ),
];
pub(super) const UPSTREAM_COMPLETED: [Metric; 2] = [
    Metric::counter(
        "ctx_completed_requests_total",
        "TensorRT-LLM's name: of those, the ones that ended, however.",
    ),
    Metric::counter(
        "gen_completed_requests_total",
        "TensorRT-LLM's name: of those, the ones that ended, however.",
    ),
];
pub(super) const UPSTREAM_FIRST: [Metric; 2] = [
    Metric::histogram(
        "ctx_first_token_latency_seconds",
        &FIRST_TOKEN,
        "TensorRT-LLM's name: baton_router_hop_first_byte_seconds of context.",
    ),
    Metric::histogram(
        "gen_first_token_latency_seconds",
        &FIRST_TOKEN,
        "TensorRT-LLM's name: baton_router_hop_first_byte_seconds of generation.",
    ),
];
pub(super) const UPSTREAM_COMPLETE: [Metric; 2] = [
    Metric::histogram(
        "ctx_complete_latency_seconds",
        &REQUEST,
        "TensorRT-LLM's name: baton_router_hop_seconds of context.",
    ),
    Metric::histogram(
        "gen_complete_latency_seconds",
        &REQUEST,
        "TensorRT-LLM's name: baton_router_hop_seconds of generation.",
    ),
];
pub(super) const UPSTREAM_REQUESTS: Metric =
    Metric::counter("total_requests_total", "TensorRT-LLM's name: requests of clients.");
pub(super) const UPSTREAM_STREAM: Metric =
    Metric::counter("stream_requests_total", "TensorRT-LLM's name: of those, with a stream.");
pub(super) const UPSTREAM_NONSTREAM: Metric =
    Metric::counter("nonstream_requests_total", "TensorRT-LLM's name: of those, without.");
pub(super) const UPSTREAM_RESPONSES: Metric =
    Metric::counter("total_responses_total", "TensorRT-LLM's name: answers to clients.");

/// All of them, in the order of the reference; those of the process too.
pub const TABLE: [&[Metric]; 4] = [
    &[
        REQUESTS,
        REQUEST_SECONDS,
        FIRST_TOKEN_SECONDS,
        IN_FLIGHT,
        MAX_IN_FLIGHT,
        REFUSED,
        QUEUE_SECONDS,
        HOPS,
        HOP_SECONDS,
        HOP_FIRST_SECONDS,
        RETRIES,
        EARLY_STOPS,
        LOCAL_PREFILLS,
        RELEASES,
        ORPHANED_KV,
        USABLE,
        WORKER_UP,
        WORKER_IN_FLIGHT,
        WORKER_QUEUED,
        TABLE_VERSION,
        CONFIG_HASH,
        RELOADS,
        RELOAD_GOOD,
        RELOAD_TIME,
        BUILD_INFO,
    ],
    &process::TABLE,
    &[UPSTREAM_REQUESTS, UPSTREAM_STREAM, UPSTREAM_NONSTREAM, UPSTREAM_RESPONSES],
    &[
        UPSTREAM_TOTAL[0],
        UPSTREAM_TOTAL[1],
        UPSTREAM_ERROR[0],
        UPSTREAM_ERROR[1],
        UPSTREAM_RETRY[0],
        UPSTREAM_RETRY[1],
        UPSTREAM_COMPLETED[0],
        UPSTREAM_COMPLETED[1],
        UPSTREAM_FIRST[0],
        UPSTREAM_FIRST[1],
        UPSTREAM_COMPLETE[0],
        UPSTREAM_COMPLETE[1],
    ],
];
