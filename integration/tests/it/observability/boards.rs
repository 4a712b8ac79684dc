//! The shipped boards as files: of Grafana's shape, consistent with each other; and the queries in them.

use std::collections::HashSet;

use baton_integration::files;
use serde_json::Value;

/// One query of one panel.
#[derive(Debug)]
pub struct Query {
    /// Board and panel.
    pub place: String,
    pub text: String,
}

/// The boards, by file name.
pub fn boards() -> Vec<(String, Value)> {
    let folder = files::top().join("config/grafana");
    let mut boards: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "json"))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
        })
        .collect();
    boards.sort_by(|(one, _), (other, _)| one.cmp(other));
    boards
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The panels of a board that show something.
fn panels(board: &Value) -> impl Iterator<Item = &Value> {
    list(board, "panels").iter().filter(|panel| panel["type"] != "row")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// As Grafana would ask with every variable at "All".
pub fn filled(query: &str) -> String {
    let mut query = query.replace("$__rate_interval", "1m");
    for variable in ["$job", "$instance", "$role"] {
        query = query.replace(variable, ".+");
    }
    assert!(!query.contains('$'), "a variable without a value: {query}");
    query
}

/// Every query of every panel.
pub fn queries() -> Vec<Query> {
    let mut queries = Vec::new();
    for (name, board) in boards() {
        for panel in panels(&board) {
            let place = format!("{name}: {}", text(panel, "title"));
            let targets = list(panel, "targets").iter();
            queries.extend(
                targets.map(|target| Query {
                    place: place.clone(),
                    text: filled(text(target, "expr")),
                }),
            );
        }
    }
    queries
}

/// What the variables of the boards are filled from: a selector and the label of its series.
pub fn variables() -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for (_, board) in boards() {
        for variable in list(&board["templating"], "list") {
            let Some(inner) = text(&variable["query"], "query").strip_prefix("label_values(")
            else {
                assert_eq!(variable["type"], "datasource", "{variable}");
                continue;
            };
            let (selector, label) = inner.trim_end_matches(')').rsplit_once(", ").unwrap();
            variables.push((filled(selector), label.to_owned()));
        }
    }
    variables
}

#[test]
fn the_boards_are_whole_and_alike() {
    let boards = boards();
    let names: Vec<_> = boards.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["handover.json", "overview.json", "router.json", "worker.json"]);
    let mut ids = HashSet::new();
    for (name, board) in &boards {
        assert!(ids.insert(text(board, "uid")), "{name}: its uid is another board's too");
        assert_eq!(board["schemaVersion"], 39, "{name}");
        assert!(!text(board, "title").is_empty() && !text(board, "description").is_empty());
        assert_eq!(board["tags"], serde_json::json!(["baton"]), "{name}");
        let first = &list(&board["templating"], "list")[0];
        assert_eq!((text(first, "name"), text(first, "type")), ("datasource", "datasource"));
        let mut panel_ids = HashSet::new();
        for panel in list(board, "panels") {
            assert!(panel_ids.insert(panel["id"].as_u64().unwrap()), "{name}: an id twice");
        }
        for panel in panels(board) {
            let place = format!("{name}: {}", text(panel, "title"));
            assert!(!text(panel, "description").is_empty(), "{place} says nothing");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{place}");
            let defaults = &panel["fieldConfig"]["defaults"];
            assert!(defaults["unit"].is_string(), "{place} has no unit");
            assert!(!list(&defaults["thresholds"], "steps").is_empty(), "{place}");
            assert!(!list(panel, "targets").is_empty(), "{place} asks nothing");
        }
    }
}

#[test]
fn panels_lie_side_by_side_and_not_on_each_other() {
    for (name, board) in boards() {
        let mut taken = HashSet::new();
        for panel in list(&board, "panels") {
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(at("x") + at("w") <= 24, "{name}: {}", panel["title"]);
            for (x, y) in (at("x")..at("x") + at("w"))
                .flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y)))
            {
                assert!(taken.insert((x, y)), "{name}: {} lies on another", panel["title"]);
            }
        }
    }
}
