//! Token ids as upstream's `prompt_token_ids_b64`: standard base64 of little-endian 32-bit integers.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Why a `prompt_token_ids_b64` is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTokenIds {
    /// Not base64.
    #[error("must be standard base64")]
    Encoding,
    /// Not whole integers.
    #[error("must hold whole 32-bit integers, {0} bytes are not a multiple of 4")]
    Length(usize),
    /// A negative integer.
    #[error("holds a negative id at position {0}")]
    Negative(usize),
}

/// `ids` as text.
pub fn encode(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// The ids in `text`.
pub fn decode(text: &str) -> Result<Vec<u32>, InvalidTokenIds> {
    let bytes = STANDARD.decode(text).map_err(|_| InvalidTokenIds::Encoding)?;
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(InvalidTokenIds::Length(bytes.len()));
    }
    let id = |(position, word): (usize, &[u8; 4])| {
        u32::try_from(i32::from_le_bytes(*word)).map_err(|_| InvalidTokenIds::Negative(position))
    };
    words.iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_the_round_trip() {
        for ids in [&[][..], &[1, 405, 13044], &[0, i32::MAX as u32]] {
            assert_eq!(decode(&encode(ids)).as_deref(), Ok(ids));
        }
        assert_eq!(encode(&[1, 405]), "AQAAAJUBAAA=");
    }

    #[test]
    fn what_is_not_a_list_of_ids_is_refused() {
        assert_eq!(decode("!"), Err(InvalidTokenIds::Encoding));
        assert_eq!(decode("AQAA"), Err(InvalidTokenIds::Length(3)));
        assert_eq!(decode("AQAAAP////8="), Err(InvalidTokenIds::Negative(1)));
    }
}
