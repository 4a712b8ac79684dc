//! The keys Baton's daemons share, and the three things they sign: hand-over records, release calls, and
//! TensorRT-LLM's `x-trtllm-disagg-auth`. Each use derives its own key, so that no tag of one is good for another;
//! only upstream's header uses the raw key, because upstream does. Comparisons take the same time whatever differs.

use std::fmt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, Mac};
use sha2::Sha256;

type HmacSha256 = Hmac<Sha256>;

/// Longest line of a key file, in bytes.
const MAX_KEY_BYTES: usize = 1024;
/// Most keys of a file.
const MAX_KEYS: usize = 16;
/// Shortest key of a file, in bytes: shorter ones can be guessed.
const MIN_KEY_BYTES: usize = 16;

/// Header of a release call; its value is `sha256=<hex>`.
pub const RELEASE_HEADER: &str = "x-baton-release-auth";
/// Upstream's header on generation requests that carry hand-over state; its value is `sha256=<hex>`.
pub const DISAGG_HEADER: &str = "x-trtllm-disagg-auth";

/// What a derived key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The tag of a hand-over record.
    Record,
    /// A release call's body.
    Release,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Record => b"baton/record/1",
            Self::Release => b"baton/release/1",
        }
    }
}

/// Shared keys: the first signs, all verify, so that keys can be rotated. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    keys: Vec<Vec<u8>>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", if self.authenticate() { self.keys.len() } else { 0 })
    }
}

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Not readable.
    #[error("{}: {source}", file.display())]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A line that is no key.
    #[error("{}:{line}: {rule}", file.display())]
    Line {
        /// Which file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the line breaks.
        rule: &'static str,
    },
}

impl Keys {
    /// No key: tags are checksums against accidents (the empty key), not authentication.
    pub fn none() -> Self {
        Self { keys: vec![Vec::new()] }
    }

    /// The one key of a configuration that names it directly, as TensorRT-LLM's does.
    pub fn single(key: impl Into<Vec<u8>>) -> Self {
        Self { keys: vec![key.into()] }
    }

