//! Baton's router.

pub mod client;
pub mod splice;
