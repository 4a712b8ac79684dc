//! One pass over a JSON text that finds where members lie, without building a tree.
//!
//! Decides what is well-formed *structurally*: brackets match, strings end, members and elements are
//! separated, nothing follows the value. What is inside strings and numbers is left to whoever reads the
//! value in the end (a worker, which answers 400). Nothing accepted here can be understood by a strict parser
//! in another way: what we accept beyond JSON, a strict parser refuses.
//!
//! Holds: every range given out starts and ends on the first and last byte of a value (or key), in the
//! order of the text.

use std::ops::Range;

use memchr::{memchr, memchr2, memchr3};

/// Deepest nesting read; a strict parser's own limit is lower (128 in serde_json).
const MAX_DEPTH: usize = 256;

/// Why a text is not a JSON value, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// The text ended inside a value.
    #[error("the JSON text ends too early")]
    Truncated,
    /// A byte that cannot be there.
    #[error("unexpected byte at offset {0} of the JSON text")]
    Unexpected(usize),
    /// Something other than an object where one was needed.
    #[error("expected a JSON object at offset {0}")]
    NotAnObject(usize),
    /// A member name with an escape: names are compared byte by byte, so `"str\u0065am"` could pass unseen.
    #[error("member name with an escape at offset {0}")]
    EscapedName(usize),
    /// More than 256 levels.
    #[error("nested deeper than {MAX_DEPTH} levels at offset {0}")]
    TooDeep(usize),
}

