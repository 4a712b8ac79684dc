//! Cached keys and values: how they lie in memory, what makes two caches the same, and the record that
//! hands them over.

mod bytes;
pub mod fingerprint;
pub mod layout;
pub mod record;
