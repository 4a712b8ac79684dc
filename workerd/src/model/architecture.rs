//! The architectures that can be run: what each format calls them, and what they have beside a plain Llama.

/// One Llama-like block with switches; see [`super::Layer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and what has its shape: TinyLlama, SmolLM2, Mistral.
    Llama,
    /// Queries, keys and values have a bias.
    Qwen2,
    /// Heads of queries and keys are normalised before RoPE.
    Qwen3,
}

/// `architectures` of a `config.json` that can be run.
const CLASSES: [(&str, Architecture); 4] = [
    ("LlamaForCausalLM", Architecture::Llama),
    ("MistralForCausalLM", Architecture::Llama),
    ("Qwen2ForCausalLM", Architecture::Qwen2),
    ("Qwen3ForCausalLM", Architecture::Qwen3),
];

impl Architecture {
    const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// As GGUF's `general.architecture` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Of a GGUF file. `None`: not supported.
    pub fn of_gguf(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// Of a `config.json`. `None`: not supported.
    pub fn of_class(class: &str) -> Option<Self> {
        CLASSES.into_iter().find(|(name, _)| *name == class).map(|(_, architecture)| architecture)
    }

    /// What GGUF files may be, for an error.
    pub fn gguf_names() -> String {
        Self::ALL.map(|architecture| format!("`{}`", architecture.name())).join(", ")
    }

    /// What `config.json` may name, for an error.
    pub fn classes() -> String {
        CLASSES.map(|(class, _)| format!("`{class}`")).join(", ")
    }

    /// Whether queries, keys and values have a bias.
    pub fn has_qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether heads of queries and keys are normalised.
    pub fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }

    /// Whether GGUF files keep the rows of Q and K as interleaved pairs.
    pub fn has_gguf_pairs(self) -> bool {
        self == Self::Llama
    }
}
