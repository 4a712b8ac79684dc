//! From generated tokens to text, in the request's own task; and what a model's tokenizer must offer for it.

pub mod model;
pub mod stop;
pub mod stream;

use baton_shared::wire::chat::ChatRequest;

/// A model's words: its tokenizer and its chat template.
pub trait Texts: Send + Sync {
    /// Ids are `0..vocab`.
    fn vocab(&self) -> u32;

    /// Ids that end a text.
    fn eos_ids(&self) -> &[u32];

    /// Token ids of a text. With `special` the special tokens a text begins or ends with are added.
    ///
    /// # Errors
    /// What the tokenizer does not like, for the client.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String>;

    /// Text of tokens; broken characters are replaced. With `skip_special` special tokens have no text.
    fn decode(&self, ids: &[u32], skip_special: bool) -> String;

    /// Bytes of one token, special tokens included; empty for ids that are none.
    fn token_bytes(&self, id: u32) -> Vec<u8>;

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// What the template does not like, for the client; or that there is no template.
    fn render(&self, chat: &ChatRequest) -> Result<String, String>;
}
