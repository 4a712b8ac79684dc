//! A foreign Pingora proxy with a route of its own that hands `/v1/*` to Baton's engine.
//!
//! `cargo run --release --example embed -- 127.0.0.1:8080 localhost:8001 localhost:8003`, then
//! `curl localhost:8080/hello` and `curl localhost:8080/v1/completions -d '{"model": …, "prompt": …}'`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use baton_router::builder::{RouterBuilder, server_conf};
use baton_router::config::{RouterConfig, ServerEntry};
use baton_router::engine::{Reply, Router, RouterCtx, early};
use baton_router::proxy::fail;
use baton_shared::wire::auth::Keys;
use pingora_core::server::{RunArgs, Server, ShutdownWatch};
use pingora_core::services::background::{BackgroundService, background_service};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_error::{Error, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, Session, http_proxy_service};

// ANCHOR: proxy
/// Somebody's proxy; the engine's handle is one field of it.
struct Ours {
    router: Router,
}

/// Its state of a request; the engine's is one field of it.
#[derive(Default)]
struct Cx {
    router: RouterCtx,
}

#[async_trait]
impl ProxyHttp for Ours {
    type CTX = Cx;

    fn new_ctx(&self) -> Cx {
        Cx::default()
    }

    async fn early_request_filter(&self, session: &mut Session, _cx: &mut Cx) -> Result<()> {
        early(session.as_downstream_mut());
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, cx: &mut Cx) -> Result<bool> {
        let path = session.req_header().uri.path();
        if Router::matches(path) {
            cx.router.begin(session.as_downstream());
            return Box::pin(self.router.handle(session, &mut cx.router)).await.map(|_| true);
        }
        if path == "/hello" {
            let hello = Reply::json(200, vec!["\"hello\"\n".into()]);
            hello.send(session, "hello").await?;
            return Ok(true);
        }
        // Everything else would go to an upstream as in any Pingora proxy.
        Ok(false)
    }

    async fn upstream_peer(&self, _session: &mut Session, _cx: &mut Cx) -> Result<Box<HttpPeer>> {
        Error::e_explain(ErrorType::HTTPStatus(404), "this example has no upstream of its own")
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, cx: &mut Cx) -> FailToProxy {
        if cx.router.outcome.is_some() {
            return fail(session, &cx.router).await;
        }
        let error_code = if let ErrorType::HTTPStatus(status) = e.etype() { *status } else { 502 };
        // The connection is closed either way.
        let _sent = session.respond_error(error_code).await;
        FailToProxy { error_code, can_reuse_downstream: false }
    }
}
// ANCHOR_END: proxy

// ANCHOR: end
/// Ends the process when the last completion has ended: Pingora alone would sleep its whole grace period.
struct Ending(Router);

#[async_trait]
impl BackgroundService for Ending {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        // An error means that the server is gone, which is a shutdown too.
        drop(shutdown.wait_for(|begun| *begun).await);
        // Whether they ended or not, it is over then.
        drop(tokio::time::timeout(Duration::from_secs(30), self.0.drained()).await);
        std::process::exit(0);
    }
}
// ANCHOR_END: end

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = |name: &str| args.next().ok_or_else(|| anyhow::anyhow!("{name} is missing"));
    let (listen, context, generation) = (next("LISTEN")?, next("CONTEXT")?, next("GENERATION")?);
    let mut config = RouterConfig::default();
    config.context.servers = vec![ServerEntry::new(context.parse()?)];
    config.generation.servers = vec![ServerEntry::new(generation.parse()?)];
    config.validate()?;

    // ANCHOR: start
    let mut server = Server::new_with_opt_and_conf(None, server_conf(&config));
    server.bootstrap();
    let baton = RouterBuilder::new(config, Keys::none())?;
    server.add_service(background_service("attendant", baton.attendant()));
    server.add_service(background_service("ending", Ending(baton.router())));
    let ours = Ours { router: baton.router() };
    let mut service = http_proxy_service(&Arc::clone(&server.configuration), ours);
    service.add_tcp(&listen);
    server.add_service(service);
    server.run(RunArgs::default());
    // ANCHOR_END: start
    Ok(())
}
