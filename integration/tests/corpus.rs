//! The fuzzers' committed corpus, replayed through their own targets: what a file says is read or refused, within
//! bounds, never a panic. A binary of its own, as its allocator counts and nothing may run beside it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod targets;

use targets::{Folder, checked, gguf_header, gguf_model, router, safetensors};

/// Every file whole, and cut at some places.
fn replay(name: &str, target: impl Fn(&[u8])) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for parts in (0..=8).rev() {
            checked(&bytes[..bytes.len() * parts / 8], &target);
        }
        files += 1;
    }
    files
}

#[test]
fn every_file_of_the_fuzzers_corpus_is_read_or_refused_within_bounds() {
    let folder = Folder::new("replay");
    assert!(replay("gguf_header", gguf_header) >= 5);
    assert!(replay("gguf_model", |bytes| gguf_model(bytes, &folder)) >= 5);
    assert!(replay("safetensors", |bytes| safetensors(bytes, &folder)) >= 4);
    assert!(replay("request", router::request) >= 3);
    assert!(replay("answer", router::answer) >= 4);
    assert!(replay("config", |bytes| router::config(bytes, &folder)) >= 2);
}
