//! `tokenizer.json` and `tokenizer_config.json` of byte-level BPE tokenizers, as Hugging Face writes them.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

/// ChatML; a message after another, each in `<|im_start|>role` … `<|im_end|>`.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// A byte-level BPE vocabulary.
#[derive(Debug)]
pub struct ByteLevel {
    /// Of every id, in GPT-2's characters; special ones literally.
    pub tokens: Vec<String>,
    /// Ids that are special.
    pub special: Vec<u32>,
    /// Pairs, best first.
    pub merges: Vec<(String, String)>,
    /// Digits are split off one by one before anything else.
    pub single_digits: bool,
}

impl ByteLevel {
    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path, template: &str, bos: u32, eos: u32) -> Result<()> {
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let pre_tokenizer = if self.single_digits {
            json!({ "type": "Sequence", "pretokenizers": [digits, byte_level] })
        } else {
            byte_level.clone()
        };
        let added: Vec<Value> = self.special.iter().map(|id| self.added(*id)).collect();
        let vocab: serde_json::Map<String, Value> =
            self.tokens.iter().zip(0..).map(|(t, id): (_, u32)| (t.clone(), id.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": false, "vocab": vocab, "merges": self.merges,
            },
        });
        std::fs::write(folder.join("tokenizer.json"), serde_json::to_vec(&tokenizer)?)?;
        let config = json!({
            "tokenizer_class": "GPT2Tokenizer", "add_bos_token": false, "add_prefix_space": false,
            "bos_token": self.tokens[bos as usize], "eos_token": self.tokens[eos as usize],
            "clean_up_tokenization_spaces": false, "chat_template": template,
        });
        std::fs::write(folder.join("tokenizer_config.json"), serde_json::to_vec_pretty(&config)?)?;
        Ok(())
    }

    fn added(&self, id: u32) -> Value {
        json!({
            "id": id, "content": self.tokens[id as usize], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    }
}

/// GPT-2's character for a byte: itself where it is visible, else one from U+0100 on.
pub fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !visible(*b)).count() as u32;
    char::from_u32(256 + before).expect("68 characters follow U+0100")
}
