//! Pulls over the in-process transport: step by step with a made-up clock, then through the thread.

mod threads;

use super::pull::requests;
use super::*;
use crate::handover::local::{LocalNet, LocalTransport};
use crate::handover::pull::copy_runs;
use crate::handover::{offer, offer::OfferedLease};
use crate::kv::fake_device::FakeDevice;
use crate::kv::region::{EpochPage, KvRegion, Place};
use baton_shared::id::{BlockIndex, WorkerId};
use baton_shared::kv::layout::{KvDtype, KvLayout};
use baton_shared::wire::error::ErrorCode;

const BLOCKS: u32 = 64;
const LEASE: LeaseId = LeaseId([7; 16]);
const PATIENCE: Duration = Duration::from_secs(10);

/// A context worker: its serving agent, pool and epochs.
struct Owner {
    worker: WorkerId,
    agent: LocalTransport,
    pool: KvRegion,
    epochs: EpochPage,
    incarnation: Incarnation,
}

fn pool() -> KvRegion {
    pool_in(Place::Host)
}

fn pool_in(place: Place) -> KvRegion {
    let layout = KvLayout::block_major(KvDtype::Bf16, 32, 64, BLOCKS, 0..2, 0..2);
    let bytes = usize::try_from(layout.bytes()).unwrap();
    let region = match place {
        Place::Host => Region::host(bytes).unwrap(),
        Place::Cuda(ordinal) => FakeDevice::region(ordinal, bytes),
    };
    KvRegion { region, layout }
}

/// Bytes that tell blocks and owners apart.
fn pattern(owner: u8, block: u32, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| owner ^ (block as u8).wrapping_mul(31) ^ (at / 64) as u8).collect()
}

fn block_bytes() -> usize {
    usize::try_from(pool().layout.block_bytes()).unwrap()
}

impl Owner {
    /// `name` is the worker's, with what tells one start from another behind a `/`.
    fn new(net: &LocalNet, name: &str, mark: u8) -> Self {
        Self::with_pool(net, name, mark, pool())
    }

    fn with_pool(net: &LocalNet, name: &str, mark: u8, pool: KvRegion) -> Self {
        let worker = name.split('/').next().unwrap().parse().unwrap();
        let mut agent = LocalTransport::new(net, name).unwrap();
        let epochs = EpochPage::new(8).unwrap();
        for block in 0..BLOCKS {
            let bytes = block_bytes();
            pool.region.write(block as usize * bytes, &pattern(mark, block, bytes)).unwrap();
        }
        agent.register(&pool.region).unwrap();
        agent.register(epochs.region()).unwrap();
        Self { worker, agent, pool, epochs, incarnation: Incarnation([mark; 16]) }
    }

    fn job(
        &mut self,
        id: u64,
        from: &[u32],
        ours: &KvRegion,
        to: &[u32],
        deadline: Instant,
    ) -> PullJob {
        let ids = |blocks: &[u32]| blocks.iter().copied().map(BlockIndex).collect::<Vec<_>>();
        let lease = OfferedLease {
            lease: LEASE,
            expires_unix_ms: 0,
            epoch_address: self.epochs.address(0),
            epoch: self.epochs.value(0),
        };
        let address = self.agent.address().unwrap();
        let leased = offer::leased_blocks(lease, &address, &self.pool, &ids(from));
        PullJob {
            id: PullId(id),
            worker: self.worker.clone(),
            incarnation: self.incarnation,
            lease: LEASE,
            ranks: copy_runs(&leased, ours, 0, &ids(to)).unwrap(),
            deadline,
        }
    }

    fn notices(&mut self) -> Vec<LeaseId> {
        let mut messages = Vec::new();
        self.agent.notifications(&mut messages).unwrap();
        messages.iter().filter_map(|(_, message)| read_notice(message)).collect()
    }
}

/// A generation worker without a thread.
struct Reader {
    net: LocalNet,
    pulls: Pulls,
    pool: KvRegion,
    now: Instant,
}

impl Reader {
    fn new(settings: MoverSettings) -> Self {
        Self::with_pool(settings, pool())
    }

    fn with_pool(settings: MoverSettings, pool: KvRegion) -> Self {
        let net = LocalNet::new();
        let mut agent = LocalTransport::new(&net, "gen/move").unwrap();
        agent.register(&pool.region).unwrap();
        let pulls = Pulls::new(Box::new(agent), pool.region.place(), settings).unwrap();
        Self { net, pulls, pool, now: Instant::now() }
    }

