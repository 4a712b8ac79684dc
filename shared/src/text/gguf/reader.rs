//! Strings, counts and metadata values of a GGUF header, each checked against the bytes that are left.

use super::{GgufError, Value};

/// Most array elements of all metadata together.
const ELEMENTS_LIMIT: u64 = 1 << 24;
/// Longest string, bytes.
const STRING_LIMIT: u64 = 1 << 24;

/// [`GgufError::Malformed`].
pub(super) fn malformed(at: usize, what: &str, rule: impl Into<String>) -> GgufError {
    GgufError::Malformed { offset: at as u64, what: format!("`{what}`"), rule: rule.into() }
}

/// Where reading is.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Array elements read so far.
    elements: u64,
}

impl<'a> Reader<'a> {
    /// At the start of `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, elements: 0 }
    }

    /// Bytes from the start.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn truncated(&self, what: &str, needed: u64) -> GgufError {
        let (offset, left) = (self.at as u64, self.left());
        GgufError::Truncated { offset, what: format!("`{what}`"), needed, left }
    }

    pub(super) fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], GgufError> {
        if n as u64 > self.left() {
            return Err(self.truncated(what, n as u64));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        Ok(self.take(N, what)?.try_into().expect("take gives N bytes"))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things that take at least `least` bytes each: never more than can be there.
    pub(super) fn count(&mut self, what: &str, least: u64) -> Result<usize, GgufError> {
        let n = self.u64(what)?;
        let needed = n.saturating_mul(least);
        if needed > self.left() {
            return Err(self.truncated(what, needed));
        }
        usize::try_from(n).map_err(|_| self.truncated(what, needed))
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let at = self.at;
        let n = self.u64(what)?;
        if n > STRING_LIMIT {
            let (offset, what) = (at as u64, format!("length of `{what}`"));
            return Err(GgufError::Limit { offset, what, value: n, limit: STRING_LIMIT });
        }
        let bytes = self.take(n as usize, what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(e) => Err(malformed(at, what, format!("not UTF-8: {e}"))),
        }
    }

    pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<Value, GgufError> {
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::U64(self.unsigned(kind, key)?),
            1 | 3 | 5 | 11 => Value::I64(self.signed(kind, key)?),
            6 | 12 => Value::F64(self.float(kind, key)?),
            7 => Value::Bool(self.boolean(key)?),
            8 => Value::String(self.string(key)?),
            9 => self.values(key)?,
            other => return Err(self.unknown_kind(other, key)),
        })
    }

    fn unknown_kind(&self, kind: u32, key: &str) -> GgufError {
        malformed(self.at, key, format!("value type {kind} is unknown"))
    }

    fn unsigned(&mut self, kind: u32, key: &str) -> Result<u64, GgufError> {
        Ok(match kind {
            0 => u64::from(self.array::<1>(key)?[0]),
            2 => u64::from(u16::from_le_bytes(self.array(key)?)),
            4 => u64::from(self.u32(key)?),
            _ => self.u64(key)?,
        })
    }

    fn signed(&mut self, kind: u32, key: &str) -> Result<i64, GgufError> {
        Ok(match kind {
            1 => i64::from(i8::from_le_bytes(self.array(key)?)),
            3 => i64::from(i16::from_le_bytes(self.array(key)?)),
            5 => i64::from(i32::from_le_bytes(self.array(key)?)),
            _ => i64::from_le_bytes(self.array(key)?),
        })
    }

    fn float(&mut self, kind: u32, key: &str) -> Result<f64, GgufError> {
        Ok(match kind {
            6 => f64::from(f32::from_le_bytes(self.array(key)?)),
            _ => f64::from_le_bytes(self.array(key)?),
        })
    }

    fn boolean(&mut self, key: &str) -> Result<bool, GgufError> {
        match self.array::<1>(key)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            b => Err(malformed(self.at - 1, key, format!("{b} is not a bool"))),
        }
    }

    fn values(&mut self, key: &str) -> Result<Value, GgufError> {
        let kind = self.u32(key)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(malformed(self.at, key, "arrays of arrays are not supported")),
            other => return Err(self.unknown_kind(other, key)),
        };
        let at = self.at;
        let n = self.count(key, least)?;
        self.elements = self.elements.saturating_add(n as u64);
        if self.elements > ELEMENTS_LIMIT {
            let what = format!("array elements up to and with `{key}`");
            let (offset, value) = (at as u64, self.elements);
            return Err(GgufError::Limit { offset, what, value, limit: ELEMENTS_LIMIT });
        }
        Ok(match kind {
            0 | 2 | 4 | 10 => {
                let element = |_| {
                    let v = self.unsigned(kind, key)?;
                    i64::try_from(v).map_err(|_| malformed(at, key, format!("{v} is over 2^63")))
                };
                Value::Ints((0..n).map(element).collect::<Result<_, _>>()?)
            }
            1 | 3 | 5 | 11 => {
                Value::Ints((0..n).map(|_| self.signed(kind, key)).collect::<Result<_, _>>()?)
            }
            6 | 12 => {
                let element = |_| self.float(kind, key).map(|v| v as f32);
                Value::Floats((0..n).map(element).collect::<Result<_, _>>()?)
            }
            7 => Value::Bools((0..n).map(|_| self.boolean(key)).collect::<Result<_, _>>()?),
            _ => Value::Strings((0..n).map(|_| self.string(key)).collect::<Result<_, _>>()?),
        })
    }
}