    /// Reads a file of one key a line.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn load(file: &Path) -> Result<Self, KeysError> {
        let text = std::fs::read(file)
            .map_err(|source| KeysError::Unreadable { file: file.to_owned(), source })?;
        Self::parse(&text, file)
    }

    /// One key a line; empty lines are skipped, `file` is for messages.
    ///
    /// # Errors
    /// [`KeysError::Line`] for a line that is too short or long, has space around it, starts with `#` or repeats
    /// another; also for a file without keys.
    pub fn parse(text: &[u8], file: &Path) -> Result<Self, KeysError> {
        let refuse = |line, rule| KeysError::Line { file: file.to_owned(), line, rule };
        let mut keys: Vec<Vec<u8>> = Vec::new();
        for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
            let key = line.strip_suffix(b"\r").unwrap_or(line);
            if key.is_empty() {
                continue;
            }
            let rule = if key[0] == b'#' {
                "a key must not start with `#` (every line is a key, there are no comments)"
            } else if key.trim_ascii().len() != key.len() {
                "a key must not start or end with white space"
            } else if key.len() < MIN_KEY_BYTES {
                "a key must have at least 16 bytes"
            } else if key.len() > MAX_KEY_BYTES {
                "a key must have at most 1024 bytes"
            } else if keys.iter().any(|other| other == key) {
                "this key was given before"
            } else if keys.len() == MAX_KEYS {
                "at most 16 keys are allowed"
            } else {
                keys.push(key.to_vec());
                continue;
            };
            return Err(refuse(index + 1, rule));
        }
        if keys.is_empty() {
            return Err(refuse(1, "there is no key in this file"));
        }
        Ok(Self { keys })
    }

    /// Whether tags authenticate (there is a key) or are only checksums.
    pub fn authenticate(&self) -> bool {
        self.keys.iter().any(|key| !key.is_empty())
    }

    /// Tag of `message`, by the first key, with the id of that key.
    pub fn sign(&self, purpose: Purpose, message: &[u8]) -> ([u8; 4], [u8; 32]) {
        let key = self.keys.first().map_or(&[][..], Vec::as_slice);
        (key_id(key), tag(&derived(key, purpose), message))
    }

    /// Id of the key that [`Self::sign`] uses: says which key made a tag, and nothing about the key.
    pub fn signing_id(&self) -> [u8; 4] {
        key_id(self.keys.first().map_or(&[], Vec::as_slice))
    }

    /// Whether one of our keys of this id made the tag.
    pub fn verify(&self, purpose: Purpose, id: [u8; 4], message: &[u8], tag: &[u8]) -> bool {
        self.keys.iter().filter(|key| key_id(key) == id).any(|key| {
            let derived = derived(key, purpose);
            mac(&derived).chain_update(message).verify_slice(tag).is_ok()
        })
    }

    /// Value of [`RELEASE_HEADER`] for a body.
    pub fn sign_release(&self, body: &[u8]) -> String {
        header_value(&self.sign(Purpose::Release, body).1)
    }

    /// Whether a release call's header fits its body; without a configured key every header, or none, does.
    pub fn verify_release(&self, body: &[u8], header: Option<&str>) -> bool {
        self.verify_header(header, |key, claimed| {
            mac(&derived(key, Purpose::Release)).chain_update(body).verify_slice(claimed).is_ok()
        })
    }

    /// Value of [`DISAGG_HEADER`], or nothing without a configured key. `endpoint` is `ctx_info_endpoint`, of a
    /// list its first element.
    pub fn sign_disagg(&self, endpoint: Option<&str>, state: Option<&str>) -> Option<String> {
        let key = self.keys.first().filter(|key| !key.is_empty())?;
        Some(header_value(&tag(key, canonical(endpoint, state).as_bytes())))
    }

    /// Whether a generation request's header fits; without a configured key every header, or none, does.
    pub fn verify_disagg(
        &self,
        endpoint: Option<&str>,
        state: Option<&str>,
        header: Option<&str>,
    ) -> bool {
        self.verify_header(header, |key, claimed| {
            let message = canonical(endpoint, state);
            mac(key).chain_update(message).verify_slice(claimed).is_ok()
        })
    }

    fn verify_header(&self, header: Option<&str>, check: impl Fn(&[u8], &[u8]) -> bool) -> bool {
        if !self.authenticate() {
            return true;
        }
        let claimed = header.and_then(|header| header.strip_prefix("sha256=")).and_then(from_hex);
        claimed.is_some_and(|claimed| self.keys.iter().any(|key| check(key, &claimed)))
    }
}

/// Upstream's signed payload: sorted members, no spaces, everything beyond ASCII escaped.
fn canonical(endpoint: Option<&str>, state: Option<&str>) -> String {
    let mut text = String::from("{\"ctx_info_endpoint\":");
    push_json(&mut text, endpoint);
    text.push_str(",\"encoded_opaque_state\":");
    push_json(&mut text, state);
    text.push('}');
    text
}

/// A JSON string as Python's `json.dumps` writes it, or `null`.
fn push_json(text: &mut String, value: Option<&str>) {
    let Some(value) = value else {
        text.push_str("null");
        return;
    };
    text.push('"');
    for character in value.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            ' '..='~' => text.push(character),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    text.push('"');
}

fn derived(key: &[u8], purpose: Purpose) -> [u8; 32] {
    tag(key, purpose.label())
}

fn key_id(key: &[u8]) -> [u8; 4] {
    let [a, b, c, d, ..] = tag(key, b"baton/key-id/1");
    [a, b, c, d]
}

fn tag(key: &[u8], message: &[u8]) -> [u8; 32] {
    mac(key).chain_update(message).finalize().into_bytes().into()
}