/// A position in a JSON text, moving forward only.
#[derive(Debug)]
pub struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the first byte.
    pub fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// The bytes of `range`.
    pub fn bytes(&self, range: &Range<usize>) -> &'a [u8] {
        &self.text[range.clone()]
    }

    /// Where it stands.
    pub fn offset(&self) -> usize {
        self.at
    }

    /// The next byte that is not white space, not consumed.
    pub fn peek(&mut self) -> Result<u8, ScanError> {
        while let Some(byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Ok(*byte);
            }
            self.at += 1;
        }
        Err(ScanError::Truncated)
    }

    /// Reads an object; `member` is called with each name (quotes excluded) while the cursor stands before the
    /// value, which it must consume.
    ///
    /// # Errors
    /// Whatever `member` says, or the text is not an object, or a name has an escape in it.
    pub fn object<E: From<ScanError>>(
        &mut self,
        mut member: impl FnMut(&mut Self, &'a [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.peek()? != b'{' {
            return Err(ScanError::NotAnObject(self.at).into());
        }
        self.at += 1;
        if self.peek()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            let name = self.name()?;
            member(self, name)?;
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(ScanError::Unexpected(self.at).into()),
            }
        }
    }

    /// Reads an array; `element` is called with each index and must consume the value.
    ///
    /// # Errors
    /// Whatever `element` says, or the text is not an array.
    pub fn array<E: From<ScanError>>(
        &mut self,
        mut element: impl FnMut(&mut Self, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.peek()? != b'[' {
            return Err(ScanError::Unexpected(self.at).into());
        }
        self.at += 1;
        if self.peek()? == b']' {
            self.at += 1;
            return Ok(());
        }
        for index in 0.. {
            self.peek()?;
            element(self, index)?;
            match self.peek()? {
                b',' => self.at += 1,
                b']' => break,
                _ => return Err(ScanError::Unexpected(self.at).into()),
            }
        }
        self.at += 1;
        Ok(())
    }

    /// Consumes one value of any kind and says where it lies.
    pub fn skip(&mut self) -> Result<Range<usize>, ScanError> {
        let first = self.peek()?;
        let start = self.at;
        match first {
            b'"' => self.string()?,
            b'{' | b'[' => self.container()?,
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => self.scalar(),
            _ => return Err(ScanError::Unexpected(start)),
        }
        Ok(start..self.at)
    }

    /// Fails unless only white space is left.
    pub fn end(&mut self) -> Result<(), ScanError> {
        match self.peek() {
            Ok(_) => Err(ScanError::Unexpected(self.at)),
            Err(_) => Ok(()),
        }
    }

    /// Consumes a name and its colon; the cursor then stands before the value.
    fn name(&mut self) -> Result<&'a [u8], ScanError> {
        if self.peek()? != b'"' {
            return Err(ScanError::Unexpected(self.at));
        }
        let start = self.at + 1;
        let rest = &self.text[start..];
        let length = memchr2(b'"', b'\\', rest).ok_or(ScanError::Truncated)?;
        if rest[length] == b'\\' {
            return Err(ScanError::EscapedName(start));
        }
        let name = &rest[..length];
        self.at = start + length + 1;
        if self.peek()? != b':' {
            return Err(ScanError::Unexpected(self.at));
        }
        self.at += 1;
        self.peek()?;
        Ok(name)
    }

    /// From the opening quote to behind the closing one: the first with an even number of backslashes before.
    fn string(&mut self) -> Result<(), ScanError> {
        let start = self.at + 1;
        let mut from = start;
        loop {
            let quote = from + memchr(b'"', &self.text[from..]).ok_or(ScanError::Truncated)?;
            let slashes =
                self.text[start..quote].iter().rev().take_while(|&&byte| byte == b'\\').count();
            from = quote + 1;
            if slashes % 2 == 0 {
                self.at = from;
                return Ok(());
            }
        }
    }

    /// A number or a literal: up to what can follow one.
    fn scalar(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest
            .iter()
            .position(|byte| {
                matches!(
                    byte,
                    b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t' | b'"' | b'[' | b'{' | b':'
                )
            })
            .unwrap_or(rest.len());
    }

    /// From an opening bracket to behind the one that matches it.
    fn container(&mut self) -> Result<(), ScanError> {
        let mut open = Brackets::default();
        loop {
            match self.text.get(self.at) {
                None => return Err(ScanError::Truncated),
                Some(b'"') => self.string()?,
                Some(b'[') => {
                    open.push(false, self.at)?;
                    self.at += 1;
                    self.skip_numbers();
                }
                Some(b'{') => {
                    open.push(true, self.at)?;
                    self.at += 1;
                }
                Some(byte @ (b']' | b'}')) => {
                    if !open.pop(*byte == b'}') {
                        return Err(ScanError::Unexpected(self.at));
                    }
                    self.at += 1;
                    if open.depth == 0 {
                        return Ok(());
                    }
                }
                Some(_) => self.at += 1,
            }
        }
    }

    /// Behind `[`: where an array of numbers ends is found at memory speed; anything else is left where it is.
    fn skip_numbers(&mut self) {
        if let Some(b'-' | b'0'..=b'9') = self.text.get(self.at)
            && let Some(stop) = memchr3(b']', b'"', b'[', &self.text[self.at..])
            && self.text[self.at + stop] == b']'
            && memchr(b'{', &self.text[self.at..self.at + stop]).is_none()
        {
            self.at += stop;
        }
    }
}

/// Which brackets are open, one bit each.
#[derive(Default)]
struct Brackets {
    braces: [u64; MAX_DEPTH / 64],
    depth: usize,
}

impl Brackets {
    fn push(&mut self, brace: bool, at: usize) -> Result<(), ScanError> {
        if self.depth == MAX_DEPTH {
            return Err(ScanError::TooDeep(at));
        }
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if brace {
            self.braces[word] |= bit;
        } else {
            self.braces[word] &= !bit;
        }
        self.depth += 1;
        Ok(())
    }

