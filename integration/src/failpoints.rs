//! Arms a worker's failpoints (`baton_workerd::failpoint`) and sees who is held there. The worker must have been
//! started with `BATON_TEST=1`.

use anyhow::{Context, Result, ensure};
use http::Method;
use serde_json::json;

use crate::client::Client;
use crate::cluster::Member;

const PATH: &str = "/test/failpoints";

/// How a point stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How often it was reached.
    pub reached: u64,
    /// How many are held there now.
    pub held: u64,
}

impl Member {
    /// From now on `action` happens at `point`.
    ///
    /// # Errors
    /// If the worker does not answer, is not in a test, or knows no such point or action.
    pub async fn arm(&self, point: &str, action: &str) -> Result<()> {
        let body = serde_json::to_vec(&json!({point: action}))?;
        let sent = self.client().send(Method::PUT, PATH, &[], body.into()).await?;
        let answer = sent.whole().await?;
        let text = String::from_utf8_lossy(&answer.body);
        ensure!(answer.status == 200, "arming `{point}` was answered {}: {text}", answer.status);
        Ok(())
    }

    /// How `point` stands.
    ///
    /// # Errors
    /// As [`Self::arm`].
    pub async fn standing(&self, point: &str) -> Result<Standing> {
        standing(self.client(), point).await
    }
}

async fn standing(client: Client, point: &str) -> Result<Standing> {
    let all = client.get(PATH).await?.ok()?;
    let number = |key: &str| {
        let value = all[point][key].as_u64();
        value.with_context(|| format!("no `{key}` of `{point}` in {all}"))
    };
    Ok(Standing { reached: number("reached")?, held: number("held")? })
}
