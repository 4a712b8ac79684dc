//! Puts the parts together: everything one router shares, and the Pingora services around it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use baton_shared::config::ConfigError;
use baton_shared::id::{IdMint, InvalidWorkerId};
use baton_shared::telemetry::LogHandle;
use baton_shared::wire::auth::Keys;
use pingora_core::apps::HttpServerOptions;
use pingora_core::server::configuration::ServerConf;
use pingora_core::server::{Server, ShutdownWatch};
use pingora_core::services::background::{BackgroundService, background_service};
use pingora_core::services::listening::Service;
use pingora_proxy::{HttpProxy, http_proxy};

use crate::admin::Admin;
use crate::admin::token::{Token, TokenError};
use crate::arrivals::Arrivals;
use crate::client::pool;
use crate::config::{Loaded, RouterConfig};
use crate::engine::{KEEP_ALIVE, Parts, Router};
use crate::health::prober;
use crate::limits::InFlight;
use crate::listen::{Bound, Inherited, ListenError, Listening};
use crate::metrics::Metrics;
use crate::proxy::{Hooks, RouterProxy};
use crate::table::keys::LiveKeys;
use crate::table::reload::Reloader;
use crate::table::{Table, watch};
use crate::watchdog::Mark;

/// What all services of one router share.
#[derive(Debug)]
pub struct Shared {
    /// Which workers there are.
    pub table: Arc<Table>,
    /// Replaces the table.
    pub reloader: Arc<Reloader>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Completions being served.
    pub in_flight: InFlight,
    /// Requests of any kind on the public port, until their last byte is out.
    pub visits: InFlight,
    /// Connections to the public port that have not asked yet.
    pub arrivals: Arrivals,
    /// The engine.
    pub router: Router,
    /// On the watchdog's own questions.
    pub heartbeat: Mark,
    draining: AtomicBool,
}

impl Shared {
    /// Whether work would be accepted: a usable worker of each role, and not draining.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.table.snapshot().ready(self.table.now())
    }

    /// Whether the router is about to end: it is not ready any more, and closes connections after their answer.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Serves what comes until the ports of [`RouterBuilder::add_to`] are closed (which Pingora does when its server
    /// shuts down); resolves when the last request has ended and every lease left behind was given back or given up.
    /// Set a deadline around it.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.arrivals.ended().await;
        loop {
            self.visits.idle().await;
            // An answer may still be on its way, or a request, and then that one is served.
            if self.arrivals.parted().await || self.visits.count() == 0 {
                break;
            }
        }
        self.router.drained().await;
    }

    /// Prometheus' text form of everything.
    pub fn render_metrics(&self) -> String {
        let (table, now) = (self.table.snapshot_full(), self.table.now());
        self.metrics.render(&table, now, self.in_flight.count())
    }
}

/// A router before it serves: take single parts from it, or add all of it to a Pingora server.
#[derive(Debug)]
pub struct RouterBuilder<H: Hooks = ()> {
    shared: Arc<Shared>,
    hooks: H,
}

impl RouterBuilder<()> {
    /// A router of a validated configuration; `keys` are those of `auth.internal_request_auth_key_file`.
    ///
    /// # Errors
    /// If a server's name is none, which validation would have found.
    pub fn new(config: RouterConfig, keys: Keys) -> Result<Self, InvalidWorkerId> {
        // Random where not configured, so that routers side by side mint different ids.
        let mint = IdMint::new(config.routing.node_id.unwrap_or_else(rand::random), rand::random());
        let table = Arc::new(Table::new(config)?);
        let metrics = Arc::new(Metrics::new());
        let in_flight = InFlight::default();
        let keys = LiveKeys::from(keys);
        let reloader = Reloader::new(Arc::clone(&table), keys.clone(), Arc::clone(&metrics));
        let router = Router::new(Parts {
            table: Arc::clone(&table),
            metrics: Arc::clone(&metrics),
            keys,
            in_flight: in_flight.clone(),
            mint,
        });
        let shared = Shared {
            table,
            reloader: Arc::new(reloader),
            metrics,
            in_flight,
            visits: InFlight::default(),
            arrivals: Arrivals::default(),
            router,
            heartbeat: Mark::default(),
            draining: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), hooks: () })
    }
}

impl<H: Hooks> RouterBuilder<H> {
    /// The same with other hooks.
    pub fn with_hooks<N: Hooks>(self, hooks: N) -> RouterBuilder<N> {
        RouterBuilder { shared: self.shared, hooks }
    }

    /// What the services share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The engine, to be called from a foreign `ProxyHttp`.
    pub fn router(&self) -> Router {
        self.shared.router.clone()
    }

