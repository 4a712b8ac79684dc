//! Little-endian, length-prefixed bytes: the writer and the bounded reader under the hand-over record.
//! The reader never takes more than is there and never more than the caller's limit, whatever a length says.

/// Appends numbers and length-prefixed pieces.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// A length that fits, because records are far smaller than 4 GiB; what does not is refused by their size.
    pub fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub fn piece(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    pub fn into_vec(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes from the front of a slice; each method says what was wrong by the name it was given.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], &'static str> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(what)?;
        self.rest = rest;
        Ok(*head)
    }

    pub fn u8(&mut self, what: &'static str) -> Result<u8, &'static str> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    pub fn u16(&mut self, what: &'static str) -> Result<u16, &'static str> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32, &'static str> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64, &'static str> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of at least `size` bytes each, at most `most`, for which there are bytes left.
    pub fn count(
        &mut self,
        size: usize,
        most: usize,
        what: &'static str,
    ) -> Result<usize, &'static str> {
        let count = self.u32(what)? as usize;
        if count > most || count > self.rest.len() / size { Err(what) } else { Ok(count) }
    }

    pub fn piece(&mut self, most: usize, what: &'static str) -> Result<&'a [u8], &'static str> {
        let len = self.count(1, most, what)?;
        let (head, rest) = self.rest.split_at_checked(len).ok_or(what)?;
        self.rest = rest;
        Ok(head)
    }

    /// Printable ASCII, at least one character.
    pub fn text(&mut self, most: usize, what: &'static str) -> Result<&'a str, &'static str> {
        let piece = self.piece(most, what)?;
        let printable = !piece.is_empty() && piece.iter().all(u8::is_ascii_graphic);
        std::str::from_utf8(piece).ok().filter(|_| printable).ok_or(what)
    }
}
