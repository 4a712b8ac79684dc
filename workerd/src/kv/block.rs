//! One block: who holds it, and as what it counts.

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

/// What the holders of a block do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// A sequence reads and writes it.
    Used,
    /// So does a context pass, which will keep it for a reader; counts as used.
    Pledged,
    /// It is kept as it is for a reader.
    Leased,
    /// A transfer may write it: it has one holder.
    InFlight,
    /// A transfer that was given up may still write it: it has one holder.
    Quarantined,
}

/// How many hold a block, by what they do with it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holders {
    used: u32,
    pledged: u32,
    leased: u32,
    in_flight: bool,
    quarantined: bool,
}

impl Holders {
    /// One holder more.
    pub(super) fn hold(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used += 1,
            BlockState::Pledged => self.pledged += 1,
            BlockState::Leased => self.leased += 1,
            BlockState::InFlight => self.in_flight = true,
            BlockState::Quarantined => self.quarantined = true,
        }
    }

    /// One holder fewer.
    pub(super) fn let_go(&mut self, state: BlockState) {
        match state {
            BlockState::Used => self.used -= 1,
            BlockState::Pledged => self.pledged -= 1,
            BlockState::Leased => self.leased -= 1,
            BlockState::InFlight => self.in_flight = false,
            BlockState::Quarantined => self.quarantined = false,
        }
    }

    /// Whether nobody holds it.
    pub(super) fn is_free(self) -> bool {
        self.count() == 0
    }

    /// Whether one of its holders may go over to `state`.
    pub(super) fn allows(self, state: BlockState) -> bool {
        match state {
            BlockState::Used | BlockState::Pledged | BlockState::Leased => true,
            BlockState::InFlight | BlockState::Quarantined => self.count() == 1,
        }
    }

    fn count(self) -> u32 {
        let written = u32::from(self.in_flight) + u32::from(self.quarantined);
        self.used + self.pledged + self.leased + written
    }

    /// Whether a lease holds it, or a context pass that will hand it to one.
    pub(super) fn is_pledged(self) -> bool {
        self.pledged + self.leased > 0
    }

    /// The one count it is part of.
    pub(super) fn counted_in(self, counts: &mut BlockCounts) -> &mut u32 {
        match self {
            _ if self.is_free() => &mut counts.free,
            _ if self.in_flight => &mut counts.in_flight,
            _ if self.quarantined => &mut counts.quarantined,
            _ if self.leased > 0 => &mut counts.leased,
            _ => &mut counts.used,
        }
    }
}
