//! The engine's loop with the fake back end, which refuses any wrong block, and a mover the test plays itself.

mod ends;
mod handover;
mod movers;
mod outputs;
mod prefix;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_shared::id::{DisaggRequestId, Incarnation, WorkerId};
use baton_shared::kv::record::{LeasedBlocks, Record};
use baton_shared::wire::error::ErrorCode;

use super::output::{self, FinishReason, OutputEvent, OutputReceiver, TokenOut};
use super::sampling::SamplingParams;
use super::*;
use crate::backend::fake::{FakeBackend, FakeConfig, FakeScript};
use crate::backend::{Backend, Caps};
use crate::handover::{MoverEvent, PeerAddress, PullId, PullJob};
use crate::kv::pool::BlockCounts;
use crate::kv::region::{EpochPage, KvRegion};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// One engine on a fake.
struct Rig {
    handle: EngineHandle,
    script: Arc<FakeScript>,
    kv: KvRegion,
    epochs: EpochPage,
    incarnation: Incarnation,
    jobs: Arc<Mutex<Jobs>>,
}

/// What the engine asked of its mover.
#[derive(Default)]
struct Jobs {
    posted: Vec<PullJob>,
    cancelled: Vec<PullId>,
    is_full: bool,
}

struct TestPuller(Arc<Mutex<Jobs>>);

impl Puller for TestPuller {
    fn pull(&mut self, job: PullJob) -> Result<(), PullJob> {
        let mut jobs = self.0.lock().unwrap();
        if jobs.is_full {
            return Err(job);
        }
        jobs.posted.push(job);
        Ok(())
    }

    fn cancel(&mut self, id: PullId) {
        self.0.lock().unwrap().cancelled.push(id);
    }
}

impl Rig {
    fn new(config: EngineConfig, fake: FakeConfig) -> Self {
        let jobs = Arc::<Mutex<Jobs>>::default();
        let serve = PeerAddress { agent: "fake/serve".to_owned(), metadata: vec![1, 2, 3] };
        let puller = Box::new(TestPuller(Arc::clone(&jobs)));
        Self::start(config, fake, jobs, |_, _, _| (puller, serve))
    }

    /// With the mover that `connect` makes for the engine's pool and epochs.
    fn start(
        config: EngineConfig,
        fake: FakeConfig,
        jobs: Arc<Mutex<Jobs>>,
        connect: impl FnOnce(&EngineHandle, &KvRegion, &EpochPage) -> (Box<dyn Puller>, PeerAddress),
    ) -> Self {
        let backend = FakeBackend::new(fake).unwrap();
        let (handle, seat) = engine(config);
        let script = backend.script();
        let kv = backend.pool().clone();
        let epochs = EpochPage::new(kv.layout.blocks as usize).unwrap();
        let incarnation = Incarnation::random();
        let (puller, serve) = connect(&handle, &kv, &epochs);
        seat.start(Parts {
            backend: Box::new(backend),
            epochs: epochs.clone(),
            serve,
            incarnation,
            puller,
        })
        .unwrap();
        Self { handle, script, kv, epochs, incarnation, jobs }
    }

    fn with_lag(lag: u32) -> Self {
        Self::new(EngineConfig::default(), fake_with(lag))
    }

    fn submit(&self, ask: Ask) -> OutputReceiver {
        let (sender, receiver) = output::channel(ask.max_tokens as usize + 8);
        self.handle.submit(ask.submission(sender)).unwrap();
        receiver
    }

    fn answer(&self, ask: Ask) -> Answer {
        Answer::of(self.submit(ask))
    }

    fn blocks(&self) -> BlockCounts {
        self.handle.status().blocks
    }

    /// Waits until nothing is held by anybody.
    fn until_free(&self) {
        let blocks = self.kv.layout.blocks;
        let all_free = BlockCounts { free: blocks, ..BlockCounts::default() };
        eventually(|| {
            let status = self.handle.status();
            status.is_alive && status.blocks == all_free && status.running + status.waiting == 0
        });
    }

