//! What pulls do when: one step at a time, over any transport, with time as an argument.
//!
//! A pull reads its blocks (requests of bounded size, a bounded number in flight towards a peer), then its lease's
//! epoch by a further request, and is done when the epoch is still what the record says. Nothing that is in flight is
//! ever dropped: a pull that fails or is abandoned keeps its requests until the transport says they ended, or until
//! the transport was rebuilt.

use std::collections::HashSet;
use std::time::Instant;

use baton_shared::id::Incarnation;
use baton_shared::kv::layout::CopyRun;
use baton_shared::kv::record::RankBlocks;
use baton_shared::wire::error::ErrorCode;

use super::super::{
    Ends, MoverEvent, Op, PeerAddress, PeerId, PullId, PullJob, TransferState, Transport,
    TransportError,
};
use super::peers::{Peers, PeersSeen, Room};
use super::pull::{Failure, Part, Pull, Request, Stage, requests, unreachable};
use super::{MoverError, MoverSettings, write_notice};
use crate::failpoint::{self, Point};
use crate::kv::host_memory::HostMemory;
use crate::kv::region::{Place, Region};

/// Epoch words that can be on their way at once.
const LANDING_SLOTS: usize = 512;

/// All pulls of one `move` agent.
pub(super) struct Pulls {
    /// In order of arrival. Before `landing`: the agent goes before the memory.
    pulls: Vec<Pull>,
    transport: Box<dyn Transport>,
    /// Where our pool is.
    pool: Place,
    landing: HostMemory,
    free_slots: Vec<usize>,
    peers: Peers,
    /// While set, nothing is posted: a rebuild waits for healthy requests until then.
    pause_until: Option<Instant>,
    rebuilds: u64,
    events: Vec<MoverEvent>,
    settings: MoverSettings,
}

impl Pulls {
    pub fn new(
        mut transport: Box<dyn Transport>,
        pool: Place,
        settings: MoverSettings,
    ) -> Result<Self, MoverError> {
        let landing = HostMemory::zeroed(LANDING_SLOTS * 8)?;
        transport.register(&Region::Host(landing.clone()))?;
        Ok(Self {
            pulls: Vec::new(),
            transport,
            pool,
            landing,
            free_slots: (0..LANDING_SLOTS).rev().collect(),
            peers: Peers::default(),
            pause_until: None,
            rebuilds: 0,
            events: Vec::new(),
            settings,
        })
    }

    pub fn is_idle(&self) -> bool {
        self.pulls.is_empty()
    }

    pub fn rebuilds(&self) -> u64 {
        self.rebuilds
    }

    pub fn peers_seen(&self) -> PeersSeen {
        self.peers.seen()
    }

    pub fn take_events(&mut self) -> Vec<MoverEvent> {
        std::mem::take(&mut self.events)
    }

    /// Incarnations that can be read from without connecting, if that changed since the last call.
    pub fn connected_if_changed(&mut self) -> Option<HashSet<Incarnation>> {
        self.peers.connected_if_changed()
    }

    pub fn accept(&mut self, job: PullJob, now: Instant) {
        let mut pull = Pull {
            id: job.id,
            worker: job.worker,
            incarnation: job.incarnation,
            lease: job.lease,
            deadline: job.deadline,
            arrived: now,
            parts: Vec::with_capacity(job.ranks.len()),
            stage: Stage::Blocks,
            bytes: 0,
            descriptors: 0,
        };
        for (rank, runs) in job.ranks {
            pull.bytes += runs.iter().map(|run| run.len).sum::<u64>();
            pull.descriptors += runs.len() as u64;
            match self.connect(&pull, rank, runs) {
                Ok(part) => pull.parts.push(part),
                Err(failure) => return self.fail(pull, failure, now),
            }
        }
        self.pulls.push(pull);
    }

