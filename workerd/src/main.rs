//! `baton-workerd`: reads its configuration, puts a worker together, serves it, ends.
//!
//! Exit codes: 0 ended as asked, 1 failed, 2 wrong usage, 78 bad configuration.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use baton_shared::config::net::Listen;
use baton_shared::config::{ConfigError, EXIT_CODE};
use baton_shared::notify::{Notifier, watchdog_limit};
use baton_shared::telemetry::{self, BUILD};
use baton_workerd::api::server;
use baton_workerd::assemble::{Assembled, assemble, peer_address};
use baton_workerd::cli::{Action, Args};
use baton_workerd::config::WorkerConfig;
use baton_workerd::engine::EngineEnd;
use baton_workerd::failpoint;
use baton_workerd::handover::nixl;
use baton_workerd::log_level;
use baton_workerd::ops;
use clap::Parser;
use tokio::net::TcpSocket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Recorded times are sorted into their buckets this often.
const UPKEEP: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            // Standard error is all that is left; if it is closed, the exit code has to do.
            writeln!(std::io::stderr(), "baton-workerd: {error:#}").ok();
            let is_config = error.downcast_ref::<ConfigError>().is_some();
            ExitCode::from(if is_config { EXIT_CODE } else { 1 })
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    let action = args.action();
    let variable = |name: &str| std::env::var(name).ok();
    let config = args.clone().load(variable)?;
    let is_test = failpoint::enable(variable)?;
    match action {
        Action::Check => return Ok(ExitCode::SUCCESS),
        Action::Print => {
            std::io::stdout().write_all(toml::to_string(&config)?.as_bytes())?;
            return Ok(ExitCode::SUCCESS);
        }
        Action::Serve => {}
    }
    // Before the first thread: NIXL and UCX read the environment when they are loaded.
    let ucx: Vec<_> = config.nixl.ucx.clone().into_iter().collect();
    nixl::prepare_environment(&ucx)?;
    let log = telemetry::init(config.log.format, &config.log.level)?;
    if is_test {
        tracing::warn!("`BATON_TEST=1`: whoever reaches this worker can hold, slow and end it");
    }
    if !config.without_effect.is_empty() {
        tracing::warn!(
            keys = config.without_effect.join(", "),
            "keys of the file that have no effect here"
        );
    }
    let service_manager = std::env::var_os("NOTIFY_SOCKET");
    let notifier = Notifier::new(service_manager.as_deref()).context("`$NOTIFY_SOCKET`")?;
    let notifier = Arc::new(notifier);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let _inside = runtime.enter();
    log_level::follow(args, config.clone(), log)?;
    let is_serving = Arc::new(AtomicBool::new(false));
    let (shutdown, forced) = signals(Arc::clone(&notifier), Arc::clone(&is_serving))?;
    // Bound first, so that a port in use is found before a model is loaded; not yet listening, so that nobody
    // waits for an answer meanwhile.
    let socket = bind(&config)?;
    let address = peer_address(&config, socket.local_addr()?)?;
    notifier.say("STATUS=loading the model");
    let Assembled { worker, mover } = assemble(&config, address, variable)?;
    let metrics = Arc::clone(&worker.metrics);
    let end = runtime.block_on(async {
        let listener = socket.listen(BACKLOG).with_context(|| format!("listening on {address}"))?;
        let upkeep = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(UPKEEP);
            loop {
                ticks.tick().await;
                metrics.upkeep();
            }
        });
        announce(&config, &worker, address);
        is_serving.store(true, Ordering::Release);
        let limit = watchdog_limit(variable);
        let report = tokio::spawn(ops::report(notifier, worker.engine.clone(), limit));
        let write_timeout = config.server.write_timeout.duration();
        let served = server::run(listener, worker, write_timeout, shutdown);
        let end = tokio::select! {
            end = served => Ok(end),
            _ = forced => Err(anyhow!("interrupted twice, ended without finishing")),
        };
        upkeep.abort();
        report.abort();
        end
    })?;
    if !mover.shutdown() {
        tracing::warn!("the mover thread has not ended in time");
    }
    match end {
        EngineEnd::Drained => {
            tracing::info!("ended");
            Ok(ExitCode::SUCCESS)
        }
        EngineEnd::Failed(reason) => Err(anyhow!("the engine failed: {reason}")),
    }
}

/// A socket at `server.listen`; a name's addresses are tried in turn.
fn bind(config: &WorkerConfig) -> Result<TcpSocket> {
    let listen = &config.server.listen;
    let addresses = match listen {
        Listen::Tcp(address) => address.resolve().with_context(|| format!("`{listen}`"))?,
        Listen::Unix(_) | Listen::Inherited(_) => Vec::new(),
    };
    let mut failure = anyhow!("`{listen}` has no address");
    for address in addresses {
        match bind_to(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = anyhow!(error).context(format!("cannot listen on {address}")),
        }
    }
    Err(failure)
}

fn bind_to(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn announce(
    config: &WorkerConfig,
    worker: &baton_workerd::api::worker::Worker,
    address: SocketAddr,
) {
    let limits = worker.limits;
    tracing::info!(
        %address,
        version = %BUILD,
        model = worker.names.join(","),
        role = worker.role.as_str(),
        incarnation = %worker.incarnation,
        kv_blocks = limits.pool_tokens / limits.block_tokens,
        max_len = limits.max_len,
        authentication = worker.keys.authenticate(),
        "serving"
    );
    if config.is_exposed() {
        tracing::warn!(
            interface = config.handover.advertise,
            "whoever reaches this worker's transfer ports can read and write its memory: firewall them"
        );
    }
}

/// What begins a drain (SIGTERM or the first SIGINT), and what cuts it short (a second SIGINT). Before anything is
/// served there is nothing to finish, and the process ends at once.
fn signals(
    notifier: Arc<Notifier>,
    is_serving: Arc<AtomicBool>,
) -> std::io::Result<(impl Future<Output = ()>, oneshot::Receiver<()>)> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (drain, draining) = oneshot::channel();
    let (force, forced) = oneshot::channel();
    tokio::spawn(async move {
        let mut interrupts = tokio::select! {
            _ = terminate.recv() => 0,
            _ = interrupt.recv() => 1,
        };
        notifier.say("STOPPING=1");
        if !is_serving.load(Ordering::Acquire) {
            tracing::info!("ended before anything was served");
            std::process::exit(0);
        }
        tracing::info!("stopping: new requests are refused, running ones finished");
        // Nobody listens any more if the engine has just ended by itself.
        drain.send(()).ok();
        // A terminal interrupts the whole group while a parent terminates its children: that is one wish.
        while interrupts < 2 && interrupt.recv().await.is_some() {
            interrupts += 1;
        }
        force.send(()).ok();
    });
    let shutdown = async {
        if draining.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    Ok((shutdown, forced))
}
