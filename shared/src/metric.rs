//! Metrics as tables: one row says what a metric is called, what it counts and by what. What a daemon registers, what
//! `/metrics` says of it, and what the reference in the manual says, is all this row.

use std::fmt::Write as _;

use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label as KeyLabel, Level, Metadata, Recorder as _,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

/// Bounds of histograms, in seconds (or as said).
pub mod bounds {
    /// Until a first token: from a cached prompt on a GPU to a long one on a CPU.
    pub const FIRST_TOKEN: [f64; 21] = [
        0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
        7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    ];
    /// Between two tokens: from 1,000 a second to fewer than one.
    pub const INTER_TOKEN: [f64; 18] = [
        0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25,
        0.5, 1.0, 2.5, 10.0,
    ];
    /// Whole requests.
    pub const REQUEST: [f64; 22] = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0,
        15.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
    ];
    /// What should be short: waiting in a queue, a hand-over, an engine's step.
    pub const SHORT: [f64; 15] = [
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    ];
    /// Sequences of a step.
    pub const SEQUENCES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
}

/// A row: one metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As Prometheus sees it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it is told apart by.
    pub labels: &'static [Label],
    /// What it means, in one sentence.
    pub help: &'static str,
    /// When it is there; `None` = always.
    pub only: Option<&'static str>,
}

/// What kind of metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only goes up, from 0 at the start.
    Counter,
    /// As it is now.
    Gauge,
    /// Counts of values up to each of these bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// As Prometheus calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// What series of one metric are told apart by.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it can be.
    pub values: Values,
}

/// What a label can be.
#[derive(Clone, Copy, Debug)]
pub enum Values {
    /// One of these.
    Of(fn() -> Vec<&'static str>),
    /// Fixed by the configuration or the build: this is meant.
    Configured(&'static str),
}

impl Metric {
    /// A counter without labels.
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, labels: &[], help, only: None }
    }

    /// A gauge without labels.
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, labels: &[], help, only: None }
    }

    /// A histogram without labels.
    pub const fn histogram(name: &'static str, bounds: &'static [f64], help: &'static str) -> Self {
        Self { name, kind: Kind::Histogram(bounds), labels: &[], help, only: None }
    }

    /// The same told apart by `labels`.
    pub const fn by(self, labels: &'static [Label]) -> Self {
        Self { labels, ..self }
    }

    /// The same, there only `when`.
    pub const fn only(self, when: &'static str) -> Self {
        Self { only: Some(when), ..self }
    }

    /// What its values are of: by Prometheus' custom the name ends with it.
    pub fn unit(&self) -> &'static str {
        let name = self.name.strip_suffix("_total").unwrap_or(self.name);
        if name.ends_with("_timestamp_seconds") || name.ends_with("_start_time_seconds") {
            return "Unix time in seconds";
        }
        let units = ["seconds", "bytes", "tokens", "blocks", "ratio", "requests", "sequences"];
        units.into_iter().find(|unit| name.ends_with(unit)).unwrap_or("")
    }

    /// Writes its head and its series as text: labels as they stand between the braces, and a value each.
    pub fn write(&self, text: &mut String, series: impl IntoIterator<Item = (String, f64)>) {
        let Self { name, kind, help, .. } = self;
        let head = format!("# HELP {name} {help}\n# TYPE {name} {}\n", kind.as_str());
        text.push_str(&head);
        for (labels, value) in series {
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            writeln!(text, "{name}{labels} {value}").expect("a string takes all");
        }
    }

    /// The same with one series that has no labels.
    pub fn write_one(&self, text: &mut String, value: f64) {
        self.write(text, [(String::new(), value)]);
    }
}

/// Where the metrics of one daemon are kept; one a daemon, so that two in one process do not mix.
pub struct Registry {
    recorder: PrometheusRecorder,
}

const METADATA: Metadata<'static> = Metadata::new("baton", Level::INFO, None);

