//! What makes two workers' caches the same: SHA-256 over everything that decides a key's and a value's bits, except
//! how weights are stored. Equal fingerprints promise that blocks of one worker are good on the other. The longest
//! sequence a worker allows is not in it; weight precision is, unless both sides set one `model_revision`.

use sha2::{Digest, Sha256};

use super::layout::KvDtype;

/// Shape and constants of a model, as both sides must have them. Floats count by their bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture<'a> {
    /// GGUF's `llama` or Hugging Face's `LlamaForCausalLM`: both count as the same.
    pub name: &'a str,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Ids are `0..vocab`.
    pub vocab: u32,
    /// RoPE base.
    pub rope_theta: f32,
    /// What the frequency of each pair of a head is divided by; empty = 1.
    pub rope_factors: &'a [f32],
    /// RMSNorm epsilon.
    pub rms_eps: f32,
}

/// Which weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revision<'a> {
    /// `model_revision` of the configuration: the operator says what is the same.
    Configured(&'a str),
    /// A hash of the tensors as stored.
    Content([u8; 32]),
}

/// The fingerprint. `tokenizer` is a hash over id → token bytes and the ids that end a text.
pub fn fingerprint(
    architecture: &Architecture<'_>,
    tokenizer: [u8; 32],
    dtype: KvDtype,
    revision: Revision<'_>,
) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"baton/fingerprint/1");
    piece(&mut hash, family(architecture.name).as_bytes());
    for number in [
        architecture.layers,
        architecture.hidden,
        architecture.ffn,
        architecture.heads,
        architecture.kv_heads,
        architecture.head_dim,
        architecture.vocab,
        architecture.rope_theta.to_bits(),
        architecture.rms_eps.to_bits(),
    ] {
        hash.update(number.to_le_bytes());
    }
    // Files of one model differ in the last digits, as they compute them in f32 or f64.
    let rounded = |factor: &f32| (f64::from(*factor) * 1024.0).round() as u64;
    if architecture.rope_factors.iter().any(|factor| rounded(factor) != 1024) {
        piece(&mut hash, b"rope factors");
        for factor in architecture.rope_factors {
            hash.update(rounded(factor).to_le_bytes());
        }
    }
    hash.update(tokenizer);
    piece(&mut hash, dtype.name().as_bytes());
    match revision {
        Revision::Configured(name) => {
            hash.update([1]);
            piece(&mut hash, name.as_bytes());
        }
        Revision::Content(content) => {
            hash.update([2]);
            hash.update(content);
        }
    }
    hash.finalize().into()
}

/// One name for GGUF's and Hugging Face's.
fn family(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    name.strip_suffix("forcausallm").map_or_else(|| name.clone(), str::to_owned)
}

fn piece(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Architecture<'static> = Architecture {
        name: "llama",
        layers: 30,
        hidden: 576,
        ffn: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49152,
        rope_theta: 100_000.0,
        rope_factors: &[],
        rms_eps: 1e-5,
    };

    fn of(architecture: &Architecture<'_>) -> [u8; 32] {
        fingerprint(architecture, [7; 32], KvDtype::Bf16, Revision::Configured("main"))
    }

    #[test]
    fn every_field_counts() {
        let others = [
            Architecture { name: "qwen2", ..LLAMA },
            Architecture { layers: 31, ..LLAMA },
            Architecture { hidden: 577, ..LLAMA },
            Architecture { ffn: 1537, ..LLAMA },
            Architecture { heads: 10, ..LLAMA },
            Architecture { kv_heads: 9, ..LLAMA },
            Architecture { head_dim: 65, ..LLAMA },
            Architecture { vocab: 49153, ..LLAMA },
            Architecture { rope_theta: 100_001.0, ..LLAMA },
            Architecture { rope_factors: &[1.0, 2.0], ..LLAMA },
            Architecture { rope_factors: &[2.0, 1.0], ..LLAMA },
            Architecture { rms_eps: 1e-6, ..LLAMA },
        ];
        let mut all: Vec<_> = others.iter().map(of).collect();
        all.push(of(&LLAMA));
        let with = |tokenizer, revision| fingerprint(&LLAMA, tokenizer, KvDtype::Bf16, revision);
        all.push(with([8; 32], Revision::Configured("main")));
        all.push(with([7; 32], Revision::Configured("other")));
        all.push(with([7; 32], Revision::Content([1; 32])));
        all.push(with([7; 32], Revision::Content([2; 32])));
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }

    #[test]
    fn gguf_and_hugging_face_name_the_same_model() {
        assert_eq!(of(&Architecture { name: "LlamaForCausalLM", ..LLAMA }), of(&LLAMA));
    }

    #[test]
    fn rope_factors_of_one_and_differences_of_rounding_do_not_count() {
        let with = |factors| of(&Architecture { rope_factors: factors, ..LLAMA });
        assert_eq!(with(&[1.0, 1.0]), of(&LLAMA));
        assert_eq!(with(&[1.0, 2.3]), with(&[1.0, 2.300_000_2]));
    }
}
