//! By what two prompts are known to begin alike: hashes of a prompt's beginnings, at lengths that are the same for
//! every prompt and grow by an eighth, so that the longest prompt has about a hundred.

use std::hash::{BuildHasher, Hasher};

use foldhash::quality::FixedState;

/// Seeds: a conversation's id is never taken for a prompt's beginning.
const PROMPT: FixedState = FixedState::with_seed(1);
const CONVERSATION: FixedState = FixedState::with_seed(2);
const SALT: FixedState = FixedState::with_seed(3);
/// The shortest beginning, in bytes; the others are multiples of it.
const FIRST: usize = 64;

/// A prompt's beginnings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Length in bytes and hash, the shortest first; the last is the whole prompt.
    marks: Vec<(usize, u64)>,
}

impl Marks {
    /// Reads `prompt` once, as it stands in the request. Prompts of different salts have no beginning in common.
    pub fn of(prompt: &[u8], salt: Option<&[u8]>) -> Self {
        let mut marks = Vec::with_capacity(32);
        let seeds = salt.map_or(PROMPT, |salt| FixedState::with_seed(SALT.hash_one(salt)));
        let mut hasher = seeds.build_hasher();
        let (mut from, mut to) = (0, FIRST);
        while let Some(piece) = prompt.get(from..to) {
            hasher.write(piece);
            marks.push((to, hasher.finish()));
            from = to;
            to += (to / 8).next_multiple_of(FIRST);
        }
        if from < prompt.len() {
            hasher.write(&prompt[from..]);
            marks.push((prompt.len(), hasher.finish()));
        }
        Self { marks }
    }

    /// Length in bytes and hash of each beginning, the longest first.
    pub fn longest_first(&self) -> impl Iterator<Item = (usize, u64)> {
        self.marks.iter().rev().copied()
    }

    /// Length of the whole prompt in bytes; 0 = it was not read.
    pub fn whole(&self) -> usize {
        self.marks.last().map_or(0, |(length, _)| *length)
    }
}

/// What a conversation's id is remembered by.
pub fn conversation(id: &[u8]) -> u64 {
    CONVERSATION.hash_one(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7919 % 251) as u8).collect()
    }

    fn shared(a: &[u8], b: &[u8]) -> usize {
        let (a, b) = (Marks::of(a, None), Marks::of(b, None));
        let common = a.longest_first().find(|mark| b.longest_first().any(|other| other == *mark));
        common.map_or(0, |(length, _)| length)
    }

    #[test]
    fn a_common_beginning_is_found_to_within_an_eighth() {
        for length in [500, 1_000, 10_000, 1_000_000] {
            let a = text(length);
            let mut b = text(length + length / 3);
            b[length..].reverse();
            let found = shared(&a, &b);
            assert!(found <= length && found * 8 >= length * 7 - 8 * FIRST, "{found} of {length}");
            b[0] ^= 1;
            assert_eq!(shared(&a, &b), 0);
        }
    }

    #[test]
    fn equal_prompts_are_equal_to_their_end() {
        for length in [1, 63, 64, 65, 10_000] {
            assert_eq!(shared(&text(length), &text(length)), length);
            assert_eq!(Marks::of(&text(length), None).whole(), length);
        }
        assert_eq!(Marks::of(b"", None).whole(), 0);
    }

    #[test]
    fn prompts_of_different_salts_have_nothing_in_common() {
        let text = text(1000);
        let salted = |salt: Option<&str>| Marks::of(&text, salt.map(str::as_bytes));
        for (one, other) in [(None, Some("a")), (Some("a"), Some("b")), (Some(""), None)] {
            let (one, other) = (salted(one), salted(other));
            assert!(one.longest_first().all(|mark| other.longest_first().all(|it| it != mark)));
            assert_eq!(one.whole(), other.whole());
        }
        assert_eq!(salted(Some("a")), salted(Some("a")));
    }

    #[test]
    fn the_longest_prompt_has_few_marks() {
        assert!(Marks::of(&vec![b'x'; 32 << 20], None).marks.len() < 120);
    }
}
