//! Every metric of a worker. A row that is not in [`TABLE`] cannot be documented, so all are.

use baton_shared::metric::bounds::{FIRST_TOKEN, INTER_TOKEN, REQUEST, SEQUENCES, SHORT};
use baton_shared::metric::{Label, Metric, Values};
use baton_shared::process;
use baton_shared::role::Role;
use baton_shared::wire::error::ErrorCode;

/// Parts of a request: all of it, or one of the two passes it is split into.
pub(super) const PHASES: [&str; 3] = ["whole", "context", "generation"];
/// Endpoints for completions.
pub(super) const ENDPOINTS: [&str; 2] = ["completions", "chat"];
/// States of a KV block.
pub(super) const STATES: [&str; 5] = ["free", "used", "leased", "in_flight", "quarantined"];
/// Where keys and values of a prompt came from.
pub(super) const SOURCES: [&str; 3] = ["computed", "prefix", "pulled"];
/// How a lease ended.
pub(super) const ENDS: [&str; 3] = ["pulled", "released", "expired"];
/// How a peer's blocks come.
pub(super) const TRANSPORTS: [&str; 2] = ["shared_memory", "network"];
/// How fetching blocks fails; a record that does not fit is refused before.
pub(super) const FAILURES: [ErrorCode; 4] = [
    ErrorCode::KvLeaseGone,
    ErrorCode::KvPeerUnreachable,
    ErrorCode::KvTransferTimeout,
    ErrorCode::Internal,
];
/// Statuses of answers that are no success.
pub(super) const STATUSES: [&str; 13] =
    ["400", "401", "404", "405", "408", "409", "413", "415", "429", "500", "502", "503", "504"];
/// `engine_type` of TensorRT-LLM's metrics.
pub(super) const ENGINE: &str = "baton";

const ENDPOINT: Label = Label { name: "endpoint", values: Values::Of(|| ENDPOINTS.to_vec()) };
const PHASE: Label = Label { name: "phase", values: Values::Of(|| PHASES.to_vec()) };
const OUTCOME: Label = Label {
    name: "outcome",
    values: Values::Of(|| {
        let codes = ErrorCode::ALL.into_iter().map(ErrorCode::code);
        std::iter::once("ok").chain(codes).collect()
    }),
};
const STATE: Label = Label { name: "state", values: Values::Of(|| STATES.to_vec()) };
const SOURCE: Label = Label { name: "source", values: Values::Of(|| SOURCES.to_vec()) };
const END: Label = Label { name: "end", values: Values::Of(|| ENDS.to_vec()) };
const TRANSPORT: Label = Label { name: "transport", values: Values::Of(|| TRANSPORTS.to_vec()) };
const CODE: Label =
    Label { name: "code", values: Values::Of(|| FAILURES.map(ErrorCode::code).to_vec()) };
const DEVICE: Label = Label { name: "device", values: Values::Configured("`cuda:N`") };
const ROLE: Label = Label {
    name: "role",
    values: Values::Of(|| [Role::Context, Role::Generation, Role::Both].map(Role::as_str).to_vec()),
};
const MODEL: Label =
    Label { name: "model", values: Values::Configured("the first of `served_model_names`") };
const VERSION: Label = Label { name: "version", values: Values::Configured("of the build") };
const COMMIT: Label =
    Label { name: "commit", values: Values::Configured("of the build, or `unknown`") };
const MODEL_NAME: Label =
    Label { name: "model_name", values: Values::Configured("the first of `served_model_names`") };
const ENGINE_TYPE: Label = Label { name: "engine_type", values: Values::Of(|| vec![ENGINE]) };
const HTTP_CODE: Label = Label { name: "http_code", values: Values::Of(|| STATUSES.to_vec()) };

