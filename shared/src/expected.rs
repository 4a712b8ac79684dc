//! What serde says about a value that does not fit, as a rule a person can act on. Configuration files and
//! request bodies share it, so that the same mistake reads the same everywhere.

/// What must hold, from serde's `message`; `map` is what the format calls a set of keys with values.
pub(crate) fn rule(message: &str, map: &str) -> String {
    if message.starts_with("unknown variant ") {
        let known: Vec<String> = backticked(message).skip(1).map(|v| format!("`{v}`")).collect();
        return format!("must be one of {}", known.join(", "));
    }
    let is_type = message.starts_with("invalid type: ") || message.starts_with("invalid value: ");
    let expected = message.rsplit_once(", expected ").filter(|_| is_type);
    match expected {
        Some((_, expected)) => format!("must be {}", plain_type(expected, map)),
        None => message.trim_end_matches('\n').to_owned(),
    }
}

/// The parts of a message that stand in backticks.
pub(crate) fn backticked(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

/// A type in words.
fn plain_type(expected: &str, map: &str) -> String {
    let whole = |highest: u64| format!("a whole number from 0 to {highest}");
    match expected {
        "u8" => whole(u64::from(u8::MAX)),
        "u16" => whole(u64::from(u16::MAX)),
        "u32" => whole(u64::from(u32::MAX)),
        "u64" | "usize" => "a whole number, not negative".to_owned(),
        "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => map.to_owned(),
        other if other.starts_with("a nonzero ") => "a whole number from 1".to_owned(),
        other if other.starts_with("struct ") => map.to_owned(),
        other => other.to_owned(),
    }
}