    /// Lets reloads read `path` by `read`, and the attendant watch it.
    pub fn with_file(
        self,
        path: PathBuf,
        read: impl Fn() -> Result<Loaded, ConfigError> + Send + Sync + 'static,
    ) -> Self {
        self.shared.reloader.set_file(path, read);
        self
    }

    /// Lets reloads and operators change the level of the process's logs.
    pub fn with_log(self, log: LogHandle) -> Self {
        self.shared.reloader.set_log(log);
        self
    }

    /// Probes workers, watches the configuration's file, keeps metrics small and few idle connections open; without it
    /// no worker ever becomes usable.
    pub fn attendant(&self) -> Attendant {
        Attendant { shared: Arc::clone(&self.shared) }
    }

    /// The ready proxy.
    pub fn proxy(self) -> RouterProxy<H> {
        RouterProxy::new(self.shared, self.hooks)
    }

    /// Binds the configured addresses, or takes them from those `inherited`, and adds public port, admin port and
    /// attendant to `server`.
    ///
    /// # Errors
    /// If an address cannot be bound or the admin port's token cannot be read; nothing has been added then.
    pub fn add_to(
        self,
        server: &mut Server,
        mut inherited: Inherited,
    ) -> Result<Addresses, StartError> {
        let config = Arc::clone(&self.shared.table.snapshot().config);
        let token = config.server.admin_token_file.as_deref().map(Token::load).transpose()?;
        let public = Bound::bind(&config.server.listen, &mut inherited)?;
        let admin = Bound::bind(&config.server.admin_listen, &mut inherited)?;
        for (name, _) in &inherited.0 {
            tracing::warn!(name, "an inherited socket that no `listen` names is closed");
        }
        let addresses =
            Addresses { public: public.address.to_string(), admin: admin.address.to_string() };
        let (attendant, arrivals) = (self.attendant(), self.shared.arrivals.clone());
        let shared = Arc::clone(&self.shared);
        let table = Arc::clone(&self.shared.table);
        let clients = arrivals.port(app(&server.configuration, self.proxy()), &public, table)?;
        server.add_service(background_service("attendant", attendant));
        let mut operators = Service::new("admin".to_owned(), Admin::new(shared, token));
        operators.threads = Some(1);
        server.add_service(Listening::new(operators, admin));
        let clients = Service::new("router".to_owned(), clients);
        server.add_service(Listening::new(clients, public));
        Ok(addresses)
    }
}

/// Why a router cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// `server.admin_token_file` cannot be used.
    #[error("`server.admin_token_file`: {0}")]
    Token(#[from] TokenError),
}

/// Where a router listens, ports as chosen.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// For clients.
    pub public: String,
    /// For operators.
    pub admin: String,
}

/// A Pingora service of the proxy, without listeners.
pub fn service<H: Hooks>(
    conf: &Arc<ServerConf>,
    proxy: RouterProxy<H>,
) -> Service<HttpProxy<RouterProxy<H>>> {
    Service::new("router".to_owned(), app(conf, proxy))
}

fn app<H: Hooks>(conf: &Arc<ServerConf>, proxy: RouterProxy<H>) -> HttpProxy<RouterProxy<H>> {
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    options.h2_idle_timeout = Some(KEEP_ALIVE);
    let mut app = http_proxy(conf, proxy);
    app.server_options = Some(options);
    app
}

/// How Pingora is run for a router: threads that do not share work, since worker connections belong to the thread
/// that made them, and a grace period that never ends before the drain does.
pub fn server_conf(config: &RouterConfig) -> ServerConf {
    let threads = match config.server.threads {
        0 => baton_shared::os::cores_available().get(),
        configured => configured,
    };
    ServerConf {
        threads,
        work_stealing: false,
        grace_period_seconds: Some(config.server.drain_timeout.0.as_secs() + 3600),
        ..ServerConf::default()
    }
}

/// The background work of a router.
#[derive(Debug)]
pub struct Attendant {
    shared: Arc<Shared>,
}

/// How often histograms are emptied into their buckets, and connections closed that nobody used for a while.
const UPKEEP: std::time::Duration = std::time::Duration::from_secs(5);

impl Attendant {
    /// Works for as long as the future is polled.
    pub async fn run(&self) {
        let upkeep = async {
            loop {
                tokio::time::sleep(UPKEEP).await;
                self.shared.metrics.upkeep();
                pool::sweep();
            }
        };
        let (table, reloader) = (Arc::clone(&self.shared.table), Arc::clone(&self.shared.reloader));
        tokio::join!(prober::run(Arc::clone(&table)), watch::run(reloader, table), upkeep);
    }
}

#[async_trait]
impl BackgroundService for Attendant {
    async fn start(&self, _shutdown: ShutdownWatch) {
        // Through a drain too: what is in flight may still need another worker. The process ends it.
        self.run().await;
    }
}
