//! One NIXL agent with its UCX back end, as safe calls on owned values.
//!
//! What always holds: no agent without a loaded library; memory is registered as long as the agent lives and freed
//! after it; a request is not dropped before its end unless the agent goes with it (the caller's duty, see
//! [`Agent::post`]). Errors are the bindings' words.
#![expect(unsafe_code, reason = "the bindings' trait for memory has an unsafe method")]

use baton_shared::kv::layout::CopyRun;
use nixl_sys as nixl;
use nixl_sys::{MemType, NixlError};

use super::NixlLibrary;
use crate::handover::{Ends, Op};
use crate::kv::region::{Place, Region};

/// The transport plug-in inside NIXL.
const BACKEND: &str = "UCX";
/// How long the progress thread sleeps without traffic; 0 would take a core, and data wakes it anyway.
const PROGRESS_SLEEP_US: u64 = 25_000;

/// An agent. Fields go in this order: registrations, then the agent with its back end, then the memory.
pub(super) struct Agent {
    registrations: Vec<nixl::RegistrationHandle>,
    agent: nixl::Agent,
    memory: Vec<Memory>,
}

/// A posted request. It holds the agent alive.
pub(super) struct Request(nixl::XferRequest);

#[derive(Debug)]
struct Memory(Region);

impl nixl::MemoryRegion for Memory {
    unsafe fn as_ptr(&self) -> *const u8 {
        std::ptr::with_exposed_provenance(self.0.base() as usize)
    }

    fn size(&self) -> usize {
        self.0.bytes()
    }
}

impl nixl::NixlDescriptor for Memory {
    fn mem_type(&self) -> MemType {
        kind(self.0.place()).0
    }

    fn device_id(&self) -> u64 {
        kind(self.0.place()).1
    }
}

/// NIXL's words for a place: lists of descriptors have the one, each descriptor the other.
fn kind(place: Place) -> (MemType, u64) {
    match place {
        Place::Host => (MemType::Dram, 0),
        Place::Cuda(ordinal) => (MemType::Vram, ordinal.into()),
    }
}

impl Agent {
    /// `engine_config` is UCX's: `KEY=V,KEY=V`, keys without `UCX_`.
    pub fn open(
        _loaded: &NixlLibrary,
        name: &str,
        engine_config: &str,
    ) -> Result<Self, (&'static str, NixlError)> {
        let config = nixl::AgentConfig {
            pthr_delay_us: PROGRESS_SLEEP_US,
            thread_sync: nixl::ThreadSync::Strict,
            ..Default::default()
        };
        let agent = nixl::Agent::new_configured(name, &config)
            .map_err(|error| ("creating a NIXL agent", error))?;
        let backend = || {
            let (_, defaults) = agent.get_plugin_params(BACKEND)?;
            let mut params = defaults.clone()?;
            params.set("engine_config", engine_config)?;
            agent.create_backend(BACKEND, &params)
        };
        backend().map_err(|error| ("creating NIXL's UCX back end", error))?;
        Ok(Self { registrations: Vec::new(), agent, memory: Vec::new() })
    }

    /// Before [`Self::metadata`].
    pub fn register(&mut self, region: &Region) -> Result<(), NixlError> {
        let memory = Memory(region.clone());
        self.registrations.push(self.agent.register_memory(&memory, None)?);
        self.memory.push(memory);
        Ok(())
    }

    pub fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        self.agent.get_local_md()
    }

    /// Connects to the agent of that metadata, which must be of a trusted source: altered bytes abort the process.
    /// The name is the one in it. Once for each incarnation: repeating it leaks sockets on both sides.
    pub fn connect(&self, metadata: &[u8]) -> Result<String, NixlError> {
        let name = self.agent.load_remote_md(metadata)?;
        if let Err(error) = self.agent.make_connection(&name, None) {
            self.forget(&name);
            return Err(error);
        }
        Ok(name)
    }

    /// Only a dead peer's, with no request in flight.
    pub fn forget(&self, name: &str) {
        if let Err(error) = self.agent.invalidate_remote_md(name) {
            tracing::debug!(agent = name, %error, "a peer's metadata was gone already");
        }
    }

    /// Starts a transfer; `runs` have been merged. The request must be kept until [`Self::status`] gave an end,
    /// else bytes go on arriving with nobody to say when they stop.
    pub fn post(
        &self,
        op: Op,
        peer: &str,
        ends: Ends,
        runs: &[CopyRun],
    ) -> Result<Request, NixlError> {
        let ((near_type, near_device), (far_type, far_device)) = (kind(ends.near), kind(ends.far));
        let mut local = nixl::XferDescList::new(near_type)?;
        let mut remote = nixl::XferDescList::new(far_type)?;
        for run in runs {
            let (near, far, len) = match op {
                Op::Read => (run.target, run.source, run.len),
                Op::Write => (run.source, run.target, run.len),
            };
            // 64-bit only: NIXL has no other build.
            local.add_desc(near as usize, len as usize, near_device);
            remote.add_desc(far as usize, len as usize, far_device);
        }
        let direction = match op {
            Op::Read => nixl::XferOp::Read,
            Op::Write => nixl::XferOp::Write,
        };
        let request = self.agent.create_xfer_req(direction, &local, &remote, peer, None)?;
        self.agent.post_xfer_req(&request, None)?;
        Ok(Request(request))
    }

    /// Whether it has ended.
    pub fn status(&self, request: &Request) -> Result<bool, NixlError> {
        self.agent.get_xfer_status(&request.0).map(|status| status.is_success())
    }

    pub fn notify(&self, peer: &str, message: &[u8]) -> Result<(), NixlError> {
        self.agent.send_notification(peer, message, None)
    }

    /// Messages that arrived, as bytes: the bindings' own reading loses all when one is not UTF-8.
    pub fn notifications(&self, out: &mut Vec<(String, Vec<u8>)>) -> Result<(), NixlError> {
        let mut map = nixl::NotificationMap::new()?;
        self.agent.get_notifications(&mut map, None)?;
        for sender in map.agents() {
            // A name that is not UTF-8 cannot be asked for; its messages are nobody's.
            let Ok(sender) = sender else { continue };
            for message in map.get_notifications(sender)? {
                out.push((sender.to_owned(), message?));
            }
        }
        Ok(())
    }
}
