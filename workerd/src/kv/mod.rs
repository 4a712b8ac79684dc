//! Whose blocks: the pool's memory, its block states, leases for peers.

pub mod lease;
pub mod pool;
pub mod region;
