//! Blocks from one process's pool to another's on one device, over NIXL: whether all bytes arrive, and how fast.
//!
//! The process that owns the blocks is this program again, started with `--owner`; it says on its standard output how it
//! is reached, and ends when its standard input does.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use baton_shared::kv::layout::CopyRun;
use baton_workerd::backend::cuda::pool::PoolMemory;
use baton_workerd::backend::cuda::sys::Gpu;
use baton_workerd::handover::nixl::{NixlLibrary, NixlSettings, NixlTransport};
use baton_workerd::handover::{Ends, Op, PeerAddress, PeerId, TransferState, Transport};
use baton_workerd::kv::region::Region;
use serde::{Deserialize, Serialize};

/// Bytes of either pool.
const BYTES: usize = 1 << 30;
/// After this a transfer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// How an owner is reached.
#[derive(Serialize, Deserialize)]
struct Owner {
    base: u64,
    agent: String,
    metadata: Vec<u8>,
    seed: u64,
}

/// What stands at an offset (a multiple of 8) of an owner's pool.
fn word(seed: u64, offset: usize) -> u64 {
    (seed ^ offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ seed
}

fn open(gpu: &Arc<dyn Gpu>, name: &str) -> Result<(NixlTransport, Region)> {
    let library = NixlLibrary::load(None)?;
    let region = Region::device(Arc::new(PoolMemory::new(gpu, BYTES)?));
    region.make_current().map_err(anyhow::Error::msg)?;
    let name = format!("{name}-{}", std::process::id());
    let mut transport = NixlTransport::open(&library, &NixlSettings::default(), name)?;
    transport.register(&region)?;
    Ok((transport, region))
}

/// The other process.
pub fn own(gpu: &Arc<dyn Gpu>, seed: u64) -> Result<()> {
    let (mut transport, region) = open(gpu, "owner")?;
    let piece = 32 << 20;
    for at in (0..BYTES).step_by(piece) {
        let words = (at..at + piece).step_by(8);
        let bytes: Vec<u8> = words.flat_map(|at| word(seed, at).to_le_bytes()).collect();
        region.write(at, &bytes).map_err(anyhow::Error::msg)?;
    }
    let PeerAddress { agent, metadata } = transport.address()?;
    println!("{}", serde_json::to_string(&Owner { base: region.base(), agent, metadata, seed })?);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pulls as one run, as blocks of an 8B-shaped pool that lie apart, and in smaller pieces. `copy` is the device's ceiling.
pub fn pull(gpu: &Arc<dyn Gpu>, device: u32, copy: f64) -> Result<Vec<String>> {
    let seed: u64 = rand::random();
    let mut child = Command::new(std::env::current_exe()?);
    child.args(["--owner", &seed.to_string(), "--device", &device.to_string()]);
    let mut child = Ended(child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let stdout = child.0.stdout.take().context("the owner's output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let owner: Owner = serde_json::from_str(&line).with_context(|| format!("the owner: {line}"))?;
    let (mut transport, region) = open(gpu, "reader")?;
    let address = PeerAddress { agent: owner.agent.clone(), metadata: owner.metadata.clone() };
    let peer = transport.connect(&address)?;
    let mut lines = Vec::new();
    for (name, piece) in [
        ("one run", BYTES),
        ("4 MiB apart", 4 << 20),
        ("2 MiB apart", 2 << 20),
        ("64 KiB apart", 64 << 10),
    ] {
        let pieces = BYTES / piece / if piece < BYTES { 2 } else { 1 };
        // Every other piece, from the end: no two runs can be made one.
        let run = |number: usize| {
            let at = if pieces == 1 { 0 } else { (2 * (pieces - 1 - number)) * piece };
            CopyRun {
                source: owner.base + at as u64,
                target: region.base() + at as u64,
                len: piece as u64,
            }
        };
        let runs: Vec<CopyRun> = (0..pieces).map(run).collect();
        let mut times = Vec::new();
        for _ in 0..5 {
            let begun = Instant::now();
            wait(&mut transport, peer, &region, &runs)?;
            times.push(begun.elapsed().as_secs_f64());
        }
        verify(&region, &owner, &runs)?;
        times.sort_by(f64::total_cmp);
        let (bytes, seconds) = ((pieces * piece) as f64, times[2]);
        lines.push(format!(
            "pull {name:14} {pieces:5} runs {:8.2} ms {:7.1} GB/s, {:3.0} % of a copy; first {:.2} ms",
            seconds * 1e3,
            bytes / seconds / 1e9,
            100.0 * 2.0 * bytes / seconds / copy,
            times[4] * 1e3
        ));
    }
    drop(child);
    Ok(lines)
}

fn wait(
    transport: &mut NixlTransport,
    peer: PeerId,
    region: &Region,
    runs: &[CopyRun],
) -> Result<()> {
    let ends = Ends { near: region.place(), far: region.place() };
    let id = transport.post(Op::Read, peer, ends, runs)?;
    let begun = Instant::now();
    loop {
        match transport.poll(id) {
            TransferState::Done => return Ok(()),
            TransferState::Failed(reason) => bail!("the transfer failed: {reason}"),
            TransferState::Running if begun.elapsed() > PATIENCE => bail!("the transfer hangs"),
            TransferState::Running => std::hint::spin_loop(),
        }
    }
}

/// The first, the last and some runs between them, byte by byte; then they are spoilt for the next check.
fn verify(region: &Region, owner: &Owner, runs: &[CopyRun]) -> Result<()> {
    let step = (runs.len() / 7).max(1);
    let is_looked_at = |number: usize| number.is_multiple_of(step) || number + 1 == runs.len();
    for (_, run) in runs.iter().enumerate().filter(|(number, _)| is_looked_at(*number)) {
        let at = (run.target - region.base()) as usize;
        let len = (run.len as usize).min(8 << 20);
        let mut bytes = vec![0; len];
        region.read(at, &mut bytes).map_err(anyhow::Error::msg)?;
        for (number, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let (got, wanted) = (u64::from_le_bytes(*bytes), word(owner.seed, at + 8 * number));
            ensure!(got == wanted, "byte {}: {got:x}, not {wanted:x}", at + 8 * number);
        }
        region.write(at, &vec![0xee; len]).map_err(anyhow::Error::msg)?;
    }
    Ok(())
}
