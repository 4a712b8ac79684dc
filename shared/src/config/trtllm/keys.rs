//! Every key of upstream's files, and what becomes of it.
//!
//! The rule for what is accepted: a key that only tunes speed, memory or upstream's own machinery has no
//! effect; a key that would change answers, or that an operator relies on, must have its neutral value.

use crate::config::ConfigError;
use crate::config::document::join;
use crate::config::mistake::unknown_rule;
use crate::config::yaml::{Node, Yaml};

/// One row: a key, and what becomes of it.
pub(super) type Row = (&'static str, Fate);

/// What becomes of a key.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    /// Becomes a field; its value is checked where it is read.
    Mapped,
    /// A map whose keys are in other tables.
    Table(&'static [&'static [Row]]),
    /// Accepted; whatever it holds.
    NoEffect,
    /// Accepted with one of these values or null; with any other not available yet.
    Neutral(&'static [&'static str]),
    /// Not available yet, in words; null is accepted.
    NotYet(&'static str),
}

use Fate::{Mapped, Neutral, NoEffect, NotYet, Table};

/// `disagg_config.yaml`, but for [`WORKER`]'s keys, which it may hold for both sections.
pub(super) const DISAGG: &[Row] = &[
    ("hostname", Mapped),
    ("port", Mapped),
    ("max_retries", Mapped),
    ("node_id", Mapped),
    ("internal_request_auth_key", Mapped),
    ("context_servers", Table(&[SERVERS, WORKER])),
    ("generation_servers", Table(&[SERVERS, WORKER])),
    ("schedule_style", Neutral(&["context_first"])),
    ("conditional_disagg_config", Table(&[&[("max_local_prefill_length", Mapped)]])),
    ("perf_metrics_max_requests", NoEffect),
    ("server_keep_alive_timeout", NoEffect),
    ("return_perf_metrics", Neutral(&["false"])),
    ("perf_metrics_output_dir", Neutral(&[])),
    ("otlp_config", Neutral(&[])),
    ("disagg_cluster", NotYet("list the servers under `context_servers` and `generation_servers`")),
    ("allow_request_chat_template", Neutral(&["false"])),
    ("gen_strip_message_history", Neutral(&["false"])),
    ("gen_tokids_ctxbytes", Neutral(&["false"])),
    ("num_workers", Neutral(&["1"])),
    ("disagg_coordinator_url", Neutral(&[])),
];

/// `context_servers` and `generation_servers`, but for [`WORKER`]'s keys.
pub(super) const SERVERS: &[Row] =
    &[("num_instances", Mapped), ("urls", Mapped), ("router", Table(&[ROUTER]))];

const ROUTER: &[Row] = &[
    ("type", Mapped),
    ("use_tokens", Mapped),
    ("max_batch_size", NoEffect),
    ("tokens_per_block", NoEffect),
    ("custom_tokenizer", NoEffect),
    ("tokenizer_dir", NoEffect),
    ("model_path", NoEffect),
    ("use_harmony", NoEffect),
    ("track_routed_blocks", NoEffect),
    ("load_weight", NoEffect),
    ("load_cap", NoEffect),
    ("match_threshold", NoEffect),
    ("use_token_ids", NoEffect),
    ("hash_skip_count", NoEffect),
    ("max_sessions", NoEffect),
];

