//! Turns, medians, ratios, and the table that comes of them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Instant;

use anyhow::Result;

/// One figure of a contest.
#[derive(Clone, Copy)]
pub struct Figure {
    /// What, with its unit.
    pub what: &'static str,
    /// Whether more is better; a ratio above 1 always speaks for the first contestant.
    pub more_is_better: bool,
}

/// One contestant: its name, and what gives its figures once.
pub type Contestant<'a> = (String, Box<dyn FnMut() -> Result<Vec<f64>> + 'a>);

/// Figures of some contestants, a table in the making.
pub struct Table {
    title: String,
    names: Vec<String>,
    rows: Vec<Row>,
    notes: Vec<String>,
}

struct Row {
    what: String,
    /// A column each, empty where there is no such figure.
    cells: Vec<String>,
}

/// More of something: tokens a second.
pub const fn more(what: &'static str) -> Figure {
    Figure { what, more_is_better: true }
}

/// Less of something: a delay.
pub const fn less(what: &'static str) -> Figure {
    Figure { what, more_is_better: false }
}

impl Table {
    /// For contestants of these names; the others are compared with the first.
    pub fn new(title: impl Into<String>, names: &[String]) -> Self {
        Self { title: title.into(), names: names.to_vec(), rows: Vec::new(), notes: Vec::new() }
    }

    /// A line below the table.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Lets everybody have `rounds` turns and adds a row for each figure. Gives the first contestant's medians. A peer
    /// that fails is left out from there on, and said to have failed.
    ///
    /// # Errors
    /// The first contestant's.
    pub fn contest(
        &mut self,
        rounds: usize,
        figures: &[Figure],
        mut contestants: Vec<Contestant<'_>>,
    ) -> Result<Vec<f64>> {
        let mut turns: Vec<Vec<Vec<f64>>> = vec![Vec::new(); contestants.len()];
        let mut failed = BTreeSet::new();
        let busy = Busy::now();
        for round in 0..rounds {
            for place in 0..contestants.len() {
                // Nobody always comes after the same one.
                let who = (place + round) % contestants.len();
                if failed.contains(&who) {
                    continue;
                }
                let name = &contestants[who].0;
                eprintln!("round {} of {rounds}: {name}, {}", round + 1, figures[0].what);
                match contestants[who].1() {
                    Ok(turn) => turns[who].push(turn),
                    Err(error) if who > 0 => {
                        self.note(format!("{} failed: {error:#}", contestants[who].0));
                        failed.insert(who);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        for (i, figure) in figures.iter().enumerate() {
            let of = |who: usize| turns[who].iter().map(|turn| turn[i]).collect::<Vec<f64>>();
            let first = of(0);
            let mut cells = vec![String::new(); self.names.len()];
            for (who, (name, _)) in contestants.iter().enumerate() {
                let column = self.names.iter().position(|known| known == name).unwrap_or(who);
                if failed.contains(&who) {
                    cells[column] = "failed".into();
                    continue;
                }
                let mut values = of(who);
                let ratios = values.iter().zip(&first).map(|(other, first)| {
                    if figure.more_is_better { first / other } else { other / first }
                });
                let ratio = median(&mut ratios.collect::<Vec<_>>());
                let mut cell = shown(&mut values);
                if who > 0 {
                    let _ = write!(cell, ", ratio **{ratio:.2}**");
                }
                cells[column] = cell;
            }
            let what = figure.what.to_owned();
            self.rows.push(Row { what, cells });
        }
        if let Some(others) = busy.others() {
            let last = figures.last().map_or("", |figure| figure.what);
            self.note(format!("up to “{last}”, other processes took {others:.0} % of the machine"));
        }
        let firsts = (0..figures.len()).map(|i| turns[0].iter().map(|turn| turn[i]).collect());
        Ok(firsts.map(|mut values: Vec<f64>| median(&mut values)).collect())
    }

    /// A row that was not a contest.
    pub fn row(&mut self, what: impl Into<String>, cells: Vec<String>) {
        self.rows.push(Row { what: what.into(), cells });
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "### {}\n", self.title)?;
        writeln!(f, "| | {} |", self.names.join(" | "))?;
        writeln!(f, "| --- |{}", " --- |".repeat(self.names.len()))?;
        for row in &self.rows {
            writeln!(f, "| {} | {} |", row.what, row.cells.join(" | "))?;
        }
        for note in &self.notes {
            write!(f, "\n{note}")?;
        }
        Ok(())
    }
}

/// Median, least and most.
fn shown(values: &mut [f64]) -> String {
    let middle = median(values);
    match values {
        [] | [_] => number(middle),
        [least, .., most] => format!("{} ({}-{})", number(middle), number(*least), number(*most)),
    }
}

/// Three figures that count.
pub fn number(x: f64) -> String {
    let digits = if x >= 100.0 { 0 } else { 2 - x.max(1.0).log10() as usize };
    format!("{x:.digits$}")
}

/// Sorts them; of an even number the lower one of the two in the middle.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The value that `part` of all are not above.
pub fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * part).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

/// How busy the machine was, and we with our children.
struct Busy {
    since: Instant,
    machine: f64,
    own: f64,
}

impl Busy {
    fn now() -> Self {
        Self { since: Instant::now(), machine: machine_seconds(), own: own_seconds() }
    }

    /// Percent of all cores' time that went to others; `None` where it is next to nothing or not known.
    fn others(&self) -> Option<f64> {
        let cores = std::thread::available_parallelism().ok()?.get() as f64;
        let others = (machine_seconds() - self.machine) - (own_seconds() - self.own);
        let percent = 100.0 * others / (self.since.elapsed().as_secs_f64() * cores);
        (percent > 3.0).then_some(percent)
    }
}

/// The kernel's clock ticks a second in what it tells of processes.
const TICKS: f64 = 100.0;

/// Seconds all cores have worked since they were started.
fn machine_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let all = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<f64> = all.filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let work = |i: &usize| ticks.get(*i).copied().unwrap_or_default();
    [0, 1, 2, 5, 6, 7].iter().map(work).sum::<f64>() / TICKS
}

/// Seconds this process and its children have worked, running ones included.
fn own_seconds() -> f64 {
    let mut seconds = 0.0;
    let own = std::process::id();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().parse::<u32>();
        let Ok(id) = id else { continue };
        let Some(fields) = stat(id) else { continue };
        // Fields 4, 14 to 17 of proc(5)'s list; `fields` begins with the third.
        let number =
            |i: usize| fields.get(i - 3).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        if id == own {
            seconds += (14..=17).map(number).sum::<f64>() / TICKS;
        } else if number(4) == f64::from(own) {
            seconds += (14..=15).map(number).sum::<f64>() / TICKS;
        }
    }
    seconds
}

/// Seconds a process has worked; 0 once it has ended.
pub fn cpu_seconds(id: u32) -> f64 {
    let fields = stat(id).unwrap_or_default();
    let number = |i: usize| fields.get(i - 3).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (number(14) + number(15)) / TICKS
}

/// What the kernel tells of a process, from its state on (the name before may contain anything).
fn stat(id: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}
