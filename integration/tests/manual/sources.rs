//! The code as text, for what a reference page must name and only the text tells.

use std::path::{Path, PathBuf};

use baton_integration::files;

/// Every source file below `folder` but those of tests, up to its own tests.
pub fn below(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(files::top().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            let is_test = path
                .file_stem()
                .is_some_and(|name| name.to_string_lossy().ends_with("tests") || name == "testing");
            if is_test {
                continue;
            }
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push((path.clone(), body(&path)));
            }
        }
    }
    found
}

/// A file up to its tests, without comments.
pub fn body(path: &Path) -> String {
    let text = std::fs::read_to_string(files::top().join(path)).unwrap();
    let body = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    let code = body.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.map(|line| format!("{line}\n")).collect()
}

/// Its string literals without escapes.
pub fn literals(text: &str) -> impl Iterator<Item = &str> {
    text.split('"').skip(1).step_by(2)
}

/// Every source file below `folder` as it is, tests too.
pub fn texts(folder: &str) -> Vec<String> {
    let mut texts = Vec::new();
    let mut folders = vec![files::top().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|ending| ending == "rs") {
                texts.push(std::fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    texts
}