/// The worker YAML.
pub(super) const WORKER: &[Row] = &[
    // Mapped.
    ("model", Mapped),
    ("max_batch_size", Mapped),
    ("max_num_tokens", Mapped),
    ("max_seq_len", Mapped),
    ("internal_request_auth_key", Mapped),
    ("cache_transceiver_config", Table(&[CACHE_TRANSCEIVER])),
    ("kv_cache_config", Table(&[KV_CACHE])),
    // One device a worker for now.
    ("tensor_parallel_size", Neutral(&["1"])),
    ("pipeline_parallel_size", Neutral(&["1"])),
    ("context_parallel_size", Neutral(&["1"])),
    ("moe_cluster_parallel_size", Neutral(&["1", "-1"])),
    ("moe_tensor_parallel_size", Neutral(&["1", "-1"])),
    ("moe_expert_parallel_size", Neutral(&["1", "-1"])),
    ("enable_attention_dp", Neutral(&["false"])),
    ("enable_lm_head_tp_in_adp", Neutral(&["false"])),
    ("pp_partition", Neutral(&[])),
    ("cp_config", Neutral(&[])),
    ("dwdp_config", Neutral(&[])),
    // They change answers.
    ("dtype", Neutral(&["auto", "bfloat16"])),
    ("kv_cache_dtype", Neutral(&["auto", "bfloat16"])),
    ("quant_config", Neutral(&[])),
    ("force_dynamic_quantization", Neutral(&["false"])),
    ("load_format", Neutral(&["auto", "0"])),
    ("max_beam_width", Neutral(&["1"])),
    ("max_input_len", Neutral(&[])),
    ("speculative_config", Neutral(&[])),
    ("decoding_config", Neutral(&[])),
    ("sparse_attention_config", Neutral(&[])),
    ("kv_cache_compression_config", Neutral(&[])),
    ("enable_lora", Neutral(&["false"])),
    ("lora_config", Neutral(&[])),
    ("peft_cache_config", Neutral(&[])),
    ("guided_decoding_backend", Neutral(&[])),
    ("batched_logits_processor", Neutral(&[])),
    ("gather_generation_logits", Neutral(&["false"])),
    ("normalize_log_probs", Neutral(&["false"])),
    ("reasoning_parser", Neutral(&[])),
    ("tokenizer", Neutral(&[])),
    ("revision", Neutral(&[])),
    ("tokenizer_revision", Neutral(&[])),
    ("skip_tokenizer_init", Neutral(&["false"])),
    ("mm_encoder_only", Neutral(&["false"])),
    ("encode_only", Neutral(&["false"])),
    ("multimodal_config", Neutral(&[])),
    ("generation_config", Neutral(&["auto"])),
    ("kv_connector_config", Neutral(&[])),
    // Operators rely on them.
    ("disagg_cluster", NotYet("give the router this worker's address instead")),
    ("otlp_traces_endpoint", Neutral(&[])),
    ("return_perf_metrics", Neutral(&["false"])),
    ("num_serve_frontends", Neutral(&["1"])),
    ("enable_sleep", Neutral(&["false"])),
    // Speed, memory and upstream's own machinery.
    ("backend", Neutral(&["pytorch", "tensorrt", "_autodeploy"])),
    ("allreduce_strategy", NoEffect),
    ("attention_dp_config", NoEffect),
    ("attn_backend", NoEffect),
    ("batch_wait_max_tokens_ratio", NoEffect),
    ("batch_wait_timeout_iters", NoEffect),
    ("batch_wait_timeout_ms", NoEffect),
    ("batching_type", NoEffect),
    ("build_config", NoEffect),
    ("checkpoint_format", NoEffect),
    ("checkpoint_io_policy", NoEffect),
    ("checkpoint_loader", NoEffect),
    ("cuda_graph_config", NoEffect),
    ("disable_mm_encoder", NoEffect),
    ("disable_overlap_scheduler", NoEffect),
    ("enable_autotuner", NoEffect),
    ("enable_build_cache", NoEffect),
    ("enable_chunked_prefill", NoEffect),
    ("enable_early_first_token_response", NoEffect),
    ("enable_encoder_decoder_mixed_cuda_graph", NoEffect),
    ("enable_energy_metrics", NoEffect),
    ("enable_in_graph_sampling", NoEffect),
    ("enable_iter_perf_stats", NoEffect),
    ("enable_iter_req_stats", NoEffect),
    ("enable_layerwise_nvtx_marker", NoEffect),
    ("enable_low_latency_host_dispatch", NoEffect),
    ("enable_min_latency", NoEffect),
    ("enable_mixed_sampler", NoEffect),
    ("enable_mla_skip_correction", NoEffect),
    ("enable_resource_governor", NoEffect),
    ("enable_speculative_beam_history_d2h", NoEffect),
    ("enable_tqdm", NoEffect),
    ("enable_trtllm_sampler", NoEffect),
    ("encoder_cuda_graph_config", NoEffect),
    ("encoder_max_batch_size", NoEffect),
    ("encoder_max_num_tokens", NoEffect),
    ("env_overrides", NoEffect),
    ("extended_runtime_perf_knob_config", NoEffect),
    ("fail_fast_on_attention_window_too_large", NoEffect),
    ("fast_build", NoEffect),
    ("garbage_collection_gen0_threshold", NoEffect),
    ("gms_config", NoEffect),
    ("gpus_per_node", NoEffect),
    ("iter_stats_max_iterations", NoEffect),
    ("layer_wise_benchmarks_config", NoEffect),
    ("max_stats_len", NoEffect),
    ("mla_skip_correction_threshold", NoEffect),
    ("moe_config", NoEffect),
    ("mx_config", NoEffect),
    ("num_postprocess_workers", NoEffect),
    ("nvfp4_gemm_config", NoEffect),
    ("orchestrator_type", NoEffect),
    ("perf_metrics_max_requests", NoEffect),
    ("postprocess_tokenizer_dir", NoEffect),
    ("prefill_capture_num_tokens", NoEffect),
    ("prefill_cuda_graph_backend", NoEffect),
    ("print_iter_log", NoEffect),
    ("prometheus_metrics_config", NoEffect),
    ("pytorch_backend_config", NoEffect),
    ("ray_placement_config", NoEffect),
    ("ray_worker_extension_cls", NoEffect),
    ("reorder_policy_config", NoEffect),
    ("request_stats_max_iterations", NoEffect),
    ("sampler_force_async_worker", NoEffect),
    ("sampler_type", NoEffect),
    ("scheduler_config", NoEffect),
    ("stream_interval", NoEffect),
    ("telemetry_config", NoEffect),
    ("tokenizer_mode", NoEffect),
    ("torch_compile_config", NoEffect),
    ("trust_remote_code", NoEffect),
    ("use_cuda_graph", NoEffect),
    ("use_cute_dsl_bf16_bmm", NoEffect),
    ("use_cute_dsl_bf16_gemm", NoEffect),
    ("use_cute_dsl_blockscaling_bmm", NoEffect),
    ("use_cute_dsl_blockscaling_mm", NoEffect),
    ("use_fine_grained_sync", NoEffect),
    ("workspace", NoEffect),
];

