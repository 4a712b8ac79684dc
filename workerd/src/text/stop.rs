//! Stop strings in text that arrives in pieces.
//!
//! Decides how much of the text may be released: never a stop string, never the beginning of something that may
//! still become one. What is found does not depend on how the text was cut into pieces: the stop string that
//! is *complete first* wins, of several that end together the longest.

/// Finds stop strings across pieces.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Bytes of `held` already known to hold no end of a stop string.
    searched: usize,
}

/// What a piece led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// This text may go out; possibly empty.
    Text(String),
    /// A stop string was completed: this is the last text, up to it.
    Stopped {
        /// Text before the stop string.
        text: String,
        /// Which one.
        stop: String,
    },
}

impl StopStrings {
    /// Empty strings among `stops` are ignored.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new(), searched: 0 }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Released {
        if self.stops.is_empty() {
            return Released::Text(piece.to_owned());
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            let text = self.held[..start].to_owned();
            let stop = self.stops[stop].clone();
            self.held.clear();
            self.searched = 0;
            return Released::Stopped { text, stop };
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        self.searched = rest.len();
        Released::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What is still held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        self.searched = 0;
        std::mem::take(&mut self.held)
    }

    /// The match that ends first, the longest of those: `(start, index of the stop string)`.
    fn first_match(&self) -> Option<(usize, usize)> {
        let matches = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            // A match that ends beyond `searched` starts at most `stop.len() - 1` bytes before it.
            let mut from = (self.searched + 1).saturating_sub(stop.len());
            while !self.held.is_char_boundary(from) {
                from -= 1;
            }
            let start = from + self.held[from..].find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        matches.min().map(|(_, start, index)| (start, index))
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let longest = self.stops.iter().map(|stop| {
            (1..stop.len().min(self.held.len() + 1))
                .rev()
                .find(|&len| stop.is_char_boundary(len) && self.held.ends_with(&stop[..len]))
                .unwrap_or(0)
        });
        longest.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces`; all text released, and the stop string found.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut found = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut all = String::new();
        for piece in pieces {
            match found.push(piece) {
                Released::Text(text) => all += &text,
                Released::Stopped { text, stop } => return (all + &text, Some(stop)),
            }
        }
        all += &found.finish();
        (all, None)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_never_released() {
        assert_eq!(
            run(&["END"], &["abcE", "N", "Dxyz"]),
            ("abc".to_owned(), Some("END".to_owned()))
        );
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_released() {
        assert_eq!(run(&["END"], &["abcE", "N", "T!"]), ("abcENT!".to_owned(), None));
        assert_eq!(run(&["END"], &["abcEN"]), ("abcEN".to_owned(), None));
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held() {
        let mut stops = StopStrings::new(vec!["aab".to_owned()]);
        assert_eq!(stops.push("xaaa"), Released::Text("xa".to_owned()));
        assert_eq!(stops.push("c"), Released::Text("aac".to_owned()));
    }

    #[test]
    fn the_stop_string_complete_first_wins_however_the_text_is_cut() {
        let stops = ["abc", "b", "bc"];
        let whole = run(&stops, &["xabcd"]);
        assert_eq!(whole, ("xa".to_owned(), Some("b".to_owned())));
        assert_eq!(run(&stops, &["x", "a", "b", "c", "d"]), whole);
        assert_eq!(run(&["c", "abc"], &["xab", "c"]), ("x".to_owned(), Some("abc".to_owned())));
    }

    #[test]
    fn multi_byte_stop_strings_are_cut_at_characters() {
        assert_eq!(run(&["é€"], &["aé", "é", "€b"]), ("aé".to_owned(), Some("é€".to_owned())));
        assert_eq!(run(&["€é"], &["a€", "ü"]), ("a€ü".to_owned(), None));
    }

    #[test]
    fn every_cut_of_a_text_gives_the_same_answer() {
        let text = "aabaabaaabcaab€€x";
        let cuts: Vec<usize> = (1..text.len()).filter(|&i| text.is_char_boundary(i)).collect();
        for stops in [&["aabc"][..], &["€x", "€€x"], &["zz"], &["aaab", "ba"], &[""]] {
            let whole = run(stops, &[text]);
            for &one in &cuts {
                for &two in cuts.iter().filter(|&&two| two > one) {
                    let pieces = [&text[..one], &text[one..two], &text[two..]];
                    assert_eq!(run(stops, &pieces), whole, "{stops:?} {pieces:?}");
                }
            }
        }
    }
}
