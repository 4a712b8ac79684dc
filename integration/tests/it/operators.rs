//! What operators see of requests: the admin port's list and the access log.

use std::net::SocketAddr;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::Behaviour;
use baton_integration::process::free_port;
use http::Method;
use serde_json::{Value, json};

use crate::support::READY;
use crate::systemd::{Scene, end};

const PATH: &str = "/v1/completions";

/// One request that is served, one that is wrong, and one whose client leaves; each by its own id.
async fn three_requests(scene: &Scene, client: Client) {
    let send = async |id: &str, body: Value| {
        let headers = [("x-request-id", id)];
        client.send(Method::POST, PATH, &headers, body.to_string().into()).await
    };
    let ask = json!({"model": "mock", "prompt": "hello", "max_tokens": 5});
    assert_eq!(send("good", ask.clone()).await.unwrap().whole().await.unwrap().status, 200);
    assert_eq!(send("wrong", json!([1])).await.unwrap().whole().await.unwrap().status, 400);
    scene.workers[1].behave(Behaviour::Hang);
    tokio::select! {
        answer = send("left", ask) => panic!("{answer:?}"),
        () = eventually(READY, "the generation worker was asked", || async {
            (scene.workers[1].requests().len() == 2).then_some(())
        }) => {}
    }
}

#[tokio::test]
async fn each_request_is_listed_and_logged_with_where_it_went_and_how_it_ended() {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let scene = Scene::new(&address.to_string()).await;
    scene.configure("[log]\nformat = \"json\"\naccess = true\n");
    let router = scene.start();
    scene.ready().await;
    three_requests(&scene, Client::new(address)).await;

    let of = |list: &[Value], id: &str| {
        list.iter().find(|one| one["request_id"] == id).cloned().unwrap_or_default()
    };
    let listed = eventually(READY, "three requests are listed", || async {
        let answer = scene.admin.get("/admin/requests").await.unwrap().ok().unwrap();
        let list = answer["requests"].as_array().unwrap().clone();
        (list.len() == 3).then_some(list)
    })
    .await;
    assert_eq!(listed[0]["request_id"], "left", "the latest first");
    let logged = eventually(READY, "three requests are logged", || async {
        let lines: Vec<Value> = router
            .log()
            .lines()
            .map(|line| serde_json::from_str(line).expect("each line is JSON"))
            .filter(|line: &Value| line["target"] == "baton_router::access")
            .collect();
        (lines.len() == 3).then_some(lines)
    })
    .await;
    let [context, generation] = scene.workers.each_ref().map(|one| one.address.to_string());
    for list in [&listed, &logged] {
        let good = of(list, "good");
        assert_eq!((&good["outcome"], &good["status"]), (&json!("answered"), &json!(200)));
        assert_eq!((&good["context"], &good["generation"]), (&json!(context), &json!(generation)));
        assert_eq!((&good["path"], &good["passes"]), (&json!(PATH), &json!(1)));
        assert!(good["first_byte_ms"].as_u64() <= good["took_ms"].as_u64(), "{good}");
        let wrong = of(list, "wrong");
        assert_eq!((&wrong["outcome"], &wrong["status"]), (&json!("answered"), &json!(400)));
        assert!(wrong["context"].is_null() && wrong["passes"] == 0, "{wrong}");
        let left = of(list, "left");
        assert_eq!(left["outcome"], "client_gone");
        assert_eq!(left["generation"], json!(generation));
    }
    end(router);
}

#[tokio::test]
async fn no_request_is_logged_unless_asked_for_and_the_level_can_be_changed() {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let scene = Scene::new(&address.to_string()).await;
    let router = scene.start();
    scene.ready().await;
    three_requests(&scene, Client::new(address)).await;
    let level =
        |text: &'static str| scene.admin.send(Method::PUT, "/admin/log-level", &[], text.into());
    let answer = level("debug").await.unwrap().whole().await.unwrap().ok().unwrap();
    assert_eq!(answer["level"], "debug");
    let shown = scene.admin.get("/admin/log-level").await.unwrap().ok().unwrap();
    assert_eq!(shown["level"], "debug");
    let wrong = level("loud").await.unwrap().whole().await.unwrap();
    assert_eq!((wrong.status, wrong.error_code().unwrap()), (400, "invalid_request".into()));
    assert!(!router.log().contains("baton_router::access"), "{}", router.log());
    end(router);
}
