//! Clients that ask without a pause, each request over a connection of its own, and what became of their requests.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use baton_integration::client::Client;
use baton_integration::nested_systemd::in_network;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::host::{MODEL, PUBLIC, client};

pub const CLIENTS: usize = 3;
const TOKENS: usize = 8;

/// What became of all requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Answered whole.
    pub served: usize,
    /// Failed before a byte of an answer's text: what nobody may see.
    pub failed: Vec<String>,
    /// Broken off after that.
    pub broken: Vec<String>,
}

/// Running clients.
pub struct Load {
    done: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    thread: JoinHandle<Tally>,
}

impl Load {
    /// Starts them in `network`.
    pub fn start(network: PathBuf) -> Self {
        let (done, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (stop, count) = (Arc::clone(&done), Arc::clone(&served));
        let thread = std::thread::spawn(move || in_network(network, || run(stop, count)));
        Self { done, served, thread }
    }

    /// Waits until so many more were served.
    pub fn goes_on(&self, requests: usize) {
        let goal = self.served.load(Ordering::Acquire) + requests;
        let begun = std::time::Instant::now();
        while self.served.load(Ordering::Acquire) < goal {
            assert!(begun.elapsed() < super::host::PATIENCE, "requests are not served any more");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Ends them, once each has its answer.
    pub fn stop(self) -> Tally {
        self.done.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }

    /// Ends them; nobody may have failed, in no way. How many were served.
    pub fn nobody_failed(self) -> usize {
        let tally = self.stop();
        assert!(tally.failed.is_empty() && tally.broken.is_empty(), "{tally:?}");
        tally.served
    }
}

async fn run(done: Arc<AtomicBool>, served: Arc<AtomicUsize>) -> Tally {
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        clients.spawn(ask_on(number, Arc::clone(&done), Arc::clone(&served)));
    }
    let mut all = Tally::default();
    for tally in clients.join_all().await {
        all.served += tally.served;
        all.failed.extend(tally.failed);
        all.broken.extend(tally.broken);
    }
    all
}

async fn ask_on(client_number: usize, done: Arc<AtomicBool>, served: Arc<AtomicUsize>) -> Tally {
    let mut tally = Tally::default();
    for number in 0.. {
        if done.load(Ordering::Acquire) {
            break;
        }
        let prompt = format!("client {client_number} asks for the {number}th time");
        let request = json!({"model": MODEL, "prompt": prompt, "max_tokens": TOKENS,
            "temperature": 0, "ignore_eos": true, "stream": true});
        match ask(client(PUBLIC), &request).await {
            Ok(()) => {
                tally.served += 1;
                served.fetch_add(1, Ordering::AcqRel);
            }
            Err((false, error)) => tally.failed.push(error),
            Err((true, error)) => tally.broken.push(error),
        }
    }
    tally
}

/// One request; an error with whether an answer had begun.
async fn ask(client: Client, request: &Value) -> Result<(), (bool, String)> {
    let begun = |has: bool| move |error: anyhow::Error| (has, format!("{error:#}"));
    let mut stream = client.stream("/v1/completions", request).await.map_err(begun(false))?;
    if stream.status != 200 {
        let status = stream.status;
        let answer = stream.whole().await.map_err(begun(false))?;
        return Err((false, format!("{status}: {}", String::from_utf8_lossy(&answer.body))));
    }
    let mut events = 0;
    loop {
        match stream.event().await.map_err(begun(events > 0))? {
            Some(event) if event == "[DONE]" => return Ok(()),
            Some(event) if event.contains("\"error\"") => return Err((events > 0, event)),
            Some(_) => events += 1,
            None => return Err((events > 0, "an end without [DONE]".to_owned())),
        }
    }
}
