//! A vocabulary of single bytes for tests: ids 0 to 255 are bytes, 256 is the end of a text.

use baton_shared::wire::chat::ChatRequest;

use crate::text::Texts;

/// The id that ends a text.
pub const EOS: u32 = 256;

/// The vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct FakeTexts;

impl Texts for FakeTexts {
    fn vocab(&self) -> u32 {
        EOS + 1
    }

    fn eos_ids(&self) -> &[u32] {
        &[EOS]
    }

    fn encode(&self, text: &str, _special: bool) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let plain = ids.iter().filter(|id| !(skip_special && **id == EOS));
        let bytes: Vec<u8> = plain.flat_map(|id| self.token_bytes(*id)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        match u8::try_from(id) {
            Ok(byte) => vec![byte],
            Err(_) => b"<end>".to_vec(),
        }
    }

    fn render(&self, chat: &ChatRequest) -> Result<String, String> {
        let messages = chat.messages.as_deref().unwrap_or_default();
        let text = |content: &Option<baton_shared::wire::chat::Content>| {
            content.as_ref().map(|content| content.0.clone()).unwrap_or_default()
        };
        Ok(messages
            .iter()
            .map(|message| format!("{}:{}\n", message.role, text(&message.content)))
            .collect())
    }
}
