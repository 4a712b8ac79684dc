//! One suite for all transports: what [`mover`](super::mover) relies on. Each check is given a way to open agents and
//! makes its own; none waits longer than [`PATIENCE`].

use std::time::{Duration, Instant};

use baton_shared::kv::layout::CopyRun;

use super::{Ends, Op, PeerAddress, TransferId, TransferState, Transport};
use crate::kv::region::Region;

/// Longest wait of a check.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the suite runs over.
pub struct Bench<'a> {
    /// Opens an agent of that name.
    pub open: &'a mut dyn FnMut(&str) -> Box<dyn Transport>,
    /// Makes so many bytes of memory, for the side that posts.
    pub near: &'a dyn Fn(usize) -> Region,
    /// The same for its peer.
    pub far: &'a dyn Fn(usize) -> Region,
}

/// Host memory at both sides.
pub fn in_host_memory(open: &mut dyn FnMut(&str) -> Box<dyn Transport>) {
    let host = |bytes| Region::host(bytes).unwrap();
    suite(&mut Bench { open, near: &host, far: &host });
}

/// Bytes of each side's memory: 4,000 blocks of 16 KiB.
const BYTES: usize = BLOCKS * BLOCK;
const BLOCKS: usize = 4000;
const BLOCK: usize = 16 << 10;

/// Every check in turn.
pub fn suite(bench: &mut Bench<'_>) {
    one_long_run_arrives_whole_in_both_directions(bench);
    four_thousand_scattered_blocks_arrive_in_place_in_both_directions(bench);
    notifications_arrive_once_and_in_order_whatever_their_bytes(bench);
    data_that_was_read_stays_when_its_source_changes_after_the_notice(bench);
    data_that_was_written_is_there_when_its_notice_arrives(bench);
    a_lost_peer_is_an_error_and_its_next_start_works_at_once(bench);
    after_a_rebuild_nothing_is_written_and_everything_works(bench);
}

impl Bench<'_> {
    fn near(&mut self, name: &str) -> Side {
        self.side(name, (self.near)(BYTES))
    }

    fn far(&mut self, name: &str) -> Side {
        self.side(name, (self.far)(BYTES))
    }

    fn side(&mut self, name: &str, memory: Region) -> Side {
        memory.make_current().unwrap();
        let mut transport = (self.open)(name);
        transport.register(&memory).unwrap();
        let address = transport.address().unwrap();
        Side { transport, memory, address }
    }
}

/// An agent with memory of its own.
struct Side {
    transport: Box<dyn Transport>,
    memory: Region,
    address: PeerAddress,
}

impl Side {
    fn fill(&self, mark: u64) {
        for (at, start) in (0..BYTES).step_by(BLOCK).enumerate() {
            self.memory.write(start, &block(mark, at)).unwrap();
        }
    }

    /// Whether `count` blocks from number `at` on are those from number `from` on of memory filled with `mark`.
    fn holds(&self, at: usize, count: usize, mark: u64, from: usize) -> bool {
        let mut bytes = vec![0; BLOCK];
        (0..count).all(|next| {
            self.memory.read((at + next) * BLOCK, &mut bytes).unwrap();
            bytes == block(mark, from + next)
        })
    }

    fn transfer(&mut self, op: Op, peer: &Side, runs: &[(usize, usize, usize)]) {
        let id = self.post(op, peer, runs);
        self.finish(id);
    }

    /// Runs are offsets: source, target, length.
    fn post(&mut self, op: Op, peer: &Side, runs: &[(usize, usize, usize)]) -> TransferId {
        let (ours, theirs) = (self.memory.base(), peer.memory.base());
        let (source, target) = match op {
            Op::Read => (theirs, ours),
            Op::Write => (ours, theirs),
        };
        let runs: Vec<_> = runs
            .iter()
            .map(|&(from, to, len)| CopyRun {
                source: source + from as u64,
                target: target + to as u64,
                len: len as u64,
            })
            .collect();
        let id = self.transport.connect(&peer.address).unwrap();
        self.transport.post(op, id, self.ends(peer), &runs).unwrap()
    }

    fn ends(&self, peer: &Side) -> Ends {
        Ends { near: self.memory.place(), far: peer.memory.place() }
    }

    fn finish(&mut self, id: TransferId) {
        let state = wait(|| match self.transport.poll(id) {
            TransferState::Running => None,
            ended => Some(ended),
        });
        assert_eq!(state, TransferState::Done);
    }

    /// Waits for that many messages.
    fn messages(&mut self, count: usize) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        wait(|| {
            self.transport.notifications(&mut messages).unwrap();
            (messages.len() >= count).then_some(())
        });
        messages.into_iter().map(|(_, message)| message).collect()
    }
}

