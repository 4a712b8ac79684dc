//! NIXL as it is found on this machine. Its environment must be set before it is loaded, and some checks need two
//! processes: so the bodies are ignored tests (`child_…`), run by the others in processes of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::handover::conformance::{self, PATIENCE};
use crate::handover::mover::{Mover, MoverHandle, MoverRegions, MoverSettings, PeersSeen};
use crate::handover::offer::{self, Identity, OfferedLease};
use crate::handover::pull::copy_runs;
use crate::handover::{MoverEvent, PullId, PullJob};
use crate::kv::region::{EpochPage, KvRegion};
use baton_shared::id::{BlockIndex, DisaggRequestId, LeaseId};
use baton_shared::kv::layout::{KvDtype, KvLayout};
use baton_shared::kv::record::Record;
use baton_shared::wire::auth::Keys;
use baton_shared::wire::error::ErrorCode;

const FOLDER: &str = "BATON_TEST_CHILD_FOLDER";
const NAME: &str = "BATON_TEST_CHILD_NAME";
const OVER_TCP: (&str, &str) = ("UCX_TLS", "tcp,self");

/// A test of this binary in a process of its own; killed when dropped.
struct Running {
    child: Child,
    output: PathBuf,
    test: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Running {
    fn start(test: &'static str, name: &str, folder: &Path, variables: &[(&str, &str)]) -> Self {
        Self::start_file(&std::env::current_exe().unwrap(), test, name, folder, variables)
    }

    fn start_file(
        exe: &Path,
        test: &'static str,
        name: &str,
        folder: &Path,
        variables: &[(&str, &str)],
    ) -> Self {
        let output = folder.join(format!("{name}.output"));
        let file = fs::File::create(&output).unwrap();
        let child = Command::new(exe)
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(format!("handover::nixl::tests::{test}"))
            .envs(library::environment(&[]).unwrap())
            .env(FOLDER, folder)
            .env(NAME, name)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, output, test }
    }

    fn finish(&mut self) -> ExitStatus {
        let deadline = Instant::now() + 3 * PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} hangs:\n{}", self.test, self.printed());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it printed, without the frame that the test runner puts around.
    fn printed(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap();
        let frame = format!("test handover::nixl::tests::{} ... ", self.test);
        let lines = text.lines().map(|line| line.strip_prefix(&frame).unwrap_or(line));
        let is_frame = |line: &str| {
            ["", "ok", "running 1 test"].contains(&line)
                || line.starts_with("test result: ok. 1 passed")
        };
        lines.filter(|line| !is_frame(line)).collect::<Vec<_>>().join("\n")
    }

    fn succeed(mut self) {
        let status = self.finish();
        assert!(status.success(), "{} failed: {status}\n{}", self.test, self.printed());
        assert_eq!(self.printed(), "", "{} printed something", self.test);
    }
}

fn alone(test: &'static str, variables: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    Running::start(test, "child", folder.path(), variables).succeed();
}

/// The folder and name given to a child.
fn given() -> (PathBuf, String) {
    let given = |name| std::env::var(name).expect("run by another test, in a process of its own");
    (PathBuf::from(given(FOLDER)), given(NAME))
}

fn library() -> NixlLibrary {
    NixlLibrary::load(None).unwrap_or_else(|error| panic!("{error}"))
}

