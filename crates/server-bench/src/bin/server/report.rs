//! Which runs are made, and what is said of them.

use std::fmt::Write as _;
use std::time::Duration;

use tower_defer_measure::{Arguments, Figure, Length, Spread, Target, machine, median};
use tower_defer_server_bench::{Answers, Counts, Rate, Server, load};

/// Connections.
const CLIENTS: u32 = 32;

/// No side effect here takes long; what is not done by then is lost, and the counts say so.
const SETTLE: Duration = Duration::from_secs(20);

type Variant = (&'static str, &'static str);

const VARIANTS: &[Variant] = &[
    ("none", "none"),
    ("inline", "awaited in the handler"),
    ("spawn", "`tokio::spawn`"),
    ("defer", "tower-defer"),
    ("dedicated", "tower-defer, `dedicated(1)`"),
    ("axum-tasks", "axum-tasks"),
];

/// Beyond what the core can do, what matters is which of the two has it: responses, or side effects.
const TOO_MANY: &[Variant] = &[
    ("none", "none"),
    ("spawn", "`tokio::spawn`"),
    ("defer", "tower-defer"),
    ("dedicated", "tower-defer, `dedicated(1)`"),
    (
        "dedicated, short queue",
        "the same, with a capacity of 1,024",
    ),
    ("axum-tasks", "axum-tasks"),
];

pub(crate) fn report(arguments: &Arguments) {
    let (pairs, rounds, millis) = match arguments.length {
        Length::Check => (1, 1, 200),
        Length::Quick => (5, 3, 1000),
        Length::Full => (9, 5, 4000),
    };
    let length = Duration::from_millis(millis);
    println!(
        "{}. The server has one thread on the first core, the load (oha, {CLIENTS} connections) the second. \
         Missing is a side effect that has neither ended nor been refused when the server is quiet: a handler \
         that awaits it loses it with a client that leaves at the end. Behind the median of the rounds stand \
         the least and the most. A server that is saturated goes as fast as the machine lets it in that moment: two rates, or two \
         times, of which one's median lies within the other's spread are the same. What targets 9 and 10 compare \
         are pairs at a fixed rate, further down.",
        machine()
    );
    let mut spawned = None;
    if arguments.wanted("tables") {
        let heading = "5 ms of waiting, as fast as it goes";
        spawned = table(heading, VARIANTS, "wait", Rate::Closed, rounds, length);
        let burn = Rate::Fixed(1500);
        let heading = "200 µs of CPU, 1,500 requests a second";
        table(heading, VARIANTS, "burn200", burn, rounds, length);
        let heading = "500 µs of CPU, 4,000 requests a second: twice what the core can do";
        // One round: what is left when the load ends takes as long again, and longer.
        let length = length.min(Duration::from_secs(2));
        table(heading, TOO_MANY, "burn500", Rate::Fixed(4000), 1, length);
    }
    if !arguments.wanted("pairs") {
        return;
    }

    let spawned =
        spawned.unwrap_or_else(|| run("spawn", "wait", Rate::Closed, length).per_second());
    let half = (spawned / 2.0) as u32;
    let compared = Pairs::run(pairs, length, half, ("spawn", "wait"), ("defer", "wait"));
    println!("\n## 5 ms of waiting, {half} requests a second: half of what the naked spawn did\n");
    let what = "server, 5 ms of waiting at half of saturation, against a naked spawn:";
    compared.heading();
    let lines = [
        compared.row(9, what, &CPU, Some(1.1)),
        compared.row(9, what, &P50, Some(1.1)),
        compared.row(9, what, &P99, Some(1.1)),
    ];
    compared.completed();
    print_lines(&lines);

    let compared = Pairs::run(
        pairs,
        length,
        1500,
        ("none", "none"),
        ("dedicated", "burn200"),
    );
    println!("\n## 200 µs of CPU on a thread of its own, 1,500 requests a second\n");
    let what = "server, 200 µs of CPU on a runtime of its own, 1,500/s, against none:";
    compared.heading();
    let lines = [
        compared.row(10, what, &P50, Some(1.25)),
        compared.row(10, what, &P99, None),
    ];
    compared.completed();
    print_lines(&lines);
}

