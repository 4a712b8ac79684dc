//! Asks each worker for its health, learns its dialect, and keeps its addresses fresh.
//!
//! One loop owns when; each visit is a short task with a deadline, so a silent worker delays nobody, and
//! at most one visit of a worker runs at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use baton_shared::config::net::Endpoint;
use tokio::task::JoinSet;

use super::Event;
use super::get::{GetError, Reply, get, resolve};
use crate::config::HealthConfig;
use crate::dialect::era;
use crate::table::Table;
use crate::table::worker::{Dialect, Worker};

/// How often a host name is resolved again while its worker is well.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);

/// Shortest time between two probes of a worker, however many requests fail on it.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Probes for as long as the future is polled.
pub async fn run(table: Arc<Table>) {
    let mut rounds = Rounds::default();
    let mut visits: JoinSet<usize> = JoinSet::new();
    loop {
        let next = rounds.start_due(&table, &mut visits);
        let wait = next.saturating_sub(table.now());
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = table.probe_wanted() => {}
            Some(done) = visits.join_next() => {
                if let Ok(slot) = done {
                    rounds.finished(slot);
                }
            }
        }
    }
}

/// When each worker, by slot, was last looked at.
#[derive(Default)]
struct Rounds(HashMap<usize, LastVisit>);

#[derive(Default)]
struct LastVisit {
    probed: Option<Duration>,
    resolved: Option<Duration>,
    running: bool,
}

impl Rounds {
    /// Starts every visit that is due; tells when to look again.
    fn start_due(&mut self, table: &Arc<Table>, visits: &mut JoinSet<usize>) -> Duration {
        let snapshot = table.snapshot_full();
        let rules = &snapshot.config.health;
        let now = table.now();
        let mut next = now + rules.probe_interval.0.min(RESOLVE_INTERVAL);
        self.0.retain(|slot, _| snapshot.workers().any(|worker| worker.slot == *slot));
        for worker in snapshot.workers() {
            let last = self.0.entry(worker.slot).or_default();
            if last.running {
                continue;
            }
            let earliest = last.probed.map_or(Duration::ZERO, |probed| probed + MIN_INTERVAL);
            let due = worker.health.probe_due().max(earliest);
            let probe = due <= now;
            let stale = last.resolved.is_none_or(|then| now >= then + RESOLVE_INTERVAL);
            let resolve = stale || (probe && !worker.health.is_spotless());
            if probe {
                last.probed = Some(now);
                worker.health.set_probe_due(now + rules.probe_interval.0);
            }
            if resolve {
                last.resolved = Some(now);
            }
            if probe || resolve {
                last.running = true;
                let visit = Visit { probe, resolve, rules: rules.clone() };
                visits.spawn(visit.run(Arc::clone(table), Arc::clone(worker)));
            } else {
                next = next.min(due);
            }
        }
        next
    }

    fn finished(&mut self, slot: usize) {
        if let Some(last) = self.0.get_mut(&slot) {
            last.running = false;
        }
    }
}

struct Visit {
    probe: bool,
    resolve: bool,
    rules: HealthConfig,
}

impl Visit {
    async fn run(self, table: Arc<Table>, worker: Arc<Worker>) -> usize {
        let timeout = self.rules.probe_timeout.0;
        if let (true, Endpoint::Tcp(at)) = (self.resolve, &worker.endpoint) {
            match resolve(&at.host, at.port, timeout).await {
                Ok(addresses) => worker.set_resolved(&addresses),
                // Known addresses stay in use: a name server that is away must not take workers with it.
                Err(error) => {
                    tracing::debug!(worker = worker.id.as_str(), %error, "name not resolved");
                }
            }
        }
        if self.probe {
            let answer = get(&worker, &self.rules.probe_path, timeout).await;
            let event = judge(&answer);
            if event == Event::ProbeOk && worker.dialect() == Dialect::Unknown {
                learn_dialect(&worker, timeout).await;
            }
            if matches!(event, Event::Refused | Event::ProbeNotReady) {
                // What comes back may be something else.
                worker.learn_dialect(Dialect::Unknown);
            }
            table.record(&worker, event);
        }
        worker.slot
    }
}

/// What a probe's answer means.
fn judge(answer: &Result<Reply, GetError>) -> Event {
    match answer {
        Ok(Reply { status: 200..=299, .. }) => Event::ProbeOk,
        Ok(Reply { status: 503, .. }) => Event::ProbeNotReady,
        Ok(_) | Err(GetError::Broken(_) | GetError::Late) => Event::ProbeFailed,
        Err(GetError::Unreachable(_)) => Event::Refused,
    }
}

