//! Hand-overs that go wrong, each at a chosen moment, on real workers: what the worker answers, what the router does,
//! who is blamed, and that every pool is free again. By both ways that blocks can travel.

mod deaths;
mod leases;
mod load;
pub mod scene;
mod stale;
mod stops;
