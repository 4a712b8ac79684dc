//! A transport inside one process: a shared registry of agents, bytes copied by the poster. For tests of what
//! stands above it, and told by them to hold transfers back, to fail them, or to lose a peer.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_shared::kv::layout::CopyRun;

use super::{
    Ends, Op, PeerAddress, PeerId, Registration, TransferId, TransferState, Transport,
    TransportError,
};
use crate::kv::region::{Place, Region};

/// Longest piece that is copied at once, in bytes.
const BOUNCE: usize = 1 << 20;

/// Where agents of one process find each other. Cloning shares it.
#[derive(Clone, Default)]
pub struct LocalNet {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    agents: HashMap<String, Agent>,
    unreachable: HashSet<String>,
    held: HashSet<String>,
    failing: HashSet<String>,
    most_in_flight: HashMap<String, usize>,
    connections: HashMap<String, usize>,
}

#[derive(Default)]
struct Agent {
    regions: Vec<Region>,
    inbox: VecDeque<(String, Vec<u8>)>,
}

impl LocalNet {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Transfers from and to this agent stay under way until [`Self::let_go`].
    pub fn hold(&self, agent: &str) {
        self.lock().held.insert(agent.to_owned());
    }

    /// Ends [`Self::hold`]: their bytes are copied when they are polled next.
    pub fn let_go(&self, agent: &str) {
        self.lock().held.remove(agent);
    }

    /// Transfers from and to this agent fail when they are polled next.
    pub fn fail(&self, agent: &str) {
        self.lock().failing.insert(agent.to_owned());
    }

    /// Nobody can connect or post to this agent any more.
    pub fn lose(&self, agent: &str) {
        self.lock().unreachable.insert(agent.to_owned());
    }

    /// Ends [`Self::fail`] and [`Self::lose`].
    pub fn heal(&self, agent: &str) {
        let mut state = self.lock();
        state.failing.remove(agent);
        state.unreachable.remove(agent);
    }

    /// Most requests that were ever in flight towards this agent.
    pub fn most_in_flight(&self, agent: &str) -> usize {
        self.lock().most_in_flight.get(agent).copied().unwrap_or(0)
    }

    /// How many agents are connected to this one and have not forgotten it.
    pub fn connections(&self, agent: &str) -> usize {
        self.lock().connections.get(agent).copied().unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One agent of a [`LocalNet`]; gone from it when dropped.
pub struct LocalTransport {
    net: LocalNet,
    name: String,
    peers: Vec<Option<String>>,
    transfers: HashMap<TransferId, Transfer>,
    posted: u64,
}

struct Transfer {
    op: Op,
    peer: String,
    ends: Ends,
    runs: Vec<CopyRun>,
}

impl LocalTransport {
    /// Joins under a name of its own.
    ///
    /// # Errors
    /// [`TransportError::Broken`] if the name is taken.
    pub fn new(net: &LocalNet, name: &str) -> Result<Self, TransportError> {
        match net.lock().agents.entry(name.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                return Err(TransportError::Broken {
                    call: "join",
                    reason: format!("agent `{name}` is there already"),
                });
            }
            std::collections::hash_map::Entry::Vacant(free) => free.insert(Agent::default()),
        };
        Ok(Self {
            net: net.clone(),
            name: name.to_owned(),
            peers: Vec::new(),
            transfers: HashMap::new(),
            posted: 0,
        })
    }

    fn peer(&self, peer: PeerId) -> Result<&str, TransportError> {
        let name = self.peers.get(peer.0 as usize).and_then(Option::as_deref);
        name.ok_or_else(|| unreachable(&format!("peer {}", peer.0), "it was forgotten"))
    }

    fn forget_all(&mut self) {
        for index in 0..self.peers.len() {
            self.forget(PeerId(u32::try_from(index).unwrap_or(u32::MAX)));
        }
    }
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        self.forget_all();
        self.net.lock().agents.remove(&self.name);
    }
}

impl Transport for LocalTransport {
    fn register(&mut self, region: &Region) -> Result<Registration, TransportError> {
        let mut state = self.net.lock();
        let regions = &mut agent(&mut state, &self.name)?.regions;
        regions.push(region.clone());
        Ok(Registration(u32::try_from(regions.len() - 1).unwrap_or(u32::MAX)))
    }

    fn address(&mut self) -> Result<PeerAddress, TransportError> {
        Ok(PeerAddress { agent: self.name.clone(), metadata: self.name.clone().into_bytes() })
    }

    fn connect(&mut self, peer: &PeerAddress) -> Result<PeerId, TransportError> {
        if peer.metadata != peer.agent.as_bytes() {
            return Err(unreachable(&peer.agent, "its metadata is of another agent"));
        }
        reachable(&mut self.net.lock(), &peer.agent)?;
        let known = self.peers.iter().position(|name| name.as_ref() == Some(&peer.agent));
        let index = known.unwrap_or_else(|| {
            *self.net.lock().connections.entry(peer.agent.clone()).or_default() += 1;
            self.peers.push(Some(peer.agent.clone()));
            self.peers.len() - 1
        });
        Ok(PeerId(u32::try_from(index).unwrap_or(u32::MAX)))
    }

