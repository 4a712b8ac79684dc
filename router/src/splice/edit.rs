//! Slices in, slices out: a JSON text with some members set, as pieces of the old text and of the new values.
//!
//! Decides where a new member goes (right behind `{`) and which pieces are worth copying together: small ones
//! are joined, so that they leave in one write; big ones are never copied.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// Pieces below this many bytes are copied together; a write of its own costs more than the copy.
const JOIN_BELOW: usize = 8 << 10;

/// A body to be sent: pieces in order, none empty.
#[derive(Clone, Debug, Default)]
pub struct Rope {
    pieces: Vec<Bytes>,
    small: BytesMut,
    len: usize,
}

impl Rope {
    /// Empty, with room for `bytes` of small pieces.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { pieces: Vec::new(), small: BytesMut::with_capacity(bytes), len: 0 }
    }

    /// Appends a piece; copies it if it is small.
    pub fn push(&mut self, piece: &Bytes) {
        if piece.len() < JOIN_BELOW {
            return self.copy(piece);
        }
        self.flush();
        self.len += piece.len();
        self.pieces.push(piece.clone());
    }

    /// Appends a copy of `piece`.
    pub fn copy(&mut self, piece: &[u8]) {
        self.len += piece.len();
        self.small.extend_from_slice(piece);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces in order.
    pub fn into_pieces(mut self) -> Vec<Bytes> {
        self.flush();
        self.pieces
    }

    fn flush(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
    }
}

/// A new value for a range of the old text; an empty range inserts.
#[derive(Clone, Debug)]
pub struct Edit {
    /// What is replaced.
    pub at: Range<usize>,
    /// With what; written one after the other.
    pub with: Vec<Bytes>,
}

/// Appends `source` to `out` with `edits` made, which must not overlap (in any order).
pub fn splice(out: &mut Rope, source: &Bytes, mut edits: Vec<Edit>) {
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end));
    let mut from = 0;
    for edit in &edits {
        debug_assert!(edit.at.start >= from, "edits overlap");
        out.push(&source.slice(from..edit.at.start));
        edit.with.iter().for_each(|piece| out.push(piece));
        from = edit.at.end;
    }
    out.push(&source.slice(from..));
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
        Self { edits: Vec::with_capacity(4), inserted: Vec::with_capacity(8), open, empty }
    }

    /// Gives the member `name` (as written in JSON, with quotes and colon: `"stream":`) the value `value`:
    /// at every place in `found`, since parsers disagree which of two duplicates counts; a new member if none.
    pub fn set(&mut self, name: &'static str, found: &[Range<usize>], value: Vec<Bytes>) {
        if found.is_empty() {
            self.inserted.push(Bytes::from_static(name.as_bytes()));
            self.inserted.extend(value);
            self.inserted.push(Bytes::from_static(b","));
            return;
        }
        for place in found {
            self.edits.push(Edit { at: place.clone(), with: value.clone() });
        }
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
            let mut rope = Rope::default();
            splice(&mut rope, &text, members.into_edits());
            let len = rope.len();
            let joined = rope.into_pieces().concat();
            assert_eq!(joined.len(), len);
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
        let mut rope = Rope::default();
        splice(&mut rope, &text, members.into_edits());
        assert_eq!(rope.into_pieces().concat(), br#"{"n":9,"x":2,"n":9}"#);
    }

    #[test]
    fn small_pieces_are_joined_and_big_ones_are_not_copied() {
        let big = Bytes::from(vec![b'x'; JOIN_BELOW]);
        let mut rope = Rope::default();
        rope.push(&Bytes::from_static(b"a"));
        rope.push(&Bytes::from_static(b"b"));
        rope.push(&big);
        rope.push(&Bytes::from_static(b"c"));
        let pieces = rope.into_pieces();
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [2, JOIN_BELOW, 1]);
        assert_eq!(pieces[1].as_ptr(), big.as_ptr());
    }
}
