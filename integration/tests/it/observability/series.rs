//! What real daemons say is what their tables say, and no request can add a series.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use baton_integration::client::Client;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use toml::Table;

use super::families::{Family, compare, most_series, parse};
use crate::support::{Running, start};
use crate::tiny;

/// Different paths, models, keys and ids.
const DIFFERENT: usize = 10_000;
/// Connections they come by.
const CONNECTIONS: usize = 4;

async fn families(client: Client, path: &str) -> BTreeMap<String, Family> {
    parse(std::str::from_utf8(&client.get(path).await.unwrap().body).unwrap())
}

/// Router, then workers.
async fn all(running: &Running) -> Vec<BTreeMap<String, Family>> {
    let mut all = vec![families(running.cluster.admin(), "/metrics").await];
    for worker in &running.cluster.workers {
        all.push(families(worker.client(), "/prometheus/metrics").await);
    }
    all
}

fn count(families: &BTreeMap<String, Family>) -> usize {
    families.values().map(|family| family.series.len()).sum()
}

/// Sends request `n` of each kind for every `n`: to a path, and for a model, that nobody else has asked for.
async fn flood(address: SocketAddr, numbers: std::ops::Range<usize>) {
    let wire = TcpStream::connect(address).await.unwrap();
    wire.set_nodelay(true).unwrap();
    let (mut sender, connection) = handshake(TokioIo::new(wire)).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    for n in numbers {
        let ask =
            json!({"model": format!("model-{n}"), "prompt": "a", "user": format!("user-{n}")});
        for (path, body) in [
            (format!("/v1/path-{n}"), Bytes::new()),
            ("/v1/completions".into(), ask.to_string().into()),
        ] {
            let request = Request::builder()
                .method(Method::POST)
                .uri(path)
                .header("host", "localhost")
                .header("content-type", "application/json")
                .header("authorization", format!("Bearer key-{n}"))
                .header("x-request-id", format!("id-{n}"))
                .body(Full::new(body));
            sender.ready().await.unwrap();
            let answer = sender.send_request(request.unwrap()).await.unwrap();
            assert_eq!(answer.status(), 404);
            answer.into_body().collect().await.unwrap();
        }
    }
}

#[tokio::test]
async fn ten_thousand_paths_models_and_keys_add_no_series() {
    let model = tiny::model(4);
    let running = start(&model.path, 1, 1, Table::new()).await;
    let ask = json!({"model": model.name, "prompt": "hello", "max_tokens": 4, "ignore_eos": true});
    running.cluster.client().post("/v1/completions", &ask).await.unwrap().ok().unwrap();
    let mut targets = vec![running.cluster.router.as_ref().unwrap().address];
    targets.extend(running.cluster.workers.iter().map(|worker| worker.address));
    for address in &targets {
        flood(*address, 0..1).await;
    }
    let before = all(&running).await;
    let (router, workers) = before.split_first().unwrap();
    compare(router, &baton_router::metrics::TABLE.concat());
    for worker in workers {
        compare(worker, &baton_workerd::metrics::TABLE.concat());
    }
    // The router passes half of it on to a worker.
    let each = DIFFERENT / CONNECTIONS;
    let share = |n: usize| flood(targets[0], n * each..(n + 1) * each);
    futures_util::future::join_all((0..CONNECTIONS).map(share)).await;
    let after = all(&running).await;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(count(before), count(after));
    }
    running.stop();
}

#[test]
fn a_daemon_has_at_most_so_many_series() {
    let most =
        |table: &[baton_shared::metric::Metric]| -> usize { table.iter().map(most_series).sum() };
    // Of a router, each server adds three.
    assert!(most(&baton_router::metrics::TABLE.concat()) < 700);
    assert!(most(&baton_workerd::metrics::TABLE.concat()) < 900);
}
