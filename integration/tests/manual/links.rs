//! Every relative link of the documentation leads to something: a file of the tree, and in it a heading.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use baton_integration::files;

use crate::page::{self, Page};

/// A link as it is written.
#[derive(Debug, PartialEq)]
struct Link<'a> {
    line: usize,
    target: &'a str,
}

fn pages() -> Vec<Page> {
    let mut paths = page::below("docs/src");
    let tops = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"].map(PathBuf::from);
    paths.extend(tops.into_iter().filter(|path| files::top().join(path).exists()));
    paths.iter().map(page::read).collect()
}

/// `](target)` outside of code.
fn links(page: &Page) -> Vec<Link<'_>> {
    let mut links = Vec::new();
    for (line, text) in page.prose() {
        for part in text.split('`').step_by(2) {
            let mut rest = part;
            while let Some((_, after)) = rest.split_once("](") {
                let (target, after) = after.split_once(')').unwrap_or((after, ""));
                links.push(Link { line, target });
                rest = after;
            }
        }
    }
    links
}

/// What mdBook and GitHub make of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// A page's anchors; of equal ones the second is `x-1`.
fn anchors(page: &Page) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut numbered = |anchor: String| {
        let times = seen.entry(anchor.clone()).or_default();
        *times += 1;
        if *times == 1 { anchor } else { format!("{anchor}-{}", *times - 1) }
    };
    page.headings().map(|(_, heading)| numbered(anchor(heading))).collect()
}

/// `a/../b` as `b`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

#[test]
fn every_link_of_the_documentation_leads_to_a_file_and_a_heading() {
    let mut wrong = String::new();
    for page in pages() {
        for Link { line, target } in links(&page) {
            if target.starts_with("https://") || target.starts_with("http://") {
                continue;
            }
            let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
            let to = match file {
                "" => page.path.clone(),
                file => plain(&page.path.parent().unwrap().join(file)),
            };
            let place = format!("{}:{line}: `{target}`", page.path.display());
            if !files::top().join(&to).exists() {
                let _ = writeln!(wrong, "{place}: there is no {}", to.display());
            } else if page.path.starts_with("docs") && !to.starts_with("docs/src") {
                let _ = writeln!(wrong, "{place} leads out of the book");
            } else if !fragment.is_empty() && !anchors(&page::read(&to)).contains(&fragment.into())
            {
                let _ = writeln!(wrong, "{place}: no such heading there");
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn every_page_of_the_book_is_in_its_summary_once() {
    let summary = page::book("SUMMARY.md");
    let mut listed: Vec<PathBuf> =
        links(&summary).iter().map(|link| Path::new("docs/src").join(link.target)).collect();
    listed.sort();
    let mut there = page::below("docs/src");
    there.retain(|path| *path != summary.path);
    assert_eq!(listed, there);
}

#[test]
fn links_are_found_outside_of_code_and_headings_have_githubs_anchors() {
    let text = "a [b](c.md#d) `[x](y)` [e](f)\n```\n[no](no)\n```\n# Hello, `W`orld!\n## A\n## A\n";
    let page = Page { path: PathBuf::new(), text: text.to_owned() };
    let targets: Vec<&str> = links(&page).iter().map(|link| link.target).collect();
    assert_eq!(targets, ["c.md#d", "f"]);
    assert_eq!(anchors(&page), ["hello-world", "a", "a-1"]);
    assert_eq!(
        plain(Path::new("docs/src/use/../inside/./x.md")),
        Path::new("docs/src/inside/x.md")
    );
}

#[test]
fn the_files_that_contributors_are_sent_to_exist() {
    let tops = ["shared/", "router/", "workerd/", "integration/", "config/", "docs/", ".ci/"];
    let page = page::read("CONTRIBUTING.md");
    let named = page.prose().flat_map(|(_, line)| page::code(line));
    let named: Vec<&str> = named.filter(|it| tops.iter().any(|top| it.starts_with(top))).collect();
    assert!(named.len() > 20, "{named:?}");
    for path in named.iter().filter(|path| !path.contains("NAME") && !path.contains('*')) {
        assert!(files::top().join(path).exists(), "{path}");
    }
}
