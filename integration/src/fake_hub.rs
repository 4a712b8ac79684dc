//! A model hub on loopback: one repository, with the answers of a real one and with what can go wrong.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{StreamExt, stream};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// The commit that `main` names.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub answers.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Only who shows this token gets anything.
    pub token: Option<String>,
    /// Nobody gets files before accepting conditions.
    pub is_gated: bool,
    /// Each body of a large file ends after this many bytes, by a broken connection.
    pub cut_after: Option<usize>,
    /// Large files are sent from their start, whatever is asked for.
    pub ignores_ranges: bool,
    /// Large files are damaged on their way.
    pub damages: bool,
    /// Answered with 503 before anything else.
    pub failures: usize,
}

/// A running hub; it ends with the value.
#[derive(Debug)]
pub struct FakeHub {
    address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: Runtime,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    /// `OWNER/NAME`.
    id: String,
    /// Large ones are on another host, as it were.
    files: BTreeMap<String, Bytes>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<String>>,
}

/// Files from this size on are large.
const LARGE: usize = 200_000;
/// What every model was called once, beside its owner.
pub const FORMER_NAME: &str = "former-name";

impl FakeHub {
    /// A hub with the files of a folder as model `id`.
    ///
    /// # Errors
    /// When the folder cannot be read or nothing can be served.
    pub fn start(id: &str, folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder).context("the model's folder")? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, Bytes::from(std::fs::read(entry.path())?));
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            address,
            id: id.to_owned(),
            files,
            behaviour: Mutex::default(),
            requests: Mutex::default(),
        });
        let router = Router::new()
            .route("/api/models/{owner}/{name}/revision/{revision}", get(list))
            .route("/{owner}/{name}/resolve/{revision}/{file}", get(resolve))
            .route("/bytes/{file}", get(bytes))
            .with_state(Arc::clone(&shared));
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, shared, _runtime: runtime })
    }

    /// For `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers so from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *lock(&self.shared.behaviour) = behaviour;
    }

    /// What was asked so far, as `METHOD PATH` and a range, and forgets it.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.shared.requests))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Notes a request; how to behave, or the refusal.
    fn enter(&self, request: &Request) -> Result<Behaviour, Box<Response>> {
        let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        let range = text("range").map(|range| format!(" {range}")).unwrap_or_default();
        let line = format!("{} {}{range}", request.method(), request.uri().path());
        lock(&self.requests).push(line);
        let mut behaviour = lock(&self.behaviour);
        if behaviour.failures > 0 {
            behaviour.failures -= 1;
            return Err(Box::new(StatusCode::SERVICE_UNAVAILABLE.into_response()));
        }
        let shown = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
        if request.uri().path().starts_with("/bytes/") {
            // Not the hub any more: a token that arrives here was given away.
            return match shown {
                None => Ok(behaviour.clone()),
                Some(_) => Err(Box::new(StatusCode::BAD_REQUEST.into_response())),
            };
        }
        let refuse = |status: StatusCode, code: &'static str| {
            let headers = [("x-error-code", code), ("x-error-message", "not for you")];
            Err(Box::new((status, headers).into_response()))
        };
        match &behaviour.token {
            Some(token) if shown != Some(token.as_str()) => {
                refuse(StatusCode::UNAUTHORIZED, "RepoNotFound")
            }
            _ if behaviour.is_gated && request.uri().path().contains("/resolve/") => {
                refuse(StatusCode::FORBIDDEN, "GatedRepo")
            }
            _ => Ok(behaviour.clone()),
        }
    }

    /// Where a model that is asked for by its former name is now.
    fn renamed(&self, request: &Request) -> Option<Response> {
        let owner = self.id.split('/').next().unwrap_or_default();
        let path = request.uri().path();
        let former = format!("/{owner}/{FORMER_NAME}/");
        let now = path.contains(&former).then(|| path.replace(&former, &format!("/{}/", self.id)));
        now.map(|now| (StatusCode::TEMPORARY_REDIRECT, [("location", now)]).into_response())
    }

    fn has(&self, owner: &str, name: &str, revision: &str) -> bool {
        self.id == format!("{owner}/{name}") && ["main", COMMIT].contains(&revision)
    }
}

async fn list(
    State(shared): State<Arc<Shared>>,
    UrlPath((owner, name, revision)): UrlPath<(String, String, String)>,
    request: Request,
) -> Response {
    match shared.enter(&request) {
        Err(refusal) => *refusal,
        Ok(_) if name == FORMER_NAME => shared.renamed(&request).unwrap_or_default(),
        Ok(_) if !shared.has(&owner, &name, &revision) => missing("RevisionNotFound"),
        Ok(_) => {
            let names = shared.files.keys().map(|name| json!({ "rfilename": name }));
            let names: Vec<_> = names.collect();
            axum::Json(json!({ "id": shared.id, "sha": COMMIT, "siblings": names })).into_response()
        }
    }
}

async fn resolve(
    State(shared): State<Arc<Shared>>,
    UrlPath((owner, name, revision, file)): UrlPath<(String, String, String, String)>,
    request: Request,
) -> Response {
    if let Err(refusal) = shared.enter(&request) {
        return *refusal;
    }
    if let Some(elsewhere) = shared.renamed(&request) {
        return elsewhere;
    }
    let bytes = shared.files.get(&file).filter(|_| shared.has(&owner, &name, &revision));
    let Some(bytes) = bytes else { return missing("EntryNotFound") };
    if bytes.len() < LARGE {
        let etag = format!("W/\"{}\"", &sha256(bytes)[..40]);
        return ([("etag", etag)], bytes.clone()).into_response();
    }
    let headers = [
        // Another host, as far as its name says.
        ("location", format!("http://localhost:{}/bytes/{file}", shared.address.port())),
        ("x-linked-etag", format!("\"{}\"", sha256(bytes))),
        ("x-linked-size", bytes.len().to_string()),
    ];
    (StatusCode::FOUND, headers).into_response()
}

async fn bytes(
    State(shared): State<Arc<Shared>>,
    UrlPath(file): UrlPath<String>,
    request: Request,
) -> Response {
    let behaviour = match shared.enter(&request) {
        Err(refusal) => return *refusal,
        Ok(behaviour) => behaviour,
    };
    let Some(bytes) = shared.files.get(&file) else { return missing("EntryNotFound") };
    let mut bytes = bytes.clone();
    if behaviour.damages {
        let mut changed = bytes.to_vec();
        changed[bytes.len() / 2] ^= 1;
        bytes = changed.into();
    }
    let from = if behaviour.ignores_ranges { None } else { range(request.headers()) };
    let all = bytes.len();
    let rest = bytes.slice(from.unwrap_or(0).min(all)..);
    let length = rest.len();
    let body = match behaviour.cut_after {
        Some(most) if most < length => {
            // What is there goes out while the body has nothing more to give; then it breaks.
            let cut = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter([Ok(rest.slice(..most))]).chain(cut))
        }
        _ => Body::from(rest),
    };
    let status = if from.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let start = from.unwrap_or(0);
    let headers = [
        ("content-length", length.to_string()),
        ("content-range", format!("bytes {start}-{}/{all}", all.saturating_sub(1))),
    ];
    (status, headers, body).into_response()
}

fn missing(code: &'static str) -> Response {
    (StatusCode::NOT_FOUND, [("x-error-code", code)]).into_response()
}

/// `bytes=N-`.
fn range(headers: &HeaderMap) -> Option<usize> {
    headers.get("range")?.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