fn mac(key: &[u8]) -> HmacSha256 {
    <HmacSha256 as Mac>::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn header_value(tag: &[u8; 32]) -> String {
    tag.iter().fold(String::from("sha256="), |text, byte| text + &format!("{byte:02x}"))
}

/// Exactly 32 bytes of lower- or upper-case hex.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(lines: &str) -> Keys {
        Keys::parse(lines.as_bytes(), Path::new("keys")).unwrap()
    }

    const OLD: &str = "old-key-0123456789";
    const NEW: &str = "new-key-0123456789";

    #[test]
    fn the_first_key_signs_and_all_verify() {
        let (before, during, after) = (keys(OLD), keys(&format!("{NEW}\r\n\n{OLD}\n")), keys(NEW));
        let (id, tag) = before.sign(Purpose::Record, b"message");
        assert!(during.verify(Purpose::Record, id, b"message", &tag));
        assert!(!after.verify(Purpose::Record, id, b"message", &tag));
        let (id, tag) = during.sign(Purpose::Record, b"message");
        assert_eq!(id, during.signing_id());
        assert!(after.verify(Purpose::Record, id, b"message", &tag));
        assert!(!before.verify(Purpose::Record, id, b"message", &tag));
    }

    #[test]
    fn a_tag_is_good_for_one_purpose_and_one_message_only() {
        let keys = keys(NEW);
        let (id, tag) = keys.sign(Purpose::Record, b"message");
        assert!(!keys.verify(Purpose::Release, id, b"message", &tag));
        assert!(!keys.verify(Purpose::Record, id, b"massage", &tag));
        assert!(!keys.verify(Purpose::Record, id, b"message", &tag[..31]));
    }

    #[test]
    fn a_line_that_is_no_key_is_named() {
        let long = "x".repeat(1025);
        for (text, at) in [
            ("", "keys:1: there is no key"),
            ("\n\nshort\n", "keys:3: a key must have at least 16"),
            (" leading-space-0123", "keys:1: a key must not start or end"),
            ("# a comment, not a key", "keys:1: a key must not start with `#`"),
            ("same-key-0123456789\nsame-key-0123456789", "keys:2: this key was given"),
            (long.as_str(), "keys:1: a key must have at most 1024"),
        ] {
            let error = Keys::parse(text.as_bytes(), Path::new("keys")).unwrap_err().to_string();
            assert!(error.starts_with(at), "{error}");
        }
        let missing = Keys::load(Path::new("/nonexistent/keys")).unwrap_err().to_string();
        assert!(missing.starts_with("/nonexistent/keys: "), "{missing}");
    }

    #[test]
    fn a_release_call_needs_its_header_only_where_a_key_is_configured() {
        let body = br#"{"disagg_request_id":7}"#;
        let (with, without) = (keys(&format!("{NEW}\n{OLD}")), Keys::none());
        assert!(with.verify_release(body, Some(&keys(OLD).sign_release(body))));
        assert!(!with.verify_release(b"{}", Some(&with.sign_release(body))));
        assert!(!with.verify_release(body, None));
        assert!(!with.verify_release(body, Some("sha256=00")));
        assert!(without.verify_release(body, None));
        assert!(without.verify_release(body, Some(&with.sign_release(body))));
    }

    #[test]
    fn upstreams_header_is_hmac_over_pythons_canonical_json() {
        // Python: json.dumps({...}, sort_keys=True, separators=(",", ":"))
        assert_eq!(
            canonical(Some("h\"\\/\u{e9}\u{1f600}\n\u{7f}"), None),
            r#"{"ctx_info_endpoint":"h\"\\/\u00e9\ud83d\ude00\n\u007f","encoded_opaque_state":null}"#
        );
        let single = Keys::single("k");
        // printf '{"ctx_info_endpoint":null,"encoded_opaque_state":"QQ=="}' | openssl dgst -sha256 -hmac k
        let value = single.sign_disagg(None, Some("QQ==")).unwrap();
        assert_eq!(value, DISAGG_EXAMPLE);
        assert!(single.verify_disagg(None, Some("QQ=="), Some(&value)));
        assert!(!single.verify_disagg(None, Some("QQ="), Some(&value)));
        assert!(!single.verify_disagg(None, Some("QQ=="), None));
        assert!(Keys::none().verify_disagg(None, Some("QQ=="), Some(&value)));
        assert_eq!(Keys::none().sign_disagg(None, None), None);
    }

    #[test]
    fn keys_are_never_printed() {
        assert_eq!(format!("{:?} {:?}", keys(NEW), Keys::none()), "Keys(1) Keys(0)");
    }

    const DISAGG_EXAMPLE: &str =
        "sha256=48853c7c208f690b8c1d009baf81f0f8dae418a346639b196d5414fb070be9f1";
}
