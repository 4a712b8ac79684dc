//! Which way a peer's bytes come. The transport does not tell, so it is found out from what a request of some size
//! did to the kernel's count of received bytes, and from whether it was over when its post returned.
//!
//! Bytes that no socket saw are taken for copied memory: so are those between devices of one host, and an RDMA
//! adapter's would be, too.

use baton_shared::kv::layout::CopyRun;

use super::octets;

/// How a peer's blocks get here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Copied out of its memory.
    SharedMemory,
    /// Through a socket.
    Network,
}

/// Fewest bytes of a request that tell the one from the other.
const TELLING_BYTES: u64 = 256 << 10;
/// Requests in a row that may be either; then it is the network.
const MOST_DOUBTS: u32 = 3;

/// A request's bytes, and the count of received ones before it was posted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    bytes: u64,
    received_before: Option<u64>,
}

impl Probe {
    /// To be made before the post; `None` for a request too small to tell.
    pub fn new(runs: &[CopyRun]) -> Option<Self> {
        let bytes = runs.iter().map(|run| run.len).sum();
        (bytes >= TELLING_BYTES).then(|| Self { bytes, received_before: octets::received() })
    }

    /// To be called after the request's end.
    pub fn seen(self, at_once: bool) -> Seen {
        let received = self
            .received_before
            .and_then(|before| octets::received().and_then(|after| after.checked_sub(before)));
        Seen { bytes: self.bytes, received, at_once }
    }
}

/// What one request showed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    bytes: u64,
    /// What this machine received meanwhile, if the kernel tells.
    received: Option<u64>,
    /// It was over when its post returned.
    at_once: bool,
}

impl Seen {
    /// The way it came, if that is sure after `doubts` requests that left it open.
    pub fn route(self, doubts: u32) -> Option<Route> {
        match self.received {
            Some(received) if received < self.bytes => Some(Route::SharedMemory),
            None if self.at_once => Some(Route::SharedMemory),
            // A copy beside other traffic, or bytes from a socket that nobody looked for in time.
            Some(_) if self.at_once && doubts + 1 < MOST_DOUBTS => None,
            Some(_) | None => Some(Route::Network),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(received: Option<u64>, at_once: bool, doubts: u32) -> Option<Route> {
        Seen { bytes: 1000, received, at_once }.route(doubts)
    }

    #[test]
    fn fewer_bytes_received_than_arrived_are_a_copy() {
        for at_once in [true, false] {
            assert_eq!(route(Some(0), at_once, 0), Some(Route::SharedMemory));
            assert_eq!(route(Some(999), at_once, 2), Some(Route::SharedMemory));
        }
    }

    #[test]
    fn as_many_received_as_arrived_are_the_network_unless_they_were_there_at_once() {
        assert_eq!(route(Some(1000), false, 0), Some(Route::Network));
        assert_eq!(route(Some(5000), false, 0), Some(Route::Network));
        assert_eq!(route(Some(1000), true, 0), None);
        assert_eq!(route(Some(1000), true, 1), None);
        assert_eq!(route(Some(1000), true, 2), Some(Route::Network), "the third in a row");
    }

    #[test]
    fn without_a_count_what_was_there_at_once_is_a_copy() {
        assert_eq!(route(None, true, 0), Some(Route::SharedMemory));
        assert_eq!(route(None, false, 0), Some(Route::Network));
    }

    #[test]
    fn a_small_request_tells_nothing() {
        let run = |len| CopyRun { source: 0, target: 0, len };
        assert!(Probe::new(&[run(TELLING_BYTES - 1)]).is_none());
        assert!(Probe::new(&[run(TELLING_BYTES - 1), run(1)]).is_some());
    }
}