/// The content of a block, different for each number and mark.
fn block(mark: u64, number: usize) -> Vec<u8> {
    let first = (mark << 40) + (number * BLOCK / 8) as u64;
    let words = (first..).take(BLOCK / 8).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Polls until there is something.
fn wait<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "nothing happened within {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Scattered on both sides: source and target order differ, and no two runs are neighbours on both.
fn scattered() -> Vec<(usize, usize, usize)> {
    let runs = (0..BLOCKS).map(|at| (at * 1231 % BLOCKS, at * 2777 % BLOCKS));
    runs.map(|(from, to)| (from * BLOCK, to * BLOCK, BLOCK)).collect()
}

fn one_long_run_arrives_whole_in_both_directions(bench: &mut Bench<'_>) {
    let (mut near, far) = (bench.near("long/near"), bench.far("long/far"));
    far.fill(1);
    near.transfer(Op::Read, &far, &[(0, 0, BYTES)]);
    assert!(near.holds(0, BLOCKS, 1, 0));
    near.fill(2);
    near.transfer(Op::Write, &far, &[(0, 0, BYTES)]);
    assert!(far.holds(0, BLOCKS, 2, 0));
}

fn four_thousand_scattered_blocks_arrive_in_place_in_both_directions(bench: &mut Bench<'_>) {
    let (mut near, far) = (bench.near("blocks/near"), bench.far("blocks/far"));
    let runs = scattered();
    far.fill(1);
    near.transfer(Op::Read, &far, &runs);
    assert!(runs.iter().all(|&(from, to, _)| near.holds(to / BLOCK, 1, 1, from / BLOCK)));
    near.fill(2);
    near.transfer(Op::Write, &far, &runs);
    assert!(runs.iter().all(|&(from, to, _)| far.holds(to / BLOCK, 1, 2, from / BLOCK)));
}

fn notifications_arrive_once_and_in_order_whatever_their_bytes(bench: &mut Bench<'_>) {
    let (mut near, mut far) = (bench.near("notes/near"), bench.far("notes/far"));
    let peer = near.transport.connect(&far.address).unwrap();
    let sent: Vec<Vec<u8>> =
        (0..500_u32).map(|at| [&at.to_le_bytes()[..], &[0xff, 0]].concat()).collect();
    for message in &sent {
        near.transport.notify(peer, message).unwrap();
    }
    assert_eq!(far.messages(sent.len()), sent);
    let back = far.transport.connect(&near.address).unwrap();
    far.transport.notify(back, b"and back").unwrap();
    assert_eq!(near.messages(1), [b"and back"]);
}

fn data_that_was_read_stays_when_its_source_changes_after_the_notice(bench: &mut Bench<'_>) {
    let (mut near, mut far) = (bench.near("fence/near"), bench.far("fence/far"));
    for round in 0..3 {
        far.fill(round);
        near.transfer(Op::Read, &far, &[(0, 0, BYTES)]);
        let peer = near.transport.connect(&far.address).unwrap();
        near.transport.notify(peer, b"read").unwrap();
        assert_eq!(far.messages(1), [b"read"]);
        far.fill(99);
        assert!(near.holds(0, BLOCKS, round, 0));
    }
}

fn data_that_was_written_is_there_when_its_notice_arrives(bench: &mut Bench<'_>) {
    let (mut near, mut far) = (bench.near("order/near"), bench.far("order/far"));
    for round in 0..3 {
        near.fill(round);
        near.transfer(Op::Write, &far, &[(0, 0, BYTES)]);
        let peer = near.transport.connect(&far.address).unwrap();
        near.transport.notify(peer, b"written").unwrap();
        assert_eq!(far.messages(1), [b"written"]);
        assert!(far.holds(0, BLOCKS, round, 0));
    }
}

fn a_lost_peer_is_an_error_and_its_next_start_works_at_once(bench: &mut Bench<'_>) {
    let (mut near, far) = (bench.near("lost/near"), bench.far("lost/far/1"));
    near.transfer(Op::Read, &far, &[(0, 0, BLOCK)]);
    let peer = near.transport.connect(&far.address).unwrap();
    let run = CopyRun { source: far.memory.base(), target: near.memory.base(), len: BLOCK as u64 };
    let ends = near.ends(&far);
    // The memory stays mapped: over TCP a read of memory that is gone would end the owner's process, which is ours.
    let Side { transport, memory: _mapped, .. } = far;
    drop(transport);
    wait(|| match near.transport.post(Op::Read, peer, ends, &[run]) {
        Err(_) => Some(()),
        Ok(id) => wait(|| match near.transport.poll(id) {
            TransferState::Running => None,
            // What had left before the peer was gone still counts.
            TransferState::Done => Some(None),
            TransferState::Failed(_) => Some(Some(())),
        }),
    });
    near.transport.forget(peer);
    let again = bench.far("lost/far/2");
    again.fill(3);
    near.transfer(Op::Read, &again, &[(0, 0, BYTES)]);
    assert!(near.holds(0, BLOCKS, 3, 0));
}

fn after_a_rebuild_nothing_is_written_and_everything_works(bench: &mut Bench<'_>) {
    let (mut near, far) = (bench.near("rebuild/near"), bench.far("rebuild/far"));
    far.fill(1);
    let id = near.post(Op::Read, &far, &[(0, 0, BYTES)]);
    near.transport.rebuild().unwrap();
    assert!(matches!(near.transport.poll(id), TransferState::Failed(_)));
    near.fill(2);
    far.fill(3);
    near.transfer(Op::Read, &far, &[(0, BYTES - BLOCK, BLOCK)]);
    assert!(near.holds(0, BLOCKS - 1, 2, 0), "bytes of before the rebuild arrived");
    assert!(near.holds(BLOCKS - 1, 1, 3, 0));
}

#[test]
fn the_in_process_transport_conforms_wherever_the_memory_is() {
    use super::local::{LocalNet, LocalTransport};
    use crate::kv::fake_device::FakeDevice;
    let host = |bytes| Region::host(bytes).unwrap();
    let first = |bytes| FakeDevice::region(0, bytes);
    let second = |bytes| FakeDevice::region(1, bytes);
    let kinds: [&dyn Fn(usize) -> Region; 3] = [&host, &first, &second];
    for (near, far) in [(0, 0), (1, 0), (0, 1), (1, 2)] {
        let net = LocalNet::new();
        let open = &mut |name: &str| -> Box<dyn Transport> {
            Box::new(LocalTransport::new(&net, name).unwrap())
        };
        suite(&mut Bench { open, near: kinds[near], far: kinds[far] });
    }
}
