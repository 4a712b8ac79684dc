//! Baton's router.

pub mod splice;
