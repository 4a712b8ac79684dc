//! Pulls between processes that go well, and what cannot disturb them.

use super::workers::{BLOCKS, LEASED, Owner, Reader, block, mover, pool, read_beside};
use super::*;
use crate::handover::mover::{MoverSettings, PeersSeen};
use crate::handover::pull::copy_runs;
use crate::handover::{MoverEvent, PullId, PullJob};
use crate::kv::lease::{LeaseEnd, LeaseTable};
use crate::kv::pool::BlockPool;
use crate::kv::region::EpochPage;
use baton_shared::id::{BlockIndex, DisaggRequestId, LeaseId};
use baton_shared::kv::record::Record;
use baton_shared::wire::auth::Keys;
use baton_shared::wire::error::ErrorCode;

#[test]
fn blocks_move_between_processes_by_shared_memory() {
    let seen = PeersSeen { shared_memory: 2, network: 0 };
    assert_eq!(hand_over(&[], &[]), format!("{seen:?}"));
}

#[test]
fn blocks_move_between_processes_over_tcp() {
    let seen = PeersSeen { shared_memory: 0, network: 2 };
    assert_eq!(hand_over(&[OVER_TCP], &[OVER_TCP]), format!("{seen:?}"));
}

/// One context worker dies and starts again, while the generation worker lives on; says how its bytes came.
pub fn hand_over(owners: &[(&str, &str)], reader: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let first = Running::start("pulls::child_offers", "first", folder, owners);
    let reader = Running::start("pulls::child_pulls", "reader", folder, reader);
    wait_for_file(folder, "first.is-done-with");
    first.kill();
    put_file(folder, "first.killed", "");
    let second = Running::start("pulls::child_offers", "second", folder, owners);
    reader.succeed();
    put_file(folder, "stop", "");
    second.succeed();
    show_figures(folder);
    fs::read_to_string(folder.join("seen")).unwrap()
}

const WANTED: std::ops::Range<u32> = 100..900;

/// A context worker: offers [`WANTED`]. Its lease ends with the first that reads it.
#[test]
#[ignore = "needs a process of its own"]
fn child_offers() {
    let owner = Owner::start();
    let lease = LeaseId::random();
    owner.offer(WANTED, lease, owner.epochs.address(3), owner.epochs.value(3));
    let (folder, heard) = (owner.folder.clone(), format!("{}.heard", owner.name));
    let epochs = owner.epochs.clone();
    owner.serve(|read| {
        assert_eq!(read, lease);
        epochs.bump(3);
        put_file(&folder, &heard, "");
    });
}

/// A generation worker: pulls from `first`, finds the lease ended, then `first` dead, then pulls from `second`.
#[test]
#[ignore = "needs a process of its own"]
fn child_pulls() {
    let (folder, name) = given();
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let (worker, settings) = (name.parse().unwrap(), MoverSettings::default());
    let (handle, _, events) = mover(&worker, Incarnation::random(), &pool, &epochs, settings);
    // The first half becomes one run, the rest is scattered.
    let target: Vec<_> =
        WANTED.map(|at| BlockIndex(if at < 500 { at + 1 } else { 1500 - at })).collect();
    assert!(target.iter().all(|block| block.0 < BLOCKS));
    let mut figures = Vec::new();
    let mut pull = |worker: &str, id| {
        let text = wait_for_file(&folder, &format!("{worker}.record"));
        let record = Record::decode_text(&text, &Keys::none()).unwrap();
        let leased = record.lease.unwrap();
        let job = PullJob {
            id: PullId(id),
            worker: record.worker,
            incarnation: record.incarnation,
            lease: leased.lease,
            ranks: copy_runs(&leased, &pool, 0, &target).unwrap(),
            deadline: Instant::now() + PATIENCE / 2,
        };
        handle.pull(job).unwrap();
        let event = events.recv_timeout(PATIENCE).unwrap();
        if let MoverEvent::Pulled { bytes, descriptors, elapsed, .. } = &event {
            assert_eq!(*bytes, 800 * pool.layout.block_bytes());
            let rate = *bytes as f64 / elapsed.as_secs_f64() / 1e9;
            figures.push(format!(
                "{worker}: {bytes} bytes, {descriptors} descriptors, {elapsed:?}, {rate:.2} GB/s"
            ));
        }
        event
    };
    let arrived = |worker: &str| {
        let mut bytes = vec![0; usize::try_from(pool.layout.block_bytes()).unwrap()];
        WANTED.zip(&target).all(|(from, to)| {
            pool.region.read(to.0 as usize * bytes.len(), &mut bytes).unwrap();
            bytes == block(worker, from, &pool.layout)
        })
    };
    assert!(matches!(pull("first", 1), MoverEvent::Pulled { .. }));
    assert!(arrived("first"));
    wait_for_file(&folder, "first.heard");
    let gone = pull("first", 2);
    assert!(
        matches!(gone, MoverEvent::PullFailed { code: ErrorCode::KvLeaseGone, settled: true, .. }),
        "{gone:?}"
    );
    put_file(&folder, "first.is-done-with", "");
    wait_for_file(&folder, "first.killed");
    let killed = pull("first", 3);
    let unreachable = ErrorCode::KvPeerUnreachable;
    assert!(
        matches!(killed, MoverEvent::PullFailed { code, .. } if code == unreachable),
        "{killed:?}"
    );
    assert!(matches!(pull("second", 4), MoverEvent::Pulled { .. }));
    assert!(arrived("second"));
    put_file(&folder, "seen", &format!("{:?}", handle.peers_seen()));
    put_file(&folder, "figures", &figures.join("\n"));
    assert!(handle.shutdown());
}

