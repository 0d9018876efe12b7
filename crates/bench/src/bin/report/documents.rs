//! Puts the figures where they are read: between two markers in docs/performance.md and README.md.

use std::fmt::Write as _;
use std::time::Duration;

use crate::programs::{Program, Said, top};
use crate::table::Line;

const BEGIN: &str = "<!-- begin: written by the report program -->";
const END: &str = "<!-- end -->";

/// README's rows: the target, how the figure's name begins or what it contains, and the figure in README's
/// words. All fifteen are here, each figure that has a target, and what helps to read it.
#[rustfmt::skip]
const README: &[(u32, &str, &str)] = &[
    (1, "", "instructions that the layer adds to a request with nothing deferred, against tower-http's `AddExtension` of an `Arc`"),
    (2, "layer adds", "allocations of the same"),
    (2, "each task", "allocations of each task, against `tokio::spawn`"),
    (3, "through an axum router", "instructions added to a request through an axum router, nothing deferred, against `Extension` of an `Arc`"),
    (3, "around the router", "the same, the layer around the router"),
    (4, "", "instructions of a task with all bounds on, bursts of 64, against `tokio::spawn`"),
    (5, "", "the same, a task alone"),
    (6, "burst of 64", "instructions of a task that waits once, with its timeout, against `tokio::spawn` of a `timeout`"),
    (7, "whole path, 1 task, burst of 64", "instructions of a request with 1 task, from its handler to the task's end, against a handler that calls `tokio::spawn`"),
    (7, "whole path, 4 tasks, burst of 64", "the same with 4 tasks"),
    (8, "", "bytes of a queued task beside its future, against `tokio::spawn`"),
    (13, "error free of cost, against a whole task", "instructions that failing and waiting for a retry add to a task, its error costing nothing, against a whole `tokio::spawn` that sleeps"),
    (13, "its error a text, against a whole task", "the same, its error made of a text"),
    (13, "no two errors the same", "the same, no two texts alike"),
    (13, "error free of cost, against what sleeping adds", "instructions that failing and waiting add, against what sleeping adds to a `tokio::spawn`"),
    (13, "by hand", "instructions of a whole task that fails with a text and waits, against a `tokio::spawn` that does the same"),
    (9, ": CPU", "CPU per request of a server, each request with a task that waits 5 ms, at half of saturation, against `tokio::spawn`"),
    (9, ": p50", "the same, p50 of the response"),
    (9, ": p99", "the same, p99"),
    (10, ": p50", "p50 of a server at 1,500 requests/s, each with 200 µs of CPU on a runtime of its own, against a server without"),
    (11, "task of 20 ms", "what a task that keeps the server's thread busy for 20 ms adds to the client's median time to the last byte, the worst of 28 cells, against 10 ms"),
    (11, "task of 50 ms", "the same, 50 ms"),
    (12, "against twice", "resident memory that twice as many tasks as can run add, against twice what capacity and dead letters hold"),
    (12, "against once", "the same, against once what they hold"),
    (12, "first half", "the most in all of the time, against the most in its first half"),
    (13, "arming one", "CPU of 100,000 retries: what failing and waiting add to each task, against starting a `tokio::spawn` that sleeps"),
    (13, "against a sleeping task's", "the same, a whole life with both attempts, against that of a `tokio::spawn` that sleeps"),
    (13, "what waiting adds", "the same, a life less its attempts, against a sleeping one's less a `tokio::spawn` that ends at once"),
    (13, "that of a spawned task that does the same", "the same, a whole life, against that of a `tokio::spawn` that fails, sleeps and runs again"),
    (14, "16 concurrent", "durable events a second, 16 concurrent, against a bare file with group commit"),
    (14, "64 concurrent", "the same, 64 concurrent"),
    (15, "p50", "what recording an event adds to a response's p50, against one append and `fdatasync`"),
];

pub(crate) fn write(machine: &str, table: &str, results: &[Said]) {
    let missed = missed(results);
    replace(
        "docs/performance.md",
        &performance(machine, &format!("{missed}\n\n{table}"), results),
    );
    replace("README.md", &readme(machine, &missed, results));
}

