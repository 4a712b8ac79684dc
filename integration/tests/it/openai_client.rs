//! The official OpenAI Python client against the router and against a worker.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use baton_integration::files;

use crate::support::{all_free, finished, start};

async fn drive(address: SocketAddr) {
    let script = files::top().join("integration/tests/openai_client.py");
    let mut command = Command::new("python3");
    command
        .arg(script)
        .args([format!("http://{address}/v1"), "SmolLM2-135M-Instruct".to_owned()])
        .env("PYTHONPATH", files::dep("python").unwrap());
    let output = finished(command).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), "all well");
}

#[tokio::test]
async fn the_official_client_gets_what_it_expects() {
    let model = files::demo_model().unwrap();
    let running = start(&model, 1, 1, toml::Table::new()).await;
    drive(running.cluster.router.as_ref().unwrap().address).await;
    drive(running.cluster.workers[1].address).await;
    all_free(&running.cluster, Duration::from_secs(3)).await;
    running.stop();
}
