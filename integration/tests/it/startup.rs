//! What does not start, and how it says so; and the names of TensorRT-LLM's documentation that do start.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::cluster::Plan;
use baton_integration::files;
use baton_integration::process::{Process, Program, free_port};
use serde_json::json;

use crate::support::{READY, STOP, finished, start_plan};
use crate::tiny;

async fn run(binary: &str, args: &[&str]) -> Output {
    let mut command = Command::new(files::binary(binary).unwrap());
    command.args(args);
    finished(command).await
}

/// Runs it and checks exit code and words.
async fn refuses(binary: &str, args: &[&str], code: i32, words: &[&str]) {
    let output = run(binary, args).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: `{word}` is not in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

fn file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_wrong_configuration_names_file_line_key_and_rule() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name, text| file(folder.path(), name, text);
    let unknown = at("unknown.toml", "[server]\nlisten = \"127.0.0.1:1\"\n[kv]\npol = \"1MiB\"\n");
    refuses("baton-workerd", &["--config", &unknown], 78, &["unknown.toml:4", "pol", "pool"]).await;
    let unit = at("unit.toml", "model = \"x\"\n[handover]\npull_timeout = \"10 parsecs\"\n");
    refuses(
        "baton-workerd",
        &["--config", &unit],
        78,
        &["unit.toml:3", "pull_timeout", "10 parsecs"],
    )
    .await;
    let zero = at("zero.toml", "[handover]\nquarantine_timeout = \"0s\"\n");
    let words = ["zero.toml:2", "quarantine_timeout", "0s", "above 0"];
    refuses("baton-workerd", &["x.gguf", "--config", &zero], 78, &words).await;
    let role = at("role.toml", "model = \"x\"\nrole = \"prefill\"\n");
    refuses("baton-workerd", &["--config", &role], 78, &["role.toml:2", "role", "context"]).await;
    let later = at("later.toml", "model = \"x\"\n[handover]\nnixl_backend = \"LIBFABRIC\"\n");
    refuses(
        "baton-workerd",
        &["--config", &later],
        78,
        &["later.toml:3", "nixl_backend", "LIBFABRIC"],
    )
    .await;
    let router = at("router.toml", "[routing]\nattemps = 3\n");
    refuses("baton-router", &["--config", &router], 78, &["router.toml:2", "attemps", "attempts"])
        .await;
    let yaml = at("disagg.yaml", "hostname: localhost\nport: 8000\ncontext_server:\n  urls: []\n");
    refuses("baton-router", &["-c", &yaml], 78, &["disagg.yaml:3", "context_server"]).await;
    refuses("baton-router", &["--config", "/nowhere/at/all.toml"], 78, &["/nowhere/at/all.toml"])
        .await;
    refuses("baton-workerd", &["--no-such-flag"], 2, &["--no-such-flag"]).await;
    refuses("baton-router", &[], 2, &["--config"]).await;
    refuses("baton-up", &[&at("up.toml", "[router]\n")], 78, &["[[worker]]"]).await;
}

#[tokio::test]
async fn a_missing_or_damaged_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("127.0.0.1:{}", free_port().unwrap());
    let serve = |model: String| {
        let listen = listen.clone();
        async move { run("baton-workerd", &[&model, "--listen", &listen]).await }
    };
    let demo = std::fs::read(files::demo_model().unwrap()).unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("half.gguf"), &demo[..demo.len() / 2]).unwrap();
    std::fs::write(path("noise.gguf"), [7u8; 5000]).unwrap();
    std::fs::create_dir(path("empty")).unwrap();
    for model in ["half.gguf", "noise.gguf", "empty", "missing.gguf"] {
        let output = serve(path(model)).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            matches!(output.status.code(), Some(1 | 78)),
            "{model}: {:?} {text}",
            output.status
        );
        assert!(text.contains(model), "{model}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
}

#[tokio::test]
async fn failpoints_are_for_tests_only() {
    let mut command = Command::new(files::binary("baton-workerd").unwrap());
    command.arg("/no/model").env("BATON_FAILPOINTS", "step=hold").env_remove("BATON_TEST");
    let output = finished(command).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("BATON_FAILPOINTS") && text.contains("BATON_TEST=1"), "{text}");
    let model = tiny::model(4);
    let plan =
        || Plan { router: None, ..Plan::local(&model.path, 1, 0, &toml::Table::new()).unwrap() };
    let running = start_plan(plan).await;
    let worker = &running.cluster.workers[0];
    assert_eq!(worker.client().get("/test/failpoints").await.unwrap().status, 404);
    running.stop();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let model = tiny::model(4);
    let model = model.path.to_str().unwrap();
    refuses("baton-workerd", &[model, "--listen", &address], 1, &[&address, "in use"]).await;
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "[server]\nlisten = \"{address}\"\nadmin_listen = \"127.0.0.1:{}\"\n\
         [[context.servers]]\nurl = \"127.0.0.1:1\"\n[[generation.servers]]\nurl = \"127.0.0.1:1\"\n",
        free_port().unwrap()
    );
    let config = file(folder.path(), "router.toml", &config);
    refuses("baton-router", &["--config", &config], 1, &[&address, "in use"]).await;
}