pub(super) const REQUESTS: Metric = Metric::counter(
    "baton_worker_requests_total",
    "Requests that ended, by how: ok, client_gone, or the error code.",
)
.by(&[ENDPOINT, PHASE, OUTCOME]);
pub(super) const REQUEST_SECONDS: Metric = Metric::histogram(
    "baton_worker_request_seconds",
    &REQUEST,
    "Time from a request's arrival to the end of its answer, of answers that went well.",
)
.by(&[PHASE]);
pub(super) const QUEUE_SECONDS: Metric = Metric::histogram(
    "baton_worker_queue_seconds",
    &SHORT,
    "Time a request waited for blocks and a slot.",
);
pub(super) const PREFILL_SECONDS: Metric = Metric::histogram(
    "baton_worker_prefill_seconds",
    &FIRST_TOKEN,
    "Time from a request's admission to its first token, where this worker computed the prompt.",
);
pub(super) const FIRST_TOKEN_SECONDS: Metric = Metric::histogram(
    "baton_worker_time_to_first_token_seconds",
    &FIRST_TOKEN,
    "Time from a request's arrival to its first token.",
);
pub(super) const INTER_TOKEN_SECONDS: Metric = Metric::histogram(
    "baton_worker_inter_token_seconds",
    &INTER_TOKEN,
    "Time between two tokens of a request.",
);
pub(super) const RUNNING: Metric =
    Metric::gauge("baton_worker_requests_running", "Requests that are being computed.");
pub(super) const WAITING: Metric =
    Metric::gauge("baton_worker_requests_waiting", "Requests that wait for blocks or a slot.");
pub(super) const PULLING: Metric =
    Metric::gauge("baton_worker_requests_pulling", "Requests whose blocks are being fetched.");
pub(super) const ACCEPTING: Metric = Metric::gauge(
    "baton_worker_accepting",
    "1 = new requests are taken; 0 = the worker is stopping, or its engine has ended.",
);
pub(super) const HEARTBEAT_SECONDS: Metric = Metric::gauge(
    "baton_worker_engine_heartbeat_age_seconds",
    "Time since the engine thread last showed itself; once a second while idle, once a step otherwise.",
);
pub(super) const STEPS: Metric = Metric::counter("baton_worker_steps_total", "Engine steps.");
pub(super) const STEP_SECONDS: Metric = Metric::histogram(
    "baton_worker_step_seconds",
    &SHORT,
    "Time of an engine step, from its plan to its tokens.",
);
pub(super) const STEP_SEQUENCES: Metric = Metric::histogram(
    "baton_worker_step_sequences",
    &SEQUENCES,
    "Sequences that a step computed together: the batch size.",
);
pub(super) const PREEMPTIONS: Metric = Metric::counter(
    "baton_worker_preemptions_total",
    "Sequences whose blocks were taken away, to be computed again.",
);
pub(super) const PROMPT_TOKENS: Metric = Metric::counter(
    "baton_worker_prompt_tokens_total",
    "Prompt tokens by where their keys and values came from.",
)
.by(&[SOURCE]);
pub(super) const GENERATED_TOKENS: Metric =
    Metric::counter("baton_worker_generated_tokens_total", "Tokens generated.");
pub(super) const BLOCKS: Metric =
    Metric::gauge("baton_worker_kv_blocks", "KV blocks by state; together, all there are.")
        .by(&[STATE]);
pub(super) const CACHED: Metric = Metric::gauge(
    "baton_worker_prefix_cache_blocks",
    "Blocks that can be found by their tokens, free ones included.",
);
pub(super) const EVICTED: Metric = Metric::counter(
    "baton_worker_prefix_cache_evictions_total",
    "Blocks of the prefix cache that lost their content to another use.",
);
pub(super) const EVENTS_DROPPED: Metric = Metric::counter(
    "baton_worker_kv_events_dropped_total",
    "Events of the prefix cache that were dropped because nobody asked for them.",
);
pub(super) const LEASES: Metric = Metric::gauge("baton_worker_leases", "Leases held for a reader.");
pub(super) const LEASES_ENDED: Metric = Metric::counter(
    "baton_worker_leases_ended_total",
    "Leases that ended, by how; an expired one was fetched by nobody.",
)
.by(&[END]);
pub(super) const TOMBSTONES: Metric = Metric::gauge(
    "baton_worker_tombstones",
    "Requests remembered because they were released; the oldest are forgotten.",
);
pub(super) const HANDOVERS: Metric =
    Metric::counter("baton_worker_handovers_total", "KV hand-overs fetched from another worker.");
