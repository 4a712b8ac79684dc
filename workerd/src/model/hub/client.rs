//! What is asked of a hub, and what its answers mean.

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::cache::is_commit;
use super::{Deadlines, HubError, HubSettings, ModelId};

/// Longest listing of a repository, bytes.
const LISTING_LIMIT: u64 = 32 << 20;
/// Hosts that a question about a file is passed on to at most.
const HOPS: usize = 5;

/// A hub, asked about one model.
pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    id: ModelId,
    /// How long what may take.
    pub deadlines: Deadlines,
}

/// What a repository has at a commit.
#[derive(Debug)]
pub struct Listing {
    /// 40 hexadecimal digits.
    pub commit: String,
    /// Paths.
    pub files: Vec<String>,
}

/// What is known of a file before it is fetched.
#[derive(Debug)]
pub struct About {
    /// Names the content; SHA-256 of it where it has 64 digits. Fit for a file's name.
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

/// The beginning of a body.
pub struct Part {
    /// First byte of it: the one that was asked for, or 0.
    pub start: u64,
    /// The rest, or less where the connection breaks.
    pub body: Body,
}

/// Why there is no part.
pub enum Refusal {
    /// Another try may do.
    Passing(String),
    /// It will not.
    Final(HubError),
}

impl Client {
    /// Of a model.
    pub fn new(settings: &HubSettings, id: &ModelId) -> Self {
        let deadlines = settings.deadlines;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects_will_error(false)
            // A renamed model is elsewhere on the hub; its bytes are elsewhere than on the hub.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(deadlines.answer))
            .timeout_connect(Some(deadlines.answer))
            .timeout_send_request(Some(deadlines.answer))
            .timeout_recv_response(Some(deadlines.answer))
            .timeout_per_read(Some(deadlines.stall))
            .tls_config(TlsConfig::builder().root_certs(root_certificates()).build())
            .build();
        Self {
            agent: config.new_agent(),
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            id: id.clone(),
            deadlines,
        }
    }

    /// What the repository has at a revision.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn list(&self, revision: &str) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let repository = self.id.repository();
        let revision_part = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{repository}/revision/{revision_part}", self.endpoint);
        let what = if revision == "main" { repository } else { format!("{repository}@{revision}") };
        let text = self.tried(&url, &what, |response| {
            response.body_mut().with_config().limit(LISTING_LIMIT).read_to_vec()
        })?;
        let invalid = |what: String| HubError::Answer { url: url.clone(), what };
        let answer: Answer = serde_json::from_slice(&text)
            .map_err(|e| invalid(format!("with something else than a listing: {e}")))?;
        if !is_commit(&answer.sha) {
            return Err(invalid("with a `sha` that is no commit".into()));
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Listing { commit: answer.sha, files })
    }