    /// Whether the innermost open bracket is of this kind; it is closed.
    fn pop(&mut self, brace: bool) -> bool {
        self.depth -= 1;
        (self.braces[self.depth / 64] >> (self.depth % 64)) & 1 == u64::from(brace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splice::testing::{Source, document};

    fn scan(text: &[u8]) -> Result<Vec<(String, Range<usize>)>, ScanError> {
        let mut cursor = Cursor::new(text);
        let mut members = Vec::new();
        cursor.object(|cursor, name| {
            let value = cursor.skip()?;
            members.push((String::from_utf8_lossy(name).into_owned(), value));
            Ok::<(), ScanError>(())
        })?;
        cursor.end()?;
        Ok(members)
    }

    #[test]
    fn each_value_of_a_random_object_is_found_whole() {
        for seed in 0..2000 {
            let (text, value) = document(&mut Source::new(seed));
            let expected = value.as_object().unwrap();
            let found = scan(text.as_bytes()).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert_eq!(found.len(), expected.len(), "{text}");
            for ((name, range), (key, value)) in found.iter().zip(expected) {
                assert_eq!(name, key);
                let parsed: serde_json::Value = serde_json::from_str(&text[range.clone()]).unwrap();
                assert_eq!(parsed, *value, "{text}");
            }
        }
    }

    #[test]
    fn every_cut_of_an_object_is_refused() {
        for seed in 0..100 {
            let (text, _) = document(&mut Source::new(seed));
            let text = text.trim_end().as_bytes();
            for end in 0..text.len() {
                assert!(scan(&text[..end]).is_err(), "{:?}", String::from_utf8_lossy(&text[..end]));
            }
        }
    }

    #[test]
    fn what_a_strict_parser_accepts_with_one_byte_changed_is_read_alike() {
        for seed in 0..300 {
            let mut source = Source::new(seed);
            let (text, _) = document(&mut source);
            let mut bytes = text.into_bytes();
            let at = source.below(bytes.len());
            bytes[at] = b"{}[]\",:\\ 0x"[source.below(11)];
            let Ok(serde_json::Value::Object(strict)) = serde_json::from_slice(&bytes) else {
                continue;
            };
            match scan(&bytes) {
                Ok(found) => {
                    for (name, value) in &strict {
                        let (_, range) = found.iter().rev().find(|(key, _)| key == name).unwrap();
                        let ours: serde_json::Value =
                            serde_json::from_slice(&bytes[range.clone()]).unwrap();
                        assert_eq!(ours, *value);
                    }
                }
                Err(error) => assert!(matches!(error, ScanError::EscapedName(_)), "{error}"),
            }
        }
    }

    #[test]
    fn broken_texts_are_refused() {
        for text in [
            "",
            " ",
            "[]",
            "1",
            "{",
            "{}}",
            "{} x",
            "{\"a\":1} x",
            "{\"a\"}",
            "{\"a\":}",
            "{a:1}",
            "{\"a\":1,}",
            "{\"a\":1 \"b\":2}",
            "{\"a\":[}}",
            "{\"a\":[1,2}",
            "{\"a\":{]}",
            "{\"a\":\"\\\"}",
            "{\"a\":\"x}",
            "{,}",
            "{\"a\"::1}",
            "{\"a\":1\"b\":2}",
        ] {
            assert!(scan(text.as_bytes()).is_err(), "{text}");
        }
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(300), "]".repeat(300));
        assert!(matches!(scan(deep.as_bytes()), Err(ScanError::TooDeep(_))));
    }

    #[test]
    fn an_escaped_name_is_refused_and_a_duplicate_is_seen_twice() {
        assert_eq!(scan(br#"{"str\u0065am":true}"#), Err(ScanError::EscapedName(2)));
        assert_eq!(scan(br#"{"a":1,"a":2}"#).unwrap().len(), 2);
    }

    #[test]
    fn an_array_of_numbers_may_hold_other_things_further_on() {
        for text in [
            r#"{"a":[1,[2],3],"b":0}"#,
            r#"{"a":[1,{},3],"b":0}"#,
            r#"{"a":[1,{"]":2},3],"b":0}"#,
            r#"{"a":[1,"]"],"b":0}"#,
            r#"{"a":[-1],"b":0}"#,
        ] {
            let found = scan(text.as_bytes()).unwrap();
            assert_eq!(found.len(), 2, "{text}");
            assert_eq!(&text[found[1].1.clone()], "0");
        }
    }
}
