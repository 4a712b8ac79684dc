//! Tokens to text, one token at a time.
//!
//! Always holds: the pieces of all [`TextStream::push`]es and of [`TextStream::finish`], joined, equal the
//! decoding of all tokens at once; no piece ends inside a character. A token's text may depend on the token before
//! it (leading spaces), so a window of tokens is decoded again and what was given out before is cut off.

/// Tokens decoded again at most. Above it the window is cut, a whole character's bytes before its end.
const WINDOW: usize = 32;
/// A character has at most four bytes, and a token at least one.
const CHARACTER: usize = 4;
/// What an incomplete character at the end of a decoding looks like.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// Incremental decoding of one sequence. `decode` is the tokenizer's whole decoding.
pub struct TextStream<D> {
    decode: D,
    /// Last tokens: some whose text is out, then those whose text is not, or in part.
    window: Vec<u32>,
    /// Of these many tokens of `window` all text is out.
    done: usize,
    /// Bytes of the window's text that are out.
    out: usize,
}

impl<D: Fn(&[u32]) -> String> TextStream<D> {
    /// Nothing decoded yet.
    pub fn new(decode: D) -> Self {
        Self { decode, window: Vec::new(), done: 0, out: 0 }
    }

    /// Takes a token; the text it completes, often empty.
    pub fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = (self.decode)(&self.window);
        let ready = text.strip_suffix(INCOMPLETE).map_or(text.len(), str::len);
        let piece = text.get(self.out..ready).unwrap_or_default().to_owned();
        self.out = self.out.max(ready);
        if ready == text.len() && !piece.is_empty() {
            self.forget(self.done);
            self.done = self.window.len();
        } else if self.window.len() > WINDOW {
            self.forget(self.window.len() - 2 * CHARACTER);
        }
        piece
    }

    /// What is left at the end of the text: an incomplete character, as whole decoding shows it.
    pub fn finish(&mut self) -> String {
        let text = (self.decode)(&self.window);
        let rest = text.get(self.out..).unwrap_or_default().to_owned();
        self.out = text.len();
        rest
    }

    /// Takes the first `count` tokens out of the window.
    fn forget(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        self.window.drain(..count);
        let text = (self.decode)(&self.window);
        self.out = text.strip_suffix(INCOMPLETE).map_or(text.len(), str::len);
        self.done = self.done.saturating_sub(count);
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// A byte-level vocabulary: a token is one to three bytes of a number; 0 is a special token without text.
    fn bytes_of(tokens: &[u32]) -> String {
        let mut bytes = Vec::new();
        for token in tokens.iter().filter(|token| **token != 0) {
            bytes.extend(token.to_le_bytes().into_iter().filter(|byte| *byte != 0));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Words with a mark for a leading space, which is not shown at the beginning (as SentencePiece does).
    fn words_of(tokens: &[u32]) -> String {
        let text: String = tokens
            .iter()
            .map(|token| match token {
                0 => String::new(),
                even if even % 2 == 0 => format!(" w{even}"),
                odd => format!("p{odd}"),
            })
            .collect();
        text.strip_prefix(' ').unwrap_or(&text).to_owned()
    }

    fn streamed(decode: fn(&[u32]) -> String, tokens: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(decode);
        let mut pieces: Vec<_> = tokens.iter().map(|token| stream.push(*token)).collect();
        pieces.push(stream.finish());
        pieces
    }

    fn bytes(text: &[u8]) -> Vec<u32> {
        text.iter().map(|byte| u32::from(*byte)).collect()
    }

    #[test]
    fn a_character_over_several_tokens_comes_out_whole() {
        let pieces = streamed(bytes_of, &bytes("a😀b".as_bytes()));
        assert_eq!(pieces, ["a", "", "", "", "😀", "b", ""]);
    }

    #[test]
    fn an_incomplete_character_at_the_end_becomes_a_replacement_character() {
        let pieces = streamed(bytes_of, &bytes(&"a😀".as_bytes()[..4]));
        assert_eq!(pieces.concat(), "a\u{fffd}");
    }

    #[test]
    fn bytes_that_are_no_text_come_out_as_whole_decoding_shows_them() {
        let tokens =
            bytes(&[0xff, b'a', 0xe2, 0x82, b'b', 0xf0, 0x9f, 0xf0, 0x9f, 0x98, 0x80, 0xc3]);
        assert_eq!(streamed(bytes_of, &tokens).concat(), bytes_of(&tokens));
    }

    #[test]
    fn a_leading_space_is_dropped_only_at_the_beginning() {
        let tokens = [0, 2, 3, 0, 4, 6, 0, 0, 8];
        assert_eq!(streamed(words_of, &tokens).concat(), words_of(&tokens));
    }

    #[test]
    fn any_tokens_stream_to_what_they_decode_to() {
        let mut random = StdRng::seed_from_u64(7);
        let characters: Vec<Vec<u8>> =
            ["a", "é", "€", "😀", "\u{fffd}"].iter().map(|c| c.as_bytes().to_vec()).collect();
        for _ in 0..300 {
            let mut raw: Vec<u8> = Vec::new();
            while raw.len() < 60 {
                match random.random_range(0..8) {
                    0 => raw.push(random.random_range(1..=255)),
                    some => raw.extend(&characters[some % characters.len()]),
                }
            }
            let mut tokens = Vec::new();
            while !raw.is_empty() {
                let rest = raw.split_off(random.random_range(1..=3.min(raw.len())));
                let mut token = [0; 4];
                token[..raw.len()].copy_from_slice(&raw);
                tokens.push(u32::from_le_bytes(token));
                raw = rest;
            }
            assert_eq!(streamed(bytes_of, &tokens).concat(), bytes_of(&tokens), "{tokens:?}");
        }
    }

    #[test]
    fn endless_replacement_characters_keep_flowing_and_the_window_stays_small() {
        let mut stream = TextStream::new(bytes_of);
        let tokens = [bytes(&[0xff; 500]), bytes("é".as_bytes())].concat();
        let mut text = String::new();
        for token in &tokens {
            text += &stream.push(*token);
            assert!(stream.window.len() <= WINDOW);
        }
        text += &stream.finish();
        assert_eq!(text, bytes_of(&tokens));
    }
}
