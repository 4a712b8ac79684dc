//! Quantities that carry their unit in the value: `"30s"`, `"4GiB"`, `"50%"`.
//!
//! Decides how such a value is spelled and what it may be at all; what range a key allows is its section's
//! business. A duration without a unit is refused, as is a negative one.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A length of time, written `"500ms"`, `"30s"`, `"2m"` or `"1h"`; fractions are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seconds(pub Duration);

/// A number of bytes, written `"32MiB"`, `"1.5GiB"`, `"64kB"` or as a plain integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// A share, written `"50%"`, from 0 to 100 %.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Percent(f64);

/// What a quantity must look like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidQuantity(&'static str);

const SECONDS_RULE: InvalidQuantity =
    InvalidQuantity("must be a duration with a unit (ms, s, m, h), as in `30s`");
const BYTES_RULE: InvalidQuantity =
    InvalidQuantity("must be a size in bytes, as in `32MiB` (B, KiB, MiB, GiB, TiB, kB, MB, GB)");
const PERCENT_RULE: InvalidQuantity =
    InvalidQuantity("must be a share from `0%` to `100%`, as in `50%`");

const TIME_UNITS: [(&str, f64); 4] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];

/// Largest first, so that a value is printed in the largest unit that divides it.
const BYTE_UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("KB", 1_000),
    ("B", 1),
];

impl Seconds {
    /// Whole seconds.
    pub const fn new(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Milliseconds.
    pub const fn millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// As the standard library's type.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        seconds.0
    }
}

impl Bytes {
    /// Mebibytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as a length in this process; saturates where addresses are shorter.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Percent {
    /// `percent` of a hundred; `None` unless it is from 0 to 100.
    pub fn new(percent: f64) -> Option<Self> {
        (0.0..=100.0).contains(&percent).then_some(Self(percent))
    }

    /// From 0 to 1.
    pub fn fraction(self) -> f64 {
        self.0 / 100.0
    }
}

/// Splits `"1.5 GiB"` into a finite, non-negative number and its unit.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    Some((number.parse().ok()?, unit.trim_start()))
}

impl FromStr for Seconds {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let (number, unit) = number_and_unit(text).ok_or(SECONDS_RULE)?;
        let (_, scale) = TIME_UNITS.iter().find(|(name, _)| *name == unit).ok_or(SECONDS_RULE)?;
        Duration::try_from_secs_f64(number * scale).map(Self).map_err(|_| SECONDS_RULE)
    }
}

impl FromStr for Bytes {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        if let Ok(plain) = text.trim().parse() {
            return Ok(Self(plain));
        }
        let (number, unit) = number_and_unit(text).ok_or(BYTES_RULE)?;
        let (_, scale) = BYTE_UNITS.iter().find(|(name, _)| *name == unit).ok_or(BYTES_RULE)?;
        let bytes = number * *scale as f64;
        if bytes < 2f64.powi(63) { Ok(Self(bytes as u64)) } else { Err(BYTES_RULE) }
    }
}

impl FromStr for Percent {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        match number_and_unit(text) {
            Some((number, "%")) => Self::new(number).ok_or(PERCENT_RULE),
            Some(_) | None => Err(PERCENT_RULE),
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.subsec_nanos() == 0 {
            write!(f, "{}s", self.0.as_secs())
        } else {
            write!(f, "{}ms", self.0.as_secs_f64() * 1e3)
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, scale): &&(&str, u64)| self.0 != 0 && self.0.is_multiple_of(*scale);
        match BYTE_UNITS.iter().find(fits) {
            Some((unit, scale)) => write!(f, "{}{unit}", self.0 / scale),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// Reads a quantity from a string, and from an integer where `plain` allows it.
struct QuantityVisitor<T> {
    rule: InvalidQuantity,
    plain: fn(u64) -> Option<T>,
}

impl<T: FromStr<Err = InvalidQuantity>> Visitor<'_> for QuantityVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule.0.trim_start_matches("must be "))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.plain)(number).ok_or_else(|| E::custom(&self.rule))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        let number = u64::try_from(number).map_err(|_| E::custom(&self.rule))?;
        self.visit_u64(number)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(QuantityVisitor { rule: SECONDS_RULE, plain: |_| None })
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(QuantityVisitor { rule: BYTES_RULE, plain: |n| Some(Self(n)) })
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(QuantityVisitor { rule: PERCENT_RULE, plain: |_| None })
    }
}

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_with_units_are_read() {
        assert_eq!("30s".parse(), Ok(Seconds::new(30)));
        assert_eq!("500ms".parse(), Ok(Seconds::millis(500)));
        assert_eq!("2m".parse(), Ok(Seconds::new(120)));
        assert_eq!("1.5h".parse(), Ok(Seconds::new(5400)));
        assert_eq!("32MiB".parse(), Ok(Bytes::mib(32)));
        assert_eq!("4 GiB".parse(), Ok(Bytes::mib(4096)));
        assert_eq!("1.5KiB".parse(), Ok(Bytes(1536)));
        assert_eq!("1024".parse(), Ok(Bytes(1024)));
        assert_eq!("18446744073709551615".parse(), Ok(Bytes(u64::MAX)));
        assert_eq!("50%".parse::<Percent>().unwrap().fraction(), 0.5);
    }

    #[test]
    fn a_quantity_without_unit_or_out_of_range_is_refused() {
        for bad in ["30", "", "s", "-1s", "1d", "1e400s", "99999999999999999999999h", "1.2.3s"] {
            assert_eq!(bad.parse::<Seconds>(), Err(SECONDS_RULE), "{bad}");
        }
        for bad in ["", "MiB", "-1", "1XiB", "99999999999TiB", "4 apples"] {
            assert_eq!(bad.parse::<Bytes>(), Err(BYTES_RULE), "{bad}");
        }
        for bad in ["", "%", "101%", "-1%", "50"] {
            assert_eq!(bad.parse::<Percent>(), Err(PERCENT_RULE), "{bad}");
        }
    }

    #[test]
    fn printed_quantities_read_back_as_the_same() {
        for text in ["0s", "1s", "90s", "1.5ms", "250ms", "86400s"] {
            let value: Seconds = text.parse().unwrap();
            assert_eq!(value.to_string().parse(), Ok(value), "{text}");
        }
        for bytes in [0, 1, 1000, 1024, 1536, 5 << 20, 7 << 40] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }
        assert_eq!("12.5%".parse::<Percent>().unwrap().to_string(), "12.5%");
    }
}
