//! What the router agrees on with a service manager, and Unix sockets: sockets that are handed over, notifications, heartbeats.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::mock_worker::MockWorker;
use baton_integration::process::{Process, Program, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::support::{READY, STOP};

/// A router that is not started yet, before a scripted worker of each role.
pub struct Scene {
    pub workers: [MockWorker; 2],
    pub admin: Client,
    program: Program,
    folder: TempDir,
}

impl Scene {
    /// It is to listen on `listen`.
    pub async fn new(listen: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let workers =
            [MockWorker::start(true, 4).await.unwrap(), MockWorker::start(true, 4).await.unwrap()];
        let admin: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
        let [context, generation] = &workers;
        let (context, generation) = (context.address, generation.address);
        let listen = listen.replace("FOLDER", folder.path().to_str().unwrap());
        let text = format!(
            "[server]\nlisten = \"{listen}\"\nadmin_listen = \"{admin}\"\nthreads = 1\n\
             [[context.servers]]\nurl = \"{context}\"\n[[generation.servers]]\nurl = \"{generation}\"\n"
        );
        std::fs::write(folder.path().join("router.toml"), text).unwrap();
        let program = Program::new("baton-router", "router", ["--config", "router.toml"]);
        Self { workers, admin: Client::new(admin), program, folder }
    }

    /// Adds sections to its configuration.
    pub fn configure(&self, sections: &str) {
        let file = self.path("router.toml");
        let text = std::fs::read_to_string(&file).unwrap() + sections;
        std::fs::write(file, text).unwrap();
    }

    /// Starts it.
    pub fn start(&self) -> Process {
        self.program.spawn(self.folder.path()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waits until it would serve.
    pub async fn ready(&self) {
        eventually(READY, "the router is ready", || async {
            let answer = self.admin.get("/readyz").await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
    }

    /// Where the router tells how it is: messages wait here.
    fn listens(&mut self) -> UnixDatagram {
        let path = self.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(READY)).unwrap();
        self.program.env.push(("NOTIFY_SOCKET".into(), path.to_str().unwrap().into()));
        socket
    }
}

fn hear(socket: &UnixDatagram) -> String {
    let mut text = [0; 1024];
    let length = socket.recv(&mut text).unwrap();
    String::from_utf8(text[..length].to_vec()).unwrap()
}

fn ask() -> Value {
    json!({"model": "mock", "prompt": "hello", "max_tokens": 5})
}

pub fn end(mut router: Process) {
    assert_eq!(router.terminate(STOP).unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_socket_that_was_handed_over_outlives_the_router_and_no_connection_is_refused() {
    let scene = Scene::new("systemd:http").await;
    // Blocking, as a service manager's may be.
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = Client::new(socket.local_addr().unwrap());
    let spawn = || {
        let handed = socket.try_clone().unwrap().into();
        scene.program.spawn_with_socket(scene.folder.path(), "http", handed).unwrap()
    };
    let first = spawn();
    let answer = client.post("/v1/completions", &ask()).await.unwrap();
    assert_eq!(answer.ok().unwrap()["choices"][0]["text"], "A 0 1 2 3");
    end(first);
    // Nobody is there; the request waits in the socket's queue.
    let waiting = tokio::spawn(async move { client.post("/v1/completions", &ask()).await });
    tokio::task::yield_now().await;
    let second = spawn();
    let answer = waiting.await.unwrap().unwrap();
    assert_eq!(answer.ok().unwrap()["choices"][0]["text"], "A 0 1 2 3");
    end(second);
}

#[tokio::test]
async fn a_socket_that_was_not_handed_over_is_named() {
    let scene = Scene::new("systemd:http").await;
    let mut alone = scene.start();
    assert_eq!(alone.wait(READY).unwrap().code(), Some(1));
    let log = alone.log();
    assert!(log.contains("cannot listen on `systemd:http`"), "{log}");
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = scene.program.spawn_with_socket(scene.folder.path(), "https", socket.into());
    let mut other = other.unwrap();
    assert_eq!(other.wait(READY).unwrap().code(), Some(1));
    // Connected, not listening.
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let wrong = scene.program.spawn_with_socket(scene.folder.path(), "http", one.into());
    let mut wrong = wrong.unwrap();
    assert_eq!(wrong.wait(READY).unwrap().code(), Some(1));
    assert!(wrong.log().contains("does not listen"), "{}", wrong.log());
}

#[tokio::test]
async fn a_unix_socket_that_was_handed_over_keeps_its_mode() {
    let scene = Scene::new("systemd:http").await;
    let path = scene.path("http.sock");
    let socket = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o660)).unwrap();
    let handed = scene.program.spawn_with_socket(scene.folder.path(), "http", socket.into());
    scene.ready().await;
    assert_eq!(version(&path).await, 200);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    end(handed.unwrap());
}

#[tokio::test]
async fn the_router_serves_on_a_unix_socket_and_asks_workers_on_theirs() {
    let scene = Scene::new("unix:FOLDER/front.sock").await;
    let front = scene.start();
    scene.ready().await;
    assert_eq!(version(&scene.path("front.sock")).await, 200);
    // Another router takes the first for a worker: what matters is that it reaches it.
    let mut behind = Scene::new("127.0.0.1:0").await;
    let config = behind.path("router.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let url = format!("unix:{}", scene.path("front.sock").display());
    let workers = text.split("[[context").next().unwrap().to_owned()
        + &format!(
            "[[context.servers]]\nurl = \"{url}\"\n[[generation.servers]]\nurl = \"{url}\"\n"
        );
    std::fs::write(config, workers).unwrap();
    behind.program.name = "behind".into();
    let second = behind.start();
    behind.ready().await;
    let workers = behind.admin.get("/admin/workers").await.unwrap().ok().unwrap();
    assert_eq!(workers["workers"][0]["url"], url);
    assert_eq!(workers["workers"][0]["condition"], "up");
    end(second);
    end(front);
}

/// Status of `GET /version` over a Unix socket.
async fn version(path: &std::path::Path) -> u16 {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let request = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_service_manager_hears_when_the_router_serves_reloads_and_stops() {
    let mut scene = Scene::new("127.0.0.1:0").await;
    let heard = scene.listens();
    let mut router = scene.start();
    assert_eq!(hear(&heard), "READY=1\nSTATUS=serving");
    router.signal("HUP").unwrap();
    let reloading = hear(&heard);
    let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(time.parse::<u64>().unwrap() > 0);
    assert_eq!(hear(&heard), "READY=1\nSTATUS=serving, configuration version 1");
    scene.configure("[limits]\nmax_in_flight = 0\n");
    router.signal("HUP").unwrap();
    assert!(hear(&heard).starts_with("RELOADING=1\n"));
    let refused = hear(&heard);
    assert!(refused.starts_with("READY=1\nSTATUS=serving, the last reload was refused: "));
    assert!(refused.contains("`limits.max_in_flight`"), "{refused}");
    router.signal("TERM").unwrap();
    assert_eq!(hear(&heard), "STOPPING=1\nSTATUS=draining, 0 requests in flight");
    assert_eq!(router.wait(STOP).unwrap().code(), Some(0));
}

#[tokio::test]
async fn the_heart_beats_while_the_public_port_answers() {
    let mut scene = Scene::new("127.0.0.1:0").await;
    let heard = scene.listens();
    let micros = Duration::from_secs(3).as_micros().to_string();
    scene.program.env.push(("WATCHDOG_USEC".into(), micros));
    let router = scene.start();
    let mut messages: Vec<String> = (0..4).map(|_| hear(&heard)).collect();
    messages.sort();
    assert_eq!(messages, ["READY=1\nSTATUS=serving", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]);
    end(router);
}

#[tokio::test]
async fn heartbeats_are_no_lines_of_the_access_log() {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port().unwrap()).parse().unwrap();
    let mut scene = Scene::new(&address.to_string()).await;
    scene.configure("[log]\naccess = true\n");
    let heard = scene.listens();
    let micros = Duration::from_millis(600).as_micros().to_string();
    scene.program.env.push(("WATCHDOG_USEC".into(), micros));
    let router = scene.start();
    let beats = (0..6).map(|_| hear(&heard)).filter(|message| message == "WATCHDOG=1").count();
    assert_eq!(beats, 5);
    // Another one's `/version` is one; it comes after those before it.
    assert_eq!(Client::new(address).get("/version").await.unwrap().status, 200);
    let lines = eventually(READY, "the client's line", || async {
        let lines = router.log().matches("\"path\":\"/version\"").count();
        (lines > 0).then_some(lines)
    })
    .await;
    assert_eq!(lines, 1, "{}", router.log());
    end(router);
}
