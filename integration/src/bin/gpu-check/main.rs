//! `gpu-check`: whether the CUDA back end computes right numbers on the device at hand, and how fast it is.
//!
//! Exit codes: 0 all right, 1 something is wrong, 3 there is no device.
#![expect(clippy::print_stdout, reason = "a report on the terminal is what it is for")]

mod agreement;
mod models;
mod reference;
mod speed;
mod steps;
mod transfer;
mod workers;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use baton_workerd::backend::cpu::{self, CpuBackend, CpuOptions, Simd};
use baton_workerd::backend::cuda::sys::driver::Features;
use baton_workerd::backend::cuda::sys::launch::Kernels;
use baton_workerd::backend::cuda::sys::{Gpu, GpuError, driver};
use baton_workerd::backend::cuda::{CudaBackend, CudaOptions, PoolSize};
use baton_workerd::handover::nixl::prepare_environment;
use clap::Parser;

use self::agreement::Lane;

/// Largest difference of a log-probability to the CPU's that counts as equal: activations are rounded to bf16 here and
/// not there.
const BOUND: f32 = 0.25;
/// Largest root of the mean square of such differences.
const TYPICAL_BOUND: f64 = 0.04;

/// Checks the CUDA back end on the device at hand.
#[derive(Debug, Parser)]
struct Options {
    /// Which device.
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// Parts to run: numbers, reference, transfer, workers, kernels, layer, steps.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "numbers,reference,transfer,workers,kernels,steps"
    )]
    parts: Vec<String>,
    /// Sequences of the largest decode step that is timed.
    #[arg(long, default_value_t = 256)]
    sequences: u32,
    /// Of the random models.
    #[arg(long)]
    seed: Option<u64>,
    /// Without the vendor's matrix library.
    #[arg(long)]
    no_blas: bool,
    /// Be the process that another pulls from (for `transfer` itself).
    #[arg(long, hide = true)]
    owner: Option<u64>,
    /// Each kernel starts when the one before it has ended.
    #[arg(long)]
    no_overlap: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Err(error) = prepare_environment(&[]) {
        println!("gpu-check: {error}");
        return ExitCode::FAILURE;
    }
    let features = Features { blas: !options.no_blas, overlap: !options.no_overlap };
    match driver::open(options.device, features) {
        Err(GpuError::Unavailable(reason)) => {
            println!("gpu-check: no device: {reason}");
            ExitCode::from(3)
        }
        Err(error) => {
            println!("gpu-check: {error}");
            ExitCode::FAILURE
        }
        Ok(gpu) => match check(&options, &gpu) {
            Ok(0) => ExitCode::SUCCESS,
            Ok(wrong) => {
                println!("gpu-check: {wrong} checks FAILED");
                ExitCode::FAILURE
            }
            Err(error) => {
                println!("gpu-check: FAILED: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn check(options: &Options, gpu: &Arc<dyn Gpu>) -> Result<usize> {
    if let Some(seed) = options.owner {
        return transfer::own(gpu, seed).map(|()| 0);
    }
    let facts = gpu.facts();
    println!("{facts:?}, cuBLASLt: {}", gpu.has_blas());
    let wants = |part: &str| options.parts.iter().any(|wanted| wanted == part);
    let mut wrong = 0;
    if wants("numbers") {
        wrong += numbers(options, gpu)?;
    }
    if wants("reference") {
        match reference::numbers(gpu) {
            Err(error) => {
                println!("WRONG reference: {error:#}");
                wrong += 1;
            }
            Ok(None) => println!("skipped: reference (python3 has no torch and transformers)"),
            Ok(Some(all)) => {
                wrong += all.into_iter().map(|(name, one)| report(&name, one)).sum::<usize>();
            }
        }
    }
    let kernels = Kernels::new(gpu);
    let ceilings = speed::ceilings(gpu, &kernels)?;
    if wants("transfer") {
        match transfer::pull(gpu, options.device, ceilings.copy) {
            Ok(lines) => lines.iter().for_each(|line| println!("{line}")),
            Err(error) => {
                println!("WRONG transfer: {error:#}");
                wrong += 1;
            }
        }
    }
    if wants("workers") {
        match workers::check(options.device) {
            Ok((lines, more)) => {
                lines.iter().for_each(|line| println!("{line}"));
                wrong += more;
            }
            Err(error) => {
                println!("WRONG workers: {error:#}");
                wrong += 1;
            }
        }
    }
    if wants("kernels") {
        println!(
            "ceilings: copy {:.2} TB/s, products {:.0} TFLOP/s",
            ceilings.copy / 1e12,
            ceilings.matrix / 1e12
        );
        for m in [1, 8, 16, 64, 256, 8192] {
            speed::products(gpu, &kernels, m)?.iter().for_each(|line| println!("{line}"));
        }
        for m in [1, 8192] {
            speed::rows(gpu, &kernels, m)?.iter().for_each(|line| println!("{line}"));
        }
        speed::attention(gpu, &kernels)?.iter().for_each(|line| println!("{line}"));
    }
    if wants("layer") {
        for batch in [1, 8] {
            speed::layer(gpu, &kernels, batch)?.iter().for_each(|line| println!("{line}"));
        }
    }
    if wants("steps") {
        time_steps(options, gpu)?;
        match reference::speed() {
            Ok(Some(report)) => print!("transformers' own generation, seconds: {report}"),
            Ok(None) => println!("skipped: transformers' speed (python3 lacks a package)"),
            Err(error) => println!("skipped: transformers' speed: {error:#}"),
        }
    }
    Ok(wrong)
}

fn numbers(options: &Options, gpu: &Arc<dyn Gpu>) -> Result<usize> {
    let seed = options.seed.unwrap_or_else(rand::random);
    println!("numbers: seed {seed}");
    let mut wrong = 0;
    for small in models::SMALL {
        let model = small.model(seed);
        let lane = |len: u32, salt: u32| Lane {
            prompt: (0..len).map(|at| (at * at * 31 + at * 7 + salt) % small.vocab).collect(),
            forced: Vec::new(),
        };
        let mut lanes: Vec<Lane> = [1, 5, 31, 32, 33, 64, 127, 128, 129, 300, 701]
            .iter()
            .zip(1..)
            .map(|(len, salt)| lane(*len, salt))
            .collect();
        let blocks = 11 * 40;
        let on_cpu = |simd| {
            let options = CpuOptions {
                threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                max_sequences: 32,
                max_batch_tokens: 512,
                blocks,
                block_tokens: 32,
                simd,
            };
            CpuBackend::new(&model, &options)
        };
        let mut cpu = on_cpu(Simd::Auto)?;
        let by_cpu = agreement::run(&mut cpu, &lanes, 512).context("on the CPU")?;
        for tier in cpu::kernels::Kernels::tiers() {
            let mut other = on_cpu(Simd::Named(tier.name))?;
            let is_same = agreement::run(&mut other, &lanes[..7], 512)? == by_cpu[..7];
            let verdict = if is_same { "ok   " } else { "WRONG" };
            println!("{verdict} {}, CPU kernels `{}`: the same bits", small.name, tier.name);
            wrong += usize::from(!is_same);
        }
        for (lane, seen) in lanes.iter_mut().zip(&by_cpu) {
            lane.forced = seen.iter().map(|seen| seen.token).collect();
        }
        for (chunk, block_tokens, graphs) in
            [(4096, 32, false), (4096, 32, true), (70, 32, true), (3, 16, true)]
        {
            let options = CudaOptions {
                max_sequences: 32,
                max_batch_tokens: 2048,
                max_len: 2048,
                pool: PoolSize::Blocks(blocks * 32 / block_tokens),
                block_tokens,
                graphs,
            };
            let mut backend =
                CudaBackend::load(gpu, &mut &model, &options).context("on the GPU")?;
            let name = format!(
                "{}, chunks of {chunk}, blocks of {block_tokens}, graphs {graphs}",
                small.name
            );
            let all = agreement::run(&mut backend, &lanes, chunk).context("side by side");
            wrong += report(&name, all.map(|seen| agreement::compare(&by_cpu, &seen)));
            let one = agreement::run(&mut backend, &lanes[9..10], chunk).context("alone");
            wrong += report(
                &format!("{name}, alone"),
                one.map(|seen| agreement::compare(&by_cpu[9..10], &seen)),
            );
            let (prompt, mut tokens) = (&lanes[6].prompt, Vec::new());
            for _ in 0..2 {
                tokens.push(agreement::ahead(&mut backend, prompt, 40)?);
            }
            let is_same = tokens[0] == tokens[1];
            let shared = tokens[0].iter().zip(&lanes[6].forced).take_while(|(a, b)| a == b).count();
            println!(
                "  steps ahead: twice the same {is_same}, {shared} of {} as on the CPU",
                lanes[6].forced.len()
            );
            wrong += usize::from(!is_same);
        }
    }
    Ok(wrong)
}

fn report(name: &str, difference: Result<agreement::Difference>) -> usize {
    match difference {
        Ok(difference) => {
            let is_right = difference.logprob < BOUND
                && difference.typical < TYPICAL_BOUND
                && difference.compared > 0;
            let verdict = if is_right { "ok   " } else { "WRONG" };
            println!(
                "{verdict} {name}: {:.4} nats apart at most, {:.4} typically, {} of {} tokens differ",
                difference.logprob, difference.typical, difference.tokens, difference.compared
            );
            usize::from(!is_right)
        }
        Err(error) => {
            println!("WRONG {name}: {error:#}");
            1
        }
    }
}

fn time_steps(options: &Options, gpu: &Arc<dyn Gpu>) -> Result<()> {
    println!("8B shape, bf16, random weights:");
    let mut steps = steps::Steps::new(gpu, 32, options.sequences, 2048)?;
    for batch in [1, 8, 64, 256].into_iter().filter(|batch| *batch <= options.sequences) {
        let seconds = steps.decode(batch, 60)?;
        let bytes = 15.01e9 + f64::from(batch) * 2048.0 * 131_072.0;
        println!(
            "decode B={batch:<3} 2k  {:7.3} ms a step, {:7.0} tok/s, {:5.2} TB/s",
            seconds * 1e3,
            f64::from(batch) / seconds,
            bytes / seconds / 1e12
        );
    }
    for tokens in [2048, 8192] {
        let seconds = steps.prefill(tokens)?;
        let n = f64::from(tokens);
        let work = 2.0 * 6.98e9 * n + 32.0 * 2.0 * 4096.0 * n * n;
        println!(
            "prefill {tokens}  {:7.1} ms, {:6.1} TFLOP/s",
            seconds * 1e3,
            work / seconds / 1e12
        );
    }
    Ok(())
}