fn open(name: &str) -> NixlTransport {
    NixlTransport::open(&library(), &NixlSettings::default(), name.to_owned()).unwrap()
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_for_file(folder: &Path, name: &str) -> String {
    wait_for(name, || fs::read_to_string(folder.join(name)).ok())
}

/// Appears whole or not at all.
fn put_file(folder: &Path, name: &str, text: &str) {
    let draft = folder.join(format!("{name}.draft"));
    fs::write(&draft, text).unwrap();
    fs::rename(draft, folder.join(name)).unwrap();
}

#[test]
fn nixl_conforms_with_its_own_choice_of_transport() {
    alone("child_conforms", &[]);
}

#[test]
fn nixl_conforms_over_tcp() {
    alone("child_conforms", &[OVER_TCP]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_conforms() {
    let library = library();
    let settings = NixlSettings::default();
    conformance::suite(&mut |name| {
        Box::new(NixlTransport::open(&library, &settings, name.to_owned()).unwrap())
    });
}

#[test]
fn an_agent_listens_on_loopback_only_and_leaves_signals_alone() {
    alone("child_listens_on_loopback", &[]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_listens_on_loopback() {
    let caught = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    };
    let before = caught();
    let ports = 21_000..=21_100;
    let settings = NixlSettings { ports: Some(ports.clone()), ..NixlSettings::default() };
    let agent = NixlTransport::open(&library(), &settings, "lo".to_owned()).unwrap();
    assert_eq!(format!("{:x}", caught()), format!("{before:x}"), "signals caught");
    let listening = listening();
    assert!(!listening.is_empty());
    for (address, port) in listening {
        assert_eq!(address, "0100007F", "not 127.0.0.1");
        assert!(ports.contains(&port), "port {port}");
    }
    drop(agent);
}

/// Addresses (as the kernel writes them) and ports of this process's listening sockets.
fn listening() -> Vec<(String, u16)> {
    let mine: Vec<_> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| {
            let link = link.to_string_lossy().into_owned();
            Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .map(|table| fs::read_to_string(table).unwrap_or_default());
    let rows = tables.iter().flat_map(|table| table.lines().skip(1));
    rows.filter_map(|row| {
        let fields: Vec<_> = row.split_whitespace().collect();
        let (address, port) = fields[1].split_once(':')?;
        let listens = fields[3] == "0A" && mine.iter().any(|inode| inode == fields[9]);
        listens.then(|| (address.to_owned(), u16::from_str_radix(port, 16).unwrap()))
    })
    .collect()
}

#[test]
fn a_home_that_cannot_be_looked_into_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    // A link to itself: looking below it is an error for everybody, root included.
    std::os::unix::fs::symlink(&home, &home).unwrap();
    let home = home.to_str().unwrap();
    Running::start("child_opens", "child", folder.path(), &[("HOME", home)]).succeed();
}

#[test]
#[ignore = "needs a process of its own"]
fn child_opens() {
    assert!(open("home").address().unwrap().metadata.len() > 100);
}

#[test]
fn a_missing_library_is_an_error_that_names_the_four_places() {
    let folder = tempfile::tempdir().unwrap();
    // Away from its build tree, the executable has no `.deps` above it.
    let exe = folder.path().join("elsewhere");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let test = "child_has_no_library";
    Running::start_file(&exe, test, "child", folder.path(), &[]).succeed();
}

#[test]
#[ignore = "needs a process of its own"]
fn child_has_no_library() {
    let text = NixlLibrary::load(None).unwrap_err().to_string();
    for place in ["`nixl.library_dir`", "`$NIXL_PREFIX`", "`.deps/nixl`", "the system's libraries"]
    {
        assert!(text.contains(place), "{text}");
    }
    let (folder, _) = given();
    let wrong = NixlLibrary::load(Some(&folder)).unwrap_err().to_string();
    assert!(wrong.starts_with("`nixl.library_dir` is `"), "{wrong}");
    // Some other library under that name.
    let zlib = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/libm.so.6", "/usr/lib/libm.so.6"];
    let other = zlib.iter().map(Path::new).find(|file| file.exists()).unwrap();
    fs::copy(other, folder.join("libnixl_capi.so")).unwrap();
    let wrong = NixlLibrary::load(Some(&folder)).unwrap_err();
    assert!(matches!(wrong, LibraryError::Unusable { .. }), "{wrong}");
}

#[test]
fn a_second_copy_is_refused() {
    alone("child_loads_twice", &[]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_loads_twice() {
    let first = library();
    assert_eq!(library().file(), first.file());
    let (folder, _) = given();
    fs::copy(first.file(), folder.join("libnixl_capi.so")).unwrap();
    let second = NixlLibrary::load(Some(&folder)).unwrap_err();
    assert!(matches!(second, LibraryError::SecondCopy { .. }), "{second}");
}

#[test]
fn an_idle_mover_and_its_agents_hardly_wake() {
    alone("child_idles", &[]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_idles() {
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let (handle, _, _events) = mover("idle", Incarnation::random(), &pool, &epochs);
    let (before, started) = (times_slept(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let rate = (times_slept() - before) as f64 / started.elapsed().as_secs_f64();
    // Each wakes, looks and sleeps within some 20 us: 1 % of a core is 500 times a second.
    assert!(rate < 300.0, "{rate} times a second");
    assert!(handle.shutdown());
}

/// How often the threads of this process have gone to sleep so far.
fn times_slept() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let slept = tasks.map(|task| {
        let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.unwrap().trim().parse::<u64>().unwrap()
    });
    slept.sum()
}

#[test]
fn ports_and_interfaces_that_cannot_be_are_refused() {
    let config = |interface: &str, ports| {
        NixlSettings { interface: interface.to_owned(), ports }.engine_config(u16::MAX)
    };
    assert_eq!(config("lo", None).unwrap(), "NET_DEVICES=lo");
    let placed = config("eth0.7", Some(20_000..=20_100)).unwrap();
    let start = placed.strip_prefix("NET_DEVICES=eth0.7,TCP_PORT_RANGE=").unwrap();
    let (start, end) = start.split_once('-').unwrap();
    assert!((20_000..=20_093).contains(&start.parse().unwrap()) && end == "20100");
    for ports in [20_000..=20_006, 0..=100, RangeInclusive::new(30_000, 20_000)] {
        assert!(config("lo", Some(ports)).is_err());
    }
    for interface in ["", "lo,eth0", "lo=1", "a-name-that-is-too-long"] {
        assert!(config(interface, None).is_err());
    }
}

#[test]
fn blocks_move_between_processes_by_shared_memory() {
    let seen = PeersSeen { shared_memory: 2, network: 0 };
    assert_eq!(hand_over(&[]), format!("{seen:?}"));
}

#[test]
fn blocks_move_between_processes_over_tcp() {
    // Which way bytes came is told from whether they were there when the post returned: on a machine that let
    // nobody look in time, bytes from a socket were there too. So both peers are classed, but not by what.
    let seen = hand_over(&[OVER_TCP]);
    let peers: u32 = seen.chars().filter_map(|c| c.to_digit(10)).sum();
    assert_eq!(peers, 2, "{seen}");
}

/// One context worker dies and starts again, while the generation worker lives on; says how its bytes came.
fn hand_over(variables: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut first = Running::start("child_offers", "first", folder, variables);
    let reader = Running::start("child_pulls", "reader", folder, variables);
    wait_for_file(folder, "first.is-done-with");
    first.child.kill().unwrap();
    first.finish();
    put_file(folder, "first.killed", "");
    assert_eq!(first.printed(), "");
    let second = Running::start("child_offers", "second", folder, variables);
    reader.succeed();
    put_file(folder, "stop", "");
    second.succeed();
    println!("{}", fs::read_to_string(folder.join("figures")).unwrap());
    fs::read_to_string(folder.join("seen")).unwrap()
}

const BLOCKS: u32 = 1024;
const WANTED: std::ops::Range<u32> = 100..900;

fn pool() -> KvRegion {
    // 64 KiB a block, 64 MiB.
    let layout = KvLayout::block_major(KvDtype::Bf16, 32, 64, BLOCKS, 0..2, 0..4);
    KvRegion { region: Region::host(usize::try_from(layout.bytes()).unwrap()).unwrap(), layout }
}

fn block(mark: &str, block: u32, layout: &KvLayout) -> Vec<u8> {
    let seed = u64::from(block) << 8 | u64::from(mark.as_bytes()[0]);
    (0..layout.block_bytes() / 8)
        .flat_map(|word| (word ^ seed << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

type Started = (MoverHandle, PeerAddress, crossbeam_channel::Receiver<MoverEvent>);

fn mover(name: &str, incarnation: Incarnation, pool: &KvRegion, epochs: &EpochPage) -> Started {
    let instance: WorkerId = name.parse().unwrap();
    let opener = |role| -> crate::handover::mover::OpenTransport {
        let name = agent_name(&instance, 0, role, &incarnation);
        let library = library();
        Box::new(move || {
            Ok(Box::new(NixlTransport::open(&library, &NixlSettings::default(), name)?))
        })
    };
    let regions = MoverRegions { pool: pool.region.clone(), epochs: epochs.region().clone() };
    let (sink, events) = crossbeam_channel::unbounded();
    // The receiver goes before the mover only when the test is over.
    let sink = Box::new(move |event| drop(sink.send(event)));
    let settings = MoverSettings::default();
    let (handle, address) =
        Mover::start(opener(AgentRole::Serve), opener(AgentRole::Move), regions, sink, settings)
            .unwrap();
    (handle, address, events)
}

/// A context worker: offers every second block of [`WANTED`] and the rest as one run.
#[test]
#[ignore = "needs a process of its own"]
fn child_offers() {
    let (folder, name) = given();
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let layout = &pool.layout;
    for index in 0..BLOCKS {
        let bytes = block(&name, index, layout);
        pool.region.write(index as usize * bytes.len(), &bytes);
    }
    let incarnation = Incarnation::random();
    let (handle, address, events) = mover(&name, incarnation, &pool, &epochs);
    let lease = LeaseId::random();
    let offered = OfferedLease {
        lease,
        expires_unix_ms: 0,
        epoch_address: epochs.address(3),
        epoch: epochs.value(3),
    };
    let blocks: Vec<_> = WANTED.map(BlockIndex).collect();
    let identity = Identity {
        worker: name.parse().unwrap(),
        address: "127.0.0.1:1".to_owned(),
        incarnation,
        fingerprint: [0; 32],
    };
    let leased = offer::leased_blocks(offered, &address, &pool, &blocks);
    let prompt = vec![1; blocks.len() * 32];
    let record = offer::record(&identity, DisaggRequestId(1), &prompt, None, Some(leased));
    put_file(&folder, &format!("{name}.record"), &record.encode_text(&Keys::none()).unwrap());
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, MoverEvent::LeaseRead(read) if read == lease));
    epochs.bump(3);
    put_file(&folder, &format!("{name}.heard"), "");
    wait_for_file(&folder, "stop");
    assert!(handle.shutdown());
}

/// A generation worker: pulls from `first`, finds the lease ended, then `first` dead, then pulls from `second`.
#[test]
#[ignore = "needs a process of its own"]
fn child_pulls() {
    let (folder, name) = given();
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let (handle, _, events) = mover(&name, Incarnation::random(), &pool, &epochs);
    let target: Vec<_> =
        WANTED.map(|at| BlockIndex(if at < 500 { at + 1 } else { 1500 - at })).collect();
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
            pool.region.read(to.0 as usize * bytes.len(), &mut bytes);
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
    assert!(handle.shutdown());
    put_file(&folder, "figures", &figures.join("\n"));
}
