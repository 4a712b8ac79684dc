//! What operators look at: metrics against their reference, shipped rules and boards against a real Prometheus.

mod boards;
mod families;
mod logs;
mod prometheus;
mod reference;
mod rules;
mod series;
