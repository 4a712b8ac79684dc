//! Whatever call or work fails, the error says so, and everything is given back.

use super::super::emulated::{Alive, Emulator, Fault};
use super::*;

const TOLD: &str = "made to fail";

fn small() -> CudaOptions {
    CudaOptions { max_sequences: 2, max_batch_tokens: 32, max_len: 64, ..options() }
}

fn load(emulator: &Arc<Emulator>, model: &Model) -> Result<CudaBackend, CudaError> {
    let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(emulator);
    CudaBackend::load(&gpu, &mut &*model, &small())
}

/// A prefill, and two decodes that are both submitted before the first is collected.
fn use_it(backend: &mut CudaBackend) -> Result<(), BackendError> {
    let seq = |start, input, blocks| StepSeq {
        slot: Slot(0),
        start,
        input,
        table: 0..blocks,
        sample: true,
    };
    let mut plan = StepPlan {
        opens: vec![SlotOpen {
            slot: Slot(0),
            sampling: SamplingParams { presence_penalty: 0.5, ..sampling() },
            history: vec![1, 2, 3],
            prompt_len: 3,
        }],
        seqs: vec![seq(0, Input::Tokens(0..3), 1)],
        tokens: vec![1, 2, 3],
        tables: vec![BlockIndex(4)],
    };
    let mut out = StepOut::default();
    let ticket = backend.submit(&plan)?;
    backend.collect(ticket, &mut out)?;
    backend.copy_blocks(&[(BlockIndex(4), BlockIndex(7))])?;
    plan.clear();
    plan.tables.push(BlockIndex(7));
    let mut tickets = Vec::new();
    for start in [3, 4] {
        plan.seqs = vec![seq(start, Input::Last, 1)];
        tickets.push(backend.submit(&plan)?);
    }
    tickets.into_iter().try_for_each(|ticket| backend.collect(ticket, &mut out))
}

#[test]
fn a_failure_while_it_starts_is_told_and_leaves_nothing_behind() {
    let model = tiny_model(&SHAPES[1]);
    for fault in [Fault::Call as fn(u64) -> Fault, Fault::Work] {
        let (mut number, mut told) = (0, 0);
        loop {
            let emulator = Emulator::new(256 << 20, 3, false);
            emulator.set_fault(Some(fault(number)));
            let loaded = load(&emulator, &model);
            let is_over = emulator.has_fault();
            match loaded {
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(TOLD), "{:?}: {error}", fault(number));
                    told += 1;
                }
                Ok(mut backend) if is_over => {
                    emulator.set_fault(None);
                    use_it(&mut backend).unwrap();
                }
                // What fails while something is given back is nobody's concern.
                Ok(backend) => drop(backend),
            }
            assert_eq!(emulator.alive(), Alive::default(), "{:?}", fault(number));
            if is_over {
                break;
            }
            number += 1;
        }
        assert!(told > 50 && told + 5 > number, "{told} of {number} failures are told");
    }
}

#[test]
fn a_failure_of_a_step_is_told_and_everything_is_given_back() {
    let model = tiny_model(&SHAPES[2]);
    for fault in [Fault::Call as fn(u64) -> Fault, Fault::Work] {
        for number in 0.. {
            let emulator = Emulator::new(256 << 20, 3, false);
            let mut backend = load(&emulator, &model).unwrap();
            emulator.set_fault(Some(fault(number)));
            let used = use_it(&mut backend);
            let is_over = emulator.has_fault();
            if is_over {
                used.unwrap();
            } else {
                let error = used.unwrap_err();
                let is_told = matches!(&error, BackendError::Device(told) if told.contains(TOLD));
                assert!(is_told, "{:?}: {error:?}", fault(number));
            }
            drop(backend);
            assert_eq!(emulator.alive(), Alive::default(), "{:?}", fault(number));
            if is_over {
                assert!(number > 10);
                break;
            }
        }
    }
}

#[test]
fn a_lost_device_fails_every_step_from_then_on() {
    let model = tiny_model(&SHAPES[0]);
    let emulator = Emulator::new(256 << 20, 3, false);
    let mut backend = load(&emulator, &model).unwrap();
    emulator.set_fault(Some(Fault::Work(3)));
    for _ in 0..2 {
        let error = use_it(&mut backend).unwrap_err();
        assert!(matches!(&error, BackendError::Device(told) if told.contains(TOLD)), "{error:?}");
    }
}

#[test]
fn a_device_that_is_too_small_is_told_with_sizes() {
    let model = tiny_model(&SHAPES[0]);
    for memory in [10_000, 300_000, 1_000_000] {
        let emulator = Emulator::new(memory, 3, false);
        let error = load(&emulator, &model).unwrap_err();
        let CudaError::Gpu(GpuError::OutOfMemory { what, bytes, free, total }) = &error else {
            panic!("{error:?}");
        };
        assert!(!what.is_empty() && bytes > free && *total == memory, "{error}");
        assert_eq!(emulator.alive(), Alive::default());
    }
}

#[test]
fn a_share_of_what_is_free_becomes_blocks() {
    let model = tiny_model(&SHAPES[0]);
    let emulator = Emulator::new(8 << 20, 3, false);
    let options =
        CudaOptions { pool: PoolSize::Share { fraction: 0.5, most: u32::MAX }, ..small() };
    let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
    let backend = cuda(&gpu, &model, &options);
    let pool = backend.pool().layout.bytes();
    let left = backend.gpu().free_memory().unwrap();
    // What was free is the pool and what is left, but for pinned memory's and graphs' sake nothing.
    let block = backend.pool().layout.block_bytes();
    assert!(pool.abs_diff((pool + left) / 2) <= block + (64 << 10), "{pool} of {}", pool + left);
    let options =
        CudaOptions { pool: PoolSize::Share { fraction: 1e-9, most: u32::MAX }, ..small() };
    let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
    let error = CudaBackend::load(&gpu, &mut &model, &options).unwrap_err().to_string();
    assert!(error.contains("one block of the pool"), "{error}");
}

#[test]
fn blocks_that_are_no_power_of_two_are_refused() {
    let model = tiny_model(&SHAPES[0]);
    let emulator = Emulator::new(8 << 20, 3, false);
    let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
    let options = CudaOptions { block_tokens: 12, ..small() };
    let error = CudaBackend::load(&gpu, &mut &model, &options).unwrap_err().to_string();
    assert!(error.contains("12 tokens a block"), "{error}");
}
