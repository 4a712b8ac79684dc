//! What is fuzzed: each function takes the bytes of a file that somebody else wrote, and must come back.
//!
//! A panic (overflow checks and bounds checks are on) is a finding, and so is memory beyond [`bound`]: a header that
//! lies about sizes must not make a reader allocate for what is not there. `integration/tests/corpus.rs` replays the
//! committed corpus through the same functions in every run of the test suite.

pub mod router;

use std::path::{Path, PathBuf};

use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::backend::check;
use baton_workerd::model;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Shape of the Hugging Face folder that [`safetensors`] puts its input into: that of `corpus/safetensors/tiny*`.
const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": 2
}"#;

/// Most bytes that reading a file of `len` bytes may hold at one time: a metadata entry or a token is several times
/// as large in memory, and a tokenizer's expressions take some megabytes whatever the file says.
pub fn bound(len: usize) -> usize {
    (32 << 20) + 128 * len
}

/// Gives `bytes` to `target`, on the only thread that runs, and holds it to [`bound`].
///
/// # Panics
/// If it takes more, or panics itself.
pub fn checked(bytes: &[u8], target: impl FnOnce(&[u8])) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    target(bytes);
    let held = MEMORY.peak_usage().saturating_sub(before);
    assert!(held <= bound(bytes.len()), "{held} bytes held for a file of {}", bytes.len());
}

/// Header and metadata of a GGUF file, and the tokenizer they describe.
pub fn gguf_header(bytes: &[u8]) {
    if let Ok(header) = Gguf::parse(bytes)
        && let Ok(tokenizer) = Tokenizer::from_gguf(&header)
    {
        // What was accepted can be used.
        if let Ok(ids) = tokenizer.encode_prompt("Hé 12 <|im_end|>\n", true) {
            tokenizer.decode(&ids, false);
        }
    }
}

/// A whole GGUF model: settings, tensor table, weights.
pub fn gguf_model(bytes: &[u8], folder: &Folder) {
    load(&folder.write("model.gguf", bytes));
}

/// The tensors of a Hugging Face folder.
pub fn safetensors(bytes: &[u8], folder: &Folder) {
    folder.write("config.json", CONFIG.as_bytes());
    folder.write("model.safetensors", bytes);
    load(&folder.0);
}

fn load(path: &Path) {
    if let Ok(model) = model::load(path) {
        // Whether the back end takes it is its business; to find out must not fail either.
        let _ = check::model(&model);
    }
}

/// A folder for what readers open by path, removed with this.
pub struct Folder(PathBuf);

impl Folder {
    /// A new one among the temporary files.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("baton-fuzz-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        Self(folder)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a file can be written");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