const CACHE_TRANSCEIVER: &[Row] = &[
    ("backend", Mapped),
    ("max_tokens_in_buffer", Mapped),
    ("kv_transfer_timeout_ms", Mapped),
    ("kv_transfer_sender_future_timeout_ms", NoEffect),
    ("kv_transfer_poll_interval_ms", NoEffect),
    ("kv_cache_bounce_size_mb", NoEffect),
    ("transceiver_runtime", NoEffect),
    ("enable_pipelined_transfer", NoEffect),
    ("agent_bounce_buffer_enable", NoEffect),
    ("agent_bounce_params", NoEffect),
];

const KV_CACHE: &[Row] = &[
    ("enable_block_reuse", Mapped),
    ("event_buffer_max_size", Mapped),
    ("kv_cache_event_hash_algo", Mapped),
    ("free_gpu_memory_fraction", Mapped),
    ("max_tokens", Mapped),
    ("tokens_per_block", Mapped),
    ("dtype", Neutral(&["auto", "bfloat16"])),
    ("host_cache_size", Neutral(&["0"])),
    ("disk_cache_size", Neutral(&["0"])),
    ("max_attention_window", Neutral(&[])),
    ("sink_token_length", Neutral(&["0"])),
    ("cross_kv_cache_fraction", Neutral(&[])),
    ("attention_dp_events_gather_period_ms", NoEffect),
    ("avg_seq_len", NoEffect),
    ("block_reuse_config", NoEffect),
    ("block_reuse_policy", NoEffect),
    ("copy_on_partial_reuse", NoEffect),
    ("disk_cache_path", NoEffect),
    ("disk_prefetch_num_reqs", NoEffect),
    ("enable_kv_pool_rebalance", NoEffect),
    ("enable_partial_reuse", NoEffect),
    ("enable_swa_scratch_reuse", NoEffect),
    ("fp8_context_mla_kv_len_cap", NoEffect),
    ("iteration_stats_interval", NoEffect),
    ("mamba_ssm_cache_dtype", NoEffect),
    ("mamba_ssm_philox_rounds", NoEffect),
    ("mamba_ssm_stochastic_rounding", NoEffect),
    ("mamba_state_config", NoEffect),
    ("max_gpu_total_bytes", NoEffect),
    ("max_util_for_resume", NoEffect),
    ("onboard_blocks", NoEffect),
    ("pool_ratio", NoEffect),
    ("secondary_offload_min_priority", NoEffect),
    ("use_kv_cache_manager_v2", NoEffect),
    ("use_uvm", NoEffect),
];

