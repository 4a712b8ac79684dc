//! See `baton_fuzz::gguf_model`.
#![no_main]

use std::sync::LazyLock;

use baton_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| Folder::new("gguf_model"));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = &*FOLDER;
    baton_fuzz::checked(bytes, |bytes| baton_fuzz::gguf_model(bytes, folder));
});
