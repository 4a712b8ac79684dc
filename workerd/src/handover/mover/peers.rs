//! The agents a mover is connected to: how much is in flight towards each, and which may not be read from now.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use baton_shared::id::Incarnation;

use super::super::{PeerId, Transport};
use super::pull::Request;

/// All connected agents of one `move` agent.
#[derive(Default)]
pub(super) struct Peers {
    by_id: HashMap<PeerId, Peer>,
    changed: bool,
}

pub(super) struct Peer {
    agent: String,
    incarnation: Incarnation,
    pub in_flight: usize,
    /// An abandoned pull's request towards it has not ended: no new pull.
    pub suspect: bool,
    /// A request failed: it is forgotten as soon as none is in flight.
    pub broken: bool,
    /// Its first large request was timed.
    timed: bool,
}

impl Peers {
    pub fn opened(&mut self, id: PeerId, agent: &str, incarnation: Incarnation) {
        self.by_id.entry(id).or_insert_with(|| {
            self.changed = true;
            let agent = agent.to_owned();
            Peer { agent, incarnation, in_flight: 0, suspect: false, broken: false, timed: false }
        });
    }

    pub fn get_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.by_id.get_mut(&id)
    }

    /// Whether requests that failed or do not end are still in flight towards that agent.
    pub fn is_closed(&self, agent: &str) -> bool {
        self.by_id.values().any(|peer| peer.agent == agent && (peer.suspect || peer.broken))
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
}

/// What ended together, for a figure in the log.
#[derive(Default)]
pub(super) struct Sample {
    bytes: u64,
    seconds: f64,
    at_once: bool,
}

impl Sample {
    pub fn add(&mut self, request: &Request, now: Instant, at_once: bool) {
        self.bytes += request.runs.iter().map(|run| run.len).sum::<u64>();
        self.seconds = self.seconds.max(now.duration_since(request.posted).as_secs_f64());
        self.at_once |= at_once;
    }
}

impl Peer {
    /// Says once which way a peer's bytes come, by its first MiB: a copy out of its memory is over when the post
    /// returns, bytes from a socket are not.
    pub fn note_transport(&mut self, sample: &Sample) {
        if self.timed || sample.bytes < 1 << 20 {
            return;
        }
        self.timed = true;
        let transport = if sample.at_once { "shared memory" } else { "network" };
        let rate = sample.bytes as f64 / sample.seconds.max(1e-6) / 1e9;
        tracing::info!(
            agent = self.agent,
            transport,
            "blocks of this peer arrive at {rate:.1} GB/s"
        );
        metrics::counter!("baton_worker_handover_peers_total", "transport" => transport)
            .increment(1);
    }
}
