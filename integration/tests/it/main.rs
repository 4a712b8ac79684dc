//! End-to-end tests of the real binaries; a module a topic.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod auth;
mod bad_requests;
mod broken_answers;
mod chaos;
mod checkpoints;
mod departures;
mod drain;
mod embed;
mod engine_golden;
mod equality;
mod fire;
mod golden;
mod handover;
mod hostile;
mod hub;
mod mixed;
mod openai_client;
mod operators;
mod orphans;
mod perplexity;
mod prefix;
mod random_faults;
mod reload;
mod restarts;
mod router_faults;
mod router_load;
mod scripted;
mod second_model;
mod spine;
mod startup;
mod streaming;
mod support;
mod systemd;
mod tiny;
mod tokenizers;