    fn owner(&self, name: &str, mark: u8) -> Owner {
        Owner::new(&self.net, name, mark)
    }

    fn pull(&mut self, owner: &mut Owner, id: u64, from: &[u32], to: &[u32]) {
        let job = owner.job(id, from, &self.pool, to, self.now + PATIENCE);
        self.pulls.accept(job, self.now);
    }

    /// Steps until nothing moves any more; what happened.
    fn run(&mut self) -> Vec<MoverEvent> {
        while self.pulls.step(self.now) {}
        self.pulls.take_events()
    }

    fn block(&self, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; block_bytes()];
        self.pool.region.read(block as usize * bytes.len(), &mut bytes).unwrap();
        bytes
    }
}

fn failure(events: &[MoverEvent]) -> (ErrorCode, bool) {
    match events {
        [MoverEvent::PullFailed { code, settled, .. }] => (*code, *settled),
        other => panic!("not one failure: {other:?}"),
    }
}

#[test]
fn a_pull_brings_the_blocks_and_then_tells_the_owner() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.pull(&mut owner, 4, &[3, 4, 9], &[10, 11, 5]);
    assert!(owner.notices().is_empty());
    let events = reader.run();
    let bytes = 3 * block_bytes() as u64;
    assert!(
        matches!(events[..], [MoverEvent::Pulled { id: PullId(4), bytes: b, descriptors: 2, .. }] if b == bytes),
        "{events:?}"
    );
    for (from, to) in [(3, 10), (4, 11), (9, 5)] {
        assert_eq!(reader.block(to), pattern(1, from, block_bytes()));
    }
    assert_eq!(owner.notices(), [LEASE]);
    assert!(reader.pulls.is_idle());
}

#[test]
fn blocks_come_from_and_go_to_host_and_device_memory() {
    let places = [Place::Host, Place::Cuda(0), Place::Cuda(1)];
    for (from, to) in places.iter().flat_map(|from| places.map(|to| (*from, to))) {
        let mut reader = Reader::with_pool(MoverSettings::default(), pool_in(to));
        let mut owner = Owner::with_pool(&reader.net, "ctx", 1, pool_in(from));
        reader.pull(&mut owner, 4, &[3, 4], &[10, 5]);
        let events = reader.run();
        assert!(matches!(events[..], [MoverEvent::Pulled { .. }]), "{from} to {to}: {events:?}");
        assert_eq!(reader.block(10), pattern(1, 3, block_bytes()), "{from} to {to}");
        assert_eq!(reader.block(5), pattern(1, 4, block_bytes()), "{from} to {to}");
        assert_eq!(owner.notices(), [LEASE]);
        // Its lease's word is in host memory all the same.
        owner.epochs.bump(0);
        let mut job = owner.job(5, &[3], &reader.pool, &[10], reader.now + PATIENCE);
        job.ranks[0].0.epoch -= 1;
        reader.pulls.accept(job, reader.now);
        assert_eq!(failure(&reader.run()), (ErrorCode::KvLeaseGone, true), "{from} to {to}");
    }
}

#[test]
fn a_device_that_fails_while_blocks_move_fails_the_pull_in_its_drivers_words() {
    let mut reader = Reader::new(MoverSettings::default());
    let KvRegion { region, layout } = pool();
    let device = FakeDevice::new(0, region.bytes());
    let pool = KvRegion { region: Region::device(device.clone()), layout };
    let mut owner = Owner::with_pool(&reader.net, "ctx", 1, pool);
    reader.net.hold("ctx");
    reader.pull(&mut owner, 1, &[3], &[10]);
    reader.run();
    device.fail();
    reader.net.let_go("ctx");
    let events = reader.run();
    assert_eq!(failure(&events), (ErrorCode::KvPeerUnreachable, true));
    let said = format!("{events:?}");
    let expected = "worker `ctx`: reading memory failed: the fake driver was told to fail";
    assert!(said.contains(expected), "{said}");
    assert!(owner.notices().is_empty());
}

#[test]
fn a_lease_whose_epoch_moved_is_gone_and_its_owner_hears_nothing() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.pull(&mut owner, 4, &[3], &[10]);
    owner.epochs.bump(0);
    assert_eq!(failure(&reader.run()), (ErrorCode::KvLeaseGone, true));
    assert!(owner.notices().is_empty());
    reader.pull(&mut owner, 5, &[3], &[10]);
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { .. }]), "the word was read anew");
}

