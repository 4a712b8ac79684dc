//! The harness of Baton's end-to-end tests: real binaries as processes, a client that asserts the protocol's shape,
//! and things that go wrong on purpose. Its binaries `baton-up` and `baton-client` are shipped.
//!
//! Reading order: [`process`] starts one binary, [`cluster`] a whole set of them, [`client`] talks to it.

pub mod at;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod eventually;
pub mod failpoints;
pub mod fake_hub;
pub mod files;
pub mod http2;
pub mod kept;
pub mod ledger;
pub mod mock_worker;
pub mod nested_systemd;
pub mod netns;
pub mod oracle;
pub mod process;
pub mod relay;
pub mod scrape;
pub mod tiny_fp8;
pub mod tiny_gguf;
pub mod tiny_model;
pub mod tokenizer_json;
pub mod weights;
