//! Two engines with their real movers, over the transport inside one process.

use super::*;
use crate::handover::Transport;
use crate::handover::local::{LocalNet, LocalTransport};
use crate::handover::mover::{Mover, MoverHandle, MoverRegions, MoverSettings, OpenTransport};

struct Worker {
    rig: Rig,
    mover: MoverHandle,
}

impl Worker {
    fn new(net: &LocalNet, name: &str, fake: FakeConfig) -> Self {
        let queue_timeout = Duration::from_millis(200);
        let config = EngineConfig { queue_timeout, ..EngineConfig::default() };
        let mut started = None;
        let rig = Rig::start(config, fake, Arc::default(), |handle, kv, epochs| {
            let regions = MoverRegions { pool: kv.region.clone(), epochs: epochs.region().clone() };
            let (serve, pull) = (opener(net, name, "serve"), opener(net, name, "move"));
            let sink = handle.mover_sink();
            let (mover, address) =
                Mover::start(serve, pull, regions, sink, MoverSettings::default()).unwrap();
            started = Some(mover.clone());
            (Box::new(mover), address)
        });
        Self { rig, mover: started.unwrap() }
    }

    fn end(self) {
        self.rig.until_free();
        self.rig.handle.drain();
        assert_eq!(self.rig.ended(), EngineEnd::Drained);
        assert!(self.mover.shutdown());
    }
}

fn opener(net: &LocalNet, name: &str, role: &str) -> OpenTransport {
    let (net, name) = (net.clone(), format!("{name}/{role}"));
    Box::new(move || Ok(Box::new(LocalTransport::new(&net, &name)?) as Box<dyn Transport>))
}

/// Both phases of a request, given up after `patience` events if it has one. `None`: refused for want of room.
fn ask_both(
    from: &Rig,
    to: &Rig,
    ask: &Ask,
    request: u64,
    patience: Option<usize>,
) -> Option<Answer> {
    let context = from.answer(ask.clone().context(request));
    if context.failure == Some(ErrorCode::PoolExhausted) {
        return None;
    }
    let first = context.tokens[0].clone();
    let record = from.record(request, &ask.prompt, context.lease());
    let mut receiver = to.submit(ask.clone().generation(request, vec![first.id], record));
    if let Some(events) = patience {
        for _ in 0..events {
            block_on(receiver.next());
        }
        drop(receiver);
        from.handle.release(DisaggRequestId(request));
        return None;
    }
    let mut answer = Answer::of(receiver);
    if answer.failure.is_some() {
        assert_eq!(answer.failure, Some(ErrorCode::PoolExhausted), "{answer:?}");
        from.handle.release(DisaggRequestId(request));
        return None;
    }
    answer.tokens.insert(0, first);
    Some(answer)
}

#[test]
fn many_requests_through_two_workers_with_small_pools_are_answered_as_by_one() {
    for lag in [0, 1] {
        let net = LocalNet::new();
        let from = Worker::new(&net, "context", small_pool(40, lag));
        let to = Worker::new(&net, "generation", small_pool(30, lag));
        let alone = Rig::with_lag(0);
        let answered: usize = std::thread::scope(|scope| {
            let client = |thread: u64| {
                let (from, to, alone) = (&from.rig, &to.rig, &alone);
                let one = move |turn: u64| {
                    let seed = thread * 100 + turn;
                    let ask = Ask::varied(seed, 1 + seed as usize * 7 % 30, 2 + seed as u32 % 17);
                    let patience = (seed % 4 == 1).then_some(seed as usize % 3);
                    let answer = ask_both(from, to, &ask, (1 << 41) + seed, patience);
                    assert!(answer.is_none() || answer == Some(alone.answer(ask)), "seed {seed}");
                    usize::from(answer.is_some())
                };
                scope.spawn(move || (0..25).map(one).sum::<usize>())
            };
            let clients: Vec<_> = (0..6).map(client).collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        });
        assert!(answered > 50, "{answered} of 150 were answered");
        assert_eq!(to.rig.handle.status().totals.pull_failures, []);
        from.end();
        to.end();
    }
}

#[test]
fn a_lost_context_worker_is_named_by_the_code() {
    let net = LocalNet::new();
    let from = Worker::new(&net, "context", fake_with(0));
    let to = Worker::new(&net, "generation", fake_with(0));
    let ask = Ask::varied(1, 9, 5);
    let context = from.rig.answer(ask.clone().context(1 << 41));
    let record = from.rig.record(1 << 41, &ask.prompt, context.lease());
    net.lose("context/serve");
    let first = vec![context.tokens[0].id];
    let answer = to.rig.answer(ask.generation(1 << 41, first, record));
    assert_eq!(answer.failure, Some(ErrorCode::KvPeerUnreachable));
    from.rig.handle.release(DisaggRequestId(1 << 41));
    from.end();
    to.end();
}
