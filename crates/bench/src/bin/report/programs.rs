//! The programs that measure, and what they said.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::table::Line;

pub(crate) struct Program {
    pub(crate) title: &'static str,
    /// As a user types it.
    pub(crate) command: &'static str,
    /// Put behind it for a short run; the last word of the command says where they belong.
    quick: &'static str,
    /// The targets that it measures.
    pub(crate) targets: &'static [u32],
    /// Whether it prints Markdown.
    pub(crate) markdown: bool,
}

#[rustfmt::skip]
pub(crate) const ALL: &[Program] = &[
    Program {
        title: "Instructions and allocations",
        command: "cargo run --profile bench -p tower-defer-bench --bin gate -- report",
        quick: "",
        targets: &[1, 2, 3, 4, 5, 6, 7, 8, 13],
        markdown: false,
    },
    Program {
        title: "A server under load",
        command: "cargo run --release -p tower-defer-server-bench --",
        quick: "quick",
        targets: &[9, 10],
        markdown: true,
    },
    Program {
        title: "The last byte",
        command: "cargo bench --bench last_byte --",
        quick: "10",
        targets: &[11],
        markdown: false,
    },
    Program {
        title: "Overload",
        command: "cargo bench --bench overload --",
        quick: "--seconds 10",
        targets: &[12],
        markdown: true,
    },
    Program {
        title: "How cost grows",
        command: "cargo run --profile bench -p tower-defer-bench --bin scale --",
        quick: "quick",
        targets: &[13],
        markdown: true,
    },
    Program {
        title: "The store of events",
        command: "cargo bench --bench store --features sqlite --",
        quick: "--quick",
        targets: &[14],
        markdown: false,
    },
    Program {
        title: "A response that records an event",
        command: "cargo bench --bench recorded --features axum,sqlite --",
        quick: "--quick",
        targets: &[15],
        markdown: false,
    },
];

/// What a program said.
pub(crate) struct Said {
    pub(crate) program: &'static Program,
    /// Everything but the lines for this report.
    pub(crate) text: String,
    pub(crate) lines: Vec<Line>,
    pub(crate) failed: Option<String>,
}

impl Program {
    pub(crate) fn run(&'static self, quick: bool) -> Said {
        let mut words: Vec<&str> = self.command.split(' ').collect();
        if quick {
            words.extend(self.quick.split_whitespace());
        }
        eprintln!("\n=== {}", words.join(" "));
        let mut said = Said {
            program: self,
            text: String::new(),
            lines: Vec::new(),
            failed: None,
        };
        let child = Command::new(words[0])
            .args(&words[1..])
            .current_dir(top())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                said.failed = Some(format!("{}: {error}", words[0]));
                return said;
            }
        };
        let out = child.stdout.take().expect("piped");
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            eprintln!("{line}");
            match Line::parse(&line) {
                Some(line) => said.lines.push(line),
                None => said.text.extend([&line, "\n"]),
            }
        }
        said.failed = match child.wait() {
            Ok(status) if status.success() => None,
            Ok(status) => Some(format!("its program ended with {status}")),
            Err(error) => Some(error.to_string()),
        };
        said
    }

    /// Without the dashes that have nothing behind them.
    pub(crate) fn shown(&self) -> &'static str {
        self.command.trim_end_matches(" --")
    }
}

/// The root of the repository.
pub(crate) fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}