    pub fn cancel(&mut self, id: PullId, now: Instant) {
        let found = self.pulls.iter().position(|pull| pull.id == id && pull.is_live());
        if let Some(index) = found {
            let pull = self.pulls.remove(index);
            let message = "the request was cancelled".to_owned();
            self.fail(pull, Failure { code: ErrorCode::ClientGone, message }, now);
        }
    }

    /// Does what can be done now; whether anything moved.
    pub fn step(&mut self, now: Instant) -> bool {
        let mut progress = false;
        for mut pull in std::mem::take(&mut self.pulls) {
            progress |= self.advance(&mut pull, now);
            if pull.stage != Stage::Over {
                self.pulls.push(pull);
            }
        }
        self.peers.forget_the_dead(self.transport.as_mut());
        progress | self.rebuild_if_due(now)
    }

    /// Ends the agent, and with it whatever was in flight; then reports every pull, those of `waiting` too, which
    /// were sent and never accepted.
    pub fn end(self, waiting: impl Iterator<Item = PullId>) -> Vec<MoverEvent> {
        let Self { pulls, transport, landing, mut events, .. } = self;
        drop(transport);
        drop(landing);
        let failed = |id| MoverEvent::PullFailed {
            id,
            // No peer is to blame: whoever reads the same blocks elsewhere will get them.
            code: ErrorCode::Internal,
            message: "this worker moves no blocks any more".to_owned(),
            settled: true,
        };
        events.extend(pulls.into_iter().map(|pull| match pull.stage {
            Stage::Settling { .. } => MoverEvent::Settled { id: pull.id },
            Stage::Blocks | Stage::Epoch | Stage::Over => failed(pull.id),
        }));
        events.extend(waiting.map(failed));
        events
    }

    fn connect(
        &mut self,
        pull: &Pull,
        rank: RankBlocks,
        runs: Vec<CopyRun>,
    ) -> Result<Part, Failure> {
        let address = PeerAddress { agent: rank.agent, metadata: rank.metadata };
        if self.peers.is_closed(&address.agent) {
            return Err(pull.unreachable("an earlier transfer from it has not ended"));
        }
        let peer = self.open_peer(&address, pull)?;
        Ok(Part {
            address,
            peer,
            place: Place::of_device(rank.device),
            epoch_address: rank.epoch_address,
            epoch: rank.epoch,
            slot: None,
            waiting: requests(runs, self.settings.max_request),
            running: Vec::new(),
        })
    }

    fn open_peer(&mut self, address: &PeerAddress, pull: &Pull) -> Result<PeerId, Failure> {
        let id = self.transport.connect(address).map_err(|error| Failure {
            code: ErrorCode::KvPeerUnreachable,
            message: error.to_string(),
        })?;
        self.peers.opened(id, &address.agent, &pull.worker, pull.incarnation);
        Ok(id)
    }

    fn advance(&mut self, pull: &mut Pull, now: Instant) -> bool {
        let (mut progress, failed) = self.collect(pull);
        if let Stage::Settling { .. } = pull.stage {
            if pull.in_flight() == 0 {
                self.settle(pull);
            }
            return progress;
        }
        if let Some(reason) = failed {
            let failure = pull.unreachable(&reason);
            self.give_up(pull, failure, now);
            return true;
        }
        if now >= pull.deadline {
            self.abandon(pull, now);
            return true;
        }
        if pull.has_read_all() {
            progress |= match pull.stage {
                Stage::Blocks => self.ask_epochs(pull),
                Stage::Epoch => {
                    self.conclude(pull, now);
                    return true;
                }
                Stage::Settling { .. } | Stage::Over => false,
            };
        }
        if self.pause_until.is_none() {
            match self.post(pull) {
                Ok(posted) => progress |= posted,
                Err(failure) => self.give_up(pull, failure, now),
            }
        }
        progress
    }