pub(super) const HANDOVER_SECONDS: Metric = Metric::histogram(
    "baton_worker_handover_seconds",
    &SHORT,
    "Time of a hand-over, from the decision to fetch to the last byte.",
);
pub(super) const HANDOVER_BYTES: Metric = Metric::counter(
    "baton_worker_handover_bytes_total",
    "Keys and values fetched from other workers.",
);
pub(super) const HANDOVER_DESCRIPTORS: Metric = Metric::counter(
    "baton_worker_handover_descriptors_total",
    "Transfer descriptors posted for them.",
);
pub(super) const HANDOVER_FAILURES: Metric = Metric::counter(
    "baton_worker_handover_failures_total",
    "Hand-overs that failed while their client was there, by error code.",
)
.by(&[CODE]);
pub(super) const HANDOVER_PEERS: Metric = Metric::counter(
    "baton_worker_handover_peers_total",
    "Peers by how their blocks come: copied out of the peer's memory, or over the network.",
)
.by(&[TRANSPORT]);
pub(super) const HANDOVER_REBUILDS: Metric = Metric::counter(
    "baton_worker_handover_rebuilds_total",
    "Times the moving agent was rebuilt because transfers did not end.",
);
const ON_GPU: &str = "on a GPU";
pub(super) const GPU_USED: Metric = Metric::gauge(
    "baton_worker_gpu_memory_used_bytes",
    "Memory of the GPU that is used, by all processes; NaN once it cannot be told.",
)
.by(&[DEVICE])
.only(ON_GPU);
pub(super) const GPU_TOTAL: Metric =
    Metric::gauge("baton_worker_gpu_memory_total_bytes", "Memory of the GPU.")
        .by(&[DEVICE])
        .only(ON_GPU);
pub(super) const GPU_BUSY: Metric = Metric::gauge(
    "baton_worker_gpu_utilization_ratio",
    "Share of the last moments in which the GPU ran a kernel, of any process.",
)
.by(&[DEVICE])
.only("on a whole GPU");
pub(super) const INFO: Metric =
    Metric::gauge("baton_worker_info", "Constant 1; the labels say what is served.")
        .by(&[ROLE, MODEL]);
pub(super) const BUILD_INFO: Metric =
    Metric::gauge("baton_worker_build_info", "Constant 1; the labels say what runs.")
        .by(&[VERSION, COMMIT]);

const UPSTREAM: &[Label] = &[MODEL_NAME, ENGINE_TYPE];
pub(super) const UPSTREAM_SUCCESS: Metric = Metric::counter(
    "trtllm_request_success_total",
    "TensorRT-LLM's name: requests that went well.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_ERROR: Metric = Metric::counter(
    "trtllm_request_error_total",
    "TensorRT-LLM's name: requests that failed, by HTTP status.",
)
.by(&[MODEL_NAME, ENGINE_TYPE, HTTP_CODE]);
pub(super) const UPSTREAM_REQUEST: Metric = Metric::histogram(
    "trtllm_e2e_request_latency_seconds",
    &REQUEST,
    "TensorRT-LLM's name: baton_worker_request_seconds of all phases.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_FIRST_TOKEN: Metric = Metric::histogram(
    "trtllm_time_to_first_token_seconds",
    &FIRST_TOKEN,
    "TensorRT-LLM's name: baton_worker_time_to_first_token_seconds.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_PER_TOKEN: Metric = Metric::histogram(
    "trtllm_time_per_output_token_seconds",
    &INTER_TOKEN,
    "TensorRT-LLM's name: mean time between two tokens, once a request.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_QUEUE: Metric = Metric::histogram(
    "trtllm_request_queue_time_seconds",
    &SHORT,
    "TensorRT-LLM's name: baton_worker_queue_seconds.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_PREFILL: Metric = Metric::histogram(
    "trtllm_request_prefill_time_seconds",
    &FIRST_TOKEN,
    "TensorRT-LLM's name: baton_worker_prefill_seconds.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_DECODE: Metric = Metric::histogram(
    "trtllm_request_decode_time_seconds",
    &REQUEST,
    "TensorRT-LLM's name: time from a request's first token to its last.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_STEP: Metric = Metric::histogram(
    "trtllm_iteration_latency_seconds",
    &SHORT,
    "TensorRT-LLM's name: baton_worker_step_seconds.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_PROMPT: Metric = Metric::counter(
    "trtllm_prompt_tokens_total",
    "TensorRT-LLM's name: prompt tokens, wherever their keys and values came from.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_CACHED: Metric = Metric::counter(
    "trtllm_prompt_cached_tokens_total",
    "TensorRT-LLM's name: of those, the ones that the prefix cache had.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_GENERATED: Metric = Metric::counter(
    "trtllm_generation_tokens_total",
    "TensorRT-LLM's name: baton_worker_generated_tokens_total.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_RUNNING: Metric = Metric::gauge(
    "trtllm_num_requests_running",
    "TensorRT-LLM's name: baton_worker_requests_running.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_WAITING: Metric = Metric::gauge(
    "trtllm_num_requests_waiting",
    "TensorRT-LLM's name: baton_worker_requests_waiting.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_HIT_RATE: Metric = Metric::gauge(
    "trtllm_kv_cache_hit_rate",
    "TensorRT-LLM's name: share of prompt tokens that the prefix cache had, since the start.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_UTILIZATION: Metric = Metric::gauge(
    "trtllm_kv_cache_utilization",
    "TensorRT-LLM's name: share of the KV blocks that are not free.",
)
.by(UPSTREAM);
pub(super) const UPSTREAM_MAX_BLOCKS: Metric =
    Metric::gauge("trtllm_kv_cache_max_blocks", "TensorRT-LLM's name: all KV blocks.").by(UPSTREAM);
