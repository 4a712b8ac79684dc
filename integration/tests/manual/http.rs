//! `reference/http.md` against both daemons: each line of it is answered, other methods are not, and no path of the
//! code is missing.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::process::{Process, Program, free_port};
use baton_integration::{files, process};
use bytes::Bytes;
use http::Method;

use crate::page::{self, code};
use crate::sources;
use crate::{READY, STOP};

const METHODS: [Method; 4] = [Method::GET, Method::POST, Method::PUT, Method::DELETE];

fn rows(heading: &str) -> Vec<(String, Vec<String>)> {
    let rows = page::book("reference/http.md").rows(heading);
    let methods = |cell: &str| code(cell).into_iter().map(str::to_owned).collect();
    rows.iter().map(|row| (code(&row[0])[0].to_owned(), methods(&row[1]))).collect()
}

/// Asks for each path by each method: 405 where the page lacks it, and a known path where it has it.
async fn ask(client: Client, heading: &str, name: &str) {
    for (path, methods) in rows(heading) {
        let path = path.replace("NAME", name);
        for method in METHODS {
            let answer = client.send(method.clone(), &path, &[], Bytes::new()).await.unwrap();
            let status = answer.whole().await.unwrap().status;
            let is_shown = methods.iter().any(|shown| shown == method.as_str());
            let is_answered = status != 405 && status != 404;
            assert_eq!(is_answered, is_shown, "{heading}: {method} {path}: {status}");
            assert_ne!(status, 404, "{heading}: {method} {path}");
        }
    }
}

fn address() -> SocketAddr {
    format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap()
}

fn worker(folder: &Path, listen: SocketAddr) -> Process {
    let model = files::demo_model().unwrap().to_string_lossy().into_owned();
    let listen = listen.to_string();
    let args = [model.as_str(), "--listen", &listen, "--device", "cpu", "--kv-pool", "64MiB"];
    let mut program = Program::new("baton-workerd", "worker", args);
    program.env.push(("BATON_TEST".to_owned(), "1".to_owned()));
    program.spawn(folder).unwrap()
}

fn router(folder: &Path, listen: SocketAddr, admin: SocketAddr, server: SocketAddr) -> Process {
    let file = folder.join("router.toml");
    let text = format!(
        "[server]\nlisten = \"{listen}\"\nadmin_listen = \"{admin}\"\n[[context.servers]]\nurl = \"{server}\"\n\
         [[generation.servers]]\nurl = \"{server}\"\n"
    );
    std::fs::write(&file, text).unwrap();
    let args = ["--config", file.to_str().unwrap()];
    process::Program::new("baton-router", "router", args).spawn(folder).unwrap()
}

#[tokio::test]
async fn both_daemons_answer_what_the_page_says_by_the_methods_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let [worker_at, router_at, admin_at] = [(); 3].map(|()| address());
    let mut worker = worker(folder.path(), worker_at);
    let mut router = router(folder.path(), router_at, admin_at, worker_at);
    eventually(READY, "router and worker are ready", || async {
        let answer = Client::new(router_at).get("/health").await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    ask(Client::new(router_at), "Router", "").await;
    ask(Client::new(worker_at), "Worker", "").await;
    ask(Client::new(admin_at), "Router: admin port", &worker_at.to_string()).await;
    for process in [&mut router, &mut worker] {
        assert!(process.terminate(STOP).unwrap().success());
    }
}

#[test]
fn every_path_of_the_code_is_on_the_page() {
    let shown: BTreeSet<String> = ["Router", "Router: admin port", "Worker"]
        .iter()
        .flat_map(|heading| rows(heading))
        .map(|(path, _)| path)
        .collect();
    let files = ["router/src/proxy.rs", "router/src/admin.rs", "router/src/dialect/mod.rs"];
    let mut bodies: Vec<String> = files.iter().map(|file| sources::body(Path::new(file))).collect();
    bodies.extend(sources::below("workerd/src/api").into_iter().map(|(_, text)| text));
    let is_path = |text: &&str| {
        let rest = text.strip_prefix('/');
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"/_-".contains(&b);
        rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(plain))
    };
    for body in &bodies {
        for path in sources::literals(body).filter(is_path) {
            // A beginning, `/admin/workers/`, has something behind it.
            let is_shown =
                shown.iter().any(|it| it == path || path.ends_with('/') && it.starts_with(path));
            assert!(is_shown, "{path}");
        }
    }
}