    /// Takes ended requests out; whether there were any, and why one failed.
    fn collect(&mut self, pull: &mut Pull) -> (bool, Option<String>) {
        let (mut progress, mut failed) = (false, None);
        for part in &mut pull.parts {
            part.running.retain(|request| {
                match self.transport.poll(request.id) {
                    TransferState::Running => return true,
                    TransferState::Done => self.peers.done(part.peer, request, false),
                    TransferState::Failed(reason) => {
                        self.peers.failed(part.peer);
                        failed = Some(reason);
                    }
                }
                progress = true;
                false
            });
        }
        (progress, failed)
    }

    /// Puts the reads of the epoch words behind the blocks'; false while no landing slot is free.
    fn ask_epochs(&mut self, pull: &mut Pull) -> bool {
        if self.free_slots.len() < pull.parts.len() {
            return false;
        }
        failpoint::reach(Point::PullRead);
        for part in &mut pull.parts {
            let Some(slot) = self.free_slots.pop() else { return false };
            // Anything but the value that is hoped for: a read that writes nothing must not pass.
            self.landing.write(slot * 8, &(!part.epoch).to_le_bytes());
            part.slot = Some(slot);
            let target = self.landing.base() as u64 + slot as u64 * 8;
            part.waiting.push_back(vec![CopyRun { source: part.epoch_address, target, len: 8 }]);
        }
        pull.stage = Stage::Epoch;
        true
    }

    /// All is read: if every epoch is what it was, tell the owners and the engine.
    fn conclude(&mut self, pull: &mut Pull, now: Instant) {
        let whole = pull.parts.iter().all(|part| {
            let mut word = [0; 8];
            part.slot.is_some_and(|slot| {
                self.landing.read(slot * 8, &mut word);
                u64::from_le_bytes(word) == part.epoch
            })
        });
        if !whole {
            let message =
                format!("the lease of worker `{}` ended before its blocks were read", pull.worker);
            return self.give_up(pull, Failure { code: ErrorCode::KvLeaseGone, message }, now);
        }
        failpoint::reach(Point::PullFenced);
        for part in &pull.parts {
            // The data is good whoever hears of it; an owner that does not ends the lease by time.
            if let Err(error) = self.transport.notify(part.peer, &write_notice(pull.lease)) {
                tracing::warn!(worker = %pull.worker, %error, "cannot tell a worker that its lease was read");
            }
        }
        failpoint::reach(Point::PullNotified);
        self.release_slots(pull);
        pull.stage = Stage::Over;
        self.events.push(MoverEvent::Pulled {
            id: pull.id,
            bytes: pull.bytes,
            descriptors: pull.descriptors,
            elapsed: now.duration_since(pull.arrived),
        });
    }

    /// Posts what the peers' windows allow, and at most a window's worth: where a post copies, a long pull would
    /// keep everything else waiting. Whether anything was posted.
    fn post(&mut self, pull: &mut Pull) -> Result<bool, Failure> {
        let (worker, stage, mut progress) = (&pull.worker, pull.stage, false);
        for part in &mut pull.parts {
            let ends = match stage {
                Stage::Epoch => Ends::HOST,
                Stage::Blocks | Stage::Settling { .. } | Stage::Over => {
                    Ends { near: self.pool, far: part.place }
                }
            };
            for _ in 0..self.settings.window.min(part.waiting.len()) {
                match self.peers.room(part.peer, self.settings.window) {
                    Room::Free => {}
                    Room::Full => break,
                    Room::Closed => {
                        return Err(unreachable(worker, "the connection to it was lost"));
                    }
                }
                let Some(runs) = part.waiting.pop_front() else { break };
                failpoint::reach(Point::PullPost);
                let probe = self.peers.probe(part.peer, &runs);
                let posted = self.transport.post(Op::Read, part.peer, ends, &runs);
                let id = posted.map_err(|error| {
                    if let TransportError::Unreachable { .. } = error {
                        self.peers.lost(part.peer);
                    }
                    unreachable(worker, &error.to_string())
                })?;
                failpoint::reach(Point::PullPosted);
                progress = true;
                self.peers.posted(part.peer);
                let request = Request { id, runs, probe };
                // A copy out of the peer's memory is over already.
                match self.transport.poll(id) {
                    TransferState::Running => part.running.push(request),
                    TransferState::Done => self.peers.done(part.peer, &request, true),
                    TransferState::Failed(reason) => {
                        self.peers.failed(part.peer);
                        return Err(unreachable(worker, &reason));
                    }
                }
            }
        }
        Ok(progress)
    }

