//! GGUF header, metadata and tensor table, versions 2 and 3, little endian.
//!
//! Decides what a well-formed header is; what tensors mean and where their bytes end is the reader's business.
//! The file is untrusted: every length is checked against the bytes that are left before anything is
//! allocated, arithmetic is checked, and no input makes this panic.

mod reader;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use reader::{Reader, malformed};

/// Most dimensions of a tensor.
const DIMS_LIMIT: u64 = 4;
/// Largest `general.alignment`, bytes.
const ALIGNMENT_LIMIT: u64 = 1 << 20;
/// What [`Gguf::open`] reads of a file at first; doubled until the header fits.
const FIRST_READ: u64 = 4 << 20;

/// A parsed header.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// 2 or 3.
    pub version: u32,
    /// Key to value.
    pub metadata: BTreeMap<String, Value>,
    /// In the file's order; names are unique.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data begins, bytes from the start of the file.
    pub data_offset: u64,
}

/// A metadata value, widened to few types. Arrays of arrays are refused.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// u8, u16, u32, u64.
    U64(u64),
    /// i8, i16, i32, i64.
    I64(i64),
    /// f32, f64.
    F64(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8.
    String(String),
    /// Array of strings.
    Strings(Vec<String>),
    /// Array of integers of any width.
    Ints(Vec<i64>),
    /// Array of f32 or f64.
    Floats(Vec<f32>),
    /// Array of bools.
    Bools(Vec<bool>),
}

/// One row of the tensor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique name.
    pub name: String,
    /// One to four extents, fastest first; the product fits a u64.
    pub dims: Vec<u64>,
    /// ggml type number.
    pub kind: u32,
    /// Bytes from [`Gguf::data_offset`]; a multiple of the alignment.
    pub offset: u64,
}

/// Why a header cannot be read; offsets are bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be opened or read.
    #[error("cannot read `{path}`: {source}")]
    Io {
        /// Path as given.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The bytes end too early.
    #[error("{what} at byte {offset} needs {needed} bytes, only {left} are left")]
    Truncated {
        /// Where it begins.
        offset: u64,
        /// What was being read.
        what: String,
        /// Bytes it needs at least.
        needed: u64,
        /// Bytes there are.
        left: u64,
    },
    /// A number is over a limit of this reader.
    #[error("{what} at byte {offset} is {value}, more than the limit {limit}")]
    Limit {
        /// Where it stands.
        offset: u64,
        /// What was being read.
        what: String,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes say something GGUF does not allow.
    #[error("{what} at byte {offset}: {rule}")]
    Malformed {
        /// Where it stands.
        offset: u64,
        /// What was being read.
        what: String,
        /// What is wrong.
        rule: String,
    },
}

impl Gguf {
    /// Reads the header of a file, and no more of the file than that needs.
    ///
    /// # Errors
    /// [`GgufError`].
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let failed = |source| GgufError::Io { path: path.display().to_string(), source };
        let mut file = File::open(path).map_err(failed)?;
        let (mut bytes, mut want) = (Vec::new(), FIRST_READ);
        loop {
            let missing = want - bytes.len() as u64;
            let got = (&mut file).take(missing).read_to_end(&mut bytes).map_err(failed)? as u64;
            match Self::parse(&bytes) {
                Err(GgufError::Truncated { .. }) if got == missing => want = want.saturating_mul(2),
                parsed => return parsed,
            }
        }
    }

    /// Reads the header at the start of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// [`GgufError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut r = Reader::new(bytes);
        if r.take(4, "magic")? != b"GGUF" {
            return Err(malformed(0, "magic", "not a GGUF file: it does not begin with `GGUF`"));
        }
        let version = r.u32("version")?;
        if !(2..=3).contains(&version) {
            let rule = format!("`{version}` is not supported, 2 and 3 are (little endian)");
            return Err(malformed(4, "version", rule));
        }
        // A tensor takes at least 32 bytes of the table, an entry 13.
        let tensor_count = r.count("tensor count", 32)?;
        let entry_count = r.count("metadata count", 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entry_count {
            let at = r.at();
            let key = r.string("metadata key")?;
            let kind = r.u32(&key)?;
            let value = r.value(kind, &key)?;
            if metadata.contains_key(&key) {
                return Err(malformed(at, &key, "the key occurs twice"));
            }
            metadata.insert(key, value);
        }
        let alignment = alignment(&metadata)?;
        let mut tensors = Vec::with_capacity(tensor_count);
        let mut names = BTreeSet::new();
        for _ in 0..tensor_count {
            let at = r.at();
            let tensor = tensor(&mut r, alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(malformed(at, &tensor.name, "the tensor occurs twice"));
            }
            tensors.push(tensor);
        }
        let data_offset = (r.at() as u64).next_multiple_of(alignment);
        if !tensors.is_empty() {
            r.take((data_offset - r.at() as u64) as usize, "padding before tensor data")?;
        }
        Ok(Self { version, metadata, tensors, data_offset })
    }

    /// The value, if the key is there and a string.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// The value, if the key is there and an integer that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            Value::U64(v) => Some(*v),
            Value::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value, if the key is there and a floating-point number.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }

    /// The value, if the key is there and a bool.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// The value, if the key is there and an array of strings.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            Value::Strings(v) => Some(v),
            _ => None,
        }
    }

    /// The value, if the key is there and an array of integers.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            Value::Ints(v) => Some(v),
            _ => None,
        }
    }

    /// The value, if the key is there and an array of floating-point numbers.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.metadata.get(key)? {
            Value::Floats(v) => Some(v),
            _ => None,
        }
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let key = "general.alignment";
    match metadata.get(key) {
        None => Ok(32),
        Some(Value::U64(v)) if v.is_power_of_two() && *v <= ALIGNMENT_LIMIT => Ok(*v),
        Some(v) => {
            let rule = format!("{v:?} is not a power of two of at most {ALIGNMENT_LIMIT}");
            Err(malformed(0, key, rule))
        }
    }
}

