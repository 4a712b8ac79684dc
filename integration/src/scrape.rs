//! Reads a daemon's metrics.

use std::net::SocketAddr;

use anyhow::{Context, Result};

use crate::client::Client;

/// One scrape.
#[derive(Clone, Debug)]
pub struct Metrics {
    samples: Vec<(String, f64)>,
}

impl Metrics {
    /// Asks `address` at `path` (`/prometheus/metrics`, or `/metrics` on a router's admin port).
    ///
    /// # Errors
    /// If nothing or something else answers.
    pub async fn of(address: SocketAddr, path: &str) -> Result<Self> {
        let answer = Client::new(address).get(path).await?;
        anyhow::ensure!(answer.status == 200, "{path} answered {}", answer.status);
        let text = std::str::from_utf8(&answer.body).context("metrics are text")?;
        Ok(Self::parse(text))
    }

    /// Prometheus' text form.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines.filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        });
        Self { samples: samples.collect() }
    }

    /// The sum of all series of `name` that carry every one of `labels`; 0 where there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |series: &str| {
            let (own, rest) = series.split_once('{').unwrap_or((series, ""));
            own == name
                && labels.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\"")))
        };
        self.samples.iter().filter(|(series, _)| matches(series)).map(|(_, value)| value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_over_the_labels_that_are_not_named() {
        let text = "# HELP a b\na{x=\"1\",y=\"2\"} 3\na{x=\"1\",y=\"3\"} 4\nab 7\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("a", &[("x", "1")]), 7.0);
        assert_eq!(metrics.sum("a", &[("y", "3")]), 4.0);
        assert_eq!(metrics.sum("ab", &[]), 7.0);
    }
}
