//! See `baton_fuzz::gguf_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| baton_fuzz::checked(bytes, baton_fuzz::gguf_header));
