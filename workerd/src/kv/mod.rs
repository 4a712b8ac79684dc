//! Whose blocks: the pool's memory, its block states, what free blocks still hold, leases for peers.

mod block;
pub mod events;
#[cfg(test)]
pub mod fake_device;
mod free_list;
pub mod host_memory;
pub mod lease;
pub mod pool;
pub mod prefix;
pub mod region;
