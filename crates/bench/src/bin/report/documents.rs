//! Puts the figures where they are read: between two markers in docs/performance.md and README.md.

use std::fmt::Write as _;

use crate::programs::{Said, top};
use crate::table::Line;

const BEGIN: &str = "<!-- begin: written by the report program -->";
const END: &str = "<!-- end -->";

/// README's rows: the target, a part of the figure's name, and the figure in README's words.
#[rustfmt::skip]
const README: &[(u32, &str, &str)] = &[
    (1, "", "instructions added to a request, nothing deferred, against tower-http's `AddExtension` of an `Arc`"),
    (4, "", "instructions of a task with all bounds on, bursts of 64, against `tokio::spawn`"),
    (5, "", "the same, a task alone"),
    (6, "burst of 64", "instructions of a task that waits once, with its timeout, against `tokio::spawn` of a `timeout`"),
    (7, "4 tasks, burst of 64", "instructions of a request with 4 tasks, from its handler to their end, against 4 `tokio::spawn`"),
    (9, "CPU", "CPU per request of a server, each request with a task that waits 5 ms, against `tokio::spawn`"),
    (10, "p50", "p50 of a server at 1,500 requests/s, each with 200 µs of CPU on a runtime of its own, against none"),
    (11, "20 ms", "what a task that keeps the server's thread busy for 20 ms adds to the client's time to the last byte, against half of it"),
    (12, "against 2 ×", "memory that twice as many requests as can be served add, against what the bounds allow"),
    (13, "whole life less", "CPU of a waiting retry, 100,000 at once, against a task that sleeps"),
    (14, "16 concurrent", "durable events a second, 16 concurrent, against a bare file with group commit"),
    (15, "p50", "what recording an event adds to a response's p50, against one `fdatasync`"),
];

pub(crate) fn write(machine: &str, table: &str, results: &[Said]) {
    replace("docs/performance.md", &performance(machine, table, results));
    replace("README.md", &readme(machine, results));
}

fn performance(machine: &str, table: &str, results: &[Said]) -> String {
    let mut text = format!("{machine}\n\n{table}");
    for said in results {
        let program = said.program;
        let _ = write!(text, "\n## {}\n\n`{}`\n\n", program.title, program.shown());
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

fn readme(machine: &str, results: &[Said]) -> String {
    let mut text = String::from(
        "| | reference | tower-defer | ratio | target | command |\n\
         | --- | ---: | ---: | ---: | --- | --- |\n",
    );
    for (number, part, words) in README {
        let mut lines = results
            .iter()
            .flat_map(|said| said.lines.iter().map(move |line| (said.program, line)))
            .filter(|(_, line)| line.number == *number && line.figure.contains(part));
        if let Some((program, line)) = lines.next() {
            let Line {
                reference,
                ours,
                ratio,
                target,
                met,
                ..
            } = line;
            // The spread is in docs/performance.md.
            let ratio = ratio.split(" (").next().unwrap_or_default();
            let _ = writeln!(
                text,
                "| {words} | {reference} | {ours} | {ratio} | {target}: {met} | `{}` |",
                program.shown()
            );
        } else {
            let _ = writeln!(text, "| {words} | | | | not measured | |");
        }
    }
    let _ = write!(text, "\n{machine}\n");
    text
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
