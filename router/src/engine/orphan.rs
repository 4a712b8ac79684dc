//! A record that nobody wants, of a context worker that takes no release call: a generation worker is asked for one
//! token of it, so that it reads the blocks and the context worker has them back.

use std::time::Duration;

use baton_shared::wire::error::{Remedy, remedy};

use super::hop;
use crate::client::{self, ClientError, Request};
use crate::dialect::era::Era;
use crate::dialect::pull;
use crate::dialect::trtllm::{ClientRequest, ContextAnswer};
use crate::policy::{Features, Tried};
use crate::table::keys::LiveKeys;
use crate::table::{Phase, Table};

/// How long all tries together may take: a worker without room may have it later.
const DEADLINE: Duration = Duration::from_secs(10);
/// Until those without room are asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest answer of one token.
const MAX_ANSWER: usize = 1 << 20;

/// All that a generation request is made of.
#[derive(Debug)]
pub(super) struct Orphan {
    pub(super) request: ClientRequest,
    pub(super) answer: ContextAnswer,
    /// Header lines that go to every worker.
    pub(super) lines: String,
}

impl Orphan {
    /// Whether somebody has read the record now.
    pub(super) async fn pull(&self, table: &Table, keys: &LiveKeys) -> bool {
        tokio::time::timeout(DEADLINE, self.tries(table, keys)).await.unwrap_or(false)
    }

    async fn tries(&self, table: &Table, keys: &LiveKeys) -> bool {
        let lines = hop::generation_lines(keys, &self.lines, &self.answer);
        let (features, mut tried) = (Features::default(), Tried::default());
        loop {
            let picked = table.pick(Phase::Generation, &features, &tried);
            let Some(worker) = picked.filter(|worker| !tried.contains(worker)) else {
                tokio::time::sleep(PAUSE).await;
                tried = Tried::default();
                continue;
            };
            tried.add(&worker);
            let _load = worker.begin(features.prompt_tokens);
            let head = worker.heads.get(self.request.api.target());
            let pieces = pull::body(&self.request, &self.answer, Era::of(worker.dialect()));
            let request = Request { head, lines: lines.as_bytes(), pieces: &pieces };
            match client::call(&hop::addresses(&worker), request, DEADLINE, MAX_ANSWER).await {
                Ok(answer) if answer.head.status < 300 => return true,
                Ok(answer) if remedy(answer.head.status, None) == Remedy::AnotherServer => {}
                Err(ClientError::Connect(_)) => {}
                Ok(answer) => {
                    tracing::debug!(worker = %worker.id, status = answer.head.status, "did not read it");
                    return false;
                }
                // Perhaps it was read; a second reader would wait in vain.
                Err(error) => {
                    tracing::debug!(worker = %worker.id, %error, "did not read it");
                    return false;
                }
            }
        }
    }
}
