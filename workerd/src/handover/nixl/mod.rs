//! The transport between processes and hosts: NIXL over UCX.
//!
//! [`library`] finds and loads NIXL, [`agent`] owns what it hands out; here is the bookkeeping of peers and requests
//! behind [`Transport`]. Nothing is authenticated or encrypted by NIXL: whoever reaches its port can read and write
//! this process's memory, so it listens on loopback unless told otherwise.

mod agent;
pub mod library;
mod sends;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;

use baton_shared::id::{Incarnation, WorkerId};
use baton_shared::kv::layout::CopyRun;
use nixl_sys::NixlError;

use self::agent::{Agent, Request};
pub use self::library::{LibraryError, NixlLibrary, prepare_environment};
use super::{
    Ends, Op, PeerAddress, PeerId, Registration, TransferId, TransferState, Transport,
    TransportError,
};
use crate::kv::region::{Place, Region};

/// Ports a rank needs at least: two agents, and the ports of a run that ended within the last minute.
pub const MIN_PORTS: u16 = 8;

/// How peers reach us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NixlSettings {
    /// Network interface (`handover.advertise`).
    pub interface: String,
    /// UCX's ports (`nixl.port_range`), at least [`MIN_PORTS`]; `None` = any.
    pub ports: Option<RangeInclusive<u16>>,
}

impl Default for NixlSettings {
    fn default() -> Self {
        Self { interface: "lo".to_owned(), ports: None }
    }
}

impl NixlSettings {
    /// UCX's keys for one agent; `random` places it in the port range, as a port just left cannot be taken at once.
    fn engine_config(&self, random: u16) -> Result<String, TransportError> {
        let refuse = |reason: String| TransportError::Broken { call: "configuring NIXL", reason };
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-@:".contains(&b);
        let name = &self.interface;
        if name.is_empty() || name.len() > 15 || !name.bytes().all(legal) {
            return Err(refuse(format!("`{name}` is not the name of a network interface")));
        }
        let devices = format!("NET_DEVICES={name}");
        let Some(ports) = &self.ports else { return Ok(devices) };
        let (first, last) = (*ports.start(), *ports.end());
        let spare = last.checked_sub(first).and_then(|span| span.checked_sub(MIN_PORTS - 1));
        let Some(spare) = spare.filter(|_| first > 0) else {
            return Err(refuse(format!(
                "port range {first}-{last} has less than {MIN_PORTS} ports"
            )));
        };
        // Within the first half at most, so that the rest is still wide enough to move on.
        let start = first + random % (spare / 2 + 1);
        Ok(format!("{devices},TCP_PORT_RANGE={start}-{last}"))
    }
}

/// What an agent is for; part of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentRole {
    /// Answers reads and takes notifications.
    Serve,
    /// Posts reads.
    Move,
}

/// `instance/rank/role/incarnation`: unique for each start, as a name used before is refused by peers.
pub fn agent_name(
    instance: &WorkerId,
    rank: u32,
    role: AgentRole,
    incarnation: &Incarnation,
) -> String {
    let role = match role {
        AgentRole::Serve => "serve",
        AgentRole::Move => "move",
    };
    format!("{instance}/{rank}/{role}/{incarnation}")
}

/// One agent. Fields go in this order: requests before the agent they hold alive.
pub struct NixlTransport {
    requests: HashMap<TransferId, Request>,
    agent: Option<Agent>,
    regions: Vec<Region>,
    library: NixlLibrary,
    settings: NixlSettings,
    name: String,
    rebuilds: u32,
    posted: u64,
    /// By id; ids are never used again, `None` = forgotten.
    peers: Vec<Option<String>>,
}

impl NixlTransport {
    /// An agent of that name, its UCX back end listening on the configured interface.
    ///
    /// # Errors
    /// [`TransportError::Broken`].
    pub fn open(
        library: &NixlLibrary,
        settings: &NixlSettings,
        name: String,
    ) -> Result<Self, TransportError> {
        let mut transport = Self {
            requests: HashMap::new(),
            agent: None,
            regions: Vec::new(),
            library: library.clone(),
            settings: settings.clone(),
            name,
            rebuilds: 0,
            posted: 0,
            peers: Vec::new(),
        };
        transport.create()?;
        Ok(transport)
    }

    /// A fresh agent with the memory of the last.
    fn create(&mut self) -> Result<(), TransportError> {
        let config = self.settings.engine_config(rand::random())?;
        let mut agent = Agent::open(&self.library, &self.agent_name(), &config)
            .map_err(|(call, error)| unopened(call, &error, Path::new(INTERFACES).exists()))?;
        for region in &self.regions {
            agent.register(region).map_err(|error| unregistered(region, &error))?;
        }
        self.agent = Some(agent);
        Ok(())
    }

    fn agent_name(&self) -> String {
        match self.rebuilds {
            0 => self.name.clone(),
            rebuilds => format!("{}/{rebuilds}", self.name),
        }
    }

    fn agent(&self) -> Result<&Agent, TransportError> {
        let reason = || "the agent did not come up again".to_owned();
        self.agent.as_ref().ok_or_else(|| TransportError::Broken { call: "NIXL", reason: reason() })
    }