#[tokio::test]
async fn nixl_that_is_not_there_is_an_error_that_says_where_it_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "model = \"{}\"\n[server]\nlisten = \"127.0.0.1:{}\"\n[nixl]\nlibrary_dir = \"{}\"\n",
        tiny::model(4).path.display(),
        free_port().unwrap(),
        folder.path().display()
    );
    let config = file(folder.path(), "w.toml", &config);
    let words = ["library_dir", folder.path().to_str().unwrap()];
    let output = run("baton-workerd", &["--config", &config]).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(matches!(output.status.code(), Some(1 | 78)), "{:?}: {text}", output.status);
    words.iter().for_each(|word| assert!(text.contains(word), "{word}: {text}"));
}

#[tokio::test]
async fn a_device_that_cannot_be_is_bad_configuration_and_one_that_is_not_there_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str, text: &str| file(folder.path(), name, text);
    for (name, device) in [("colon.toml", "cuda:"), ("x.toml", "cuda:x"), ("gpu.toml", "gpu")] {
        let config = at(name, &format!("model = \"x\"\n[engine]\ndevice = \"{device}\"\n"));
        let place = format!("{name}:3");
        let words = [place.as_str(), "engine.device", device, "must be `auto`, `cpu` or `cuda:N`"];
        refuses("baton-workerd", &["--config", &config], 78, &words).await;
        refuses("baton-workerd", &["x", "--device", device], 78, &words[1..]).await;
    }
    for (name, share) in [("none.toml", "0"), ("much.toml", "1.5")] {
        let text = format!("model = \"x\"\n[kv]\nfree_gpu_memory_fraction = {share}\n");
        let (config, place) = (at(name, &text), format!("{name}:3"));
        let value = format!("`kv.free_gpu_memory_fraction` = `{share}`");
        let words = [place.as_str(), &value, "above 0 and at most 1"];
        refuses("baton-workerd", &["--config", &config], 78, &words).await;
        let flags = ["x", "--free-gpu-memory-fraction", share];
        refuses("baton-workerd", &flags, 78, &words[1..]).await;
    }
    // Whether or not there are GPUs: none is the 4000th, and hidden ones are none.
    let model = tiny::model(4);
    let listen = format!("127.0.0.1:{}", free_port().unwrap());
    let args = [model.path.to_str().unwrap(), "--listen", &listen, "--device", "cuda:4000"];
    let mut command = Command::new(files::binary("baton-workerd").unwrap());
    command.args(args).env("CUDA_VISIBLE_DEVICES", "");
    let output = finished(command).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("no CUDA device"), "{text}");
    let is_driverless = text.contains("libcuda.so.1 is not on this machine");
    assert!(is_driverless || text.contains("CUDA_ERROR_NO_DEVICE"), "{text}");
}

#[tokio::test]
async fn auto_without_a_gpu_is_the_cpu_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port().unwrap();
    let listen = format!("127.0.0.1:{port}");
    let model = tiny::model(4);
    let model = model.path.to_str().unwrap();
    let args = [model, "--listen", &listen, "--threads", "1", "--kv-pool", "64MiB"];
    let mut program = Program::new("baton-workerd", "worker", args);
    program.env.push(("CUDA_VISIBLE_DEVICES".to_owned(), String::new()));
    let mut worker = program.spawn(folder.path()).unwrap();
    let client = Client::new(([127, 0, 0, 1], port).into());
    ready(&mut worker, client).await;
    let log = worker.log();
    for words in ["device `auto`: the CPU computes", "no CUDA device: ", "cpu ("] {
        assert!(log.contains(words), "`{words}` is not in: {log}");
    }
    let metrics = client.get("/prometheus/metrics").await.unwrap();
    assert_eq!(metrics.status, 200);
    assert!(!String::from_utf8_lossy(&metrics.body).contains("baton_worker_gpu_"));
    assert!(worker.terminate(STOP).unwrap().success());
}

