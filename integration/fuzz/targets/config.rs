//! See `baton_fuzz::router::config`.
#![no_main]

use std::sync::LazyLock;

use baton_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| Folder::new("config"));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = &*FOLDER;
    baton_fuzz::checked(bytes, |bytes| baton_fuzz::router::config(bytes, folder));
});
