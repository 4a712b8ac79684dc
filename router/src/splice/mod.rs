//! JSON bodies stay bytes: find members in one pass, cut and insert slices, build no tree.

pub mod edit;
pub mod scan;

#[cfg(test)]
pub mod testing {
    //! Random JSON documents from a seed, with the value a strict parser reads from them.

    use serde_json::{Map, Value};

    /// A small deterministic source of choices (SplitMix64).
    pub struct Source(u64);

    impl Source {
        /// The same seed makes the same choices.
        pub fn new(seed: u64) -> Self {
            Self(seed)
        }

        /// A number in `0..limit`.
        pub fn below(&mut self, limit: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % limit as u64) as usize
        }
    }

    /// An object with random white space and escapes, and its value.
    pub fn document(source: &mut Source) -> (String, Value) {
        let mut text = String::new();
        space(source, &mut text);
        let value = object(source, &mut text, 4);
        space(source, &mut text);
        (text, value)
    }

    fn space(source: &mut Source, text: &mut String) {
        for _ in 0..source.below(4).saturating_sub(1) {
            text.push([' ', '\n', '\r', '\t'][source.below(4)]);
        }
    }

    fn object(source: &mut Source, text: &mut String, depth: usize) -> Value {
        const NAMES: [&str; 9] = [
            "stream",
            "prompt",
            "disaggregated_params",
            "n",
            "messages",
            "model",
            "ü",
            "",
            "a]}{[\u{1f600}",
        ];
        let mut map = Map::new();
        text.push('{');
        space(source, text);
        for name in NAMES {
            if source.below(3) > 0 {
                continue;
            }
            if !map.is_empty() {
                text.push(',');
                space(source, text);
            }
            text.push_str(&format!("\"{name}\""));
            space(source, text);
            text.push(':');
            space(source, text);
            map.insert(name.to_owned(), any(source, text, depth - 1));
            space(source, text);
        }
        text.push('}');
        Value::Object(map)
    }

    fn any(source: &mut Source, text: &mut String, depth: usize) -> Value {
        match source.below(if depth == 0 { 4 } else { 7 }) {
            0 => literal(source, text),
            1 | 2 => string(source, text),
            3 => {
                let number = ["0", "-1", "1.5e3", "12345678901", "-0.25"][source.below(5)];
                text.push_str(number);
                serde_json::from_str(number).unwrap()
            }
            4 => object(source, text, depth),
            _ => array(source, text, depth),
        }
    }

    fn literal(source: &mut Source, text: &mut String) -> Value {
        let literal = ["true", "false", "null"][source.below(3)];
        text.push_str(literal);
        serde_json::from_str(literal).unwrap()
    }

    fn array(source: &mut Source, text: &mut String, depth: usize) -> Value {
        let numbers = source.below(2) == 0;
        let mut values = Vec::new();
        text.push('[');
        space(source, text);
        for index in 0..source.below(6) {
            if index > 0 {
                text.push(',');
                space(source, text);
            }
            values.push(if numbers && source.below(8) > 0 {
                let number = source.below(50_000);
                text.push_str(&number.to_string());
                Value::from(number)
            } else {
                any(source, text, depth - 1)
            });
            space(source, text);
        }
        text.push(']');
        Value::Array(values)
    }

    fn string(source: &mut Source, text: &mut String) -> Value {
        const PIECES: [&str; 12] =
            ["a", "\\\"", "\\\\", "\\n", "\\u00e9", "[", "]", "{", "}", ",", ":", "naïve 😀 "];
        let from = text.len();
        text.push('"');
        for _ in 0..source.below(12) {
            text.push_str(PIECES[source.below(12)]);
        }
        text.push('"');
        serde_json::from_str(&text[from..]).unwrap()
    }
}
