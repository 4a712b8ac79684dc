//! The agents a mover is connected to: how much is in flight towards each, which may not be read from now, and which
//! way their bytes come.

use std::collections::{HashMap, HashSet};

use baton_shared::id::Incarnation;

use super::super::{PeerId, Transport};
use super::pull::Request;

/// Which way bytes come: counts of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeersSeen {
    /// Those whose memory is copied from directly.
    pub shared_memory: u64,
    /// Those whose bytes come through a socket.
    pub network: u64,
}

/// All connected agents of one `move` agent.
#[derive(Default)]
pub(super) struct Peers {
    by_id: HashMap<PeerId, Peer>,
    changed: bool,
    seen: PeersSeen,
}

/// Whether a request may be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Free,
    /// As many as allowed are in flight.
    Full,
    /// The peer is broken or forgotten.
    Closed,
}

struct Peer {
    agent: String,
    incarnation: Incarnation,
    in_flight: usize,
    /// An abandoned pull's request towards it has not ended: no new pull.
    suspect: bool,
    /// A request failed: it is forgotten as soon as none is in flight.
    broken: bool,
    /// A request towards it has ended: the next ones wait for no connection.
    warm: bool,
    /// It was found out which way its bytes come.
    known: bool,
}

/// Fewest bytes that tell a copy from a socket's queue.
const TELLING_BYTES: u64 = 256 << 10;

impl Peers {
    /// A connection; the same id again is the same one.
    pub fn opened(&mut self, id: PeerId, agent: &str, incarnation: Incarnation) {
        self.by_id.entry(id).or_insert_with(|| {
            self.changed = true;
            Peer {
                agent: agent.to_owned(),
                incarnation,
                in_flight: 0,
                suspect: false,
                broken: false,
                warm: false,
                known: false,
            }
        });
    }

    pub fn room(&self, id: PeerId, window: usize) -> Room {
        match self.by_id.get(&id) {
            Some(peer) if peer.broken => Room::Closed,
            Some(peer) if peer.in_flight >= window => Room::Full,
            Some(_) => Room::Free,
            None => Room::Closed,
        }
    }

    /// A request is in flight; whether one before it has ended already.
    pub fn posted(&mut self, id: PeerId) -> bool {
        self.by_id.get_mut(&id).is_some_and(|peer| {
            peer.in_flight += 1;
            peer.warm
        })
    }

    /// A request has ended well; `at_once` = with its post.
    pub fn done(&mut self, id: PeerId, request: &Request, at_once: bool) {
        self.change(id, |peer, seen| {
            peer.ended();
            peer.warm = true;
            // The first ones waited for the connection, whichever way it goes.
            if request.warm && !peer.known {
                peer.learn(request, at_once, seen);
            }
        });
    }

    /// A request has failed.
    pub fn failed(&mut self, id: PeerId) {
        self.change(id, |peer, _| {
            peer.ended();
            peer.broken = true;
        });
    }

    /// A post was refused.
    pub fn lost(&mut self, id: PeerId) {
        self.change(id, |peer, _| peer.broken = true);
    }

    /// A pull of which something is in flight was abandoned.
    pub fn suspect(&mut self, id: PeerId) {
        self.change(id, |peer, _| peer.suspect = true);
    }

    /// Whether requests that failed or do not end are still in flight towards that agent.
    pub fn is_closed(&self, agent: &str) -> bool {
        self.by_id.values().any(|peer| peer.agent == agent && (peer.suspect || peer.broken))
    }

    /// Peers by the way their bytes come, since the start.
    pub fn seen(&self) -> PeersSeen {
        self.seen
    }

    /// Incarnations that can be read from without connecting, if that changed since the last call.
    pub fn connected_if_changed(&mut self) -> Option<HashSet<Incarnation>> {
        std::mem::take(&mut self.changed)
            .then(|| self.by_id.values().map(|peer| peer.incarnation).collect())
    }

    /// Forgets those that failed and have nothing in flight any more.
    pub fn forget_the_broken(&mut self, transport: &mut dyn Transport) {
        let before = self.by_id.len();
        self.by_id.retain(|&id, peer| {
            let keep = !peer.broken || peer.in_flight > 0;
            if !keep {
                tracing::info!(agent = peer.agent, "forgot a peer whose transfers failed");
                transport.forget(id);
            }
            keep
        });
        self.changed |= self.by_id.len() != before;
    }

    /// The agent was rebuilt and knows nobody.
    pub fn clear(&mut self) {
        self.by_id.clear();
        self.changed = true;
    }

    fn change(&mut self, id: PeerId, change: impl FnOnce(&mut Peer, &mut PeersSeen)) {
        if let Some(peer) = self.by_id.get_mut(&id) {
            change(peer, &mut self.seen);
        }
    }
}

impl Peer {
    fn ended(&mut self) {
        self.in_flight -= 1;
        self.suspect &= self.in_flight > 0;
    }

    /// Learns which way this peer's bytes come: a copy out of its memory is over when the post returns, bytes from
    /// a socket are not. (On a machine too busy to look at once, those may be there too and be taken for a copy.)
    fn learn(&mut self, request: &Request, at_once: bool, seen: &mut PeersSeen) {
        let bytes: u64 = request.runs.iter().map(|run| run.len).sum();
        if bytes < TELLING_BYTES {
            return;
        }
        self.known = true;
        let (transport, count) = match at_once {
            true => ("shared_memory", &mut seen.shared_memory),
            false => ("network", &mut seen.network),
        };
        *count += 1;
        tracing::info!(agent = self.agent, transport, "found out how this peer's blocks come");
    }
}
