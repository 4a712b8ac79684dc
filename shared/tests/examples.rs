//! The example files in TensorRT-LLM's form are read as they stand.

use std::path::{Path, PathBuf};

use baton_shared::config::trtllm::{DisaggConfig, LoadBalancing, WorkerSettings};

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/examples").join(name)
}

#[test]
fn the_example_router_file_is_read() {
    let config = DisaggConfig::read(&example("disagg_config.yaml")).unwrap();
    let context: Vec<String> = config.context.urls.iter().map(ToString::to_string).collect();
    let generation: Vec<String> = config.generation.urls.iter().map(ToString::to_string).collect();
    assert_eq!((config.hostname.as_str(), config.port), ("localhost", 8000));
    assert_eq!(context, ["localhost:8001", "localhost:8002"]);
    assert_eq!(generation, ["localhost:8003"]);
    assert_eq!(config.context.router, LoadBalancing::RoundRobin);
    assert_eq!(config.without_effect, ["backend"]);
}

#[test]
fn the_example_worker_files_are_read() {
    for (name, without_effect) in
        [("ctx_config.yaml", &["disable_overlap_scheduler"][..]), ("gen_config.yaml", &[])]
    {
        let (settings, _) = WorkerSettings::read(&example(name)).unwrap();
        assert_eq!(settings.max_tokens_in_buffer.map(|tokens| tokens.get()), Some(2048));
        assert_eq!(settings.without_effect, without_effect, "{name}");
    }
}
