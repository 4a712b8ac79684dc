//! The kernels there are, how a launch is shaped, and how arguments are passed.

/// Threads of a block and blocks of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// A compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// As in its source.
    pub name: &'static str,
    /// Which of [`Kernel::all`].
    pub index: usize,
    /// Bytes of shared memory it is launched with at most.
    pub shared: u32,
}

/// A source and its kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// File in `kernels`, without ending.
    pub name: &'static str,
    /// What it compiled to, for compute capability 8.0 and above.
    pub ptx: &'static str,
    /// The same for exactly 9.0: kernels overlap with the one before.
    pub ptx_90a: &'static str,
    /// Its kernels and their shared memory.
    pub kernels: &'static [(&'static str, u32)],
}

macro_rules! source {
    ($name:literal, $($kernel:literal: $shared:expr),+ $(,)?) => {
        Source {
            name: $name,
            ptx: include_str!(concat!("../../../../kernels/ptx/", $name, ".compute_80.ptx")),
            ptx_90a: include_str!(concat!("../../../../kernels/ptx/", $name, ".compute_90a.ptx")),
            kernels: &[$(($kernel, $shared)),+],
        }
    };
}

const SMALL: u32 = 48 << 10;

/// Shared memory of decode attention: three stages of 16 keys and values for each of four warps, and what warps and
/// blocks tell each other.
pub const fn decode_shared(head_dim: u32) -> u32 {
    4 * 3 * 2 * 16 * head_dim * 2 + 4 * 16 * 8 + 16
}

/// All sources.
pub const SOURCES: [Source; 6] = [
    source!("rows", "embed": 0, "rms_norm": 128, "turn_and_store": 0, "swiglu": 0),
    source!(
        "skinny",
        "skinny_bf16_1": SMALL, "skinny_add_1": SMALL, "skinny_swiglu_1": SMALL, "skinny_f32_1": SMALL,
        "skinny_bf16_8": SMALL, "skinny_add_8": SMALL, "skinny_swiglu_8": SMALL, "skinny_f32_8": SMALL,
        "skinny_bf16_16": SMALL, "skinny_add_16": SMALL, "skinny_swiglu_16": SMALL, "skinny_f32_16": SMALL,
        "skinny_f8_bf16_1": SMALL, "skinny_f8_add_1": SMALL, "skinny_f8_swiglu_1": SMALL, "skinny_f8_f32_1": SMALL,
        "skinny_f8_bf16_8": SMALL, "skinny_f8_add_8": SMALL, "skinny_f8_swiglu_8": SMALL, "skinny_f8_f32_8": SMALL,
        "skinny_f8_bf16_16": SMALL, "skinny_f8_add_16": SMALL, "skinny_f8_swiglu_16": SMALL, "skinny_f8_f32_16": SMALL,
        "widen": 0,
    ),
    source!("gemm", "gemm_bf16": 65536, "gemm_add": 65536, "gemm_swiglu": 65536, "gemm_f32": 65536),
    source!(
        "decode",
        "decode_32": decode_shared(32), "decode_64": decode_shared(64), "decode_128": decode_shared(128),
    ),
    source!("prefill", "prefill_32": 384 * 64, "prefill_64": 384 * 128, "prefill_128": 384 * 256),
    source!("sample", "open_slots": 0, "sample": SMALL),
];

impl Kernel {
    /// The kernel of that name.
    ///
    /// # Panics
    /// If there is none: a bug.
    pub fn named(name: &str) -> Self {
        Self::all().find(|kernel| kernel.name == name).expect("the name is of a kernel")
    }

    /// All kernels, by index.
    pub fn all() -> impl Iterator<Item = Self> {
        let kernels = SOURCES.iter().flat_map(|source| source.kernels);
        kernels.enumerate().map(|(index, &(name, shared))| Self { name, index, shared })
    }
}

/// Values of a kernel's arguments, in order.
#[derive(Clone, Debug, Default)]
pub struct Args {
    words: [u64; 32],
    used: usize,
    /// Where each argument begins.
    starts: [usize; 20],
    count: usize,
}

impl Args {
    fn push(mut self, words: &[u64]) -> Self {
        self.starts[self.count] = self.used;
        self.words[self.used..][..words.len()].copy_from_slice(words);
        self.count += 1;
        self.used += words.len();
        self
    }

    /// An address or another 64-bit number.
    pub fn u64(self, value: u64) -> Self {
        self.push(&[value])
    }

    /// A 32-bit number.
    pub fn u32(self, value: u32) -> Self {
        self.push(&[u64::from(value)])
    }

    /// A float.
    pub fn f32(self, value: f32) -> Self {
        self.push(&[u64::from(value.to_bits())])
    }

    /// A structure, as words in memory order.
    pub fn words(self, words: &[u64]) -> Self {
        self.push(words)
    }

    /// A pointer to each value, for as long as `self` stays where it is.
    pub fn pointers(&self) -> ([*mut std::ffi::c_void; 20], usize) {
        let mut pointers = [std::ptr::null_mut(); 20];
        for (pointer, start) in pointers.iter_mut().zip(&self.starts[..self.count]) {
            *pointer = std::ptr::from_ref(&self.words[*start]).cast_mut().cast();
        }
        (pointers, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_in_its_ptx_once_and_the_ptx_has_no_other() {
        for source in SOURCES {
            let mut names: Vec<&str> = source.kernels.iter().map(|(name, _)| *name).collect();
            names.sort_unstable();
            for ptx in [source.ptx, source.ptx_90a] {
                let entries = ptx.lines();
                let entries =
                    entries.filter_map(|line| line.trim().strip_prefix(".visible .entry "));
                let mut found: Vec<&str> = entries.map(|rest| rest.trim_end_matches('(')).collect();
                found.sort_unstable();
                assert_eq!(found, names, "{}", source.name);
            }
        }
    }

    #[test]
    fn arguments_are_found_where_their_pointers_say() {
        let args = Args::default().u32(7).words(&[1, 2, 3]).f32(1.5).u64(9);
        let (pointers, count) = args.pointers();
        assert_eq!(count, 4);
        let base = pointers[0] as usize;
        let offsets = pointers[..4].iter().map(|pointer| *pointer as usize - base);
        assert_eq!(offsets.collect::<Vec<_>>(), [0, 8, 32, 40]);
    }
}
