//! Which runs are made, and what is said of them.

use std::time::Duration;

use crate::load::{Counts, Rate, Run, run};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Length {
    Quick,
    Full,
}

const VARIANTS: [(&str, &str); 6] = [
    ("none", "none"),
    ("inline", "awaited in the handler"),
    ("spawn", "`tokio::spawn`"),
    ("defer", "tower-defer"),
    ("dedicated", "tower-defer, `dedicated(1)`"),
    ("axum-tasks", "axum-tasks"),
];

pub(crate) fn report(length: Length) {
    let (pairs, rounds, seconds) = match length {
        Length::Quick => (5, 1, 1),
        Length::Full => (9, 3, 4),
    };
    let length = Duration::from_secs(seconds);
    machine();
    let spawn = table(
        "5 ms of waiting, as fast as it goes",
        "wait",
        Rate::Closed,
        rounds,
        length,
    );
    let burn = Rate::Fixed(1500);
    table(
        "200 µs of CPU, 1,500 requests a second",
        "burn",
        burn,
        rounds,
        length,
    );

    let half = (spawn / 2.0) as u32;
    let compared = Pairs::run(pairs, length, half, ("spawn", "wait"), ("defer", "wait"));
    println!("\n## 5 ms of waiting, {half} requests a second: half of what the naked spawn did\n");
    let what = "server, 5 ms of waiting at half of saturation, against a naked spawn:";
    compared.heading();
    let lines = [
        compared.row("9", what, &CPU, Some(1.1)),
        compared.row("9", what, &P50, Some(1.1)),
        compared.row("9", what, &P99, Some(1.1)),
    ];
    compared.completed();
    print_lines(&lines);

    let compared = Pairs::run(pairs, length, 1500, ("none", "none"), ("dedicated", "burn"));
    println!("\n## 200 µs of CPU on a thread of its own, 1,500 requests a second\n");
    let what = "server, 200 µs of CPU on a runtime of its own, 1,500/s, against none:";
    compared.heading();
    let lines = [
        compared.row("10", what, &P50, Some(1.25)),
        compared.row("10", what, &P99, None),
    ];
    compared.completed();
    print_lines(&lines);
}

fn print_lines(lines: &[String]) {
    println!();
    lines.iter().for_each(|line| println!("{line}"));
}

/// All variants in turn, so many rounds, medians. Returns what the naked spawn did a second.
fn table(title: &str, effect: &str, rate: Rate, rounds: usize, length: Duration) -> f64 {
    println!("\n## {title} (medians of {rounds} interleaved rounds)\n");
    println!(
        "| the side effect | responses/s | p50, ms | p99, ms | CPU per request, µs | requests | completed | refused |"
    );
    println!("| --- |{}", " ---: |".repeat(7));
    let rounds: Vec<[Run; VARIANTS.len()]> = (0..rounds)
        .map(|_| VARIANTS.map(|(variant, _)| run(variant, effect, rate, length)))
        .collect();
    let mut spawned = 0.0;
    for (at, (variant, title)) in VARIANTS.iter().enumerate() {
        let of = |figure: fn(&Run) -> f64| {
            let values = rounds.iter().map(|round| figure(&round[at]));
            Spread::of(values).median
        };
        let per_second = of(|run| run.per_second);
        if *variant == "spawn" {
            spawned = per_second;
        }
        let counts = rounds.iter().map(|round| round[at].counts);
        let sum = counts.fold(Counts::default(), Counts::plus);
        println!(
            "| {title} | {per_second:.0} | {:.2} | {:.2} | {:.1} | {} | {} | {} |",
            of(|run| run.p50) / 1000.0,
            of(|run| run.p99) / 1000.0,
            of(|run| run.cpu),
            sum.requests,
            sum.completed,
            sum.refused
        );
    }
    spawned
}

struct Figure {
    name: &'static str,
    of: fn(&Run) -> f64,
}

const CPU: Figure = Figure {
    name: "CPU per request",
    of: |run| run.cpu,
};
const P50: Figure = Figure {
    name: "p50",
    of: |run| run.p50,
};
const P99: Figure = Figure {
    name: "p99",
    of: |run| run.p99,
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
        let reached = |run: &Run| run.per_second > 0.98 * f64::from(rate);
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
    fn row(&self, number: &str, what: &str, figure: &Figure, target: Option<f64>) -> String {
        let Figure { name, of } = figure;
        // With none there is still something to be shown.
        let pairs = if self.sound.is_empty() {
            &self.made
        } else {
            &self.sound
        };
        let reference = Spread::of(pairs.iter().map(|(reference, _)| of(reference)));
        let ours = Spread::of(pairs.iter().map(|(_, ours)| of(ours)));
        let ratio = Spread::of(pairs.iter().map(|(a, b)| of(b) / of(a)));
        let met = match target {
            None => "",
            Some(_) if !self.all_completed() => "NOT MET: side effects are missing",
            Some(_) if 2 * self.failed > self.made.len() => {
                "NOT MET: only the reference reached the rate"
            }
            Some(_) if 2 * self.sound.len() <= self.made.len() => {
                "not measured: the machine was too busy for the rate"
            }
            Some(target) if ratio.median <= target => "met",
            Some(_) => "NOT MET",
        };
        let target = target.map_or(String::new(), |target| format!("≤ {target}"));
        let Spread {
            least,
            median,
            most,
        } = ratio;
        let figures = format!(
            "{:.1} µs | {:.1} µs | {median:.2} ({least:.2} to {most:.2}) | {target} | {met}",
            reference.median, ours.median
        );
        println!("| {name} | {figures} |");
        format!("target {number} | {what} {name} | {figures}")
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
            let rate = Spread::of(runs.iter().map(|run| run.per_second));
            println!(
                "\n{name}: {:.0} ({:.0} to {:.0}) responses/s; side effects: {} requests, {} completed, {} refused.",
                rate.median, rate.least, rate.most, sum.requests, sum.completed, sum.refused
            );
        }
    }
}

#[derive(Clone, Copy)]
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }
}

fn machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .split(": ")
                .nth(1)
                .map(str::to_owned)
        })
        .unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!(
        "{cores} cores, {cpu}, Linux {}. The server has one thread on the first core, the load (oha, 32 \
         connections) the second.",
        read("/proc/sys/kernel/osrelease").trim()
    );
}
