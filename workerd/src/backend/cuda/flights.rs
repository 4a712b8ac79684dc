//! Steps that were submitted and not collected: where each one's results arrive, in pinned memory that is used again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::forward::{Arena, MOST_ALTERNATIVES};
use super::sys::buffer::Pinned;
use super::sys::launch::CHOSEN_BYTES;
use super::sys::queue::Event;
use super::sys::{Gpu, GpuError};
use crate::backend::StepTicket;
use crate::engine::step::{Sampled, Slot, StepOut, StepPlan};

const PAIR: usize = 8;
const ROW: usize = MOST_ALTERNATIVES as usize * PAIR;

/// A step under way.
#[derive(Debug)]
pub struct Flight {
    /// Which.
    pub ticket: StepTicket,
    /// Whose tokens are sampled, and how many alternatives are told of each.
    wanted: Vec<(Slot, u32)>,
    /// Inputs, until the device has read them.
    pub inputs: Pinned,
    /// Chosen tokens, then alternatives.
    results: Pinned,
    done: Event,
}

/// All of them, oldest first, and the memory of those that have landed.
#[derive(Debug)]
pub struct Flights {
    gpu: Arc<dyn Gpu>,
    input_bytes: usize,
    result_bytes: usize,
    under_way: VecDeque<Flight>,
    spare: Vec<Flight>,
}

impl Flights {
    /// For steps of so many bytes of input and sequences.
    pub fn new(gpu: &Arc<dyn Gpu>, input_bytes: usize, sequences: u32) -> Self {
        Self {
            gpu: Arc::clone(gpu),
            input_bytes,
            result_bytes: sequences as usize * (CHOSEN_BYTES + ROW),
            under_way: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Memory for the next step.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn take(&mut self, ticket: StepTicket) -> Result<Flight, GpuError> {
        if let Some(flight) = self.spare.pop() {
            return Ok(Flight { ticket, ..flight });
        }
        Ok(Flight {
            ticket,
            wanted: Vec::new(),
            inputs: Pinned::new(&self.gpu, self.input_bytes)?,
            results: Pinned::new(&self.gpu, self.result_bytes)?,
            done: Event::new(&self.gpu)?,
        })
    }

    /// A step whose launches have been asked for takes off; `logprobs` says how many alternatives a slot tells.
    ///
    /// # Errors
    /// [`GpuError`]; it did not.
    pub fn depart(
        &mut self,
        mut flight: Flight,
        step: &StepPlan,
        arena: &Arena,
        logprobs: impl Fn(Slot) -> u32,
    ) -> Result<(), GpuError> {
        flight.wanted.clear();
        let sampled = step.seqs.iter().filter(|seq| seq.sample);
        flight.wanted.extend(sampled.map(|seq| (seq.slot, logprobs(seq.slot))));
        let count = flight.wanted.len();
        if count > 0 {
            flight.results.copy_from(0, arena.chosen.view().part(0, count * CHOSEN_BYTES))?;
        }
        if flight.wanted.iter().any(|(_, alternatives)| *alternatives > 0) {
            let all = arena.alternatives.view().part(0, count * ROW);
            flight.results.copy_from(count * CHOSEN_BYTES, all)?;
        }
        flight.done.record()?;
        self.under_way.push_back(flight);
        Ok(())
    }

    /// Waits for the oldest step and reads its results; `Err(oldest)` if that is not the one asked for.
    ///
    /// # Errors
    /// What the device says.
    pub fn land(
        &mut self,
        ticket: StepTicket,
        out: &mut StepOut,
    ) -> Result<Result<(), Option<StepTicket>>, GpuError> {
        let oldest = self.under_way.front().map(|flight| flight.ticket);
        if oldest != Some(ticket) {
            return Ok(Err(oldest));
        }
        let Some(flight) = self.under_way.pop_front() else { return Ok(Err(None)) };
        flight.done.wait()?;
        flight.read(out);
        self.spare.push(flight);
        Ok(Ok(()))
    }
}

impl Flight {
    fn read(&self, out: &mut StepOut) {
        out.clear();
        let bytes = self.results.bytes();
        let (chosen, alternatives) = bytes.split_at(self.wanted.len() * CHOSEN_BYTES);
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        for (number, (slot, wanted)) in self.wanted.iter().enumerate() {
            let one = &chosen[number * CHOSEN_BYTES..][..CHOSEN_BYTES];
            let from = out.top.len() as u32;
            for pair in 0..*wanted as usize {
                let at = number * ROW + pair * PAIR;
                let logprob = f32::from_bits(word(alternatives, at + 4));
                out.top.push((word(alternatives, at), logprob));
            }
            out.samples.push(Sampled {
                slot: *slot,
                token: word(one, 0),
                logprob: f32::from_bits(word(one, 4)),
                rank: word(one, 8),
                top: from..out.top.len() as u32,
            });
        }
    }
}
