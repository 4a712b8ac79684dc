//! What it takes to load NIXL and to open agents, and what an agent does to its process.

use super::workers::{mover, pool};
use super::*;
use crate::handover::conformance;
use crate::handover::mover::MoverSettings;
use crate::kv::fake_device::FakeDevice;
use crate::kv::region::EpochPage;

#[test]
fn nixl_conforms_with_its_own_choice_of_transport() {
    alone("loading::child_conforms", &[]);
}

#[test]
fn nixl_conforms_over_tcp() {
    alone("loading::child_conforms", &[OVER_TCP]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_conforms() {
    let library = library();
    let settings = NixlSettings::default();
    conformance::in_host_memory(&mut |name| {
        Box::new(NixlTransport::open(&library, &settings, name.to_owned()).unwrap())
    });
}

/// Here nothing is a device's, whatever it says: as where the driver or UCX's module is missing.
#[test]
fn device_memory_that_ucx_does_not_know_is_refused_with_cause_and_remedy() {
    alone("loading::child_registers_no_device", &[]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_registers_no_device() {
    let host = Region::host(1 << 20).unwrap();
    let mut agent = open("agent");
    let device = FakeDevice::region(0, 1 << 20);
    let error = agent.register(&device).unwrap_err().to_string();
    for part in
        ["registering memory failed", "device memory of cuda:0", "`libuct_cuda`", "`UCX_TLS`"]
    {
        assert!(error.contains(part), "{error}");
    }
    agent.register(&host).unwrap();
    agent.address().unwrap();
}

#[test]
fn an_agent_listens_on_loopback_only_and_leaves_signals_alone() {
    alone("loading::child_listens_on_loopback", &[]);
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
    Running::start("loading::child_opens", "child", folder.path(), &[("HOME", home)]).succeed();
}

#[test]
#[ignore = "needs a process of its own"]
fn child_opens() {
    assert!(open("home").address().unwrap().metadata.len() > 100);
}

#[test]
fn a_missing_library_is_an_error_that_names_the_five_places() {
    let folder = tempfile::tempdir().unwrap();
    // Away from its build tree, the executable has no `.deps` above it.
    let exe = folder.path().join("elsewhere");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    let test = "loading::child_has_no_library";
    Running::start_by(Command::new(exe), test, "child", folder.path(), &[]).succeed();
}

#[test]
#[ignore = "needs a process of its own"]
fn child_has_no_library() {
    let text = NixlLibrary::load(None).unwrap_err().to_string();
    let (installed, system) = ("`../lib/baton/nixl`", "the system's libraries");
    for place in ["`nixl.library_dir`", "`$NIXL_PREFIX`", installed, "`.deps/nixl`", system] {
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
    alone("loading::child_loads_twice", &[]);
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
    alone("loading::child_idles", &[]);
}

#[test]
#[ignore = "needs a process of its own"]
fn child_idles() {
    let (pool, epochs) = (pool(), EpochPage::new(8).unwrap());
    let (worker, settings) = ("idle".parse().unwrap(), MoverSettings::default());
    let (handle, _, _events) = mover(&worker, Incarnation::random(), &pool, &epochs, settings);
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
fn a_back_end_that_cannot_be_made_where_there_is_no_sys_is_an_error_that_says_so() {
    let said = |has_interfaces| {
        unopened("creating NIXL's UCX back end", &NixlError::BackendError, has_interfaces)
            .to_string()
    };
    assert!(said(false).contains("in `/sys/class/net`, which is not there: mount `/sys`"));
    assert!(!said(true).contains("/sys"));
}