#[test]
fn a_worker_that_started_anew_is_read_at_once_by_shared_memory() {
    read_after_a_restart(&[]);
}

#[test]
fn a_worker_that_started_anew_is_read_at_once_over_tcp() {
    read_after_a_restart(&[OVER_TCP]);
}

fn read_after_a_restart(variables: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let first = Running::start("workers::child_owns", "owner.1", folder, variables);
    let reader = Running::start("pulls::child_reads_after_a_restart", "reader", folder, variables);
    wait_for_file(folder, "owner.1.was-read");
    first.kill();
    let second = Running::start("workers::child_owns", "owner.2", folder, variables);
    reader.succeed();
    put_file(folder, "stop", "");
    second.succeed();
    show_figures(folder);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_reads_after_a_restart() {
    let mut reader = Reader::start(MoverSettings::default());
    let first = reader.succeed_from("owner.1", 0);
    let folder = reader.folder.clone();
    put_file(&folder, "owner.1.was-read", "");
    let second = reader.succeed_from("owner.2", 500);
    reader.note(&format!("first start read in {first:?}, second in {second:?}"));
    let is_connected = |start: &str| {
        let incarnation = reader.record(start).incarnation;
        reader.handle.is_connected(&incarnation)
    };
    wait_for("forgotten first start", || (!is_connected("owner.1")).then_some(()));
    assert!(is_connected("owner.2"));
    assert!(reader.handle.shutdown());
}

#[test]
fn a_copy_from_a_stopped_worker_ends_unless_a_notice_went_before_it() {
    read_beside(&["owner"], "pulls::child_reads_from_a_stopped_worker", &[]);
}

/// UCX sends notices through a socket even where it copies, and the next request towards that peer ends only when
/// the peer has confirmed them.
#[test]
#[ignore = "needs a process of its own"]
fn child_reads_from_a_stopped_worker() {
    let mut reader = Reader::start(MoverSettings::default());
    let owner = reader.process("owner");
    let mut agent = open("agent");
    agent.register(&reader.pool.region).unwrap();
    let (rank, runs) = reader.runs("owner", 0).remove(0);
    let address = PeerAddress { agent: rank.agent, metadata: rank.metadata };
    let peer = agent.connect(&address).unwrap();
    let far = Place::of_device(rank.device);
    let ends = Ends { near: reader.pool.region.place(), far };
    let read = |agent: &mut NixlTransport| {
        reader.fill(0);
        let id = agent.post(Op::Read, peer, ends, &runs).unwrap();
        wait_for("copied blocks", || reader.holds("owner", 0).then_some(()));
        id
    };
    let end = |agent: &mut NixlTransport, id| {
        wait_for("end", || (agent.poll(id) == TransferState::Done).then_some(()));
    };
    let id = read(&mut agent);
    end(&mut agent, id);
    stop(owner);
    let id = read(&mut agent);
    end(&mut agent, id);
    go_on(owner);
    agent.notify(peer, b"not a notice").unwrap();
    stop(owner);
    let id = read(&mut agent);
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_millis(200) {
        assert_eq!(agent.poll(id), TransferState::Running);
    }
    go_on(owner);
    end(&mut agent, id);

    // So a pull after another has its deadline, and then settles when the worker goes on.
    reader.succeed_from("owner", 0);
    stop(owner);
    let id = reader.pull("owner", 0, 1, Duration::from_millis(500));
    let failed = reader.fail(id);
    assert_eq!((failed.code, failed.settled), (ErrorCode::KvTransferTimeout, false));
    go_on(owner);
    let settled = reader.settle(id, &failed);
    reader.note(&format!("reported after {:?}, settled after {settled:?}", failed.reported));
    reader.succeed_from("owner", 0);
    assert!(reader.handle.shutdown());
}

#[test]
fn forged_notices_end_no_lease() {
    for variables in [&[][..], &[OVER_TCP]] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let owner = Running::start("pulls::child_leases", "owner", folder, variables);
        Running::start("pulls::child_forges", "reader", folder, variables).succeed();
        put_file(folder, "stop", "");
        owner.succeed();
    }
}

