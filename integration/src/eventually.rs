//! Waiting for something that must come true, with an end.

use std::future::Future;
use std::time::{Duration, Instant};

/// Asks until the answer is `Some`, every 10 ms, for at most `patience`.
///
/// # Panics
/// When patience ends; `what` says what was awaited.
pub async fn eventually<T, F, Fut>(patience: Duration, what: &str, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