pub(super) const UPSTREAM_FREE_BLOCKS: Metric =
    Metric::gauge("trtllm_kv_cache_free_blocks", "TensorRT-LLM's name: of those, the free ones.")
        .by(UPSTREAM);
pub(super) const UPSTREAM_USED_BLOCKS: Metric =
    Metric::gauge("trtllm_kv_cache_used_blocks", "TensorRT-LLM's name: of those, the others.")
        .by(UPSTREAM);

/// All of them, in the order of the reference; those of the process too.
pub const TABLE: [&[Metric]; 3] = [
    &[
        REQUESTS,
        REQUEST_SECONDS,
        QUEUE_SECONDS,
        PREFILL_SECONDS,
        FIRST_TOKEN_SECONDS,
        INTER_TOKEN_SECONDS,
        RUNNING,
        WAITING,
        PULLING,
        ACCEPTING,
        HEARTBEAT_SECONDS,
        STEPS,
        STEP_SECONDS,
        STEP_SEQUENCES,
        PREEMPTIONS,
        PROMPT_TOKENS,
        GENERATED_TOKENS,
        BLOCKS,
        CACHED,
        EVICTED,
        EVENTS_DROPPED,
        LEASES,
        LEASES_ENDED,
        TOMBSTONES,
        HANDOVERS,
        HANDOVER_SECONDS,
        HANDOVER_BYTES,
        HANDOVER_DESCRIPTORS,
        HANDOVER_FAILURES,
        HANDOVER_PEERS,
        HANDOVER_REBUILDS,
        GPU_USED,
        GPU_TOTAL,
        GPU_BUSY,
        INFO,
        BUILD_INFO,
    ],
    &process::TABLE,
    &[
        UPSTREAM_SUCCESS,
        UPSTREAM_ERROR,
        UPSTREAM_REQUEST,
        UPSTREAM_FIRST_TOKEN,
        UPSTREAM_PER_TOKEN,
        UPSTREAM_QUEUE,
        UPSTREAM_PREFILL,
        UPSTREAM_DECODE,
        UPSTREAM_STEP,
        UPSTREAM_PROMPT,
        UPSTREAM_CACHED,
        UPSTREAM_GENERATED,
        UPSTREAM_RUNNING,
        UPSTREAM_WAITING,
        UPSTREAM_HIT_RATE,
        UPSTREAM_UTILIZATION,
        UPSTREAM_MAX_BLOCKS,
        UPSTREAM_FREE_BLOCKS,
        UPSTREAM_USED_BLOCKS,
    ],
];
