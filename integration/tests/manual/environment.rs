//! `reference/environment.md` against the names of variables in the code.

use std::collections::BTreeSet;

use crate::page::{self, code};
use crate::sources;

/// What a variable of ours or of those we act for begins with.
const FAMILIES: [&str; 9] =
    ["BATON_", "TRTLLM_", "NIXL_", "UCX_", "HF_", "XDG_", "LISTEN_", "WATCHDOG_", "NOTIFY_"];

fn is_name(text: &str) -> bool {
    let rest = FAMILIES.iter().find_map(|family| text.strip_prefix(family));
    let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
    rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(plain))
}

fn shown(heading: &str) -> BTreeSet<String> {
    let rows = page::book("reference/environment.md").rows(heading);
    rows.iter().flat_map(|row| code(&row[0])).map(str::to_owned).collect()
}

#[test]
fn each_variable_of_the_code_is_on_the_page_and_the_other_way_round() {
    let mut named = BTreeSet::new();
    for folder in ["router/src", "workerd/src", "shared/src"] {
        for (path, text) in sources::below(folder) {
            // Marks of the stand-in for a GPU, which only tests have.
            if !path.starts_with("workerd/src/backend/cuda/emulated") {
                named.extend(sources::literals(&text).filter(|it| is_name(it)).map(str::to_owned));
            }
        }
    }
    // What a build is told is in the code too, but is no business of a running daemon.
    named.retain(|name| !shown("Building and testing").contains(name) || name.starts_with("XDG_"));
    let mut shown_here = shown("Daemons");
    shown_here.append(&mut shown("NIXL and UCX"));
    assert_eq!(shown_here, named);
}

#[test]
fn what_a_worker_sets_for_nixl_is_what_the_page_says() {
    let rows = page::book("reference/environment.md").rows("NIXL and UCX");
    let said = rows.iter().map(|row| (code(&row[0])[0].to_owned(), code(&row[1])[0].to_owned()));
    let mut said: Vec<(String, String)> = said.collect();
    let mut set = baton_workerd::handover::nixl::library::environment(&[]).unwrap();
    said.sort();
    set.sort();
    assert_eq!(said, set);
}

#[test]
fn variables_of_tests_and_builds_are_read_somewhere() {
    let mut texts: Vec<String> = ["Makefile", "integration/setup.sh", "shared/src/telemetry.rs"]
        .map(|path| page::read(path).text)
        .into();
    for folder in ["integration/tests", "workerd/src", "integration/src"] {
        texts.extend(sources::texts(folder));
    }
    for variable in shown("Building and testing") {
        assert!(texts.iter().any(|text| text.contains(&variable)), "{variable}");
    }
}
