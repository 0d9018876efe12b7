//! The lines that the programs print for this report, and the table that is made of them.

use std::fmt::Write as _;
use std::process::Command;

use tower_defer_measure::Length;

use crate::programs::Said;

/// What a program printed as a [`tower_defer_measure::Figure`].
pub(crate) struct Line {
    pub(crate) number: u32,
    pub(crate) figure: String,
    pub(crate) reference: String,
    pub(crate) ours: String,
    pub(crate) ratio: String,
    pub(crate) target: String,
    pub(crate) met: String,
}

impl Line {
    pub(crate) fn is_judged(&self) -> bool {
        !self.met.is_empty() && !self.met.starts_with("not measured")
    }

    pub(crate) fn is_missed(&self) -> bool {
        self.met.starts_with("NOT MET")
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line
            .strip_prefix("target ")?
            .split('|')
            .map(str::trim)
            .collect();
        let [number, figure, reference, ours, ratio, target, met] = fields[..] else {
            return None;
        };
        Some(Self {
            number: number.parse().ok()?,
            figure: figure.to_owned(),
            reference: reference.to_owned(),
            ours: ours.to_owned(),
            ratio: ratio.to_owned(),
            target: target.to_owned(),
            met: met.to_owned(),
        })
    }
}

/// What stands in the table where a figure is missing.
const FIGURES: [&str; 15] = [
    "instructions added to a request, nothing deferred",
    "allocations of the same, and for each task",
    "instructions added to a request through an axum router",
    "instructions of a ready task, burst of 64",
    "the same, burst of 1",
    "instructions of a task that waits once, with its timeout",
    "instructions of the whole path",
    "bytes of ours per queued task, future aside",
    "server with a side effect of 5 ms: CPU per request, p50, p99",
    "server with 200 µs of CPU on a runtime of its own: p50",
    "a response's last byte while its task keeps the thread busy",
    "memory in overload",
    "100,000 waiting retries: CPU, and arming one",
    "durable emits, 16 and 64 concurrent",
    "added latency of a response that records one event",
];

/// The report.
pub(crate) fn of_all(results: &[Said]) -> String {
    let mut table = String::from(
        "| # | figure | reference | ours | ratio | target | |\n\
         | ---: | --- | ---: | ---: | ---: | ---: | --- |\n",
    );
    for (number, figure) in (1..).zip(FIGURES) {
        let lines = results.iter().flat_map(|said| &said.lines);
        let lines: Vec<&Line> = lines.filter(|line| line.number == number).collect();
        for line in &lines {
            let Line {
                figure,
                reference,
                ours,
                ratio,
                target,
                met,
                ..
            } = line;
            let _ = writeln!(
                table,
                "| {number} | {figure} | {reference} | {ours} | {ratio} | {target} | {met} |"
            );
        }
        if lines.is_empty() {
            let _ = writeln!(
                table,
                "| {number} | {figure} | | | | | not measured: {} |",
                why(number, results)
            );
        }
    }
    table
}

fn why(number: u32, results: &[Said]) -> String {
    let said = results
        .iter()
        .find(|said| said.program.targets.contains(&number));
    match said {
        None => "no program does".to_owned(),
        Some(Said {
            failed: Some(error),
            program,
            ..
        }) => format!("`{}`: {error}", program.shown()),
        Some(said) => format!("`{}` said nothing of it", said.program.shown()),
    }
}

/// Where and when it is made, and by which command.
pub(crate) fn machine(length: Length) -> String {
    let date = Command::new("date").arg("+%Y-%m-%d").output();
    let date = date.map(|output| output.stdout).unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "{}, {}; load average {load} before the start. Made by `cargo run --release -p tower-defer-bench --bin report{}`.",
        tower_defer_measure::machine(),
        String::from_utf8_lossy(&date).trim(),
        match length {
            Length::Full => String::new(),
            shorter => format!(" -- {}", shorter.word()),
        },
    )
}
