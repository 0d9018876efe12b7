//! The programs that measure, and what they said.
//!
//! Each takes the words `quick` (noisier) and `check` (as short as it can be, to see that it works), all
//! but the gate, which has one length.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tower_defer_measure::{LACKING, Length};

use crate::table::Line;

pub(crate) struct Program {
    pub(crate) title: &'static str,
    /// As a user types it.
    pub(crate) command: &'static str,
    /// Whether it knows the words for a shorter run; they are put behind the command.
    pub(crate) lengths: bool,
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
        lengths: false,
        targets: &[1, 2, 3, 4, 5, 6, 7, 8, 13],
        markdown: false,
    },
    Program {
        title: "A server under load",
        command: "cargo run --release -p tower-defer-server-bench --bin server --",
        lengths: true,
        targets: &[9, 10],
        markdown: true,
    },
    Program {
        title: "The last byte",
        command: "cargo bench --bench last_byte --",
        lengths: true,
        targets: &[11],
        markdown: false,
    },
    Program {
        title: "Overload",
        command: "cargo run --release -p tower-defer-server-bench --bin overload --",
        lengths: true,
        targets: &[12],
        markdown: true,
    },
    Program {
        title: "How cost grows",
        command: "cargo run --profile bench -p tower-defer-bench --bin scale --",
        lengths: true,
        targets: &[13],
        markdown: true,
    },
    Program {
        title: "The store of events",
        command: "cargo bench --bench store --features sqlite --",
        lengths: true,
        targets: &[14],
        markdown: false,
    },
    Program {
        title: "Deliveries of events",
        command: "cargo bench --bench events --features sqlite --",
        lengths: true,
        targets: &[],
        markdown: true,
    },
    Program {
        title: "A response that records an event",
        command: "cargo bench --bench recorded --features axum,sqlite --",
        lengths: true,
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
    /// What a user can switch off: which, with it, without it.
    pub(crate) off: Vec<[String; 3]>,
    pub(crate) failed: Option<String>,
    /// The program is not to blame.
    pub(crate) lacks_a_tool: bool,
    /// Without building it.
    pub(crate) took: Duration,
}

impl Program {
    /// So that nothing is compiled while something is measured, or shortly before. What cannot be built
    /// is found again when it is run, and said there.
    pub(crate) fn build(&self, length: Length) {
        let words = self.words(length);
        let mut words: Vec<&str> = words.into_iter().take_while(|word| *word != "--").collect();
        match words[1] {
            "run" => words[1] = "build",
            _ => words.push("--no-run"),
        }
        eprintln!("=== {}", words.join(" "));
        let _ = Command::new(words[0])
            .args(&words[1..])
            .current_dir(top())
            .status();
    }

    fn words(&self, length: Length) -> Vec<&'static str> {
        let words: Vec<&str> = self.command.split(' ').collect();
        if length == Length::Check {
            unoptimised(&words)
        } else {
            words
        }
    }

    /// Ends by itself: each program gives up after twenty minutes.
    pub(crate) fn run(&'static self, length: Length) -> Said {
        let mut words = self.words(length);
        if self.lengths {
            words.extend(length.word().split_whitespace());
        }
        eprintln!("\n=== {}", words.join(" "));
        let mut said = Said {
            program: self,
            text: String::new(),
            lines: Vec::new(),
            off: Vec::new(),
            failed: None,
            lacks_a_tool: false,
            took: Duration::ZERO,
        };
        let start = Instant::now();
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
            if let Some(why) = line.strip_prefix("unmeasured | ") {
                said.failed = Some(why.to_owned());
                said.lacks_a_tool = why.starts_with(LACKING);
            } else if let Some(off) = line.strip_prefix("off | ") {
                let fields: Vec<_> = off.split(" | ").map(str::to_owned).collect();
                said.off.extend(<[String; 3]>::try_from(fields));
            } else if let Some(line) = Line::parse(&line) {
                said.lines.push(line);
            } else {
                said.text.extend([&line, "\n"]);
            }
        }
        let ended = match child.wait() {
            Ok(status) if status.success() => None,
            Ok(status) => Some(format!("its program ended with {status}")),
            Err(error) => Some(error.to_string()),
        };
        said.failed = said.failed.or(ended);
        said.took = start.elapsed();
        said
    }

    /// Without the dashes that have nothing behind them.
    pub(crate) fn shown(&self) -> &'static str {
        self.command.trim_end_matches(" --")
    }
}

/// Whether a program works can be seen in the build that the tests use, which is there already.
fn unoptimised(words: &[&'static str]) -> Vec<&'static str> {
    let mut words = words.iter().copied();
    let mut other = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "--release" => {}
            "--profile" | "--features" => drop(words.next()),
            "bench" => other.extend(["bench", "--profile", "dev", "--all-features"]),
            word => other.push(word),
        }
    }
    other
}

/// The root of the repository.
pub(crate) fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}
