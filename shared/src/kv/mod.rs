//! Cached keys and values: how they lie in memory, what makes two caches the same, what names a block of them, and the
//! record that hands them over.

pub mod block_hash;
mod bytes;
pub mod fingerprint;
pub mod layout;
pub mod record;
