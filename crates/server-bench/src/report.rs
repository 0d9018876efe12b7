//! Which runs are made, and what is said of them.

use crate::load::{Rate, Run, run};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Length {
    Quick,
    Full,
}

pub(crate) fn report(length: Length) {
    let (pairs, seconds) = match length {
        Length::Quick => (3, 2),
        Length::Full => (9, 4),
    };
    machine();
    table(
        "5 ms of waiting, as fast as it goes",
        "wait",
        Rate::Closed,
        seconds,
    );
    table(
        "200 µs of CPU, 1,500 requests a second",
        "burn",
        Rate::Fixed(1500),
        seconds,
    );

    let saturation = run("spawn", "wait", Rate::Closed, seconds).per_second;
    let half = (saturation / 2.0) as u32;
    println!("\n## Target 9: 5 ms of waiting, {half} requests a second (half of saturation)\n");
    let ratios = compare(
        pairs,
        seconds,
        Rate::Fixed(half),
        ("spawn", "wait"),
        ("defer", "wait"),
    );
    println!(
        "| figure | tower-defer ÷ naked spawn: median (least to most of {pairs} pairs) | target | met |"
    );
    println!("| --- | --- | --- | --- |");
    ratios.row("CPU per request", |r| r.cpu, 1.1);
    ratios.row("p50", |r| r.p50, 1.1);
    ratios.row("p99", |r| r.p99, 1.1);
    ratios.completed();

    println!("\n## Target 10: 200 µs of CPU on threads of its own, 1,500 requests a second\n");
    let rate = Rate::Fixed(1500);
    let ratios = compare(
        pairs,
        seconds,
        rate,
        ("none", "none"),
        ("dedicated", "burn"),
    );
    println!(
        "| figure | with ÷ without side effect: median (least to most of {pairs} pairs) | target | met |"
    );
    println!("| --- | --- | --- | --- |");
    ratios.row("p50", |r| r.p50, 1.25);
    ratios.row("p99", |r| r.p99, f64::INFINITY);
    ratios.completed();
}

/// A table of all variants; one run each, so for orders of magnitude only.
fn table(title: &str, effect: &str, rate: Rate, seconds: u32) {
    println!("\n## {title}\n");
    println!(
        "| the side effect | requests/s | p50 ms | p99 ms | CPU µs/request | completed | refused |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for variant in [
        "none",
        "inline",
        "spawn",
        "defer",
        "dedicated",
        "axum-tasks",
    ] {
        let r = run(variant, effect, rate, seconds);
        println!(
            "| {variant} | {:.0} | {:.2} | {:.2} | {:.1} | {} | {} |",
            r.per_second,
            r.p50 / 1000.0,
            r.p99 / 1000.0,
            r.cpu,
            r.completed,
            r.refused
        );
    }
}

struct Pairs(Vec<(Run, Run)>);

/// Runs two servers in turn, so that what the machine does otherwise meets both.
fn compare(
    pairs: usize,
    seconds: u32,
    rate: Rate,
    reference: (&str, &str),
    ours: (&str, &str),
) -> Pairs {
    let pairs = (0..pairs).map(|n| {
        let one = |which: (&str, &str)| run(which.0, which.1, rate, seconds);
        if n % 2 == 0 {
            let first = one(reference);
            (first, one(ours))
        } else {
            let first = one(ours);
            (one(reference), first)
        }
    });
    Pairs(pairs.collect())
}

impl Pairs {
    fn row(&self, name: &str, figure: impl Fn(&Run) -> f64, target: f64) {
        let mut ratios: Vec<f64> = self
            .0
            .iter()
            .map(|(reference, ours)| figure(ours) / figure(reference))
            .collect();
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let (goal, met) = if target.is_finite() {
            (
                format!("≤ {target}"),
                if median <= target { "yes" } else { "no" },
            )
        } else {
            ("–".to_owned(), "–")
        };
        println!("| {name} | {median:.2} ({least:.2} to {most:.2}) | {goal} | {met} |");
    }

    /// A rate without this says nothing.
    fn completed(&self) {
        let sum =
            |figure: fn(&Run) -> u64| self.0.iter().map(|(_, ours)| figure(ours)).sum::<u64>();
        println!(
            "\nSide effects: {} answered, {} completed, {} refused.",
            sum(|r| r.answered),
            sum(|r| r.completed),
            sum(|r| r.refused)
        );
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
        "{cores} cores, {cpu}, Linux {}",
        read("/proc/sys/kernel/osrelease").trim()
    );
}
