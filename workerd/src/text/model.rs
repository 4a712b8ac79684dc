//! A model's own tokenizer and chat template, from its files.

use std::path::Path;
use std::time::SystemTime;

use baton_shared::text::gguf::Gguf;
use baton_shared::text::template::{ChatTemplate, Conversation, TemplateError};
use baton_shared::text::tokenizer::{Tokenizer, TokenizerError};
use baton_shared::wire::chat::ChatRequest;

use super::Texts;
use crate::model::ModelSpec;

/// Tokenizer and template of one model.
pub struct ModelTexts {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    vocab: u32,
    eos: Vec<u32>,
}

/// Why a model has no words.
#[derive(Debug, thiserror::Error)]
pub enum TextsError {
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl ModelTexts {
    /// Reads them from the `header` of a GGUF file, or from the Hugging Face folder `path`; `spec` is that model's.
    ///
    /// # Errors
    /// [`TextsError`].
    pub fn open(path: &Path, header: Option<&Gguf>, spec: &ModelSpec) -> Result<Self, TextsError> {
        let tokenizer = match header {
            None => Tokenizer::from_file(&path.join("tokenizer.json"))?,
            Some(header) => Tokenizer::from_gguf(header)?,
        };
        let text = |token: Option<&str>| token.unwrap_or_default().to_owned();
        let (bos, eos_token) = (text(tokenizer.bos_token()), text(tokenizer.eos_token()));
        let template = tokenizer
            .chat_template()
            .map(|source| ChatTemplate::new(source, &bos, &eos_token))
            .transpose()?;
        // An id beyond the model's head can never be sampled.
        let mut eos: Vec<u32> = [tokenizer.eos_ids(), &spec.eos_ids].concat();
        eos.retain(|id| *id < spec.vocab);
        eos.sort_unstable();
        eos.dedup();
        Ok(Self { tokenizer, template, vocab: spec.vocab, eos })
    }

    /// What two workers' tokenizers must agree in.
    pub fn hash(&self) -> [u8; 32] {
        self.tokenizer.hash()
    }
}

impl Texts for ModelTexts {
    fn vocab(&self) -> u32 {
        self.vocab
    }

    fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        self.tokenizer.encode_prompt(text, special).map_err(|error| error.to_string())
    }

    fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.tokenizer.decode(ids, skip_special)
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id).to_vec()
    }

    fn render(&self, chat: &ChatRequest) -> Result<String, String> {
        let template = self.template.as_ref().ok_or(
            "need a chat template, and this model has none: use `/v1/completions`".to_owned(),
        )?;
        let conversation = Conversation {
            messages: chat.messages.as_deref().unwrap_or_default(),
            tools: chat.tools.as_deref(),
            add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
            more: chat.chat_template_kwargs.as_ref(),
        };
        template.render(conversation, SystemTime::now()).map_err(|error| error.to_string())
    }
}
