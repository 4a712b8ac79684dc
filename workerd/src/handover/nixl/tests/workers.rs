//! Workers of two processes: one owns blocks under a lease, another reads them with a mover.

use std::collections::HashSet;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, LazyLock};

use crossbeam_channel::Receiver;

use super::*;
use crate::backend::cuda::pool::PoolMemory;
use crate::backend::cuda::sys::{Gpu, driver};
use crate::handover::mover::{Mover, MoverHandle, MoverRegions, MoverSettings, OpenTransport};
use crate::handover::offer::{self, Identity, OfferedLease};
use crate::handover::pull::copy_runs;
use crate::handover::{MoverEvent, PullId, PullJob};
use crate::kv::region::{EpochPage, KvRegion};
use baton_shared::id::{BlockIndex, DisaggRequestId, LeaseId};
use baton_shared::kv::layout::{KvDtype, KvLayout};
use baton_shared::kv::record::{RankBlocks, Record};
use baton_shared::wire::auth::Keys;
use baton_shared::wire::error::ErrorCode;

pub const BLOCKS: u32 = 1024;
/// The owner's blocks that are under its lease: 25 MiB.
pub const LEASED: Range<u32> = 100..500;
/// What blocks hold that nothing was read into.
const FILLER: u8 = 0xEE;

const PLACE: &str = "BATON_TEST_POOL_PLACE";
/// Given to a process, it has its pool there.
pub const IN_DEVICE_MEMORY: (&str, &str) = (PLACE, "cuda:0");

/// 64 KiB a block, 64 MiB.
pub fn pool() -> KvRegion {
    let layout = KvLayout::block_major(KvDtype::Bf16, 32, 64, BLOCKS, 0..2, 0..4);
    let bytes = usize::try_from(layout.bytes()).unwrap();
    let region = match std::env::var(PLACE) {
        Ok(place) => {
            assert_eq!(place, IN_DEVICE_MEMORY.1);
            device_memory(bytes)
        }
        Err(_) => Region::host(bytes).unwrap(),
    };
    KvRegion { region, layout }
}

/// Memory of the first GPU.
pub fn device_memory(bytes: usize) -> Region {
    static GPU: LazyLock<Arc<dyn Gpu>> = LazyLock::new(|| {
        driver::open(0, driver::Features { blas: false, ..driver::Features::default() }).unwrap()
    });
    Region::device(Arc::new(PoolMemory::new(&GPU, bytes).unwrap()))
}

