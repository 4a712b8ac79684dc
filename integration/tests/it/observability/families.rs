//! Prometheus' text form, taken apart; and what the code's tables say about it.

use std::collections::BTreeMap;

use baton_shared::metric::{Kind, Metric, Values};

/// What `/metrics` says of one metric.
#[derive(Debug, Default)]
pub struct Family {
    pub kind: String,
    pub help: String,
    /// Labels of each series, but for a histogram's `le`.
    pub series: Vec<BTreeMap<String, String>>,
}

/// All families of a text, each of which must have a kind and a help before its first series.
pub fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            let family = families.entry(name.to_owned()).or_default();
            assert!(family.help.is_empty(), "a second help of {name}");
            family.help = help.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            let family = families.entry(name.to_owned()).or_default();
            assert!(family.kind.is_empty(), "a second type of {name}");
            family.kind = kind.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let is_histogram =
                |name: &str| families.get(name).is_some_and(|family| family.kind == "histogram");
            let suffixes = ["_bucket", "_sum", "_count"];
            let stem = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
            let name = stem.filter(|stem| is_histogram(stem)).unwrap_or(name);
            let mut labels = labels_of(labels.trim_end_matches('}'));
            labels.remove("le");
            let family = families.get_mut(name).unwrap_or_else(|| panic!("no head for {line}"));
            family.series.push(labels);
        }
    }
    families
}

/// No label of ours holds a quote or a comma.
fn labels_of(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap();
        (name.to_owned(), value.trim_matches('"').to_owned())
    };
    pairs.map(pair).collect()
}

/// What a daemon says must be what its table says: every family that is there, and every row that must be.
pub fn compare(families: &BTreeMap<String, Family>, table: &[Metric]) {
    for name in families.keys() {
        assert!(table.iter().any(|row| row.name == name), "`{name}` is in no table");
    }
    for row in table {
        let Some(family) = families.get(row.name) else {
            assert!(row.only.is_some(), "`{}` is not there", row.name);
            continue;
        };
        assert_eq!((&*family.kind, &*family.help), (row.kind.as_str(), row.help), "{}", row.name);
        assert!(!family.series.is_empty(), "`{}` has no series", row.name);
        for series in &family.series {
            let wanted: Vec<_> = row.labels.iter().map(|label| label.name).collect();
            assert_eq!(series.len(), wanted.len(), "{}: {series:?} {wanted:?}", row.name);
            for label in row.labels {
                let value = series.get(label.name);
                let value = value.unwrap_or_else(|| panic!("{}: {series:?}", row.name));
                if let Values::Of(all) = label.values {
                    assert!(all().contains(&value.as_str()), "{}: {series:?}", row.name);
                }
            }
        }
    }
}

/// The most series that a row can have, where nothing of it depends on a configuration.
pub fn most_series(row: &Metric) -> usize {
    let values = |values: Values| match values {
        Values::Of(all) => all().len(),
        Values::Configured(_) => 1,
    };
    let each = match row.kind {
        Kind::Counter | Kind::Gauge => 1,
        // One a bound, the infinite one, sum and count.
        Kind::Histogram(bounds) => bounds.len() + 3,
    };
    row.labels.iter().map(|label| values(label.values)).product::<usize>() * each
}