/// Checks each key of the map at `section` (empty = the whole file) against `tables`, and collects the dotted
/// keys that are accepted without effect.
pub(super) fn check(
    file: &Yaml,
    section: &str,
    tables: &[&'static [Row]],
    without_effect: &mut Vec<String>,
) -> Result<(), ConfigError> {
    let node = if section.is_empty() { Some(&file.root) } else { file.get(section) };
    let members = match node {
        None => return Ok(()),
        Some(Node::Map(members)) => members,
        Some(_) => return Err(file.document.error(section, "must be a map of keys")),
    };
    for (name, node) in members {
        let key = join(section, name);
        let row = tables.iter().copied().flatten().find(|(known, _)| known == name);
        let Some((_, fate)) = row else {
            let known: Vec<&str> =
                tables.iter().copied().flatten().map(|(name, _)| *name).collect();
            return Err(file.document.error(&key, unknown(name, &known)).without_value());
        };
        match *fate {
            Mapped => {}
            Table(tables) => check(file, &key, tables, without_effect)?,
            NoEffect => without_effect.push(key),
            Neutral(values) if is_neutral(node, values) => without_effect.push(key),
            Neutral(values) => return Err(file.document.error(&key, not_yet(values))),
            NotYet(_) if *node == Node::Null => without_effect.push(key),
            NotYet(instead) => {
                return Err(file.document.error(&key, format!("is not available yet: {instead}")));
            }
        }
    }
    Ok(())
}

/// The nearest known key; a list of all would fill the screen.
fn unknown(name: &str, known: &[&str]) -> String {
    const MOST: usize = 20;
    let rule = unknown_rule(name, known);
    if known.len() > MOST && rule.contains("known here") { "unknown key".to_owned() } else { rule }
}

fn not_yet(values: &[&str]) -> String {
    match values {
        [] => "is not available yet".to_owned(),
        values => format!("only `{}` is available yet", values.join("` or `")),
    }
}

/// Whether a value is null, empty, or one of `values` (case does not count).
fn is_neutral(node: &Node, values: &[&str]) -> bool {
    let text = match node {
        Node::Null => return true,
        Node::List(items) => return items.is_empty(),
        Node::Map(members) => return members.is_empty(),
        Node::Bool(flag) => flag.to_string(),
        Node::Whole(number) => number.to_string(),
        Node::Number(number) => number.to_string(),
        Node::Text(text) => text.to_ascii_lowercase(),
    };
    values.contains(&text.as_str())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_key_is_listed_twice() {
        for table in [DISAGG, SERVERS, ROUTER, WORKER, CACHE_TRANSCEIVER, KV_CACHE] {
            let names: HashSet<&str> = table.iter().map(|(name, _)| *name).collect();
            assert_eq!(names.len(), table.len());
        }
    }

    /// `docs/src/reference/trtllm-keys.md`, a table of ours a section.
    #[test]
    fn the_documentation_says_of_every_key_what_becomes_of_it() {
        let page = include_str!("../../../../docs/src/reference/trtllm-keys.md");
        let sections = page.split("\n## ").skip(1);
        let tables = [DISAGG, SERVERS, ROUTER, WORKER, CACHE_TRANSCEIVER, KV_CACHE];
        assert_eq!(sections.clone().count(), tables.len());
        for (section, table) in sections.zip(tables) {
            let (rest, without_effect) = match section.split_once("\nWithout effect: ") {
                Some((rest, keys)) => (rest, crate::expected::backticked(keys).collect()),
                None => (section, HashSet::new()),
            };
            let rows = rest.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
            let said: HashSet<(&str, String)> = rows
                .map(|(key, here)| (key, here.trim_end_matches(" |").to_owned()))
                .filter(|(_, here)| here.starts_with("only ") || here.starts_with("not "))
                .collect();
            let mut expected = HashSet::new();
            let mut named = HashSet::new();
            for (key, fate) in table {
                match fate {
                    Mapped | Table(_) => assert!(rest.contains(&format!("| `{key}` | ")), "{key}"),
                    NoEffect => drop(named.insert(*key)),
                    Neutral([]) => drop(expected.insert((*key, "only empty".to_owned()))),
                    Neutral(values) => {
                        let values = values.join("`, `");
                        expected.insert((*key, format!("only `{values}`")));
                    }
                    NotYet(instead) => {
                        expected.insert((*key, format!("not available yet: {instead}")));
                    }
                }
            }
            assert_eq!((said, without_effect), (expected, named));
            let count = rest.lines().filter(|line| line.starts_with("| `")).count();
            let listed = table.iter().filter(|(_, fate)| !matches!(fate, NoEffect)).count();
            assert_eq!(count, listed, "{section}");
        }
    }
}