impl Registry {
    /// Room for the metrics of `table`, none of which has a series yet.
    pub fn new(table: &[Metric]) -> Self {
        let mut builder = PrometheusBuilder::new();
        for row in table {
            if let Kind::Histogram(bounds) = row.kind {
                builder = builder
                    .set_buckets_for_metric(Matcher::Full(row.name.to_owned()), bounds)
                    .expect("a histogram has bounds");
            }
        }
        let recorder = builder.build_recorder();
        for Metric { name, kind, help, .. } in table {
            let (name, help) = (KeyName::from(*name), (*help).into());
            match kind {
                Kind::Counter => recorder.describe_counter(name, None, help),
                Kind::Gauge => recorder.describe_gauge(name, None, help),
                Kind::Histogram(_) => recorder.describe_histogram(name, None, help),
            }
        }
        Self { recorder }
    }

    /// The counter of this row with these labels, at 0 if it is new.
    pub fn counter(&self, row: &Metric, values: &[&str]) -> Counter {
        debug_assert_eq!(row.kind, Kind::Counter, "{}", row.name);
        self.recorder.register_counter(&key(row, values), &METADATA)
    }

    /// The gauge of this row with these labels, at 0 if it is new.
    pub fn gauge(&self, row: &Metric, values: &[&str]) -> Gauge {
        debug_assert_eq!(row.kind, Kind::Gauge, "{}", row.name);
        self.recorder.register_gauge(&key(row, values), &METADATA)
    }

    /// The histogram of this row with these labels, empty if it is new.
    pub fn histogram(&self, row: &Metric, values: &[&str]) -> Histogram {
        debug_assert!(matches!(row.kind, Kind::Histogram(_)), "{}", row.name);
        self.recorder.register_histogram(&key(row, values), &METADATA)
    }

    /// Prometheus' text form of all.
    pub fn render(&self) -> String {
        self.recorder.handle().render()
    }

    /// Moves samples out of the histograms' buffers, where they pile up otherwise until somebody renders.
    pub fn upkeep(&self) {
        self.recorder.handle().run_upkeep();
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

/// The row's labels with `values`, in the row's order.
fn key(row: &Metric, values: &[&str]) -> Key {
    debug_assert_eq!(row.labels.len(), values.len(), "{}", row.name);
    let labels = row.labels.iter().zip(values);
    let labels: Vec<_> =
        labels.map(|(label, value)| KeyLabel::new(label.name, (*value).to_owned())).collect();
    Key::from_parts(row.name, labels)
}

/// Text between a label's quotes.
pub fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOUR: Label = Label { name: "colour", values: Values::Of(|| vec!["red", "blue"]) };
    const CARS: Metric = Metric::counter("cars_total", "Cars that passed.").by(&[COLOUR]);
    const WEIGHT: Metric = Metric::histogram("car_bytes", &[1.0, 2.0], "Weight of a car.");
    const AGE: Metric = Metric::gauge("car_age_seconds", "Age of the last car.");

    #[test]
    fn what_a_row_says_is_what_is_rendered() {
        let registry = Registry::new(&[CARS, WEIGHT, AGE]);
        registry.counter(&CARS, &["red"]).increment(2);
        registry.histogram(&WEIGHT, &[]).record(1.5);
        registry.gauge(&AGE, &[]).set(3.0);
        let text = registry.render();
        for line in [
            "# HELP cars_total Cars that passed.",
            "# TYPE cars_total counter",
            "cars_total{colour=\"red\"} 2",
            "# TYPE car_bytes histogram",
            "car_bytes_bucket{le=\"1\"} 0",
            "car_bytes_bucket{le=\"2\"} 1",
            "car_age_seconds 3",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn text_that_is_written_by_hand_has_the_same_form() {
        let mut text = String::new();
        AGE.write(&mut text, [(format!("name=\"{}\"", escaped("a\"b")), 0.5)]);
        let wanted = "# HELP car_age_seconds Age of the last car.\n# TYPE car_age_seconds gauge\n\
                      car_age_seconds{name=\"a\\\"b\"} 0.5\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn the_unit_is_in_the_name() {
        let units = [CARS, WEIGHT, AGE].map(|row| row.unit());
        assert_eq!(units, ["", "bytes", "seconds"]);
    }
}