fn print_lines(lines: &[Figure]) {
    println!();
    lines.iter().for_each(|line| println!("{line}"));
}

/// What one run found.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    answers: Answers,
    /// Of the server's process until its last side effect has ended, per request, in microseconds.
    cpu: f64,
    counts: Counts,
}

impl Run {
    fn per_second(&self) -> f64 {
        self.answers.per_second
    }
}

fn run(variant: &str, effect: &str, rate: Rate, length: Duration) -> Run {
    let server = Server::start(&[variant, effect]);
    load(
        &server,
        Rate::Fixed(500),
        CLIENTS,
        Duration::from_millis(300),
    );
    let (before, cpu) = (server.settle(SETTLE), server.cpu());
    let answers = load(&server, rate, CLIENTS, length);
    let counts = server.settle(SETTLE).since(before);
    let cpu = server.cpu() - cpu;
    Run {
        answers,
        cpu: cpu.as_secs_f64() * 1e6 / counts.requests.max(1) as f64,
        counts,
    }
}

/// All variants in turn, another first in each round. Returns what the naked spawn did a second.
fn table(
    title: &str,
    variants: &[Variant],
    effect: &str,
    rate: Rate,
    rounds: usize,
    length: Duration,
) -> Option<f64> {
    let interleaved = match rounds {
        1 => "one round".to_owned(),
        _ => format!("{rounds} interleaved rounds"),
    };
    println!("\n## {title} ({interleaved})\n");
    println!(
        "| the side effect | responses/s | p50, ms | p99, ms | CPU per request, µs | requests | completed | refused | missing | responses failed |"
    );
    println!("| --- |{}", " ---: |".repeat(9));
    let rounds: Vec<Vec<Run>> = (0..rounds)
        .map(|round| {
            let mut runs = vec![Run::default(); variants.len()];
            for nth in 0..variants.len() {
                let at = (nth + round) % variants.len();
                runs[at] = run(variants[at].0, effect, rate, length);
            }
            runs
        })
        .collect();
    let mut spawned = None;
    for (at, (variant, title)) in variants.iter().enumerate() {
        let of =
            |figure: fn(&Run) -> f64| Spread::of(rounds.iter().map(|round| figure(&round[at])));
        let per_second = of(Run::per_second);
        if *variant == "spawn" {
            spawned = Some(per_second.median);
        }
        let counts = rounds.iter().map(|round| round[at].counts);
        let sum = counts.fold(Counts::default(), Counts::plus);
        let failed = rounds.iter().map(|round| {
            let answers = round[at].answers;
            answers.failed + answers.unavailable
        });
        println!(
            "| {title} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            digits(per_second, 0),
            digits(of(|run| run.answers.p50 / 1000.0), 2),
            digits(of(|run| run.answers.p99 / 1000.0), 2),
            digits(of(|run| run.cpu), 1),
            sum.requests,
            sum.completed,
            sum.refused,
            sum.missing(),
            failed.sum::<u64>()
        );
    }
    spawned
}

/// The median, and where rounds differ the least and the most.
fn digits(spread: Spread, digits: usize) -> String {
    let Spread {
        least,
        median,
        most,
    } = spread;
    let mut text = format!("{median:.digits$}");
    if least < most {
        let _ = write!(text, " ({least:.digits$} to {most:.digits$})");
    }
    text
}

struct Kind {
    name: &'static str,
    of: fn(&Run) -> f64,
}

const CPU: Kind = Kind {
    name: "CPU per request",
    of: |run| run.cpu,
};
const P50: Kind = Kind {
    name: "p50",
    of: |run| run.answers.p50,
};
const P99: Kind = Kind {
    name: "p99",
    of: |run| run.answers.p99,
};