#[tokio::test]
async fn every_shipped_configuration_passes_the_check() {
    let config = files::top().join("config");
    let path = |name: &str| config.join(name).to_str().unwrap().to_owned();
    for (binary, flag, name) in [
        ("baton-router", "--config", "router.toml"),
        ("baton-router", "-c", "examples/disagg_config.yaml"),
        ("baton-workerd", "--config", "workerd-context.toml"),
        ("baton-workerd", "--config", "workerd-generation.toml"),
    ] {
        let output = run(binary, &[flag, &path(name), "--check"]).await;
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

async fn ready(process: &mut Process, client: Client) {
    let begun = std::time::Instant::now();
    while !matches!(client.get("/health").await, Ok(answer) if answer.status == 200) {
        assert!(process.ended().unwrap().is_none(), "{}", process.log());
        assert!(begun.elapsed() < READY, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_commands_of_the_documentation_that_is_replaced_start_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny::model(4);
    let examples = files::top().join("config/examples");
    let ports = [free_port().unwrap(), free_port().unwrap(), free_port().unwrap()];
    let mut workers = Vec::new();
    for (name, yaml, flag, port) in [
        ("ctx", "ctx_config.yaml", "--extra_llm_api_options", ports[0]),
        ("gen", "gen_config.yaml", "--config", ports[1]),
    ] {
        let mut args = vec![model.path.to_str().unwrap().to_owned()];
        args.extend(["--host", "localhost", "--port"].map(str::to_owned));
        args.extend([port.to_string(), "--backend".into(), "pytorch".into()]);
        args.extend([flag.to_owned(), examples.join(yaml).to_str().unwrap().to_owned()]);
        args.extend(["--threads", "1", "--kv-pool", "64MiB"].map(str::to_owned));
        let process = Program::new("baton-workerd", name, args).spawn(folder.path()).unwrap();
        workers.push((process, Client::new(([127, 0, 0, 1], port).into())));
    }
    for (process, client) in &mut workers {
        ready(process, *client).await;
    }
    let text = std::fs::read_to_string(examples.join("disagg_config.yaml")).unwrap();
    let text = text
        .replace("8000", &ports[2].to_string())
        .replace("8001", &ports[0].to_string())
        .replace("8003", &ports[1].to_string());
    let config = file(folder.path(), "disagg_config.yaml", &text);
    // The file has no place for the admin port, whose default somebody else may use.
    let args = ["-c", &config, "--admin-listen", "127.0.0.1:0"];
    let mut router = Program::new("baton-router", "router", args).spawn(folder.path()).unwrap();
    let client = Client::new(([127, 0, 0, 1], ports[2]).into());
    ready(&mut router, client).await;
    let request = json!({"model": model.name, "prompt": "NVIDIA is a great company because",
        "max_tokens": 16, "temperature": 0});
    client.post("/v1/completions", &request).await.unwrap().ok().unwrap();
    assert!(router.terminate(STOP).unwrap().success());
    for (process, _) in &mut workers {
        let log = process.log();
        assert!(log.contains("keys of the file that have no effect here"), "{log}");
        assert!(log.contains("cache_transceiver_config.max_tokens_in_buffer"), "{log}");
        assert!(process.terminate(STOP).unwrap().success());
    }
}

/// `config/cluster.toml` on free ports, in `folder`.
fn cluster_file(folder: &Path) -> String {
    let text = std::fs::read_to_string(files::top().join("config/cluster.toml")).unwrap();
    let models = files::top().join(".deps/models");
    let mut text = text.replace(".deps/models", models.to_str().unwrap());
    for port in ["8000", "9000", "8001", "8002", "8003"] {
        text = text.replace(port, &free_port().unwrap().to_string());
    }
    file(folder, "cluster.toml", &text)
}

#[tokio::test]
async fn sigterm_ends_baton_up_and_all_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let config = cluster_file(folder.path());
    let logs = folder.path().join("logs");
    let args = [&config, "--logs", logs.to_str().unwrap()];
    let mut up = Program::new("baton-up", "up", args).spawn(folder.path()).unwrap();
    let begun = std::time::Instant::now();
    while !up.log().contains("serving at") {
        assert!(up.ended().unwrap().is_none() && begun.elapsed() < READY, "{}", up.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let children = format!("/proc/{0}/task/{0}/children", up.id());
    let children = std::fs::read_to_string(children).unwrap();
    assert_eq!(children.split_whitespace().count(), 4, "{children}");
    let status = up.terminate(STOP).unwrap();
    assert!(status.success(), "{status}: {}", up.log());
    for child in children.split_whitespace() {
        assert!(!Path::new("/proc").join(child).exists(), "process {child} goes on");
    }
}

#[tokio::test]
async fn baton_up_shows_an_answer_and_ends_well() {
    let folder = tempfile::tempdir().unwrap();
    let config = cluster_file(folder.path());
    let logs = folder.path().join("logs");
    let output =
        run("baton-up", &[&config, "--try", "--once", "--logs", logs.to_str().unwrap()]).await;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{out}{}", String::from_utf8_lossy(&output.stderr));
    for word in
        ["NVIDIA is a great company because", "computed 8 prompt tokens", "pulled 8 prompt tokens"]
    {
        assert!(out.contains(word), "`{word}` is not in: {out}");
    }
}