    fn post(
        &mut self,
        op: Op,
        peer: PeerId,
        ends: Ends,
        runs: &[CopyRun],
    ) -> Result<TransferId, TransportError> {
        let peer = self.peer(peer)?.to_owned();
        let mut state = self.net.lock();
        reachable(&mut state, &peer)?;
        let transfer = Transfer { op, peer: peer.clone(), ends, runs: runs.to_vec() };
        for run in runs {
            transfer.pieces(&state, &self.name, run)?;
        }
        let id = TransferId(self.posted);
        self.posted += 1;
        let in_flight = 1 + self.transfers.values().filter(|other| other.peer == peer).count();
        let most = state.most_in_flight.entry(peer).or_default();
        *most = in_flight.max(*most);
        self.transfers.insert(id, transfer);
        Ok(id)
    }

    fn notify(&mut self, peer: PeerId, message: &[u8]) -> Result<(), TransportError> {
        let peer = self.peer(peer)?.to_owned();
        let mut state = self.net.lock();
        let inbox = &mut reachable(&mut state, &peer)?.inbox;
        inbox.push_back((self.name.clone(), message.to_vec()));
        Ok(())
    }

    fn forget(&mut self, peer: PeerId) {
        let known = self.peers.get_mut(peer.0 as usize).and_then(Option::take);
        let Some(name) = known else { return };
        if let Some(count) = self.net.lock().connections.get_mut(&name) {
            *count -= 1;
        }
    }

    fn poll(&mut self, id: TransferId) -> TransferState {
        let Some(transfer) = self.transfers.get(&id) else {
            return TransferState::Failed("no such transfer".to_owned());
        };
        let mut state = self.net.lock();
        if state.failing.contains(&transfer.peer) {
            self.transfers.remove(&id);
            return TransferState::Failed("told to fail".to_owned());
        }
        if state.held.contains(&transfer.peer) {
            return TransferState::Running;
        }
        let outcome = reachable(&mut state, &transfer.peer).map(|_| ()).and_then(|()| {
            transfer.runs.iter().try_for_each(|run| transfer.copy(&state, &self.name, run))
        });
        self.transfers.remove(&id);
        match outcome {
            Ok(()) => TransferState::Done,
            Err(error) => TransferState::Failed(error.to_string()),
        }
    }

    fn rebuild(&mut self) -> Result<(), TransportError> {
        self.transfers.clear();
        self.forget_all();
        Ok(())
    }

    fn notifications(&mut self, out: &mut Vec<(String, Vec<u8>)>) -> Result<(), TransportError> {
        out.extend(agent(&mut self.net.lock(), &self.name)?.inbox.drain(..));
        Ok(())
    }
}

fn agent<'a>(state: &'a mut State, name: &str) -> Result<&'a mut Agent, TransportError> {
    state.agents.get_mut(name).ok_or_else(|| unreachable(name, "there is no such agent"))
}

fn reachable<'a>(state: &'a mut State, name: &str) -> Result<&'a mut Agent, TransportError> {
    if state.unreachable.contains(name) {
        return Err(unreachable(name, "told to be unreachable"));
    }
    agent(state, name)
}

fn unreachable(peer: &str, reason: &str) -> TransportError {
    TransportError::Unreachable { peer: peer.to_owned(), reason: reason.to_owned() }
}

fn broken(call: &'static str, reason: String) -> TransportError {
    TransportError::Broken { call, reason }
}

impl Transfer {
    /// Regions and offsets of a run: where it is read, where it is written.
    fn pieces<'a>(
        &self,
        state: &'a State,
        ours: &str,
        run: &CopyRun,
    ) -> Result<[(&'a Region, usize); 2], TransportError> {
        let (near, far) = ((ours, self.ends.near), (self.peer.as_str(), self.ends.far));
        let (source, target) = match self.op {
            Op::Read => (far, near),
            Op::Write => (near, far),
        };
        let find = |(name, place): (&str, Place), address: u64| {
            let regions = state.agents.get(name).map_or(&[][..], |agent| &agent.regions);
            let there = regions.iter().filter(|region| region.place() == place);
            let found = there.into_iter().find_map(|region| {
                let offset = address.checked_sub(region.base())?;
                (offset.checked_add(run.len)? <= region.bytes() as u64).then_some((region, offset))
            });
            let missing = || unreachable(name, &format!("it registered no such {place}"));
            found.map(|(region, offset)| (region, offset as usize)).ok_or_else(missing)
        };
        Ok([find(source, run.source)?, find(target, run.target)?])
    }

    fn copy(&self, state: &State, ours: &str, run: &CopyRun) -> Result<(), TransportError> {
        let [(source, from), (target, to)] = self.pieces(state, ours, run)?;
        let len = usize::try_from(run.len).unwrap_or(usize::MAX);
        let mut bounce = vec![0; len.min(BOUNCE)];
        for start in (0..len).step_by(BOUNCE) {
            let piece = &mut bounce[..BOUNCE.min(len - start)];
            source.read(from + start, piece).map_err(|reason| broken("reading memory", reason))?;
            target.write(to + start, piece).map_err(|reason| broken("writing memory", reason))?;
        }
        Ok(())
    }
}