    fn abandon(&mut self, pull: &mut Pull, now: Instant) {
        for part in pull.parts.iter().filter(|part| !part.running.is_empty()) {
            self.peers.suspect(part.peer);
        }
        let message = format!(
            "reading the blocks of worker `{}` did not end within {:?}",
            pull.worker,
            pull.deadline.saturating_duration_since(pull.arrived)
        );
        self.give_up(pull, Failure { code: ErrorCode::KvTransferTimeout, message }, now);
    }

    /// Reports a failure; what is in flight keeps the pull here until it has ended.
    fn give_up(&mut self, pull: &mut Pull, failure: Failure, now: Instant) {
        pull.parts.iter_mut().for_each(|part| part.waiting.clear());
        let settled = pull.in_flight() == 0;
        pull.stage = if settled { Stage::Over } else { Stage::Settling { since: now } };
        if settled {
            self.release_slots(pull);
        }
        let Failure { code, message } = failure;
        self.events.push(MoverEvent::PullFailed { id: pull.id, code, message, settled });
    }

    fn fail(&mut self, mut pull: Pull, failure: Failure, now: Instant) {
        self.give_up(&mut pull, failure, now);
        if pull.stage != Stage::Over {
            self.pulls.push(pull);
        }
    }

    /// A failed pull's requests have ended.
    fn settle(&mut self, pull: &mut Pull) {
        self.release_slots(pull);
        pull.stage = Stage::Over;
        self.events.push(MoverEvent::Settled { id: pull.id });
    }

    fn release_slots(&mut self, pull: &mut Pull) {
        self.free_slots.extend(pull.parts.iter_mut().filter_map(|part| part.slot.take()));
    }

    /// Rebuilds the agent when a failed pull's requests do not end; healthy ones are given a moment before.
    fn rebuild_if_due(&mut self, now: Instant) -> bool {
        let patience = self.settings.settle_timeout;
        let overdue = |pull: &Pull| match pull.stage {
            Stage::Settling { since } => now >= since + patience,
            Stage::Blocks | Stage::Epoch | Stage::Over => false,
        };
        if !self.pulls.iter().any(overdue) {
            self.pause_until = None;
            return false;
        }
        let until = *self.pause_until.get_or_insert(now + self.settings.rebuild_pause);
        let healthy = self.pulls.iter().filter(|pull| pull.is_live());
        if now < until && healthy.map(Pull::in_flight).sum::<usize>() > 0 {
            return false;
        }
        self.rebuild(now);
        true
    }

    fn rebuild(&mut self, now: Instant) {
        let outcome = self.transport.rebuild();
        self.rebuilds += 1;
        self.pause_until = None;
        self.peers.clear();
        tracing::warn!(pulls = self.pulls.len(), "rebuilt the moving agent: transfers did not end");
        if let Err(error) = outcome {
            tracing::error!(%error, "the moving agent did not come up again");
        }
        for mut pull in std::mem::take(&mut self.pulls) {
            for part in &mut pull.parts {
                let interrupted = part.running.drain(..).rev().map(|request| request.runs);
                interrupted.for_each(|runs| part.waiting.push_front(runs));
            }
            if !pull.is_live() {
                self.settle(&mut pull);
                continue;
            }
            match self.reconnect(&mut pull) {
                Ok(()) => self.pulls.push(pull),
                Err(failure) => self.fail(pull, failure, now),
            }
        }
    }

    fn reconnect(&mut self, pull: &mut Pull) -> Result<(), Failure> {
        for index in 0..pull.parts.len() {
            let peer = self.open_peer(&pull.parts[index].address, pull)?;
            pull.parts[index].peer = peer;
        }
        Ok(())
    }
}
