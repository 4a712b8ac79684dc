//! `reference/commands.md` holds what each program prints for `--help`. With `BATON_WRITE=1` it is written.

use std::fmt::Write;
use std::process::{Command, Stdio};

use baton_integration::files;

use crate::page;

const PAGE: &str = "docs/src/reference/commands.md";

/// Both daemons, and every tool whose name says that it is for users.
fn programs() -> Vec<String> {
    let mut programs = vec!["baton-router".to_owned(), "baton-workerd".to_owned()];
    let folder = std::fs::read_dir(files::top().join("integration/src/bin")).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut tools: Vec<String> = names
        .map(|name| name.trim_end_matches(".rs").to_owned())
        .filter(|name| name.starts_with("baton-"))
        .collect();
    tools.sort();
    programs.append(&mut tools);
    programs
}

/// What a program prints, as where there is no terminal.
fn help(program: &str) -> String {
    let mut command = Command::new(files::binary(program).unwrap());
    let output = command.arg("--help").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[test]
fn the_page_of_commands_holds_what_each_program_prints_for_help() {
    let page = page::read(PAGE);
    let (intro, _) = page.text.split_once("\n## ").unwrap_or((&page.text, ""));
    let mut expected = format!("{}\n", intro.trim_end());
    for program in programs() {
        let _ = write!(expected, "\n## `{program}`\n\n```text\n{}```\n", help(&program));
    }
    if std::env::var("BATON_WRITE").is_ok_and(|value| value == "1") {
        std::fs::write(files::top().join(PAGE), expected).unwrap();
        return;
    }
    assert_eq!(page.text, expected, "run `make reference` after a change of a program's options");
}
