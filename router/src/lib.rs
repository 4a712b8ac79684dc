//! Baton's ingress: one HTTP endpoint in front of context and generation workers.
//!
//! Life of a request. Pingora accepts the connection and reads the head; [`proxy::RouterProxy`] finds the
//! route. For `/v1/completions` and `/v1/chat/completions` the engine reads the body (bounded in size and
//! time) and scans its top level once. It takes a snapshot of the [`table`], lets the [`policy`] choose a
//! context worker, sends it the prompt as a `context_only` request and waits for the first token and the
//! opaque hand-over record. Then it chooses a generation worker, splices the record into the client's own
//! bytes, and forwards the answer as it comes. Until the first byte of the answer has gone to the client
//! every failure moves to another worker, by the table in `baton_shared::wire::error`; afterwards nothing
//! is repeated. A client that leaves cancels both legs and releases the KV lease.
//!
//! Beside the requests: [`health`] probes and ejects workers, [`metrics`] counts, [`admin`] answers
//! operators on a port of its own, [`ops`] drains on a signal, [`arrivals`] keeps
//! new connections from being lost by that, and [`heads`] ends those that bring no request.
//!
//! Embedding, from most to least of ours: [`builder::RouterBuilder`] adds everything to a Pingora server;
//! [`proxy::RouterProxy`] is a ready `ProxyHttp` with hooks; the engine's `Router` handle serves single
//! requests inside a foreign `ProxyHttp` (`examples/embed.rs`).

pub mod admin;
pub mod arrivals;
pub mod builder;
pub mod cli;
pub mod client;
pub mod config;
pub mod dialect;
pub mod engine;
pub mod heads;
pub mod health;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod ops;
pub mod policy;
pub mod proxy;
pub mod splice;
pub mod table;
pub mod watchdog;