fn performance(machine: &str, table: &str, results: &[Said]) -> String {
    let mut text = format!("{machine}\n\n{table}");
    for said in results {
        let program = said.program;
        let (title, shown) = (program.title, program.shown());
        let _ = write!(
            text,
            "\n## {title}\n\n`{shown}` took {}.\n\n",
            spoken(said.took)
        );
        let body = said.text.trim();
        if let Some(error) = &said.failed {
            let _ = writeln!(text, "Not complete: {error}.\n");
        }
        if program.markdown {
            // A heading of a program stands below that of its section.
            for line in body.lines() {
                let deeper = if line.starts_with("## ") { "#" } else { "" };
                let _ = writeln!(text, "{deeper}{line}");
            }
        } else {
            let _ = writeln!(text, "```text\n{body}\n```");
        }
    }
    text
}

fn readme(machine: &str, missed: &str, results: &[Said]) -> String {
    let mut text = format!(
        "{missed}\n\n\
         | # | | reference | tower-defer | ratio | target | command |\n\
         | ---: | --- | ---: | ---: | ---: | --- | --- |\n"
    );
    let mut before = "";
    let mut put = |line: &Line, words: &str, program: &Program| {
        let Line {
            number,
            reference,
            ours,
            ratio,
            target,
            met,
            ..
        } = line;
        // The spread is in docs/performance.md.
        let ratio = ratio.split(" (").next().unwrap_or_default();
        let judged = if target.is_empty() {
            "none".to_owned()
        } else {
            format!("{target}: {met}")
        };
        let shown = program.shown();
        let command = if shown == before {
            "the same".to_owned()
        } else {
            format!("`{shown}`")
        };
        before = shown;
        let _ = writeln!(
            text,
            "| {number} | {words} | {reference} | {ours} | {ratio} | {judged} | {command} |"
        );
    };
    let mut unmeasured = String::new();
    for (number, part, words) in README {
        let mut lines = all(results);
        let line = lines.find(|(_, line)| line.number == *number && line.figure.contains(part));
        if let Some((program, line)) = line {
            put(line, words, program);
        } else {
            let _ = writeln!(unmeasured, "| {number} | {words} | | | | not measured | |");
        }
    }
    // What is missed is shown, whether or not somebody has thought of it.
    let shown = |line: &Line| {
        let mut rows = README.iter();
        rows.any(|(number, part, _)| line.number == *number && line.figure.contains(part))
    };
    for (program, line) in all(results).filter(|(_, line)| line.is_missed() && !shown(line)) {
        put(line, &line.figure, program);
    }
    text.push_str(&unmeasured);
    text.push_str("\nWhat can be switched off, in instructions of the gate, with it and without:");
    for (n, [what, with, without]) in results.iter().flat_map(|said| &said.off).enumerate() {
        let before = if n == 0 { "" } else { ";" };
        let _ = write!(text, "{before} {what} {with} → {without}");
    }
    text.push_str(". No figure of the table was reached by any of it.\n");
    let _ = write!(text, "\n{machine}\n");
    text
}

fn all(results: &[Said]) -> impl Iterator<Item = (&'static Program, &Line)> {
    results
        .iter()
        .flat_map(|said| said.lines.iter().map(move |line| (said.program, line)))
}

/// Which of the fifteen, in a sentence.
fn missed(results: &[Said]) -> String {
    let which = |of: &dyn Fn(u32) -> bool| {
        let numbers = (1..=15).filter(|number| of(*number));
        let numbers: Vec<String> = numbers.map(|number| number.to_string()).collect();
        match &numbers[..] {
            [] => "none".to_owned(),
            [one] => one.clone(),
            [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
        }
    };
    let of = |number: u32| all(results).filter(move |(_, line)| line.number == number);
    format!(
        "Of the fifteen targets missed in at least one figure: {}. Met in all, but narrowly or within the spread \
         of the rounds: {}. Not measured: {}.",
        which(&|number| of(number).any(|(_, line)| line.is_missed())),
        which(&|number| {
            !of(number).any(|(_, line)| line.is_missed())
                && of(number).any(|(_, line)| line.met.starts_with("met,"))
        }),
        which(&|number| !of(number).any(|(_, line)| line.is_judged())),
    )
}

/// A time, as people say it.
pub(crate) fn spoken(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, seconds) => format!("{minutes} min {seconds} s"),
    }
}

fn replace(name: &str, text: &str) {
    let path = top().join(name);
    let old = std::fs::read_to_string(&path).expect(name);
    let (before, rest) = old.split_once(BEGIN).expect("the first marker");
    let (_, after) = rest.split_once(END).expect("the second marker");
    let new = format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim());
    std::fs::write(&path, new).expect(name);
    eprintln!("written: {name}");
}