    /// What a file of a commit is.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn about(&self, commit: &str, file: &str) -> Result<About, HubError> {
        let mut url = self.file_url(commit, file);
        for _ in 0..HOPS {
            let call = || {
                let request = self.authorised(self.agent.head(&url), &url);
                request.config().max_redirects(0).build().call()
            };
            let response = self.answered(&url, file, call)?;
            let text = |name: &str| {
                let value = response.headers().get(name).and_then(|value| value.to_str().ok());
                value.map(str::to_owned)
            };
            let is_redirect = response.status().is_redirection();
            let invalid = |what: &str| HubError::Answer { url: url.clone(), what: what.into() };
            // Another host has the bytes, but this one says what they are.
            let linked = text("x-linked-etag").zip(text("x-linked-size"));
            let (etag, size) = match linked {
                Some(linked) => linked,
                None if is_redirect => {
                    let to =
                        text("location").ok_or_else(|| invalid("with a redirect to nowhere"))?;
                    url = redirected(&url, &to)?;
                    continue;
                }
                None => text("etag")
                    .zip(text("content-length"))
                    .ok_or_else(|| invalid("without an etag and a size"))?,
            };
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
            if !(1..=128).contains(&etag.len()) || !etag.bytes().all(is_plain) {
                return Err(invalid("with an etag that is no file name"));
            }
            let size = size.parse().map_err(|_| invalid("with a size that is no number"))?;
            return Ok(About { etag, size });
        }
        Err(HubError::Answer { url, what: format!("with more than {HOPS} redirects") })
    }

    /// A file of a commit from byte `from` on, or from an earlier one where the host cannot do that.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn part(&self, commit: &str, file: &str, from: u64) -> Result<Part, Refusal> {
        let url = self.file_url(commit, file);
        let mut request = self.authorised(self.agent.get(&url), &url);
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| Refusal::Passing(e.to_string()))?;
        let status = response.status().as_u16();
        let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
        let start = match status {
            200 => Some(0),
            206 => range.and_then(|range| {
                range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
            }),
            // Nothing follows: what is there is too long, so it is fetched anew.
            416 if from > 0 => return self.part(commit, file, 0),
            status if is_passing(status) => {
                return Err(Refusal::Passing(format!("status {status}")));
            }
            _ => return Err(Refusal::Final(self.refused(&response, &url, file))),
        };
        match start {
            Some(start) if start == from || start == 0 => {
                Ok(Part { start, body: response.into_body() })
            }
            _ => {
                let what = "with another part than was asked for".into();
                Err(Refusal::Final(HubError::Answer { url, what }))
            }
        }
    }

    /// The error of a host that cannot be reached.
    pub fn unreachable(&self, url: &str, reason: impl ToString) -> HubError {
        let (id, url) = (self.id.repository(), url.to_owned());
        HubError::Unreachable { id, url, reason: reason.to_string() }
    }

    /// Where a file is asked for.
    pub fn file_url(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, self.id.repository())
    }

    /// Waits before another try.
    pub fn pause(&self) {
        std::thread::sleep(self.deadlines.pause);
    }

    /// Adds the token where the hub itself is asked.
    fn authorised<B>(
        &self,
        request: ureq::RequestBuilder<B>,
        url: &str,
    ) -> ureq::RequestBuilder<B> {
        let is_own = url.strip_prefix(&self.endpoint).is_some_and(|rest| rest.starts_with('/'));
        match &self.token {
            Some(token) if is_own => request.header("authorization", format!("Bearer {token}")),
            _ => request,
        }
    }

    /// Calls until there is a final answer; what is none is an error.
    fn answered(
        &self,
        url: &str,
        what: &str,
        call: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let mut reason = String::new();
        for tried in 0..self.deadlines.tries {
            if tried > 0 {
                self.pause();
            }
            match call() {
                Ok(response) if is_passing(response.status().as_u16()) => {
                    reason = format!("status {}", response.status().as_u16());
                }
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status().is_redirection() => return Ok(response),
                Ok(response) => return Err(self.refused(&response, url, what)),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(self.unreachable(url, reason))
    }

    /// A small answer, read to its end.
    fn tried(
        &self,
        url: &str,
        what: &str,
        read: impl Fn(&mut Response<Body>) -> Result<Vec<u8>, ureq::Error>,
    ) -> Result<Vec<u8>, HubError> {
        let call = || self.authorised(self.agent.get(url), url).call();
        let mut response = self.answered(url, what, call)?;
        read(&mut response).map_err(|e| self.unreachable(url, e))
    }

    /// What a refusal means to who asked.
    fn refused(&self, response: &Response<Body>, url: &str, what: &str) -> HubError {
        let text = |name: &str| -> Option<String> {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.chars().filter(|c| !c.is_control()).take(300).collect())
        };
        let (status, url) = (response.status().as_u16(), url.to_owned());
        let repository = self.id.repository();
        let what = if what.starts_with(&repository) {
            what.into()
        } else {
            format!("{repository}/{what}")
        };
        let code = text("x-error-code").unwrap_or_default();
        match status {
            401 | 403 => {
                let mut rule = match (code.as_str(), &self.token) {
                    ("GatedRepo", None) => format!(
                        "it is gated: accept its conditions at `{}/{repository}`, then set `HF_TOKEN`",
                        self.endpoint
                    ),
                    ("GatedRepo", Some(_)) => format!(
                        "it is gated: accept its conditions at `{}/{repository}` with the account of `HF_TOKEN`",
                        self.endpoint
                    ),
                    (_, None) => "it is private, gated or misspelt: set `HF_TOKEN`".to_owned(),
                    (_, Some(_)) => "the token of `HF_TOKEN` does not allow it".to_owned(),
                };
                if let Some(message) = text("x-error-message") {
                    rule = format!("{rule}; it says: {message}");
                }
                HubError::Forbidden { what, rule, status, url }
            }
            404 => HubError::NotFound { what, url },
            _ => HubError::Answer { url, what: format!("status {status}") },
        }
    }
}

/// Where a redirect leads: to a whole address, or to a path on the same host.
fn redirected(from: &str, to: &str) -> Result<String, HubError> {
    if to.starts_with("http://") || to.starts_with("https://") {
        return Ok(to.to_owned());
    }
    let host = from.find("://").map_or(0, |at| at + 3);
    let end = from[host..].find('/').map_or(from.len(), |at| at + host);
    if to.starts_with('/') {
        return Ok(format!("{}{to}", &from[..end]));
    }
    Err(HubError::Answer { url: from.to_owned(), what: format!("with a redirect to `{to}`") })
}

/// Too many requests, or something wrong at the other side.
fn is_passing(status: u16) -> bool {
    status == 429 || status == 408 || (500..600).contains(&status)
}

/// The system's, so that a mirror's own authority counts; where it has none, those that came with the client.
fn root_certificates() -> RootCerts {
    match rustls_native_certs::load_native_certs() {
        Ok(all) if !all.is_empty() => {
            let all = all.iter().map(|der| Certificate::from_der(der).to_owned());
            RootCerts::new_with_certs(&all.collect::<Vec<_>>())
        }
        _ => RootCerts::WebPki,
    }
}
