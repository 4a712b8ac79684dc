//! The shipped rules by themselves: `promtool` finds nothing, every alert has its cases and its page in the manual.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use baton_integration::files;

use crate::support::{finished, skipped};

/// Whether `promtool` and `prometheus` are there; else the test is skipped by name.
pub async fn has_prometheus(test: &str) -> bool {
    for tool in ["promtool", "prometheus"] {
        let mut which = Command::new("sh");
        which.args(["-c", &format!("command -v {tool}")]);
        if !finished(which).await.status.success() {
            skipped(test, &format!("there is no `{tool}` (Debian package prometheus)"));
            return false;
        }
    }
    true
}

/// Runs `promtool` in `folder`; it must find nothing.
pub async fn promtool(folder: &Path, args: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("promtool {args}")]).current_dir(folder);
    let output = finished(command).await;
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && err.is_empty(), "promtool {args}:\n{out}{err}");
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(files::top().join(relative)).unwrap()
}

/// What follows `key` on lines of a YAML file.
pub fn values<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| line.trim().trim_start_matches("- ").strip_prefix(key))
}

#[tokio::test]
async fn promtool_finds_nothing_in_the_shipped_rules_and_each_alert_fires_when_it_should() {
    if !has_prometheus("promtool_finds_nothing_in_the_shipped_rules").await {
        return;
    }
    let folder = files::top().join("config/prometheus");
    promtool(&folder, "check config prometheus.yml").await;
    promtool(&folder, "check rules rules/*.yml").await;
    promtool(&folder, "test rules tests/*.yml").await;
}

#[test]
fn every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() {
    let (alerts, tests) =
        (read("config/prometheus/rules/alerts.yml"), read("config/prometheus/tests/alerts.yml"));
    let mut cases: HashMap<&str, [usize; 2]> = HashMap::new();
    for case in tests.split("alertname: ").skip(1) {
        let name = case.lines().next().unwrap();
        let is_quiet = case.contains("exp_alerts: []");
        cases.entry(name).or_default()[usize::from(is_quiet)] += 1;
    }
    let names: Vec<_> = values(&alerts, "alert: ").collect();
    assert!(names.len() > 20, "{names:?}");
    for name in &names {
        assert_eq!(cases.remove(name), Some([1, 1]), "{name}: cases that fire, and that do not");
    }
    assert!(cases.is_empty(), "cases of no alert: {cases:?}");
}

#[test]
fn every_alert_has_its_page_in_the_manual_and_every_page_its_alert() {
    let (alerts, manual) =
        (read("config/prometheus/rules/alerts.yml"), read("docs/src/operate/runbooks.md"));
    let mut names: Vec<_> = values(&alerts, "alert: ").collect();
    let urls: Vec<_> = values(&alerts, "runbook_url: ").collect();
    let wanted = |name: &&str| format!("operate/runbooks.html#{}", name.to_lowercase());
    assert_eq!(urls, names.iter().map(wanted).collect::<Vec<_>>());
    let mut pages: Vec<_> =
        values(&manual, "## Baton").map(|rest| format!("Baton{rest}")).collect();
    names.sort_unstable();
    pages.sort_unstable();
    assert_eq!(names, pages);
}
