//! `baton-client`: prompts in, answers out, in both APIs, streamed or not; and what it says when it cannot.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Output};

use baton_integration::files;
use baton_integration::process::free_port;
use serde_json::{Value, json};

use crate::support::{finished, start};
use crate::tiny;

const PROMPTS: [&str; 3] = ["one", "NVIDIA is a great company because", "häßlich \"quoted\"\n"];

async fn client(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(files::binary("baton-client").unwrap());
    command.current_dir(folder).args(args);
    finished(command).await
}

/// A router's file in TensorRT-LLM's form.
fn config(folder: &Path, address: SocketAddr) {
    let text = format!(
        "hostname: {}\nport: {}\ncontext_servers:\n  num_instances: 1\n  urls: [\"localhost:1\"]\n\
         generation_servers:\n  num_instances: 1\n  urls: [\"localhost:2\"]\n",
        address.ip(),
        address.port()
    );
    std::fs::write(folder.join("disagg_config.yaml"), text).unwrap();
}

fn prompts(folder: &Path, text: &str) {
    std::fs::write(folder.join("prompts.json"), text).unwrap();
}

fn json_in(file: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

#[tokio::test]
async fn each_prompt_gets_the_answer_that_a_request_by_hand_gets() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let (folder, cluster) = (running.folder.path(), &running.cluster);
    config(folder, cluster.router.as_ref().unwrap().address);
    prompts(folder, &json!(PROMPTS).to_string());
    for endpoint in ["completions", "chat"] {
        let mut expected = Vec::new();
        for prompt in PROMPTS {
            let common =
                json!({"model": model.name, "max_tokens": 9, "temperature": 0, "ignore_eos": true});
            let mut body = common.clone();
            let (path, text) = if endpoint == "chat" {
                body["messages"] = json!([
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": prompt},
                ]);
                ("/v1/chat/completions", "/choices/0/message/content")
            } else {
                body["prompt"] = json!(prompt);
                ("/v1/completions", "/choices/0/text")
            };
            let answer = cluster.client().post(path, &body).await.unwrap().ok().unwrap();
            expected.push(answer.pointer(text).unwrap().clone());
        }
        for streaming in [false, true] {
            let mut args = vec!["-c", "disagg_config.yaml", "-p", "prompts.json", "-e", endpoint];
            args.extend(["--max-tokens", "9", "--ignore-eos", "-o", "answers.json"]);
            if streaming {
                args.push("--streaming");
            }
            let output = client(folder, &args).await;
            assert!(output.status.success(), "{output:?}");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.starts_with("3 of 3 prompts answered in "), "{said}");
            assert_eq!(
                json_in(&folder.join("answers.json")),
                json!(expected),
                "{endpoint} {streaming}"
            );
        }
    }
    // The router's own file will do as well, and so does the address; the names of the rest are upstream's defaults.
    let address = cluster.router.as_ref().unwrap().address.to_string();
    for server in [["-c", "router.toml"], ["--server", &address]] {
        let output = client(folder, &[&server[..], &["-p", "prompts.json"]].concat()).await;
        assert!(output.status.success(), "{output:?}");
        let answers = json_in(&folder.join("output.json"));
        assert!(answers.as_array().unwrap().iter().all(Value::is_string), "{answers}");
        std::fs::remove_file(folder.join("output.json")).unwrap();
    }
    running.stop();
}

#[tokio::test]
async fn a_prompt_that_is_refused_costs_its_own_answer_only() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let folder = running.folder.path();
    config(folder, running.cluster.router.as_ref().unwrap().address);
    prompts(folder, &json!(["short", "much too long ".repeat(20_000), "short"]).to_string());
    for streaming in [&[][..], &["--streaming"]] {
        let args = ["-c", "disagg_config.yaml", "-p", "prompts.json", "--max-tokens", "4"];
        let output = client(folder, &[&args, streaming].concat()).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("prompt 1: status 400") && !said.contains("prompt 0"), "{said}");
        let answers = json_in(&folder.join("output.json"));
        assert!(answers[0].is_string() && answers[1].is_null(), "{answers}");
        assert_eq!(answers[0], answers[2]);
    }
    running.stop();
}

#[tokio::test]
async fn what_is_wrong_with_a_file_is_said_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let address: SocketAddr = ([127, 0, 0, 1], free_port().unwrap()).into();
    config(folder, address);
    prompts(folder, "[\"one\"]");
    std::fs::write(folder.join("typo.yaml"), "hostname: localhost\nprt: 8000\n").unwrap();
    std::fs::write(folder.join("unit.toml"), "[server]\nlisten = \"systemd:http\"\n").unwrap();
    std::fs::write(folder.join("object.json"), "{\"prompts\": []}").unwrap();
    std::fs::write(folder.join("number.json"), "[\"one\", 2]").unwrap();
    std::fs::write(folder.join("cut.json"), "[\"one\",\n\"tw").unwrap();
    std::fs::write(folder.join("none.json"), "[]").unwrap();
    let (yaml, json) = ("disagg_config.yaml", "prompts.json");
    for (config, prompts, words) in [
        ("missing.yaml", json, &["missing.yaml", "No such file"][..]),
        ("typo.yaml", json, &["typo.yaml:2", "prt"]),
        ("unit.toml", json, &["unit.toml:2", "systemd:http", "--server"]),
        (yaml, "missing.json", &["missing.json", "No such file"]),
        (yaml, "object.json", &["object.json:1", "JSON array of prompts"]),
        (yaml, "number.json", &["number.json", "prompt 1", "`2`", "string"]),
        (yaml, "cut.json", &["cut.json:2", "JSON array of prompts"]),
        (yaml, "none.json", &["none.json", "no prompt"]),
    ] {
        let output = client(folder, &["-c", config, "-p", prompts]).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{config} {prompts}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{config} {prompts}: {said}");
    }
    let output = client(folder, &["-p", json]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let output = client(folder, &["-c", yaml, "-p", json, "-o", "no/folder.json"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no/folder.json: cannot write"), "{said}");
}

#[tokio::test]
async fn a_server_that_does_not_get_ready_is_waited_for_as_long_as_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    config(folder, ([127, 0, 0, 1], free_port().unwrap()).into());
    prompts(folder, "[\"one\"]");
    let args = ["-c", "disagg_config.yaml", "-p", "prompts.json", "--server-start-timeout", "1"];
    let output = client(folder, &args).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is not ready after 1 s") && said.contains("refused"), "{said}");
    // One that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    config(folder, silent.local_addr().unwrap());
    let output = client(folder, &args).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is not ready after 1 s") && said.contains("/health"), "{said}");
}