/// The content of an owner's block.
pub fn block(owner: &str, block: u32, layout: &KvLayout) -> Vec<u8> {
    let mark = owner.bytes().fold(7_u64, |mark, byte| mark * 31 + u64::from(byte));
    let seed = mark << 32 | u64::from(block) << 8;
    (0..layout.block_bytes() / 8)
        .flat_map(|word| (word ^ seed << 12).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

pub type Started = (MoverHandle, PeerAddress, Receiver<MoverEvent>);

/// A mover as the daemon starts it.
pub fn mover(
    worker: &WorkerId,
    incarnation: Incarnation,
    pool: &KvRegion,
    epochs: &EpochPage,
    settings: MoverSettings,
) -> Started {
    let opener = |role| -> OpenTransport {
        let name = agent_name(worker, 0, role, &incarnation);
        let library = library();
        Box::new(move || {
            Ok(Box::new(NixlTransport::open(&library, &NixlSettings::default(), name)?))
        })
    };
    let regions = MoverRegions { pool: pool.region.clone(), epochs: epochs.region().clone() };
    let (sink, events) = crossbeam_channel::unbounded();
    // The receiver goes before the mover only when the test is over.
    let sink = Box::new(move |event| drop(sink.send(event)));
    let (handle, address) =
        Mover::start(opener(AgentRole::Serve), opener(AgentRole::Move), regions, sink, settings)
            .unwrap();
    (handle, address, events)
}

/// A context worker. Its name is the given one up to a dot: what follows tells its starts apart.
pub struct Owner {
    pub folder: PathBuf,
    pub name: String,
    pub pool: KvRegion,
    pub epochs: EpochPage,
    pub handle: MoverHandle,
    pub events: Receiver<MoverEvent>,
    incarnation: Incarnation,
    worker: WorkerId,
    address: PeerAddress,
}

impl Owner {
    pub fn start() -> Self {
        let (folder, name) = given();
        let worker: WorkerId = name.split('.').next().unwrap().parse().unwrap();
        let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
        let incarnation = Incarnation::random();
        let settings = MoverSettings::default();
        let (handle, address, events) = mover(&worker, incarnation, &pool, &epochs, settings);
        Self { folder, name, pool, epochs, handle, events, incarnation, worker, address }
    }

    /// Fills the blocks and writes the record of their lease, for everybody to find.
    pub fn offer(&self, blocks: Range<u32>, lease: LeaseId, epoch_address: u64, epoch: u64) {
        for index in blocks.clone() {
            let bytes = block(&self.name, index, &self.pool.layout);
            self.pool.region.write(index as usize * bytes.len(), &bytes).unwrap();
        }
        let identity = Identity {
            worker: self.worker.clone(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: self.incarnation,
            fingerprint: [0; 32],
        };
        let offered = OfferedLease { lease, expires_unix_ms: 0, epoch_address, epoch };
        let blocks: Vec<_> = blocks.map(BlockIndex).collect();
        let leased = offer::leased_blocks(offered, &self.address, &self.pool, &blocks);
        let prompt = vec![1; blocks.len() * 32];
        let record = offer::record(&identity, DisaggRequestId(1), &prompt, None, Some(leased));
        let text = record.encode_text(&Keys::none()).unwrap();
        put_file(&self.folder, &format!("{}.pid", self.name), &std::process::id().to_string());
        put_file(&self.folder, &format!("{}.record", self.name), &text);
    }

    /// Goes on until told to stop; `heard` is called for each lease that was read.
    pub fn serve(self, mut heard: impl FnMut(LeaseId)) {
        let stop = self.folder.join("stop");
        while !stop.exists() {
            match self.events.recv_timeout(Duration::from_millis(5)) {
                Ok(MoverEvent::LeaseRead(lease)) => heard(lease),
                Ok(other) => panic!("{other:?}"),
                Err(_) => {}
            }
        }
        assert!(self.handle.shutdown());
    }
}

/// An owner whose lease can be read for ever.
#[test]
#[ignore = "needs a process of its own"]
fn child_owns() {
    let owner = Owner::start();
    let lease = LeaseId::random();
    owner.offer(LEASED, lease, owner.epochs.address(3), owner.epochs.value(3));
    let (folder, heard) = (owner.folder.clone(), format!("{}.heard", owner.name));
    owner.serve(|read| {
        assert_eq!(read, lease);
        put_file(&folder, &heard, "");
    });
}

/// Runs a test as a reader beside owners of these names. Each ends well when told, or was killed by the reader.
pub fn read_beside(owners: &[&str], test: &'static str, variables: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let start = |name: &&str| Running::start("workers::child_owns", name, folder, variables);
    let running: Vec<_> = owners.iter().map(start).collect();
    Running::start(test, "reader", folder, variables).succeed();
    put_file(folder, "stop", "");
    show_figures(folder);
    for (name, mut owner) in owners.iter().zip(running) {
        let status = owner.finish(PATIENCE);
        let is_killed = status.signal() == Some(libc::SIGKILL);
        assert!(status.success() || is_killed, "{name}: {status}\n{}", owner.printed());
    }
}

/// A generation worker.
pub struct Reader {
    pub folder: PathBuf,
    pub handle: MoverHandle,
    pub pool: KvRegion,
    pub events: Receiver<MoverEvent>,
    started: Vec<Instant>,
    figures: String,
}

/// How a pull failed, with times from its start.
#[derive(Debug)]
pub struct Failed {
    pub code: ErrorCode,
    /// Its blocks could be reused when it was reported.
    pub settled: bool,
    pub reported: Duration,
}

impl Reader {
    pub fn start(settings: MoverSettings) -> Self {
        Self::start_as(Incarnation::random(), settings)
    }

    pub fn start_as(incarnation: Incarnation, settings: MoverSettings) -> Self {
        let (folder, name) = given();
        let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
        let worker = name.parse().unwrap();
        let (handle, _, events) = mover(&worker, incarnation, &pool, &epochs, settings);
        Self { folder, handle, pool, events, started: Vec::new(), figures: String::new() }
    }

    /// A line for [`show_figures`].
    pub fn note(&mut self, line: &str) {
        self.figures.push_str(line);
        self.figures.push('\n');
        put_file(&self.folder, "figures", &self.figures);
    }

    pub fn record(&self, owner: &str) -> Record {
        let text = wait_for_file(&self.folder, &format!("{owner}.record"));
        Record::decode_text(&text, &Keys::none()).unwrap()
    }

    pub fn process(&self, owner: &str) -> u32 {
        wait_for_file(&self.folder, &format!("{owner}.pid")).trim().parse().unwrap()
    }

    /// What copies an owner's blocks to blocks from `place` on, no two neighbours.
    pub fn runs(&self, owner: &str, place: u32) -> Vec<(RankBlocks, Vec<CopyRun>)> {
        let target: Vec<_> = place_blocks(place).rev().map(BlockIndex).collect();
        copy_runs(&self.record(owner).lease.unwrap(), &self.pool, 0, &target).unwrap()
    }

    /// Starts to read an owner's blocks `rounds` times over, to blocks from `place` on.
    pub fn pull(&mut self, owner: &str, place: u32, rounds: usize, patience: Duration) -> PullId {
        let record = self.record(owner);
        let mut ranks = self.runs(owner, place);
        ranks[0].1 = ranks[0].1.repeat(rounds);
        let id = PullId(self.started.len() as u64);
        let now = Instant::now();
        self.started.push(now);
        let job = PullJob {
            id,
            worker: record.worker,
            incarnation: record.incarnation,
            lease: record.lease.unwrap().lease,
            ranks,
            deadline: now + patience,
        };
        self.handle.pull(job).unwrap();
        id
    }

    pub fn since_start_of(&self, pull: PullId) -> Duration {
        self.started[pull.0 as usize].elapsed()
    }

    pub fn event(&self) -> MoverEvent {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    /// Waits for the good end of the only pull under way; how long it took.
    pub fn succeed(&self, wanted: PullId) -> Duration {
        match self.event() {
            MoverEvent::Pulled { id, elapsed, .. } if id == wanted => elapsed,
            other => panic!("{other:?}"),
        }
    }

    /// Reads an owner's blocks once, and looks at them.
    pub fn succeed_from(&mut self, owner: &str, place: u32) -> Duration {
        self.fill(place);
        let id = self.pull(owner, place, 1, PATIENCE / 2);
        let elapsed = self.succeed(id);
        assert!(self.holds(owner, place));
        elapsed
    }

    /// Waits for the failure of the only pull under way.
    pub fn fail(&self, wanted: PullId) -> Failed {
        self.fail_within(wanted, PATIENCE)
    }

    pub fn fail_within(&self, wanted: PullId, patience: Duration) -> Failed {
        let event = self.events.recv_timeout(patience).unwrap();
        let reported = self.since_start_of(wanted);
        match event {
            MoverEvent::PullFailed { id, code, settled, .. } if id == wanted => {
                Failed { code, settled, reported }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Waits until a failed pull's blocks may be reused; how long after its start that is.
    pub fn settle(&self, wanted: PullId, failed: &Failed) -> Duration {
        if failed.settled {
            return failed.reported;
        }
        match self.event() {
            MoverEvent::Settled { id } if id == wanted => self.since_start_of(id),
            other => panic!("{other:?}"),
        }
    }

    /// Whether blocks from `place` on are an owner's.
    pub fn holds(&self, owner: &str, place: u32) -> bool {
        let mut bytes = vec![0; usize::try_from(self.pool.layout.block_bytes()).unwrap()];
        LEASED.zip(place_blocks(place).rev()).all(|(from, to)| {
            self.pool.region.read(to as usize * bytes.len(), &mut bytes).unwrap();
            bytes == block(owner, from, &self.pool.layout)
        })
    }

    /// Makes blocks from `place` on hold nothing.
    pub fn fill(&self, place: u32) {
        let bytes = vec![FILLER; usize::try_from(self.pool.layout.block_bytes()).unwrap()];
        for index in place_blocks(place) {
            self.pool.region.write(index as usize * bytes.len(), &bytes).unwrap();
        }
    }

    /// Blocks from `place` on that were written to since they were filled.
    pub fn written(&self, place: u32) -> HashSet<u32> {
        let mut bytes = vec![0; usize::try_from(self.pool.layout.block_bytes()).unwrap()];
        let mut is_written = |&index: &u32| {
            self.pool.region.read(index as usize * bytes.len(), &mut bytes).unwrap();
            bytes.iter().any(|byte| *byte != FILLER)
        };
        place_blocks(place).filter(|index| is_written(index)).collect()
    }

    /// Waits until the first bytes are there: the transfer is under way.
    pub fn wait_for_bytes(&self, place: u32) {
        let bytes = usize::try_from(self.pool.layout.block_bytes()).unwrap();
        let any = || {
            let mut word = [0; 8];
            place_blocks(place).any(|index| {
                self.pool.region.read(index as usize * bytes, &mut word).unwrap();
                word != [FILLER; 8]
            })
        };
        wait_for("first bytes", || any().then_some(()));
    }

    /// Fills blocks from `place` on and watches them: nothing may be written any more.
    pub fn stay_untouched(&self, place: u32) {
        self.fill(place);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(self.written(place), HashSet::new(), "written after the end");
    }
}

fn place_blocks(place: u32) -> Range<u32> {
    place..place + LEASED.end - LEASED.start
}