#[test]
fn requests_are_bounded_in_size_and_number() {
    let bytes = block_bytes() as u64;
    let settings = MoverSettings { max_request: 2 * bytes, window: 3, ..MoverSettings::default() };
    let mut reader = Reader::new(settings);
    let mut owner = reader.owner("ctx", 1);
    reader.net.hold("ctx");
    // Every second block: no two are neighbours.
    let (from, to): (Vec<u32>, Vec<u32>) = (0..24).map(|at| (2 * at, 63 - at)).unzip();
    reader.pull(&mut owner, 1, &from, &to);
    reader.pull(&mut owner, 2, &from[..2], &[0, 1]);
    assert!(reader.run().is_empty());
    reader.net.let_go("ctx");
    let events = reader.run();
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(reader.net.most_in_flight("ctx"), 3);
    assert_eq!(
        requests(vec![run(3), run(3), run(9), run(1), run(7)], 8),
        [vec![run(3), run(3)], vec![run(9)], vec![run(1), run(7)]]
    );
}

fn run(len: u64) -> baton_shared::kv::layout::CopyRun {
    baton_shared::kv::layout::CopyRun { source: 0, target: 0, len }
}

#[test]
fn a_short_pull_is_not_kept_waiting_by_a_long_one() {
    let bytes = block_bytes() as u64;
    let mut reader = Reader::new(MoverSettings { max_request: bytes, ..MoverSettings::default() });
    let mut owner = reader.owner("ctx", 1);
    let (from, to): (Vec<u32>, Vec<u32>) = (0..24).map(|at| (2 * at, 63 - at)).unzip();
    reader.pull(&mut owner, 1, &from, &to);
    reader.pull(&mut owner, 2, &from[..1], &[0]);
    let ended = reader.run().into_iter().map(|event| match event {
        MoverEvent::Pulled { id, .. } => id,
        other => panic!("{other:?}"),
    });
    assert_eq!(ended.collect::<Vec<_>>(), [PullId(2), PullId(1)]);
}

#[test]
fn a_pull_past_its_deadline_is_abandoned_and_its_peer_suspect_until_it_settles() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.net.hold("ctx");
    reader.pull(&mut owner, 1, &[3], &[10]);
    assert!(reader.run().is_empty());
    reader.now += PATIENCE;
    assert_eq!(failure(&reader.run()), (ErrorCode::KvTransferTimeout, false));
    reader.pull(&mut owner, 2, &[3], &[11]);
    assert_eq!(failure(&reader.run()), (ErrorCode::KvPeerUnreachable, true));
    reader.net.let_go("ctx");
    let events = reader.run();
    assert!(matches!(events[..], [MoverEvent::Settled { id: PullId(1) }]), "{events:?}");
    assert!(owner.notices().is_empty(), "an abandoned pull tells nobody");
    reader.pull(&mut owner, 3, &[3], &[12]);
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { .. }]));
}

#[test]
fn a_transfer_that_never_ends_is_ended_by_a_rebuild_that_fails_no_healthy_pull() {
    let settings = MoverSettings::default();
    let mut reader = Reader::new(settings);
    let (mut stuck, mut slow) = (reader.owner("stuck", 1), reader.owner("slow", 2));
    reader.net.hold("stuck");
    reader.pull(&mut stuck, 1, &[3], &[10]);
    reader.run();
    reader.now += PATIENCE;
    assert_eq!(failure(&reader.run()), (ErrorCode::KvTransferTimeout, false));
    reader.now += settings.settle_timeout - Duration::from_secs(1);
    reader.net.hold("slow");
    reader.pull(&mut slow, 2, &[4, 6], &[20, 22]);
    assert!(reader.run().is_empty());
    assert_eq!(reader.pulls.rebuilds(), 0);
    reader.now += Duration::from_secs(1);
    assert!(reader.run().is_empty(), "healthy requests are given a moment");
    reader.pull(&mut slow, 3, &[5], &[21]);
    reader.now += settings.rebuild_pause;
    let events = reader.run();
    assert!(matches!(events[..], [MoverEvent::Settled { id: PullId(1) }]), "{events:?}");
    assert_eq!(reader.pulls.rebuilds(), 1);
    assert_eq!(reader.block(10), vec![0; block_bytes()]);
    reader.net.let_go("slow");
    let events = reader.run();
    assert!(
        matches!(events[..], [MoverEvent::Pulled { .. }, MoverEvent::Pulled { .. }]),
        "{events:?}"
    );
    for (from, to) in [(4, 20), (6, 22), (5, 21)] {
        assert_eq!(reader.block(to), pattern(2, from, block_bytes()));
    }
    assert_eq!(slow.notices().len(), 2);
}