struct Pairs {
    made: Vec<(Run, Run)>,
    /// Those in which both servers did what they were asked for: one that was asked more than it could
    /// do, because something else took the core, has a queue for a latency.
    sound: Vec<(Run, Run)>,
    /// How often only the reference did.
    failed: usize,
}

impl Pairs {
    /// Two servers in turn, so that what the machine does otherwise meets both.
    fn run(
        pairs: usize,
        length: Duration,
        rate: u32,
        reference: (&str, &str),
        ours: (&str, &str),
    ) -> Self {
        let one = |which: (&str, &str)| run(which.0, which.1, Rate::Fixed(rate), length);
        let pairs = (0..pairs).map(|n| {
            if n % 2 == 0 {
                let first = one(reference);
                (first, one(ours))
            } else {
                let first = one(ours);
                (one(reference), first)
            }
        });
        let made: Vec<_> = pairs.collect();
        let reached = |run: &Run| run.per_second() > 0.98 * f64::from(rate);
        let both = made.iter().filter(|(a, b)| reached(a) && reached(b));
        let only_reference = made.iter().filter(|(a, b)| reached(a) && !reached(b));
        Self {
            sound: both.copied().collect(),
            failed: only_reference.count(),
            made,
        }
    }

    fn heading(&self) {
        println!(
            "| figure | reference | tower-defer | ratio, median (least to most of {} pairs, {} made) | target | |",
            self.sound.len(),
            self.made.len()
        );
        println!("| --- | ---: | ---: | ---: | ---: | --- |");
    }

    /// Prints a row, and returns the line for the report of all targets.
    fn row(&self, number: u32, what: &str, kind: &Kind, target: Option<f64>) -> Figure {
        let Kind { name, of } = kind;
        // With none there is still something to be shown.
        let pairs = if self.sound.is_empty() {
            &self.made
        } else {
            &self.sound
        };
        let instead = if !self.all_completed() {
            Some("NOT MET: side effects are missing")
        } else if 2 * self.failed > self.made.len() {
            Some("NOT MET: only the reference reached the rate")
        } else if 2 * self.sound.len() <= self.made.len() {
            Some("not measured: the machine was too busy for the rate")
        } else {
            None
        };
        let micros = |values: Vec<f64>| format!("{:.1} µs", median(values));
        let figure = Figure {
            number,
            what: format!("{what} {name}"),
            reference: micros(pairs.iter().map(|(reference, _)| of(reference)).collect()),
            ours: micros(pairs.iter().map(|(_, ours)| of(ours)).collect()),
            ratio: Spread::of(pairs.iter().map(|(a, b)| of(b) / of(a))),
            target: target.map(Target::AtMost),
            instead,
        };
        println!(
            "| {name} | {} | {} | {} | {} | {} |",
            figure.reference,
            figure.ours,
            figure.ratio,
            figure.wanted(),
            figure.verdict()
        );
        figure
    }

    fn all_completed(&self) -> bool {
        let mut runs = self.made.iter().flat_map(|(a, b)| [a, b]);
        runs.all(|run| run.counts.all_completed())
    }

    /// A rate without this says nothing.
    fn completed(&self) {
        let both = [
            (
                "reference",
                self.made.iter().map(|p| p.0).collect::<Vec<_>>(),
            ),
            ("tower-defer", self.made.iter().map(|p| p.1).collect()),
        ];
        for (name, runs) in both {
            let sum = runs.iter().map(|run| run.counts);
            let sum = sum.fold(Counts::default(), Counts::plus);
            let rate = Spread::of(runs.iter().map(Run::per_second));
            println!(
                "\n{name}: {:.0} ({:.0} to {:.0}) responses/s; side effects: {} requests, {} completed, {} refused.",
                rate.median, rate.least, rate.most, sum.requests, sum.completed, sum.refused
            );
        }
    }
}
