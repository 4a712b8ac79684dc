//! Who may use `/admin/*`: whoever presents the bearer token of `server.admin_token_file`. Comparisons take the same time
//! whatever differs.

use std::fmt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Longest token, in bytes.
const LONGEST: usize = 1024;
/// Shortest token, in bytes: shorter ones can be guessed.
const SHORTEST: usize = 16;

/// An operator's token. Never printed.
pub struct Token {
    token: Vec<u8>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// A token file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not readable.
    #[error("{}: {source}", file.display())]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// Not one line of 16 to 1024 visible ASCII characters.
    #[error("{}: must be one line of {SHORTEST} to {LONGEST} visible ASCII characters", file.display())]
    Shape {
        /// Which file.
        file: PathBuf,
    },
}

impl Token {
    /// Reads a file of one line.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn load(file: &Path) -> Result<Self, TokenError> {
        let file = file.to_owned();
        match std::fs::read(&file) {
            Ok(text) => Self::parse(&text).ok_or(TokenError::Shape { file }),
            Err(source) => Err(TokenError::Unreadable { file, source }),
        }
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let token = text.trim_ascii_end();
        let is_token =
            (SHORTEST..=LONGEST).contains(&token.len()) && token.iter().all(u8::is_ascii_graphic);
        is_token.then(|| Self { token: token.to_vec() })
    }

    /// Whether an `Authorization` header presents it.
    pub fn is_in(&self, header: Option<&[u8]>) -> bool {
        let Some((scheme, given)) = header.and_then(|header| header.split_at_checked(7)) else {
            return false;
        };
        // Tags instead of tokens are compared: in constant time, and of the same length.
        let tag = self.mac().chain_update(&self.token).finalize().into_bytes();
        scheme.eq_ignore_ascii_case(b"bearer ")
            && self.mac().chain_update(given.trim_ascii()).verify(&tag).is_ok()
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.token).expect("HMAC takes keys of any length")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_itself_is_accepted() {
        let token = Token::parse(b"0123456789abcdef\n").unwrap();
        for good in ["Bearer 0123456789abcdef", "bearer  0123456789abcdef "] {
            assert!(token.is_in(Some(good.as_bytes())), "{good}");
        }
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcde",
            "Basic 0123456789abcdef",
            "Bearer 0123456789abcdefg",
            "0123456789abcdef",
        ] {
            assert!(!token.is_in(Some(bad.as_bytes())), "{bad}");
        }
        assert!(!token.is_in(None));
        assert_eq!(format!("{token:?}"), "Token");
    }

    #[test]
    fn a_token_is_one_line_of_visible_characters_long_enough() {
        let long = "x".repeat(1025);
        for bad in ["", "short", "0123456789 abcdef", "0123456789abcdef\nfedcba9876543210", &long] {
            assert!(Token::parse(bad.as_bytes()).is_none(), "{bad}");
        }
        let error = Token::load(Path::new("/none/token")).unwrap_err().to_string();
        assert!(error.starts_with("/none/token: "), "{error}");
    }
}
