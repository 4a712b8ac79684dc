//! `baton-router`: reads the command line and the configuration, then serves until a signal.
//!
//! Exit codes: 0 ok, 1 failed at run time, 2 wrong usage, 78 bad configuration.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use baton_router::builder::{RouterBuilder, server_conf};
use baton_router::cli::Cli;
use baton_router::config::Loaded;
use baton_router::listen::Inherited;
use baton_router::ops::{Drain, HangUps, SignalWatch, Signals};
use baton_router::watchdog::Watchdog;
use baton_shared::config::{ConfigError, EXIT_CODE};
use baton_shared::notify::Notifier;
use baton_shared::{os, telemetry};
use clap::Parser;
use pingora_core::server::{RunArgs, Server};
use pingora_core::services::background::background_service;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let (code, message) = match run(&Cli::parse()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Config(error)) => (EXIT_CODE, error.to_string()),
        Err(Failure::Run(error)) => (1, format!("{error:#}")),
    };
    // Standard error may be closed; the code says it too.
    let _ = writeln!(std::io::stderr(), "baton-router: {message}");
    ExitCode::from(code)
}

enum Failure {
    Config(ConfigError),
    Run(anyhow::Error),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Config(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Run(error)
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let inherited = Inherited(os::inherited_sockets().context("socket activation")?);
    let Loaded { config, keys, without_effect, .. } = cli.load()?;
    if cli.print_config {
        let text = toml::to_string(&config.spelled_out()).context("configuration as TOML")?;
        let written = std::io::stdout().write_all(text.as_bytes());
        return Ok(written.context("standard output")?);
    }
    if cli.check {
        return Ok(());
    }
    let log = telemetry::init(config.log.format, &config.log.level).context("logs")?;
    if !without_effect.is_empty() {
        tracing::warn!(keys = without_effect.join(", "), "accepted, but without effect");
    }
    let again = cli.clone();
    let builder = RouterBuilder::new(config, keys).context("table")?;
    let builder = builder.with_log(log).with_file(cli.config.clone(), move || again.load());
    Ok(serve(builder, inherited)?)
}

fn serve(builder: RouterBuilder, inherited: Inherited) -> anyhow::Result<()> {
    let signals = Arc::new(Signals::install().context("signals")?);
    let service_manager = std::env::var_os("NOTIFY_SOCKET");
    let notifier = Notifier::new(service_manager.as_deref()).context("`$NOTIFY_SOCKET`")?;
    let notifier = Arc::new(notifier);
    let shared = Arc::clone(builder.shared());
    let conf = server_conf(&shared.table.snapshot().config);
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let addresses = builder.add_to(&mut server, inherited)?;
    tracing::info!(
        version = telemetry::BUILD.version,
        listen = %addresses.public,
        admin = %addresses.admin,
        context = shared.table.snapshot().context.len(),
        generation = shared.table.snapshot().generation.len(),
        "serving"
    );
    let reloader = Arc::clone(&shared.reloader);
    let (signals_too, notifier_too) = (Arc::clone(&signals), Arc::clone(&notifier));
    let hang_ups = HangUps { reloader, signals: signals_too, notifier: notifier_too };
    server.add_service(background_service("reload", hang_ups));
    if let Some(watchdog) = Watchdog::wanted(&notifier, &addresses.public, &shared.heartbeat) {
        server.add_service(background_service("watchdog", watchdog));
    }
    let drain = Drain { shared, signals: Arc::clone(&signals), notifier };
    server.add_service(background_service("drain", drain));
    // Returns only if Pingora ends before the drain does.
    server.run(RunArgs { shutdown_signal: Box::new(SignalWatch(signals)) });
    Ok(())
}
