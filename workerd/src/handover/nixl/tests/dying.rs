//! Workers that die or are stopped while their blocks are read, and readers that lose their patience. A settled pull's
//! blocks belong to others: in every case nothing may be written to them any more.

use super::workers::{Failed, Reader, read_beside};
use super::*;
use crate::handover::mover::MoverSettings;
use crate::handover::{MoverEvent, PullId};
use baton_shared::wire::error::ErrorCode;

/// Times a pull reads the same blocks, so that it is surely still under way when something happens: 1 GiB.
const LONG: usize = 40;
/// Deadline of pulls that are to fail earlier.
const DEADLINE: Duration = Duration::from_secs(8);

#[test]
fn whenever_a_worker_is_killed_its_pull_fails_and_nothing_is_written_afterwards() {
    read_beside(&["before", "during", "after"], "dying::child_sees_workers_killed", &[]);
}

#[test]
fn whenever_a_worker_is_killed_its_pull_fails_and_nothing_is_written_afterwards_over_tcp() {
    let owners = ["before", "during", "after", "stopped"];
    read_beside(&owners, "dying::child_sees_workers_killed", &[OVER_TCP]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_sees_workers_killed() {
    let mut reader = Reader::start(MoverSettings::default());

    reader.succeed_from("before", 0);
    kill(reader.process("before"));
    let pulled = Instant::now();
    let id = reader.pull("before", 0, 1, DEADLINE);
    expect_death(&mut reader, "before", id, pulled);

    reader.fill(0);
    let id = reader.pull("during", 0, LONG, DEADLINE);
    reader.wait_for_bytes(0);
    let killed = Instant::now();
    kill(reader.process("during"));
    expect_death(&mut reader, "during", id, killed);

    reader.succeed_from("after", 0);
    kill(reader.process("after"));
    std::thread::sleep(Duration::from_millis(100));
    assert!(reader.holds("after", 0), "what was read stays");
    let pulled = Instant::now();
    let id = reader.pull("after", 0, 1, DEADLINE);
    expect_death(&mut reader, "after", id, pulled);

    if std::env::var_os(OVER_TCP.0).is_some() {
        reader.succeed_from("stopped", 0);
        stop(reader.process("stopped"));
        reader.fill(0);
        let id = reader.pull("stopped", 0, 1, DEADLINE);
        // Nobody answers, so it is under way until the end.
        std::thread::sleep(Duration::from_millis(100));
        assert!(reader.events.is_empty() && reader.written(0).is_empty());
        let killed = Instant::now();
        kill(reader.process("stopped"));
        expect_death(&mut reader, "stopped", id, killed);
    }
    assert!(reader.handle.shutdown());
}

/// Times count from `since`.
fn expect_death(reader: &mut Reader, owner: &str, id: PullId, since: Instant) {
    let failed = reader.fail(id);
    let reported = since.elapsed();
    assert_eq!(failed.code, ErrorCode::KvPeerUnreachable, "{owner}: {failed:?}");
    reader.settle(id, &failed);
    let settled = since.elapsed();
    reader.stay_untouched(0);
    reader.note(&format!("killed {owner}: failed after {reported:?}, settled after {settled:?}"));
}

#[test]
fn a_cancelled_pull_settles_only_when_its_transfers_have_ended() {
    read_beside(&["owner"], "dying::child_cancels", &[OVER_TCP]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_cancels() {
    let mut reader = Reader::start(MoverSettings::default());
    reader.succeed_from("owner", 0);
    let owner = reader.process("owner");
    let id = stop_in_mid_transfer(&mut reader, "owner", 0, DEADLINE);
    reader.handle.cancel(id);
    let failed = reader.fail(id);
    assert_eq!((failed.code, failed.settled), (ErrorCode::ClientGone, false));
    // Whoever took the blocks for free now would lose what he writes to them.
    reader.fill(0);
    std::thread::sleep(Duration::from_millis(200));
    assert!(reader.events.is_empty(), "settled while its transfers are under way");
    let continued = Instant::now();
    go_on(owner);
    reader.settle(id, &failed);
    let settled = continued.elapsed();
    let written = reader.written(0).len();
    assert!(written > 0, "nothing was under way: this test shows nothing");
    reader.stay_untouched(0);
    reader.note(&format!("settled {settled:?} after going on, {written} blocks were written to"));
    reader.succeed_from("owner", 500);
    assert!(reader.handle.shutdown());
}

/// Has a worker stopped when some bytes of a long pull have arrived, and never all.
fn stop_in_mid_transfer(
    reader: &mut Reader,
    owner: &str,
    place: u32,
    patience: Duration,
) -> PullId {
    reader.fill(place);
    let id = reader.pull(owner, place, LONG, patience);
    reader.wait_for_bytes(place);
    stop(reader.process(owner));
    assert!(reader.events.is_empty(), "it was over too soon");
    id
}

#[test]
fn a_stopped_worker_costs_its_own_pulls_their_deadline_and_the_others_nothing() {
    let (owners, test) = (["stopped", "healthy"], "dying::child_reads_beside_a_stopped_worker");
    read_beside(&owners, test, &[OVER_TCP]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_reads_beside_a_stopped_worker() {
    let settings = MoverSettings {
        settle_timeout: Duration::from_millis(1500),
        // Long enough on any machine.
        rebuild_pause: DEADLINE,
        ..MoverSettings::default()
    };
    let mut reader = Reader::start(settings);
    reader.succeed_from("stopped", 0);
    reader.succeed_from("healthy", 500);
    let patience = Duration::from_millis(2500);
    let begun = Instant::now();
    let stuck = stop_in_mid_transfer(&mut reader, "stopped", 0, patience);
    let mut stream = Stream::default();
    let Failed { code, settled, .. } = stream.until_failed(&mut reader, stuck);
    let reported = begun.elapsed();
    assert_eq!((code, settled), (ErrorCode::KvTransferTimeout, false));
    let before = std::mem::take(&mut stream.pulled);
    assert!(before > 0, "the healthy worker was not read from meanwhile");

    let refused = reader.pull("stopped", 0, 1, DEADLINE);
    let Failed { code, settled, reported: after } = stream.until_failed(&mut reader, refused);
    assert_eq!((code, settled), (ErrorCode::KvPeerUnreachable, true));
    assert_eq!(reader.handle.figures().rebuilds, 0);

    // Nothing is written to its blocks after it has settled, though the worker goes on.
    stream.until_settled(&mut reader, stuck);
    let rebuilt = begun.elapsed();
    wait_for("rebuild", || (reader.handle.figures().rebuilds == 1).then_some(()));
    go_on(reader.process("stopped"));
    reader.stay_untouched(0);
    stream.drain(&mut reader);
    assert!(stream.crossed > 0, "no healthy pull was under way at the rebuild");
    reader.note(&format!(
        "timed out after {reported:?} with {before} healthy pulls meanwhile, refused within \
         {after:?}, rebuilt after {rebuilt:?} with {} healthy pulls under way",
        stream.crossed
    ));
    let healthy = reader.succeed_from("healthy", 500);
    let again = reader.pull("stopped", 0, 1, DEADLINE);
    assert!(matches!(reader.event(), MoverEvent::Pulled { id, .. } if id == again));
    assert!(reader.holds("stopped", 0), "what went on is read from again");
    reader.note(&format!("afterwards: healthy in {healthy:?}"));
    assert_eq!(reader.handle.figures().rebuilds, 1);
    assert!(reader.handle.shutdown());
}

/// Pulls from the healthy worker, some of them always under way.
#[derive(Default)]
struct Stream {
    /// Each with the rebuilds there had been when it began.
    under_way: Vec<(PullId, u64)>,
    pulled: usize,
    /// Pulls that a rebuild came across.
    crossed: usize,
}

impl Stream {
    const DEPTH: usize = 3;

    /// The next event of another pull.
    fn until(&mut self, reader: &mut Reader) -> MoverEvent {
        loop {
            while self.under_way.len() < Self::DEPTH {
                let rebuilds = reader.handle.figures().rebuilds;
                self.under_way.push((reader.pull("healthy", 500, 2, DEADLINE), rebuilds));
            }
            match reader.event() {
                MoverEvent::Pulled { id, .. } => self.ended(reader, id),
                other => return other,
            }
        }
    }

    fn ended(&mut self, reader: &Reader, id: PullId) {
        let index = self.under_way.iter().position(|(ours, _)| *ours == id).unwrap();
        let (_, rebuilds) = self.under_way.remove(index);
        self.pulled += 1;
        self.crossed += usize::from(rebuilds < reader.handle.figures().rebuilds);
    }

    fn until_failed(&mut self, reader: &mut Reader, wanted: PullId) -> Failed {
        match self.until(reader) {
            MoverEvent::PullFailed { id, code, settled, .. } if id == wanted => {
                Failed { code, settled, reported: reader.since_start_of(id) }
            }
            other => panic!("{other:?}"),
        }
    }

    fn until_settled(&mut self, reader: &mut Reader, wanted: PullId) {
        match self.until(reader) {
            MoverEvent::Settled { id } if id == wanted => {}
            other => panic!("{other:?}"),
        }
    }

    fn drain(&mut self, reader: &mut Reader) {
        while !self.under_way.is_empty() {
            match reader.event() {
                MoverEvent::Pulled { id, .. } => self.ended(reader, id),
                other => panic!("{other:?}"),
            }
        }
        assert!(reader.holds("healthy", 500));
    }
}

#[test]
fn readers_that_are_killed_while_blocks_are_copied_harm_nobody() {
    readers_are_killed(&[], 3);
}

/// Most of these kills ended the owner by a wild pointer in UCX before [`NixlLibrary`] had fresh memory mapped; of the
/// rest some ended it by an assertion before sends stopped telling of broken connections (`sends.rs`).
#[test]
fn readers_that_are_killed_while_blocks_are_sent_do_not_crash_the_owner() {
    readers_are_killed(&[OVER_TCP], 3);
}

fn readers_are_killed(variables: &[(&str, &str)], readers: usize) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut owner = Running::start("workers::child_owns", "owner", folder, variables);
    for reader in 0..readers {
        let name = format!("reader-{reader}");
        let reader = Running::start("dying::child_reads_until_killed", &name, folder, variables);
        let is_read = || folder.join(format!("{name}.reads")).exists().then_some(());
        wait_for("bytes", || is_read().or_else(|| threads_are(owner.id(), "ZX").then_some(())));
        reader.kill();
    }
    put_file(folder, "stop", "");
    let status = owner.finish(PATIENCE);
    assert!(status.success(), "{status}\n{}", owner.printed());
}

#[test]
#[ignore = "needs a process of its own"]
fn child_reads_until_killed() {
    let mut reader = Reader::start(MoverSettings::default());
    let (folder, name) = given();
    reader.fill(0);
    reader.pull("owner", 0, 10 * LONG, PATIENCE);
    reader.wait_for_bytes(0);
    put_file(&folder, &format!("{name}.reads"), "");
    panic!("{:?}", reader.event());
}
