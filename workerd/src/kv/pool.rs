//! The blocks of one instance: who may use which.

/// Blocks by state; together they are the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Nobody's.
    pub free: u32,
    /// Of running sequences.
    pub used: u32,
    /// Kept for a reader.
    pub leased: u32,
    /// Targets of a pull.
    pub in_flight: u32,
    /// Targets of a pull that was given up but may still write.
    pub quarantined: u32,
}
