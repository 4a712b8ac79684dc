//! What scripted context workers hold for whom: each id is issued once, and then pulled or released, or orphaned.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by the scripted workers of a scene.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<Books>>);

#[derive(Debug, Default)]
struct Books {
    leases: HashMap<u64, Entry>,
    dead: Vec<SocketAddr>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Who computed it.
    issued: Option<SocketAddr>,
    pulled: bool,
    released: bool,
}

/// How many ids went which way. One that is released after it was pulled counts as pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// Computed by a context worker.
    pub issued: usize,
    /// Taken by a generation worker.
    pub pulled: usize,
    /// Given back without that.
    pub released: usize,
    /// Gone with their worker.
    pub lost: usize,
}

impl Balance {
    /// Ids whose blocks a living worker still holds.
    pub fn orphaned(&self) -> usize {
        self.issued - self.pulled - self.released - self.lost
    }
}

/// Why a generation worker cannot pull; the protocol's error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Released, pulled, or never issued.
    LeaseGone,
    /// Its worker does not run.
    PeerUnreachable,
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `worker` holds blocks for `id`.
    pub fn issue(&self, id: u64, worker: SocketAddr) {
        self.books().leases.entry(id).or_default().issued = Some(worker);
    }

    /// Nobody needs `id`; may come before it is issued.
    pub fn release(&self, id: u64) {
        self.books().leases.entry(id).or_default().released = true;
    }

    /// A generation worker reads the blocks of `id`.
    ///
    /// # Errors
    /// If they are not there.
    pub fn pull(&self, id: u64) -> Result<(), Missing> {
        let mut books = self.books();
        let Books { leases, dead } = &mut *books;
        match leases.get_mut(&id) {
            Some(Entry { issued: Some(at), .. }) if dead.contains(at) => {
                Err(Missing::PeerUnreachable)
            }
            Some(entry) if entry.issued.is_some() && !entry.pulled && !entry.released => {
                entry.pulled = true;
                Ok(())
            }
            _ => Err(Missing::LeaseGone),
        }
    }

    /// `worker` runs no more.
    pub fn died(&self, worker: SocketAddr) {
        self.books().dead.push(worker);
    }

    /// The state of all ids that were issued.
    pub fn balance(&self) -> Balance {
        let books = self.books();
        let mut balance = Balance::default();
        for entry in books.leases.values() {
            let Some(worker) = entry.issued else { continue };
            balance.issued += 1;
            if entry.pulled {
                balance.pulled += 1;
            } else if entry.released {
                balance.released += 1;
            } else if books.dead.contains(&worker) {
                balance.lost += 1;
            }
        }
        balance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    #[test]
    fn an_id_is_pulled_once_and_one_that_is_neither_pulled_nor_released_is_orphaned() {
        let ledger = Ledger::default();
        ledger.release(3);
        for id in [1, 2, 3, 4] {
            ledger.issue(id, WORKER);
        }
        assert_eq!(ledger.pull(1), Ok(()));
        assert_eq!(ledger.pull(1), Err(Missing::LeaseGone));
        assert_eq!(ledger.pull(3), Err(Missing::LeaseGone), "released before it was issued");
        assert_eq!(ledger.pull(5), Err(Missing::LeaseGone), "never issued");
        ledger.release(2);
        assert_eq!(ledger.balance(), Balance { issued: 4, pulled: 1, released: 2, lost: 0 });
        assert_eq!(ledger.balance().orphaned(), 1);
        ledger.died(WORKER);
        assert_eq!(ledger.pull(4), Err(Missing::PeerUnreachable));
        assert_eq!(ledger.balance().orphaned(), 0);
    }
}