/// A context worker with a table of leases; writes down what each notice did.
#[test]
#[ignore = "needs a process of its own"]
fn child_leases() {
    let owner = Owner::start();
    let blocks = BlockPool::new(BLOCKS);
    let (_before, leased) = (blocks.allocate(LEASED.start), blocks.allocate(400));
    let leased = leased.unwrap();
    assert_eq!(leased.ids(), LEASED.map(BlockIndex).collect::<Vec<_>>());
    let mut table = LeaseTable::new(owner.epochs.clone());
    let expires = Instant::now() + 10 * PATIENCE;
    let grant = table.grant(DisaggRequestId(1), leased, expires).unwrap();
    owner.offer(LEASED, grant.lease, grant.epoch_address, grant.epoch);
    let (folder, mut notices) = (owner.folder.clone(), Vec::new());
    owner.serve(|lease| {
        notices.push(table.end(lease, LeaseEnd::Pulled));
        put_file(&folder, "owner.notices", &format!("{notices:?}"));
    });
}

/// Sends forged and senseless notices under the reader's own name, then reads.
#[test]
#[ignore = "needs a process of its own"]
fn child_forges() {
    let (_, name) = given();
    let incarnation = Incarnation::random();
    let posing_as = agent_name(&name.parse().unwrap(), 0, AgentRole::Move, &incarnation);
    let mut forger = open(&posing_as);
    let memory = Region::host(4096).unwrap();
    forger.register(&memory).unwrap();
    let mut reader = Reader::start_as(incarnation, MoverSettings::default());
    let rank = reader.record("owner").lease.unwrap().ranks.remove(0);
    let address = PeerAddress { agent: rank.agent, metadata: rank.metadata };
    let owner = forger.connect(&address).unwrap();
    let forged = [&[1], &LeaseId::random().0[..]].concat();
    let no_text = [0xff, 0xfe, 0xc3, 0x28];
    for message in [&no_text, &forged[..], &[], &[0; 900], &forged[..16], &no_text, &forged] {
        forger.notify(owner, message).unwrap();
    }
    // The lease is whole, the owner alive, and it heard of two leases that it does not have.
    wait_for("two notices", || {
        let text = fs::read_to_string(reader.folder.join("owner.notices")).ok()?;
        (text == "[false, false]").then_some(())
    });
    reader.succeed_from("owner", 0);
    wait_for("the third notice", || {
        let text = fs::read_to_string(reader.folder.join("owner.notices")).ok()?;
        (text == "[false, false, true]").then_some(())
    });
    let id = reader.pull("owner", 0, 1, PATIENCE / 2);
    assert_eq!(reader.fail(id).code, ErrorCode::KvLeaseGone);
    assert!(reader.handle.shutdown());
}
