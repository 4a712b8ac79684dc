//! `docs/src/reference/metrics.md` is what the code's tables say. `BATON_WRITE=1` writes it anew
//! (`make reference`).

use std::collections::HashSet;
use std::fmt::Write as _;

use baton_integration::files;
use baton_shared::metric::{Kind, Metric, Values};
use baton_shared::process;

const PAGE: &str = "docs/src/reference/metrics.md";
const INTRODUCTION: &str = "\
# Metrics

<!-- Written by `make reference` from the tables in the code; a test compares. -->

Prometheus' text form. Router: `GET /metrics` on the admin port (`server.admin_listen`), and `GET /prometheus/metrics` on
the public one. Worker: `GET /prometheus/metrics` (its `GET /metrics` is TensorRT-LLM's JSON of the last steps). How to
scrape them, and boards and alerts made of them: [Monitoring](../operate/monitoring.md).

Every label's values are a closed set, or fixed by configuration or build: no request can add a series. Counters start at
0 with the process. `baton_router_worker_*` and `baton_router_usable_workers` follow the routing table: the series of a
removed worker go with it.
";

fn rows(text: &mut String, title: &str, rows: &[Metric]) {
    write!(text, "\n## {title}\n\n| name | type | unit | labels | meaning |\n").unwrap();
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for row in rows {
        let label = |label: &baton_shared::metric::Label| match label.values {
            Values::Of(all) if all().len() > 10 => format!("`{}`: see below", label.name),
            Values::Of(all) => format!("`{}`: {}", label.name, all().join(", ")),
            Values::Configured(what) => format!("`{}`: {what}", label.name),
        };
        let labels = row.labels.iter().map(label).collect::<Vec<_>>().join("<br>");
        let only = row.only.map(|when| format!(" Only {when}.")).unwrap_or_default();
        let (kind, unit) = (row.kind.as_str(), row.unit());
        let help = row.help;
        writeln!(text, "| `{}` | {kind} | {unit} | {labels} | {help}{only} |", row.name).unwrap();
    }
}

/// Label sets that are too long for a cell.
fn long_labels(text: &mut String, rows: &[Metric]) {
    let mut told = HashSet::new();
    for label in rows.iter().flat_map(|row| row.labels) {
        if let Values::Of(all) = label.values
            && all().len() > 10
            && told.insert(label.name)
        {
            write!(text, "\n`{}` is one of: {}.\n", label.name, all().join(", ")).unwrap();
        }
    }
}

fn bounds(text: &mut String, rows: &[Metric]) {
    text.push_str("\n## Buckets\n\n| upper bounds | of |\n| --- | --- |\n");
    let mut told = HashSet::new();
    for row in rows {
        if let Kind::Histogram(bounds) = row.kind
            && told.insert(format!("{bounds:?}"))
        {
            let same = |other: &&Metric| other.kind == row.kind;
            let names = rows.iter().filter(same).map(|row| format!("`{}`", row.name));
            let names: Vec<_> = names.collect();
            let bounds: Vec<_> = bounds.iter().map(f64::to_string).collect();
            writeln!(text, "| {} | {} |", bounds.join(" "), names.join(", ")).unwrap();
        }
    }
}

fn page() -> String {
    let router = baton_router::metrics::TABLE;
    let worker = baton_workerd::metrics::TABLE;
    let mut text = INTRODUCTION.to_owned();
    rows(&mut text, "Router", router[0]);
    rows(&mut text, "Worker", worker[0]);
    long_labels(&mut text, worker[0]);
    rows(&mut text, "Process", &process::TABLE);
    text.push_str(
        "\n## TensorRT-LLM's names\n\nThe same quantities under the names of `trtllm-serve`, so that boards made for it \
         keep working. Left out is what has no counterpart here: `trtllm_request_success_total` has no `finished_reason`, \
         and the router forwards events unread, so it has no `*_per_token_latency_seconds`.\n",
    );
    rows(&mut text, "Router, as TensorRT-LLM's orchestrator", &router[2..].concat());
    rows(&mut text, "Worker, as TensorRT-LLM's", &worker[2..].concat());
    long_labels(&mut text, &worker[2..].concat());
    bounds(&mut text, &[router.concat(), worker.concat()].concat());
    text
}

#[test]
fn the_reference_of_the_metrics_is_what_the_code_says() {
    let file = files::top().join(PAGE);
    let page = page();
    if std::env::var_os("BATON_WRITE").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = written.lines().zip(page.lines()).find(|(old, new)| old != new);
    assert!(written == page, "{PAGE} is not up to date: `make reference`. First: {differs:?}");
}

#[test]
fn names_are_unique_and_follow_prometheus_customs() {
    for table in [baton_router::metrics::TABLE.concat(), baton_workerd::metrics::TABLE.concat()] {
        let mut names = HashSet::new();
        for row in &table {
            assert!(names.insert(row.name), "{} twice", row.name);
            let is_counter = row.kind == Kind::Counter;
            assert_eq!(row.name.ends_with("_total"), is_counter, "{}", row.name);
            assert!(row.help.ends_with('.') && !row.help.contains('\n'), "{}", row.help);
            if let Kind::Histogram(bounds) = row.kind {
                assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{}", row.name);
            }
        }
    }
}
