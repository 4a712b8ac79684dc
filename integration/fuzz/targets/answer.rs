//! See `baton_fuzz::router::answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| baton_fuzz::checked(bytes, baton_fuzz::router::answer));
