//! A layer of the KV pool as sequences see it, through their block tables. Elements are bf16 as stored.

use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::KvLayout;

use crate::kv::host_memory::HostMemory;

/// The pool, one layer of it, and the plan's block tables.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// The pool's memory.
    pub memory: &'a HostMemory,
    /// How it lies.
    pub layout: &'a KvLayout,
    /// Which layer.
    pub layer: u32,
    /// All block tables, back to back; checked against the pool.
    pub tables: &'a [BlockIndex],
}

/// What lies in the pool for a token and head.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// After its turn by position.
    Key = 0,
    /// As computed.
    Value = 1,
}

impl Cache<'_> {
    /// Writes a position's vector of a head; the block table begins at `table`.
    pub fn store(&self, table: usize, position: usize, head: usize, kind: Kind, vector: &[u16]) {
        let (offset, _) = self.place(table, position, head, kind);
        self.memory.write_elements(offset, vector);
    }

    /// Reads `tokens` positions from `first` on, a vector after another.
    pub fn load(
        &self,
        (table, first, tokens): (usize, usize, usize),
        head: usize,
        kind: Kind,
        stored: &mut [u16],
    ) {
        let size = self.layout.head_dim as usize;
        let mut done = 0;
        while done < tokens {
            let (offset, run) = self.place(table, first + done, head, kind);
            let run = run.min(tokens - done);
            self.memory.read_elements(offset, &mut stored[done * size..(done + run) * size]);
            done += run;
        }
    }

    /// Has the vectors from position `first` on fetched, as far as they lie in one block, `tokens` at most. What is more
    /// than 4 KiB at a time the processor may drop.
    pub fn prefetch(&self, (table, first, tokens): (usize, usize, usize), head: usize, kind: Kind) {
        let (offset, run) = self.place(table, first, head, kind);
        self.memory.prefetch(offset, run.min(tokens) * self.vector_bytes());
    }

    fn vector_bytes(&self) -> usize {
        self.layout.head_dim as usize * self.layout.dtype.bytes() as usize
    }

    /// Offset of a position's vector, and how many positions follow it directly, itself included.
    fn place(&self, table: usize, position: usize, head: usize, kind: Kind) -> (usize, usize) {
        let layout = self.layout;
        let tokens = layout.block_tokens as usize;
        let block = self.tables[table + position / tokens];
        let head = layout.heads.start + head as u32;
        let base = layout.offset(block, layout.layers.start + self.layer, head, kind as u32);
        (base as usize + position % tokens * self.vector_bytes(), tokens - position % tokens)
    }
}
