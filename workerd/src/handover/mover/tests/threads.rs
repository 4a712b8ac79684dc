//! The thread around it all.

use super::*;

/// A worker with a mover thread, and what its sink heard.
struct Worker {
    handle: MoverHandle,
    address: PeerAddress,
    pool: KvRegion,
    events: Receiver<MoverEvent>,
}

fn worker(net: &LocalNet, name: &str, settings: MoverSettings) -> Worker {
    let open = |role: &str| -> OpenTransport {
        let (net, name) = (net.clone(), format!("{name}/{role}"));
        Box::new(move || Ok(Box::new(LocalTransport::new(&net, &name)?)))
    };
    let pool = pool();
    let regions = MoverRegions {
        pool: pool.region.clone(),
        epochs: EpochPage::new(8).unwrap().region().clone(),
    };
    let (sink, events) = crossbeam_channel::unbounded();
    let sink = Box::new(move |event| sink.send(event).unwrap());
    let (handle, address) =
        Mover::start(open("serve"), open("move"), regions, sink, settings).unwrap();
    Worker { handle, address, pool, events }
}

fn heard(worker: &Worker) -> MoverEvent {
    worker.events.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn the_thread_pulls_passes_on_notices_and_ends() {
    let net = LocalNet::new();
    let reader = worker(&net, "gen", MoverSettings::default());
    let mut owner = Owner::new(&net, "ctx", 1);
    assert_eq!(reader.address.agent, "gen/serve");
    let deadline = Instant::now() + PATIENCE;
    reader.handle.pull(owner.job(1, &[3], &reader.pool, &[10], deadline)).unwrap();
    assert!(matches!(heard(&reader), MoverEvent::Pulled { id: PullId(1), .. }));
    assert_eq!(owner.notices(), [LEASE]);
    assert!(reader.handle.is_connected(&owner.incarnation));
    assert_eq!(reader.handle.unfinished(), 0);

    let peer = owner.agent.connect(&reader.address).unwrap();
    owner.agent.notify(peer, b"not a notice").unwrap();
    owner.agent.notify(peer, &write_notice(LEASE)).unwrap();
    assert!(matches!(heard(&reader), MoverEvent::LeaseRead(LEASE)));
    assert!(reader.handle.shutdown());
    assert!(reader.handle.shutdown(), "a second time as well");
}

#[test]
fn a_full_or_ended_mover_hands_the_job_back() {
    let net = LocalNet::new();
    let reader = worker(&net, "gen", MoverSettings { max_pulls: 1, ..MoverSettings::default() });
    let mut owner = Owner::new(&net, "ctx", 1);
    net.hold("ctx");
    let deadline = Instant::now() + PATIENCE;
    let mut job = |id| owner.job(id, &[3], &reader.pool, &[10], deadline);
    reader.handle.pull(job(1)).unwrap();
    assert_eq!(reader.handle.pull(job(2)).unwrap_err().id, PullId(2));
    assert!(reader.handle.shutdown());
    let event = heard(&reader);
    assert_eq!(failure(std::slice::from_ref(&event)), (ErrorCode::Internal, true));
    assert_eq!(reader.handle.unfinished(), 0);
    assert_eq!(reader.handle.pull(job(3)).unwrap_err().id, PullId(3));
    reader.handle.cancel(PullId(1));
}

#[test]
fn the_thread_ends_with_its_last_handle() {
    let net = LocalNet::new();
    let Worker { handle, events, .. } = worker(&net, "gen", MoverSettings::default());
    drop(handle);
    assert!(events.recv_timeout(PATIENCE).is_err_and(|error| error.is_disconnected()));
}

#[test]
fn a_transport_that_does_not_open_is_an_error() {
    let net = LocalNet::new();
    let _taken = LocalTransport::new(&net, "gen/move").unwrap();
    let open = |name: &'static str| -> OpenTransport {
        let net = net.clone();
        Box::new(move || Ok(Box::new(LocalTransport::new(&net, name)?)))
    };
    let pool = Region::host(4096).unwrap();
    let regions = MoverRegions { epochs: pool.clone(), pool };
    let started = Mover::start(
        open("gen/serve"),
        open("gen/move"),
        regions,
        Box::new(|_| {}),
        MoverSettings::default(),
    );
    let error = started.unwrap_err().to_string();
    assert_eq!(error, "join failed: agent `gen/move` is there already");
}

#[test]
fn the_pools_device_is_current_on_the_thread_before_a_transport_is_opened() {
    let net = LocalNet::new();
    let device = FakeDevice::new(1, 4096);
    let open = |name: &'static str| -> OpenTransport {
        let (net, device) = (net.clone(), device.clone());
        Box::new(move || {
            assert!(device.is_current());
            Ok(Box::new(LocalTransport::new(&net, name)?))
        })
    };
    let start = || {
        let epochs = EpochPage::new(8).unwrap().region().clone();
        let regions = MoverRegions { pool: Region::device(device.clone()), epochs };
        let (serve, move_) = (open("gen/serve"), open("gen/move"));
        Mover::start(serve, move_, regions, Box::new(|_| {}), MoverSettings::default())
    };
    let (handle, _) = start().unwrap();
    assert!(handle.shutdown());
    device.fail();
    let error = start().unwrap_err();
    assert!(matches!(error, MoverError::Transport(TransportError::Broken { .. })));
    assert_eq!(
        error.to_string(),
        "making the pool's device current failed: the fake driver was told to fail"
    );
}
