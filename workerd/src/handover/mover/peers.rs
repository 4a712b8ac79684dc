//! The agents a mover is connected to: how much is in flight towards each, which may not be read from now, and which
//! way their bytes come.

use std::collections::{HashMap, HashSet};

use baton_shared::id::{Incarnation, WorkerId};
use baton_shared::kv::layout::CopyRun;

use super::super::{PeerId, Transport};
use super::pull::Request;
use super::route::{Probe, Route};
use crate::kv::region::Place;

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
    /// Where its pool is.
    place: Place,
    worker: WorkerId,
    incarnation: Incarnation,
    in_flight: usize,
    /// An abandoned pull's request towards it has not ended: no new pull.
    suspect: bool,
    /// A request failed: it is forgotten as soon as none is in flight.
    broken: bool,
    /// Its worker has started anew: it is forgotten as soon as none is in flight.
    replaced: bool,
    /// A request towards it has ended: the next ones wait for no connection.
    warm: bool,
    /// Which way its bytes come, once that was found out.
    route: Option<Route>,
    /// Requests that left it open which way they came.
    doubts: u32,
}

impl Peers {
    /// A connection; the same id again is the same one. A worker's other incarnations are over with a new one.
    pub fn opened(
        &mut self,
        id: PeerId,
        (agent, place): (&str, Place),
        worker: &WorkerId,
        incarnation: Incarnation,
    ) {
        if self.by_id.contains_key(&id) {
            return;
        }
        self.changed = true;
        for peer in self.by_id.values_mut().filter(|peer| peer.worker == *worker) {
            peer.replaced |= peer.incarnation != incarnation;
        }
        let peer = Peer {
            agent: agent.to_owned(),
            place,
            worker: worker.clone(),
            incarnation,
            in_flight: 0,
            suspect: false,
            broken: false,
            replaced: false,
            warm: false,
            route: None,
            doubts: 0,
        };
        self.by_id.insert(id, peer);
    }

    pub fn room(&self, id: PeerId, window: usize) -> Room {
        match self.by_id.get(&id) {
            Some(peer) if peer.broken => Room::Closed,
            Some(peer) if peer.in_flight >= window => Room::Full,
            Some(_) => Room::Free,
            None => Room::Closed,
        }
    }

    /// What is to be known before a post, if it may tell which way this peer's bytes come. The first requests wait
    /// for the connection, whichever way it goes.
    pub fn probe(&self, id: PeerId, runs: &[CopyRun]) -> Option<Probe> {
        let peer = self.by_id.get(&id)?;
        if peer.warm && peer.route.is_none() { Probe::new(runs) } else { None }
    }

    /// A request is in flight.
    pub fn posted(&mut self, id: PeerId) {
        self.change(id, |peer, _| peer.in_flight += 1);
    }

    /// A request has ended well; `at_once` = with its post.
    pub fn done(&mut self, id: PeerId, request: &Request, at_once: bool) {
        self.change(id, |peer, seen| {
            peer.ended();
            peer.warm = true;
            if let (Some(probe), None) = (request.probe, peer.route) {
                peer.learn(probe, at_once, seen);
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
        let living = self.by_id.values().filter(|peer| !peer.replaced);
        std::mem::take(&mut self.changed).then(|| living.map(|peer| peer.incarnation).collect())
    }

    /// Forgets those that failed or were replaced and have nothing in flight any more.
    pub fn forget_the_dead(&mut self, transport: &mut dyn Transport) {
        let before = self.by_id.len();
        self.by_id.retain(|&id, peer| {
            if peer.in_flight > 0 || !(peer.broken || peer.replaced) {
                return true;
            }
            if peer.broken {
                tracing::info!(agent = peer.agent, "forgot a peer whose transfers failed");
            } else {
                tracing::info!(agent = peer.agent, "forgot a peer whose worker has started anew");
            }
            transport.forget(id);
            false
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

    /// Learns which way this peer's bytes come from a request that has ended.
    fn learn(&mut self, probe: Probe, at_once: bool, seen: &mut PeersSeen) {
        let Some(route) = probe.seen(at_once).route(self.doubts) else {
            self.doubts += 1;
            return;
        };
        self.route = Some(route);
        let (transport, count) = match route {
            Route::SharedMemory => ("shared_memory", &mut seen.shared_memory),
            Route::Network => ("network", &mut seen.network),
        };
        *count += 1;
        tracing::info!(agent = self.agent, pool = %self.place, transport, "found out how this peer's blocks come");
    }
}
