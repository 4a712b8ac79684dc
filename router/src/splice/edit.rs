//! Slices in, slices out: a JSON text with some members set, as pieces of the old text and of the new values.
//!
//! Decides where a new member goes (right behind `{`) and which pieces are worth copying together: small ones
//! are joined, so that they leave in one write; big ones are never copied.

use std::ops::Range;

use bytes::Bytes;

/// Pieces below this many bytes are copied together; a write of its own costs more than the copy.
const JOIN_BELOW: usize = 8 << 10;

/// Joins neighbours that are each below 8 KiB; bigger pieces stay as they are. Empty pieces vanish.
pub fn join(pieces: Vec<Bytes>) -> Vec<Bytes> {
    let mut joined = Vec::with_capacity(pieces.len().min(4));
    let mut rest = &pieces[..];
    while let Some(first) = rest.first() {
        let run = rest.iter().take_while(|piece| piece.len() < JOIN_BELOW).count();
        if run < 2 {
            if !first.is_empty() {
                joined.push(first.clone());
            }
            rest = &rest[1..];
            continue;
        }
        let (small, behind) = rest.split_at(run);
        let small = small.concat();
        if !small.is_empty() {
            joined.push(small.into());
        }
        rest = behind;
    }
    joined
}

/// A new value for a range of the old text; an empty range inserts.
#[derive(Clone, Debug)]
pub struct Edit {
    /// What is replaced.
    pub at: Range<usize>,
    /// With what; written one after the other.
    pub with: Vec<Bytes>,
}

/// The part `range` of `source` with `edits` made, which must lie in it and not overlap (in any order).
pub fn splice(source: &Bytes, range: Range<usize>, mut edits: Vec<Edit>) -> Vec<Bytes> {
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end));
    let mut pieces = Vec::with_capacity(edits.len() * 4 + 1);
    let mut from = range.start;
    for edit in edits {
        debug_assert!(edit.at.start >= from, "edits overlap");
        pieces.push(source.slice(from..edit.at.start));
        pieces.extend(edit.with);
        from = edit.at.end;
    }
    pieces.push(source.slice(from..range.end));
    pieces
}

/// Edits that set members of one object.
#[derive(Debug)]
pub struct Members {
    edits: Vec<Edit>,
    /// New members, each followed by a comma.
    inserted: Vec<Bytes>,
    open: usize,
    empty: bool,
}

impl Members {
    /// Of the object whose `{` is at `open` of the text; `empty` says that it has no member.
    pub fn of(open: usize, empty: bool) -> Self {
        Self { edits: Vec::with_capacity(4), inserted: Vec::new(), open, empty }
    }

    /// Gives the member `name` (as written in JSON, with quotes and colon: `"stream":`) the value `value`:
    /// at every place in `found`, since parsers disagree which of two duplicates counts; a new member if none.
    pub fn set(&mut self, name: &'static str, found: &[Range<usize>], value: Vec<Bytes>) {
        let Some((last, others)) = found.split_last() else {
            if self.inserted.is_empty() {
                self.inserted.reserve(value.len() + 8); // for two more
            }
            self.inserted.push(Bytes::from_static(name.as_bytes()));
            self.inserted.extend(value);
            self.inserted.push(Bytes::from_static(b","));
            return;
        };
        for place in others {
            self.edits.push(Edit { at: place.clone(), with: value.clone() });
        }
        self.edits.push(Edit { at: last.clone(), with: value });
    }

    /// The edits for [`splice`].
    pub fn into_edits(mut self) -> Vec<Edit> {
        if self.empty {
            self.inserted.pop(); // nothing follows the last new member
        }
        if !self.inserted.is_empty() {
            let behind = self.open + 1;
            self.edits.push(Edit { at: behind..behind, with: self.inserted });
        }
        self.edits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splice::scan::{Cursor, ScanError};
    use crate::splice::testing::{Source, document};

    const NAMES: [(&str, &str); 4] = [
        ("stream", "\"stream\":"),
        ("prompt", "\"prompt\":"),
        ("disaggregated_params", "\"disaggregated_params\":"),
        ("n", "\"n\":"),
    ];

    fn places(text: &[u8], wanted: &str) -> (Vec<Range<usize>>, bool) {
        let (mut found, mut empty) = (Vec::new(), true);
        Cursor::new(text)
            .object(|cursor, name| {
                empty = false;
                let value = cursor.skip()?;
                if name == wanted.as_bytes() {
                    found.push(value);
                }
                Ok::<(), ScanError>(())
            })
            .unwrap();
        (found, empty)
    }

    #[test]
    fn members_set_in_random_objects_are_what_a_parser_then_reads() {
        for seed in 0..2000 {
            let mut source = Source::new(seed);
            let (text, mut value) = document(&mut source);
            let text = Bytes::from(text);
            let start = text.iter().position(|&byte| byte == b'{').unwrap();
            let mut members = Members::of(start, value.as_object().unwrap().is_empty());
            for (name, written) in NAMES {
                if source.below(2) == 0 {
                    continue;
                }
                let (new, parsed) = document(&mut source);
                let (found, _) = places(&text, name);
                members.set(written, &found, vec![Bytes::from(new)]);
                value[name] = parsed;
            }
            let joined = join(splice(&text, 0..text.len(), members.into_edits())).concat();
            let read: serde_json::Value = serde_json::from_slice(&joined).unwrap_or_else(|error| {
                panic!("{error}: {}", String::from_utf8_lossy(&joined));
            });
            assert_eq!(read, value);
        }
    }

    #[test]
    fn every_duplicate_is_edited() {
        let text = Bytes::from_static(br#"{"n":1,"x":2,"n":3}"#);
        let (found, empty) = places(&text, "n");
        let mut members = Members::of(0, empty);
        members.set("\"n\":", &found, vec![Bytes::from_static(b"9")]);
        let edited = splice(&text, 0..text.len(), members.into_edits()).concat();
        assert_eq!(edited, br#"{"n":9,"x":2,"n":9}"#);
    }

    #[test]
    fn small_pieces_are_joined_and_big_ones_are_not_copied() {
        let big = Bytes::from(vec![b'x'; JOIN_BELOW]);
        let small = |text: &'static str| Bytes::from_static(text.as_bytes());
        let pieces =
            join(vec![small("a"), small(""), small("b"), big.clone(), small("c"), small("")]);
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [2, JOIN_BELOW, 1]);
        assert_eq!(pieces[1].as_ptr(), big.as_ptr());
    }
}
