//! Text to tokens and back: tokenizer, chat template, and the GGUF metadata both may come from.

pub mod gguf;
pub mod strftime;
pub mod template;
pub mod tokenizer;