/// Asks `/server_info`, then `/version` if it is not ours; a worker that answers neither stays unknown and is asked again.
async fn learn_dialect(worker: &Worker, timeout: Duration) {
    let info = get(worker, "/server_info", timeout).await;
    let version = match &info {
        Ok(reply) if dialect_of(Some(reply), None) == Dialect::Baton => None,
        Ok(_) => get(worker, "/version", timeout).await.ok(),
        Err(_) => return,
    };
    let dialect = dialect_of(info.as_ref().ok(), version.as_ref());
    if dialect != Dialect::Unknown {
        tracing::info!(worker = worker.id.as_str(), dialect = dialect.as_str(), "dialect known");
        worker.learn_dialect(dialect);
    }
}

/// Baton names itself in `/server_info`; whoever else answers one of the two is taken for TensorRT-LLM of the age
/// that its version tells.
fn dialect_of(info: Option<&Reply>, version: Option<&Reply>) -> Dialect {
    let json = |reply: &Reply| serde_json::from_slice::<serde_json::Value>(&reply.body).ok();
    let is_ok = |reply: &&Reply| reply.status == 200;
    let info = info.filter(is_ok).and_then(json);
    let version = version.filter(is_ok).and_then(json);
    if info.as_ref().is_some_and(|info| info.pointer("/baton/version").is_some()) {
        return Dialect::Baton;
    }
    match version.as_ref().and_then(|version| version.get("version")) {
        Some(version) => era::of_version(version.as_str().unwrap_or_default()),
        None if info.is_some() => Dialect::TrtllmMain,
        None => Dialect::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RouterConfig, ServerEntry};
    use baton_shared::config::units::Seconds;
    use std::sync::atomic::{AtomicU16, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn reply(status: u16, body: &str) -> Reply {
        Reply { status, body: body.as_bytes().to_vec().into() }
    }

    #[test]
    fn a_worker_is_ours_only_if_it_says_so() {
        let ours = reply(200, r#"{"baton":{"version":"0.1.0"}}"#);
        assert_eq!(dialect_of(Some(&ours), None), Dialect::Baton);
        assert_eq!(dialect_of(Some(&reply(200, "{}")), None), Dialect::TrtllmMain);
        let version = reply(200, r#"{"version":"1.4.0"}"#);
        assert_eq!(dialect_of(Some(&reply(404, "")), Some(&version)), Dialect::TrtllmMain);
        assert_eq!(dialect_of(Some(&reply(404, "")), Some(&reply(404, ""))), Dialect::Unknown);
        let old = reply(200, r#"{"version":"1.2.1"}"#);
        for info in [reply(404, ""), reply(200, "{}")] {
            assert_eq!(dialect_of(Some(&info), Some(&old)), Dialect::Trtllm12);
        }
    }

    #[test]
    fn an_answer_is_judged_by_who_is_to_blame() {
        assert_eq!(judge(&Ok(reply(204, ""))), Event::ProbeOk);
        assert_eq!(judge(&Ok(reply(503, ""))), Event::ProbeNotReady);
        assert_eq!(judge(&Ok(reply(500, ""))), Event::ProbeFailed);
        assert_eq!(judge(&Err(GetError::Late)), Event::ProbeFailed);
        assert_eq!(judge(&Err(GetError::Unreachable("x".to_owned()))), Event::Refused);
    }

    /// Answers every request with the current status until dropped.
    async fn worker(status: Arc<AtomicU16>) -> (u16, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = [0; 1024];
                let _read = stream.read(&mut head).await;
                let status = status.load(Ordering::Relaxed);
                let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}");
                let _written = stream.write_all(answer.as_bytes()).await;
            }
        });
        (port, task)
    }

    async fn until(what: impl Fn() -> bool) {
        let wait = async {
            while !what() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect("it should become true");
    }

    #[tokio::test]
    async fn a_worker_is_found_lost_and_found_again() {
        let status = Arc::new(AtomicU16::new(503));
        let (port, server) = worker(Arc::clone(&status)).await;
        let mut config = RouterConfig::default();
        config.health.probe_interval = Seconds::millis(100);
        config.context.servers =
            vec![ServerEntry::new(format!("localhost:{port}").parse().unwrap())];
        config.generation.servers =
            vec![ServerEntry::new(format!("127.0.0.1:{port}").parse().unwrap())];
        let table = Arc::new(Table::new(config).unwrap());
        let prober = tokio::spawn(run(Arc::clone(&table)));
        let snapshot = table.snapshot_full();
        let condition = || snapshot.context[0].health.condition(table.now());

        until(|| condition() == crate::health::Condition::Down).await;
        status.store(200, Ordering::Relaxed);
        until(|| snapshot.ready(table.now())).await;
        assert_eq!(snapshot.context[0].dialect(), Dialect::TrtllmMain);
        server.abort();
        until(|| condition() == crate::health::Condition::Down).await;
        prober.abort();
    }
}