fn tensor(r: &mut Reader<'_>, alignment: u64) -> Result<TensorInfo, GgufError> {
    let at = r.at();
    let name = r.string("tensor name")?;
    let rank = u64::from(r.u32(&name)?);
    if rank == 0 || rank > DIMS_LIMIT {
        let rule = format!("{rank} dimensions, 1 to {DIMS_LIMIT} are allowed");
        return Err(malformed(at, &name, rule));
    }
    let mut dims = Vec::with_capacity(rank as usize);
    let mut elements: u64 = 1;
    for _ in 0..rank {
        let extent = r.u64(&name)?;
        elements = match elements.checked_mul(extent) {
            Some(n) if n > 0 => n,
            _ => return Err(malformed(at, &name, "its dimensions are zero or too large")),
        };
        dims.push(extent);
    }
    let kind = r.u32(&name)?;
    let offset = r.u64(&name)?;
    if !offset.is_multiple_of(alignment) {
        let rule = format!("offset {offset} is not a multiple of the alignment {alignment}");
        return Err(malformed(at, &name, rule));
    }
    Ok(TensorInfo { name, dims, kind, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put_string(out: &mut Vec<u8>, s: &str) {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    }

    fn put_entry(out: &mut Vec<u8>, key: &str, kind: u32, value: &[u8]) {
        put_string(out, key);
        out.extend(kind.to_le_bytes());
        out.extend(value);
    }

    fn put_array(out: &mut Vec<u8>, key: &str, kind: u32, n: u64, value: &[u8]) {
        put_entry(out, key, 9, &kind.to_le_bytes());
        out.extend(n.to_le_bytes());
        out.extend(value);
    }

    fn small_file() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        out.extend(11u64.to_le_bytes());
        let mut text = Vec::new();
        put_string(&mut text, "llama");
        put_entry(&mut out, "general.architecture", 8, &text);
        put_entry(&mut out, "general.alignment", 4, &32u32.to_le_bytes());
        put_entry(&mut out, "a.float", 6, &0.5f32.to_le_bytes());
        put_entry(&mut out, "a.double", 12, &0.25f64.to_le_bytes());
        put_entry(&mut out, "a.bool", 7, &[1]);
        put_entry(&mut out, "a.byte", 1, &[0xff]);
        put_entry(&mut out, "a.long", 11, &7i64.to_le_bytes());
        let mut words = Vec::new();
        put_string(&mut words, "Ġa");
        put_string(&mut words, "");
        put_array(&mut out, "words", 8, 2, &words);
        put_array(&mut out, "kinds", 5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        put_array(&mut out, "scores", 6, 1, &1.5f32.to_le_bytes());
        put_array(&mut out, "flags", 7, 2, &[0, 1]);
        for (name, offset) in [("x", 0u64), ("y", 32)] {
            put_string(&mut out, name);
            out.extend(2u32.to_le_bytes());
            out.extend(2u64.to_le_bytes());
            out.extend(4u64.to_le_bytes());
            out.extend(0u32.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }

    #[test]
    fn every_value_type_is_read_as_written() {
        let bytes = small_file();
        let g = Gguf::parse(&bytes).unwrap();
        assert_eq!(g.version, 3);
        assert_eq!(g.data_offset, bytes.len() as u64);
        assert_eq!(g.string("general.architecture"), Some("llama"));
        assert_eq!(g.u64("general.alignment"), Some(32));
        assert_eq!(g.f64("a.float"), Some(0.5));
        assert_eq!(g.f64("a.double"), Some(0.25));
        assert_eq!(g.bool("a.bool"), Some(true));
        assert_eq!(g.metadata["a.byte"], Value::I64(-1));
        assert_eq!(g.u64("a.byte"), None);
        assert_eq!(g.u64("a.long"), Some(7));
        assert_eq!(g.strings("words").unwrap(), ["Ġa", ""]);
        assert_eq!(g.ints("kinds").unwrap(), [1, -1]);
        assert_eq!(g.floats("scores").unwrap(), [1.5]);
        assert_eq!(g.metadata["flags"], Value::Bools(vec![false, true]));
        let y = TensorInfo { name: "y".into(), dims: vec![2, 4], kind: 0, offset: 32 };
        assert_eq!(g.tensors[1], y);
    }

    #[test]
    fn a_file_cut_anywhere_is_called_truncated() {
        let bytes = small_file();
        for n in 0..bytes.len() {
            let e = Gguf::parse(&bytes[..n]).unwrap_err();
            assert!(matches!(e, GgufError::Truncated { .. }), "{n}: {e}");
        }
    }

    #[test]
    fn no_single_byte_change_makes_it_panic() {
        let bytes = small_file();
        let mut refused = 0;
        for i in 0..bytes.len() {
            for value in 0..=255 {
                let mut changed = bytes.clone();
                changed[i] = value;
                refused += u32::from(Gguf::parse(&changed).is_err());
            }
        }
        assert!(refused > 10_000, "{refused}");
    }

    #[test]
    fn counts_beyond_the_file_are_refused_before_allocating() {
        let mut bytes = small_file();
        bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        let e = Gguf::parse(&bytes).unwrap_err().to_string();
        assert!(e.starts_with("`tensor count` at byte 16 needs 18446744073709551615 bytes"), "{e}");
    }

    #[test]
    fn what_is_not_gguf_is_named() {
        let e = Gguf::parse(b"PK\x03\x04 a zip").unwrap_err().to_string();
        assert!(e.contains("not a GGUF file"), "{e}");
        let mut old = small_file();
        old[4] = 1;
        let e = Gguf::parse(&old).unwrap_err().to_string();
        assert!(e.contains("2 and 3 are"), "{e}");
    }

    #[test]
    fn a_file_is_read_no_further_than_its_header() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = small_file();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(Gguf::open(file.path()).unwrap(), Gguf::parse(&bytes).unwrap());
        let e = Gguf::open(Path::new("no/such.gguf")).unwrap_err().to_string();
        assert!(e.contains("no/such.gguf"), "{e}");
    }
}