#[test]
fn a_peer_that_fails_is_forgotten_and_can_be_connected_again() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.net.fail("ctx");
    reader.pull(&mut owner, 1, &[3], &[10]);
    reader.pull(&mut owner, 2, &[4], &[11]);
    assert_eq!(reader.pulls.connected_if_changed().unwrap().len(), 1);
    let events = reader.run();
    assert_eq!(failure(&events[..1]), (ErrorCode::KvPeerUnreachable, true));
    assert_eq!(failure(&events[1..]), (ErrorCode::KvPeerUnreachable, true));
    assert!(reader.pulls.connected_if_changed().unwrap().is_empty());
    reader.net.heal("ctx");
    reader.net.lose("ctx");
    reader.pull(&mut owner, 3, &[3], &[10]);
    assert_eq!(failure(&reader.run()), (ErrorCode::KvPeerUnreachable, true));
    reader.net.heal("ctx");
    reader.pull(&mut owner, 4, &[3], &[10]);
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { .. }]));
}

#[test]
fn a_start_of_a_worker_is_forgotten_after_the_next_one_once_nothing_is_in_flight() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut old = reader.owner("ctx/1", 1);
    let mut other = reader.owner("other/1", 2);
    reader.net.hold("ctx/1");
    reader.pull(&mut old, 1, &[3], &[10]);
    reader.pull(&mut other, 2, &[4], &[11]);
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { id: PullId(2), .. }]));
    let mut new = reader.owner("ctx/2", 3);
    reader.pull(&mut new, 3, &[5], &[12]);
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { id: PullId(3), .. }]));
    assert_eq!(reader.net.connections("ctx/1"), 1, "a request is in flight towards it");
    let connected = reader.pulls.connected_if_changed().unwrap();
    assert_eq!(connected, [other.incarnation, new.incarnation].into());
    reader.net.let_go("ctx/1");
    assert!(matches!(reader.run()[..], [MoverEvent::Pulled { id: PullId(1), .. }]));
    let connections = ["ctx/1", "ctx/2", "other/1"].map(|agent| reader.net.connections(agent));
    assert_eq!(connections, [0, 1, 1]);
}

#[test]
fn a_cancelled_pull_tells_nobody_and_keeps_its_blocks_until_it_settles() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.net.hold("ctx");
    reader.pull(&mut owner, 1, &[3], &[10]);
    reader.run();
    reader.pulls.cancel(PullId(1), reader.now);
    assert_eq!(failure(&reader.pulls.take_events()), (ErrorCode::ClientGone, false));
    reader.pulls.cancel(PullId(1), reader.now);
    assert!(reader.run().is_empty(), "still in flight, and reported once");
    reader.net.let_go("ctx");
    assert!(matches!(reader.run()[..], [MoverEvent::Settled { id: PullId(1) }]));
    assert!(owner.notices().is_empty());
    reader.pulls.cancel(PullId(1), reader.now);
    reader.pull(&mut owner, 2, &[3], &[10]);
    reader.pulls.cancel(PullId(2), reader.now);
    assert_eq!(failure(&reader.run()), (ErrorCode::ClientGone, true));
    assert!(owner.notices().is_empty());
}

#[test]
fn a_prefix_that_is_here_already_still_ends_its_lease() {
    let mut reader = Reader::new(MoverSettings::default());
    let mut owner = reader.owner("ctx", 1);
    reader.pull(&mut owner, 1, &[], &[]);
    let events = reader.run();
    assert!(
        matches!(events[..], [MoverEvent::Pulled { bytes: 0, descriptors: 0, .. }]),
        "{events:?}"
    );
    assert_eq!(owner.notices(), [LEASE]);
}

#[test]
fn only_a_version_and_a_lease_id_are_a_notice() {
    let notice = write_notice(LEASE);
    assert_eq!(read_notice(&notice), Some(LEASE));
    assert_eq!(read_notice(&notice[..16]), None);
    assert_eq!(read_notice(&[]), None);
    assert_eq!(read_notice(&[&notice[..], &[0]].concat()), None);
    let newer: Vec<u8> = [2].into_iter().chain(notice[1..].iter().copied()).collect();
    assert_eq!(read_notice(&newer), None);
}