    /// The record of a finished context pass.
    fn record(&self, request: u64, prompt: &[u32], leased: LeasedBlocks) -> Box<Record> {
        Box::new(Record {
            worker: "fake".parse::<WorkerId>().unwrap(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: self.incarnation,
            request: DisaggRequestId(request),
            prompt_hash: [0; 32],
            fingerprint: [0; 32],
            prompt_tokens: prompt.len() as u32,
            lease: Some(leased),
        })
    }

    /// Takes the next job the engine posted.
    fn next_job(&self) -> PullJob {
        eventually(|| !self.jobs.lock().unwrap().posted.is_empty());
        self.jobs.lock().unwrap().posted.remove(0)
    }

    /// Plays the mover: copies a job's bytes from `source` and says how it went.
    fn carry(&self, job: &PullJob, source: &Rig) {
        let mut bytes = 0;
        let mut descriptors = 0;
        for (rank, runs) in &job.ranks {
            for run in runs {
                let mut copy = vec![0; run.len as usize];
                source.kv.region.read((run.source - rank.pool_base) as usize, &mut copy).unwrap();
                let base = self.kv.region.base();
                self.kv.region.write((run.target - base) as usize, &copy).unwrap();
                bytes += run.len;
                descriptors += 1;
            }
            let slot = (rank.epoch_address - source.epochs.address(0)) as usize / 8;
            if source.epochs.value(slot) != rank.epoch {
                return self.fail_pull(job.id, ErrorCode::KvLeaseGone, true);
            }
        }
        source.tell(MoverEvent::LeaseRead(job.lease));
        let elapsed = Duration::from_millis(1);
        self.tell(MoverEvent::Pulled { id: job.id, bytes, descriptors, elapsed });
    }

    fn fail_pull(&self, id: PullId, code: ErrorCode, settled: bool) {
        self.tell(MoverEvent::PullFailed { id, code, message: "as told".to_owned(), settled });
    }

    fn tell(&self, event: MoverEvent) {
        self.handle.mover_sink()(event);
    }

    fn ended(&self) -> EngineEnd {
        block_on(self.handle.ended())
    }
}

/// A request in short.
#[derive(Clone)]
struct Ask {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    max_tokens: u32,
    stop_ids: Vec<u32>,
    phase: Part,
}

#[derive(Clone)]
enum Part {
    Whole,
    Context(u64),
    Generation(u64, Vec<u32>, Box<Record>),
}

impl Ask {
    fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Self {
        let sampling = SamplingParams::greedy();
        Self { prompt, sampling, max_tokens, stop_ids: Vec::new(), phase: Part::Whole }
    }

    /// Everything on, by seed; an even seed is greedy.
    fn varied(seed: u64, prompt_len: usize, max_tokens: u32) -> Self {
        let prompt = prompt(seed as u32, prompt_len);
        let sampling = SamplingParams {
            temperature: if seed.is_multiple_of(2) { 0.0 } else { 0.8 },
            top_p: 0.9,
            seed,
            frequency_penalty: 0.2,
            presence_penalty: 0.1,
            repetition_penalty: 1.1,
            logprobs: seed.is_multiple_of(3).then_some(2),
            ..SamplingParams::default()
        };
        Self { sampling, ..Self::greedy(prompt, max_tokens) }
    }

    fn context(self, request: u64) -> Self {
        Self { phase: Part::Context(request), ..self }
    }

    fn generation(self, request: u64, first: Vec<u32>, record: Box<Record>) -> Self {
        Self { phase: Part::Generation(request, first, record), ..self }
    }

    fn submission(self, output: OutputSender) -> Submission {
        let Self { prompt, sampling, max_tokens, stop_ids, phase } = self;
        let phase = match phase {
            Part::Whole => Phase::Whole,
            Part::Context(request) => Phase::Context(DisaggRequestId(request)),
            Part::Generation(request, first, record) => {
                Phase::Generation { request: DisaggRequestId(request), first, record }
            }
        };
        let stop = StopRule { max_tokens, stop_ids };
        Submission { prompt, salt: None, sampling, stop, phase, output }
    }
}

/// Everything one request was told.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    starts: usize,
    tokens: Vec<TokenOut>,
    leased: Option<Option<LeasedBlocks>>,
    finish: Option<FinishReason>,
    failure: Option<ErrorCode>,
}

impl Answer {
    fn of(mut receiver: OutputReceiver) -> Self {
        let mut answer = Self::default();
        while let Some(event) = block_on(receiver.next()) {
            match event {
                OutputEvent::Started { .. } => answer.starts += 1,
                OutputEvent::Token(token) => answer.tokens.push(token),
                OutputEvent::ContextDone(leased) => answer.leased = Some(leased),
                OutputEvent::Finished(reason) => answer.finish = Some(reason),
                OutputEvent::Failed { code, message: _ } => answer.failure = Some(code),
            }
        }
        answer
    }

    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// The lease of a context pass that went well.
    fn lease(&self) -> LeasedBlocks {
        assert_eq!((self.starts, self.tokens.len(), self.failure), (1, 1, None), "{self:?}");
        self.leased.clone().flatten().unwrap()
    }
}

fn fake_with(lag: u32) -> FakeConfig {
    let fake = FakeConfig::default();
    FakeConfig { caps: Caps { lag, ..fake.caps }, ..fake }
}

fn small_pool(blocks: u32, lag: u32) -> FakeConfig {
    FakeConfig { blocks, ..fake_with(lag) }
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|position| (seed * 13 + position * 5 + position * position) % 97).collect()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }).unwrap()
}

/// Waits until `holds`, for as long as a test may take.
fn eventually(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it did not come true");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}