    fn peer(&self, peer: PeerId) -> Result<&str, TransportError> {
        let name = self.peers.get(peer.0 as usize).and_then(Option::as_deref);
        name.ok_or_else(|| TransportError::Unreachable {
            peer: format!("peer {}", peer.0),
            reason: "it was forgotten".to_owned(),
        })
    }
}

impl Transport for NixlTransport {
    fn register(&mut self, region: &Region) -> Result<Registration, TransportError> {
        let Some(agent) = &mut self.agent else { return self.agent().map(|_| Registration(0)) };
        agent.register(region).map_err(|error| unregistered(region, &error))?;
        self.regions.push(region.clone());
        Ok(Registration(u32::try_from(self.regions.len() - 1).unwrap_or(u32::MAX)))
    }

    fn address(&mut self) -> Result<PeerAddress, TransportError> {
        let metadata = self.agent()?.metadata();
        let metadata = metadata.map_err(|error| broken("describing a NIXL agent", &error))?;
        Ok(PeerAddress { agent: self.agent_name(), metadata })
    }

    fn connect(&mut self, peer: &PeerAddress) -> Result<PeerId, TransportError> {
        let known = self.peers.iter().position(|name| name.as_ref() == Some(&peer.agent));
        let index = match known {
            Some(index) => index,
            None => {
                if self.agent.is_none() {
                    self.create()?;
                }
                let agent = self.agent()?;
                let name = agent
                    .connect(&peer.metadata)
                    .map_err(|error| unreachable(&peer.agent, &error.to_string()))?;
                if name != peer.agent {
                    agent.forget(&name);
                    return Err(unreachable(&peer.agent, "its metadata is of another agent"));
                }
                self.peers.push(Some(name));
                self.peers.len() - 1
            }
        };
        Ok(PeerId(u32::try_from(index).unwrap_or(u32::MAX)))
    }

    fn post(
        &mut self,
        op: Op,
        peer: PeerId,
        ends: Ends,
        runs: &[CopyRun],
    ) -> Result<TransferId, TransportError> {
        let name = self.peer(peer)?;
        let posted = self.agent()?.post(op, name, ends, runs);
        let request = posted.map_err(|error| refused(name, &error))?;
        let id = TransferId(self.posted);
        self.posted += 1;
        self.requests.insert(id, request);
        Ok(id)
    }

    fn notify(&mut self, peer: PeerId, message: &[u8]) -> Result<(), TransportError> {
        let name = self.peer(peer)?;
        self.agent()?.notify(name, message).map_err(|error| refused(name, &error))
    }

    fn forget(&mut self, peer: PeerId) {
        let name = self.peers.get_mut(peer.0 as usize).and_then(Option::take);
        if let (Some(name), Some(agent)) = (name, &self.agent) {
            agent.forget(&name);
        }
    }

    fn poll(&mut self, id: TransferId) -> TransferState {
        let (Some(agent), Some(request)) = (&self.agent, self.requests.get(&id)) else {
            return TransferState::Failed("no such transfer".to_owned());
        };
        let state = match agent.status(request) {
            Ok(false) => return TransferState::Running,
            Ok(true) => TransferState::Done,
            Err(error) => TransferState::Failed(error.to_string()),
        };
        self.requests.remove(&id);
        state
    }

    fn rebuild(&mut self) -> Result<(), TransportError> {
        // Dropping requests does not stop them; that the agent goes does. Requests first: they hold it alive.
        self.requests.clear();
        self.agent = None;
        self.peers.iter_mut().for_each(|name| *name = None);
        self.rebuilds += 1;
        self.create()
    }

    fn notifications(&mut self, out: &mut Vec<(String, Vec<u8>)>) -> Result<(), TransportError> {
        let taken = self.agent()?.notifications(out);
        taken.map_err(|error| broken("taking notifications", &error))
    }
}

/// Where UCX looks for network interfaces; without one its back end is not made, and NIXL says only that.
const INTERFACES: &str = "/sys/class/net";

fn unopened(call: &'static str, error: &NixlError, has_interfaces: bool) -> TransportError {
    if has_interfaces {
        return broken(call, error);
    }
    let reason = format!(
        "{error}; UCX looks for network interfaces in `{INTERFACES}`, which is not there: mount `/sys`"
    );
    TransportError::Broken { call, reason }
}

fn broken(call: &'static str, error: &NixlError) -> TransportError {
    TransportError::Broken { call, reason: error.to_string() }
}

/// NIXL does not say why. For memory of a device there is one thing that usually is amiss.
fn unregistered(region: &Region, error: &NixlError) -> TransportError {
    let reason = match region.place() {
        Place::Host => error.to_string(),
        place => format!(
            "{error}: UCX does not know {place}. It needs its module `libuct_cuda` (`make setup` puts it beside \
             NIXL) and the driver's `libcuda.so.1` and `libnvidia-ml.so.1`; `UCX_TLS`, where it is set (`nixl.ucx`), \
             has to list `cuda_copy` and `cuda_ipc`"
        ),
    };
    TransportError::Broken { call: "registering memory", reason }
}

fn unreachable(peer: &str, reason: &str) -> TransportError {
    TransportError::Unreachable { peer: peer.to_owned(), reason: reason.to_owned() }
}

/// NIXL does not tell a dead peer from memory that its metadata does not cover; both are the peer's.
fn refused(peer: &str, error: &NixlError) -> TransportError {
    unreachable(peer, &error.to_string())
}
