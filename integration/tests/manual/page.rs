//! A page of Markdown as tests want it: headings, tables and fenced blocks. No more of the language than our pages use.

use std::path::{Path, PathBuf};

use baton_integration::files;

/// One page.
pub struct Page {
    /// Relative to the top folder.
    pub path: PathBuf,
    pub text: String,
}

/// What stands between two headings.
#[derive(Debug)]
pub struct Section {
    /// From the page's title down to this one.
    pub headings: Vec<String>,
    /// Rows of its tables, without their heads; a cell is text.
    pub rows: Vec<Vec<String>>,
}

/// A fenced block.
#[derive(Debug)]
pub struct Fence {
    /// What stands behind the opening fence.
    pub info: String,
    /// Of its first line, from 1.
    pub line: usize,
    pub text: String,
}

/// A page by its place below the top folder.
pub fn read(path: impl AsRef<Path>) -> Page {
    let text = std::fs::read_to_string(files::top().join(&path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()));
    Page { path: path.as_ref().to_owned(), text }
}

/// A page of the book by its place below `docs/src`.
pub fn book(path: &str) -> Page {
    read(Path::new("docs/src").join(path))
}

/// The path of every page below `folder`, relative to the top folder, in order.
pub fn below(folder: &str) -> Vec<PathBuf> {
    let mut pages = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(files::top().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    pages
}

impl Page {
    /// Lines outside of fenced blocks, with their numbers from 1.
    pub fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut fenced = false;
        (1..).zip(self.text.lines()).filter(move |(_, line)| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fence && !fenced
        })
    }

    /// Fenced blocks, in order.
    pub fn fences(&self) -> Vec<Fence> {
        let mut fences: Vec<Fence> = Vec::new();
        let mut open = false;
        for (line, text) in (1..).zip(self.text.lines()) {
            if let Some(info) = text.trim_start().strip_prefix("```") {
                open = !open;
                if open {
                    let info = info.trim().to_owned();
                    fences.push(Fence { info, line: line + 1, text: String::new() });
                }
            } else if open {
                let fence = fences.last_mut().unwrap();
                fence.text.push_str(text);
                fence.text.push('\n');
            }
        }
        fences
    }

    /// Its headings with their levels, from 1, in order.
    pub fn headings(&self) -> impl Iterator<Item = (usize, &str)> {
        self.prose().filter_map(|(_, line)| {
            let level = line.bytes().take_while(|byte| *byte == b'#').count();
            let title = line.get(level..)?.strip_prefix(' ')?;
            (level > 0).then_some((level, title.trim()))
        })
    }

    /// Its sections, in order.
    pub fn sections(&self) -> Vec<Section> {
        let mut headings: Vec<String> = Vec::new();
        let mut sections = vec![Section { headings: Vec::new(), rows: Vec::new() }];
        let mut in_table = false;
        for (_, line) in self.prose() {
            let level = line.bytes().take_while(|byte| *byte == b'#').count();
            if level > 0 && line.as_bytes().get(level) == Some(&b' ') {
                headings.truncate(level - 1);
                headings.push(line[level..].trim().to_owned());
                sections.push(Section { headings: headings.clone(), rows: Vec::new() });
            }
            let row = cells(line);
            // The first line of a table is its head, the second is dashes.
            let is_body = in_table && !row.iter().all(|cell| cell.trim_matches('-').is_empty());
            in_table = !row.is_empty();
            if is_body && in_table {
                sections.last_mut().unwrap().rows.push(row);
            }
        }
        sections
    }

    /// The rows below a heading; it must be there.
    pub fn rows(&self, heading: &str) -> Vec<Vec<String>> {
        let mut sections = self.sections().into_iter();
        let found =
            sections.find(|section| section.headings.last().is_some_and(|it| it == heading));
        let section = found.unwrap_or_else(|| panic!("{}: no `{heading}`", self.path.display()));
        assert!(!section.rows.is_empty(), "{}: no table at `{heading}`", self.path.display());
        section.rows
    }
}

/// The cells of a table's line; none of any other.
fn cells(line: &str) -> Vec<String> {
    let Some(inner) = line.strip_prefix('|').and_then(|rest| rest.trim_end().strip_suffix('|'))
    else {
        return Vec::new();
    };
    let hidden = inner.replace("\\|", "\u{1}");
    hidden.split('|').map(|cell| cell.trim().replace('\u{1}', "|")).collect()
}

/// What stands in backticks, in order.
pub fn code(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn sections_have_their_tables_and_fences_hide_what_they_hold() {
    let text = "# A\n| k | v |\n| --- | --- |\n| `a` | 1 \\| 2 |\n\n```sh run\n# no heading\n| x | y |\n```\n## B\nx\n";
    let page = Page { path: PathBuf::new(), text: text.to_owned() };
    let sections = page.sections();
    assert_eq!(sections[1].rows, [["`a`", "1 | 2"]]);
    assert_eq!(sections[2].headings, ["A", "B"]);
    let fences = page.fences();
    assert_eq!((fences[0].info.as_str(), fences[0].line), ("sh run", 7));
    assert_eq!(fences[0].text, "# no heading\n| x | y |\n");
}
