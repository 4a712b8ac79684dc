//! Checks that take their time or need root: `make test-long`. One that lacks something says so on standard error.

use std::io::Write;

use super::workers::{LEASED, Owner, Reader, mover, pool, read_beside};
use super::*;
use crate::handover::mover::{MoverSettings, PeersSeen};
use crate::handover::offer::{self, OfferedLease};
use crate::handover::pull::copy_runs;
use crate::handover::{MoverEvent, PullId, PullJob};
use crate::kv::region::EpochPage;
use baton_shared::id::{BlockIndex, LeaseId};
use baton_shared::wire::error::ErrorCode;

/// Times a pull reads the same blocks: 1 GiB.
const LONG: usize = 40;

/// Says that a check was not made: past the test runner, which keeps what tests print.
fn skipped(test: &str, missing: &str) {
    writeln!(std::io::stderr(), "skipped: {test}: {missing}").unwrap();
}

/// Whether a command ends well, else in words what is missing.
fn can(command: &[&str]) -> Result<(), String> {
    let output = Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("`{}`: {error}", command[0]))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let reason = said.lines().next().unwrap_or("no reason given");
    if output.status.success() { Ok(()) } else { Err(format!("`{}`: {reason}", command.join(" "))) }
}

/// This binary, run by another command.
fn run_by(command: &[&str], exe: &Path) -> Command {
    let mut runner = Command::new(command[0]);
    runner.args(&command[1..]).arg(exe);
    runner
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_two_thousand_peers_come_and_go_and_leave_nothing() {
    meet_many_peers(&[]);
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_five_hundred_peers_come_and_go_and_leave_nothing_over_tcp() {
    meet_many_peers(&[OVER_TCP]);
}

fn meet_many_peers(variables: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let reader = Running::start("long::child_meets_many_peers", "reader", folder.path(), variables);
    reader.succeed_within(Duration::from_secs(900));
    show_figures(folder.path());
}

/// Starts of one worker, each an agent of this process, that are read from and end.
#[test]
#[ignore = "needs a process of its own"]
fn child_meets_many_peers() {
    /// Until then the C library's memory finds its size.
    const WARM: u64 = 100;
    // Over TCP each takes longer, and ports that nobody may use for a minute.
    let peers = if std::env::var_os(OVER_TCP.0).is_some() { 500 } else { 2000 };
    let mut reader = Reader::start(MoverSettings::default());
    let (theirs, epochs) = (pool(), EpochPage::new(8).unwrap());
    let blocks: Vec<_> = (0..8).map(BlockIndex).collect();
    let mut before = (0, 0);
    for peer in 0..peers {
        if peer == WARM {
            before = (open_files(), resident_kib());
        }
        let incarnation = Incarnation::random();
        let worker: WorkerId = "peer".parse().unwrap();
        let mut agent = open(&agent_name(&worker, 0, AgentRole::Serve, &incarnation));
        agent.register(&theirs.region).unwrap();
        agent.register(epochs.region()).unwrap();
        let lease = LeaseId::random();
        let (epoch_address, epoch) = (epochs.address(0), epochs.value(0));
        let offered = OfferedLease { lease, expires_unix_ms: 0, epoch_address, epoch };
        let address = agent.address().unwrap();
        let leased = offer::leased_blocks(offered, &address, &theirs, &blocks);
        let ranks = copy_runs(&leased, &reader.pool, 0, &blocks).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let job = PullJob { id: PullId(peer), worker, incarnation, lease, ranks, deadline };
        reader.handle.pull(job).unwrap();
        let event = reader.event();
        assert!(matches!(event, MoverEvent::Pulled { .. }), "peer {peer}: {event:?}");
    }
    let (files, resident) = (open_files(), resident_kib());
    reader.note(&format!(
        "after {WARM} peers {} files, {} KiB; after {peers} {files} files, {resident} KiB",
        before.0, before.1
    ));
    assert!(files <= before.0 + 4, "{} open files, then {files}", before.0);
    // 2 KiB a peer.
    let most = before.1 + 2 * (peers - WARM);
    assert!(resident <= most, "{} KiB resident, then {resident}", before.1);
    assert!(reader.handle.shutdown());
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    resident.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_another_agent_answers_at_once_while_a_gibibyte_moves() {
    for variables in [&[][..], &[OVER_TCP]] {
        read_beside(&["owner"], "long::child_calls_another_agent", variables);
    }
}

#[test]
#[ignore = "needs a process of its own"]
fn child_calls_another_agent() {
    let mut reader = Reader::start(MoverSettings::default());
    reader.succeed_from("owner", 0);
    let mut agent = open("bystander");
    agent.register(&reader.pool.region).unwrap();
    let id = reader.pull("owner", 0, LONG, 3 * PATIENCE);
    let (mut took, mut messages) = (Vec::new(), Vec::new());
    while reader.events.is_empty() {
        let called = Instant::now();
        agent.notifications(&mut messages).unwrap();
        took.push(called.elapsed());
        std::thread::sleep(Duration::from_micros(100));
    }
    let moved = reader.succeed(id);
    took.sort();
    let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
    let calls = took.len();
    reader.note(&format!("{calls} calls: median {median:?}, most {most:?}; 1 GiB in {moved:?}"));
    assert!(calls > 100, "{calls} calls");
    assert!(median < Duration::from_millis(1), "{median:?}");
    assert!(reader.handle.shutdown());
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_an_idle_mover_and_its_agents_take_less_than_a_hundredth_of_a_core() {
    let folder = tempfile::tempdir().unwrap();
    Running::start("long::child_stays_idle", "idle", folder.path(), &[]).succeed();
    show_figures(folder.path());
}

#[test]
#[ignore = "needs a process of its own"]
fn child_stays_idle() {
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let (worker, settings) = ("idle".parse().unwrap(), MoverSettings::default());
    let (handle, _, _events) = mover(&worker, Incarnation::random(), &pool, &epochs, settings);
    let (before, started) = (time_on_cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(20));
    let share = (time_on_cpu() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    put_file(&given().0, "figures", &format!("{:.3} % of a core", share * 100.0));
    assert!(share < 0.01, "{share}");
    assert!(handle.shutdown());
}

/// What the threads of this process have run so far.
fn time_on_cpu() -> Duration {
    let ran = fs::read_dir("/proc/self/task").unwrap().map(|task| {
        let text = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(ran.sum())
}

/// What other users need: this binary and NIXL, in a folder that everybody can use.
fn for_everybody(folder: &Path) -> PathBuf {
    let everybody = |path: &Path| {
        let done = Command::new("chmod").args(["-R", "a+rwX"]).arg(path).status().unwrap();
        assert!(done.success());
    };
    let (exe, nixl) = (folder.join("baton-test"), folder.join("nixl"));
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    // `library()` would load it, which this process must not: it stands in the build tree, or where it was said to.
    let tree = std::env::current_exe().unwrap();
    let tree = tree.ancestors().map(|above| above.join(".deps/nixl")).find(|path| path.exists());
    let source = std::env::var_os("NIXL_PREFIX").map(PathBuf::from).or(tree).unwrap();
    let copied = Command::new("cp").arg("-rL").arg(source).arg(&nixl).status().unwrap();
    assert!(copied.success());
    everybody(folder);
    exe
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_workers_of_two_users_use_the_network() {
    let as_user = |id| {
        let (user, group) = (format!("--reuid={id}"), format!("--regid={id}"));
        ["setpriv".to_owned(), user, group, "--clear-groups".to_owned()]
    };
    let (owner, reader) = (as_user(65_501), as_user(65_502));
    apart(
        "long_workers_of_two_users_use_the_network",
        &owner.each_ref().map(String::as_str),
        &reader.each_ref().map(String::as_str),
    );
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_a_worker_in_its_own_process_namespace_uses_the_network() {
    let namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    apart("long_a_worker_in_its_own_process_namespace_uses_the_network", &namespace, &["env"]);
}

/// An owner and a reader that cannot look into each other's memory.
fn apart(test: &str, owner: &[&str], reader: &[&str]) {
    for command in [owner, reader] {
        if let Err(missing) = can(&[command, &["true"]].concat()) {
            return skipped(test, &missing);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let exe = for_everybody(folder);
    let nixl = folder.join("nixl");
    let variables = [("NIXL_PREFIX", nixl.to_str().unwrap())];
    let start = |command, test, name| {
        Running::start_by(run_by(command, &exe), test, name, folder, &variables)
    };
    let owner = start(owner, "workers::child_owns", "owner");
    start(reader, "long::child_reads_from_afar", "reader").succeed();
    put_file(folder, "stop", "");
    owner.succeed();
    show_figures(folder);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_reads_from_afar() {
    let mut reader = Reader::start(MoverSettings::default());
    let took: Vec<_> = (0..3).map(|_| reader.succeed_from("owner", 0)).collect();
    reader.note(&format!("25 MiB in {took:?}"));
    assert_eq!(reader.handle.peers_seen(), PeersSeen { shared_memory: 0, network: 1 });
    assert!(reader.handle.shutdown());
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_a_killed_worker_whose_child_lives_is_noticed_by_the_deadline() {
    for variables in [&[][..], &[OVER_TCP]] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let test = "long::child_owns_and_has_a_child";
        let owner = Running::start(test, "owner", folder, variables);
        let test = "long::child_sees_a_parent_killed";
        Running::start(test, "reader", folder, variables).succeed();
        owner.kill();
        show_figures(folder);
    }
}

/// An owner that starts a child when it is first read from: that inherits the connection, and lives for a minute.
#[test]
#[ignore = "needs a process of its own"]
fn child_owns_and_has_a_child() {
    let owner = Owner::start();
    let lease = LeaseId::random();
    owner.offer(LEASED, lease, owner.epochs.address(3), owner.epochs.value(3));
    let folder = owner.folder.clone();
    owner.serve(|_| {
        let script = r#"sleep 60 & echo $! > "$0.draft"; mv "$0.draft" "$0""#;
        let child = folder.join("child.pid");
        let started = Command::new("sh").args(["-c", script]).arg(child).status().unwrap();
        assert!(started.success());
    });
}

#[test]
#[ignore = "needs a process of its own"]
fn child_sees_a_parent_killed() {
    let patience = Duration::from_secs(20);
    let settle_timeout = Duration::from_secs(2);
    let mut reader = Reader::start(MoverSettings { settle_timeout, ..MoverSettings::default() });
    reader.succeed_from("owner", 0);
    let child = reader.process("child");
    reader.fill(0);
    let id = reader.pull("owner", 0, LONG, patience);
    reader.wait_for_bytes(0);
    let killed = Instant::now();
    kill(reader.process("owner"));
    let failed = reader.fail_within(id, patience + PATIENCE);
    let reported = killed.elapsed();
    let settled = reader.settle(id, &failed);
    reader.stay_untouched(0);
    let rebuilds = reader.handle.figures().rebuilds;
    reader.note(&format!(
        "{:?} after {reported:?}, settled {settled:?} after the start, {rebuilds} rebuilds",
        failed.code
    ));
    signal(child, "KILL");
    let codes = [ErrorCode::KvPeerUnreachable, ErrorCode::KvTransferTimeout];
    assert!(codes.contains(&failed.code), "{failed:?}");
    assert!(failed.reported < patience + Duration::from_secs(2), "{failed:?}");
    assert!(settled < patience + settle_timeout + Duration::from_secs(5), "{settled:?}");
    assert!(reader.handle.shutdown());
}

#[test]
#[ignore = "long: `make test-long`"]
fn long_packets_that_vanish_are_an_error_in_time() {
    let namespace = ["unshare", "--net", "--mount", "sh", "-ec"];
    let prepare = "mount -t sysfs none /sys; ip link set lo up; ";
    let probe = format!("{prepare} {VANISH}");
    if let Err(missing) = can(&[&namespace[..], &[&probe]].concat()) {
        return skipped("long_packets_that_vanish_are_an_error_in_time", &missing);
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let script = format!("{prepare} exec \"$@\"");
    let command =
        run_by(&[&namespace[..], &[&script, "sh"]].concat(), &std::env::current_exe().unwrap());
    let test = "long::child_loses_packets";
    Running::start_by(command, test, "reader", folder, &[OVER_TCP]).succeed_within(4 * PATIENCE);
    show_figures(folder);
}

/// Has every packet of this network namespace dropped silently.
const VANISH: &str = "tc qdisc add dev lo root blackhole";

/// In a network namespace with its owners.
#[test]
#[ignore = "needs a process of its own"]
fn child_loses_packets() {
    let (folder, _) = given();
    let start = |name| Running::start("workers::child_owns", name, &folder, &[OVER_TCP]);
    let owners = ["busy", "idle"].map(start);
    let mut reader = Reader::start(MoverSettings::default());
    reader.succeed_from("busy", 0);
    reader.succeed_from("idle", 500);
    reader.fill(0);
    let patience = Duration::from_secs(40);
    let busy = reader.pull("busy", 0, LONG, patience);
    reader.wait_for_bytes(0);
    can(&VANISH.split(' ').collect::<Vec<_>>()).unwrap();
    let lost = Instant::now();
    let idle = reader.pull("idle", 500, 1, patience);
    for _ in 0..2 {
        let event = reader.event();
        let MoverEvent::PullFailed { id, code, settled, .. } = event else { panic!("{event:?}") };
        let what = if id == busy { "under way" } else { "begun afterwards" };
        assert!(id == busy || id == idle);
        let took = lost.elapsed();
        reader.note(&format!("{what}: {code:?} after {took:?}, settled: {settled}"));
        assert_eq!(code, ErrorCode::KvPeerUnreachable);
        // Three times `UCX_TCP_USER_TIMEOUT`.
        assert!(took < Duration::from_secs(15), "{took:?}");
    }
    assert!(reader.handle.shutdown());
    drop(owners);
}
