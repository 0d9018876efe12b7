//! The table: target, reference, ours, ratio, met or not, and whether it has grown.

use std::collections::HashMap;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tower_defer_measure::{Spread, Target, has, unmeasured};

use crate::{allocations_of, in_runtime, tasks};

/// Both lengths are multiples of the longest burst, and the shorter one is past the warm-up.
const SHORT: usize = 640;
const LONG: usize = 1920;

/// A recorded ratio may be exceeded by so much: code that has nothing to do with it moves the
/// references' counts by up to half a per cent, another compiler by more.
const MARGIN: f64 = 1.04;

const VARIANTS: &[&str] = &[
    "request",
    "request+add_extension",
    "request+defer",
    "request+request_id",
    "request+trace",
    "router",
    "router+identity",
    "router+extension",
    "router+defer",
    "defer around router",
    "router, 1 spawn",
    "router+defer, 1 task",
    "spawn/64",
    "spawn/1",
    "tracker/64",
    "tracker/1",
    "by hand/64",
    "by hand/1",
    "submit/64",
    "submit/1",
    "submit once/64",
    "submit, no retry/64",
    "submit, no bounds/64",
    "submit, fatal/64",
    "submit, fatal, no letters/64",
    "spawn, waits/64",
    "spawn+timeout, waits/64",
    "by hand, waits/64",
    "submit, waits/64",
    "spawn, waits/1",
    "spawn+timeout, waits/1",
    "by hand, waits/1",
    "submit, waits/1",
    "submit, no timeout, waits/64",
    "submit, no timeout, waits/1",
    "submit, fails bare/64",
    "submit, fails/64",
    "submit, fails apart/64",
    "spawn, sleeps/64",
    "by hand, fails/64",
    "whole spawn 1/64",
    "whole defer 1/64",
    "whole defer, no hold 1/64",
    "whole spawn 4/64",
    "whole defer 4/64",
    "whole spawn 1/1",
    "whole defer 1/1",
    "whole spawn 4/1",
    "whole defer 4/1",
];

/// `(ours - base) / (reference - base)`.
struct Ratio {
    number: &'static str,
    what: &'static str,
    ours: &'static str,
    reference: &'static str,
    base: Option<&'static str>,
    /// None: no target is set, the figure is there to be looked at.
    target: Option<f64>,
}

impl Ratio {
    /// The reference and ours.
    fn figures(&self, counts: &HashMap<&'static str, f64>) -> (f64, f64) {
        let base = self.base.map_or(0.0, |base| counts[base]);
        (counts[self.reference] - base, counts[self.ours] - base)
    }
}

const fn target(
    number: &'static str,
    what: &'static str,
    ours: &'static str,
    reference: &'static str,
    base: Option<&'static str>,
    target: Option<f64>,
) -> Ratio {
    Ratio {
        number,
        what,
        ours,
        reference,
        base,
        target,
    }
}

#[rustfmt::skip]
const TARGETS: &[Ratio] = &[
    target("1", "added to a request, nothing deferred", "request+defer", "request+add_extension", Some("request"), Some(1.5)),
    target("3", "the same through an axum router", "router+defer", "router+extension", Some("router"), Some(1.3)),
    target("3b", "the same, around the router", "defer around router", "router+extension", Some("router"), None),
    target("4", "ready task, burst of 64", "submit/64", "spawn/64", None, Some(0.4)),
    target("5", "ready task, burst of 1", "submit/1", "spawn/1", None, Some(0.9)),
    target("6", "task that waits once, burst of 64", "submit, waits/64", "spawn+timeout, waits/64", None, Some(0.7)),
    target("6b", "task that waits once, burst of 1", "submit, waits/1", "spawn+timeout, waits/1", None, None),
    target("7a", "whole path, 1 task, burst of 64", "whole defer 1/64", "whole spawn 1/64", None, Some(1.2)),
    target("7b", "whole path, 4 tasks, burst of 64", "whole defer 4/64", "whole spawn 4/64", None, Some(0.6)),
    target("7c", "whole path, 1 task, burst of 1", "whole defer 1/1", "whole spawn 1/1", None, None),
    target("7d", "whole path, 4 tasks, burst of 1", "whole defer 4/1", "whole spawn 4/1", None, None),
    target("7e", "axum router, handler with 1 task, burst of 64", "router+defer, 1 task", "router, 1 spawn", None, None),
];

/// One line a target: its number and the ratio it may not exceed by more than the margin.
const LIMITS: &str = include_str!("../../../gate.limits");

pub fn print(lines: bool) -> ExitCode {
    if !has("valgrind", "--version") {
        return unmeasured("there is no `valgrind` (Debian: valgrind, libc6-dbg)");
    }
    let counts = match check_limits().and_then(|()| measure()) {
        Ok(counts) => counts,
        Err(error) => return unmeasured(&error),
    };
    println!("instructions each, and allocations\n");
    for name in VARIANTS {
        let allocations = hundredths(allocations_of(name, SHORT));
        println!("{name:<28} {:>8.0} {allocations:>8.2}", counts[name]);
    }
    println!(
        "\n{:>3}  {:<46} {:>10} {:>8} {:>7} {:>7}  {:<17} limit",
        "", "", "reference", "ours", "ratio", "target", ""
    );
    let mut grown = Vec::new();
    for target in TARGETS {
        let (reference, ours) = target.figures(&counts);
        row(target, reference, ours, &mut grown);
    }
    waiting(lines, &counts, &mut grown);
    switched_off(lines, &counts);
    by_allocations(lines, &mut grown);
    if lines {
        for target in TARGETS {
            println!("{}", line(target, &counts));
        }
    }
    for line in &grown {
        eprintln!("GROWN: {line}");
    }
    if grown.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn row(target: &Ratio, reference: f64, ours: f64, grown: &mut Vec<String>) {
    let ratio = ours / reference;
    let limit = limit(target.number);
    let met = verdict(ratio, target.target);
    let wanted = target.target.map_or(String::new(), |t| format!("{t:.2}"));
    let Ratio { number, what, .. } = target;
    println!(
        "{number:>3}  {what:<46} {reference:>10.0} {ours:>8.0} {ratio:>7.3} {wanted:>7}  {met:<17} {}",
        limit.map_or(String::new(), |limit| format!("{limit:.3}"))
    );
    if has_grown(limit, ratio, target.target) {
        grown.push(format!("{number}, {what}: {ratio:.3}"));
    }
}

/// More than was reached, with the margin; and a target that was met stays met, whatever the margin says.
fn has_grown(limit: Option<f64>, ratio: f64, wanted: Option<f64>) -> bool {
    limit.is_some_and(|limit| {
        let wanted = wanted.filter(|wanted| limit <= *wanted);
        is_over(ratio, wanted.unwrap_or(f64::MAX).min(limit * MARGIN))
    })
}

/// A ratio that is no number, or nothing, was not measured: it holds no limit either.
fn is_over(ratio: f64, limit: f64) -> bool {
    !ratio.is_finite() || ratio <= 0.0 || ratio > limit
}

/// As they are printed; none is a negative nothing.
fn hundredths(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0 + 0.0
}

/// They repeat to one instruction, but another compiler moves them across what is near.
fn verdict(ratio: f64, wanted: Option<f64>) -> &'static str {
    wanted.map_or("", |wanted| {
        Target::AtMost(wanted).verdict(Spread::exact(ratio))
    })
}

fn wanted(wanted: Option<f64>) -> String {
    wanted.map_or(String::new(), |wanted| Target::AtMost(wanted).to_string())
}

/// For the report of all targets: `target 1 | figure | reference | ours | ratio | target | met`.
fn line(target: &Ratio, counts: &HashMap<&'static str, f64>) -> String {
    let (reference, ours) = target.figures(counts);
    let ratio = ours / reference;
    let (wanted, met) = (wanted(target.target), verdict(ratio, target.target));
    format!(
        "target {} | instructions: {}, against `{}` | {reference:.0} | {ours:.0} | {ratio:.2} | {wanted} | {met}",
        target.number.trim_end_matches(char::is_alphabetic),
        target.what,
        target.reference,
    )
}

/// What a user can switch off, beside the same with everything on. No target is reached by any of it.
fn switched_off(lines: bool, counts: &HashMap<&'static str, f64>) {
    println!("\nswitched off by the user (no target): all on, without, ratio");
    for (what, on, off) in [
        (
            "a plain future: one attempt (`Task::once`)",
            "submit/64",
            "submit once/64",
        ),
        (
            "no retry (`Retry::never`)",
            "submit/64",
            "submit, no retry/64",
        ),
        (
            "no timeout (`Duration::MAX`)",
            "submit, waits/64",
            "submit, no timeout, waits/64",
        ),
        (
            "no timeout, a task alone",
            "submit, waits/1",
            "submit, no timeout, waits/1",
        ),
        (
            "no `concurrency`, no `capacity`: the largest numbers",
            "submit/64",
            "submit, no bounds/64",
        ),
        (
            "no dead letters (0), a task that fails for good",
            "submit, fatal/64",
            "submit, fatal, no letters/64",
        ),
        (
            "no `max_hold` (`Duration::MAX`), whole path, 1 task",
            "whole defer 1/64",
            "whole defer, no hold 1/64",
        ),
    ] {
        let (on, off) = (counts[on], counts[off]);
        println!("     {what:<52} {on:>10.0} {off:>8.0} {:>7.3}", off / on);
        if lines {
            println!("off | {what} | {on:.0} | {off:.0}");
        }
    }
}

/// Target 13: what a failed task costs that has to wait. The target compares what failing and waiting adds
/// to a task with a whole task that sleeps; what a whole one costs, and what sleeping adds to a spawned
/// task, stand beside it.
fn waiting(lines: bool, counts: &HashMap<&'static str, f64>, grown: &mut Vec<String>) {
    println!();
    let adds = |name| counts[name] - counts["submit/64"];
    let sleeps = counts["spawn, sleeps/64"];
    let added = "against a whole task of `spawn, sleeps/64`";
    for (number, what, ours, reference, wanted) in [
        (
            "13",
            format!("arming a retry (what failing and waiting adds to a task), its error free of cost, {added}"),
            adds("submit, fails bare/64"),
            sleeps,
            Some(0.5),
        ),
        (
            "13b",
            format!("arming a retry, its error a text, {added}"),
            adds("submit, fails/64"),
            sleeps,
            Some(0.5),
        ),
        (
            "13c",
            format!("arming a retry, no two errors the same, {added}"),
            adds("submit, fails apart/64"),
            sleeps,
            Some(0.5),
        ),
        (
            "13e",
            "arming a retry, its error free of cost, against what sleeping adds to a spawned task".into(),
            adds("submit, fails bare/64"),
            sleeps - counts["spawn/64"],
            None,
        ),
        (
            "13f",
            "a whole task that fails and waits, its error free of cost, against `spawn, sleeps/64`".into(),
            counts["submit, fails bare/64"],
            sleeps,
            None,
        ),
        (
            "13d",
            "a whole task that fails and waits, its error a text, against `by hand, fails/64`, which does the same".into(),
            counts["submit, fails/64"],
            counts["by hand, fails/64"],
            None,
        ),
    ] {
        let ratio = ours / reference;
        let said = verdict(ratio, wanted);
        println!("{number:>3}  {reference:>6.0} {ours:>6.0} {ratio:>6.3} {said:<8} {what}");
        if lines {
            let wanted = self::wanted(wanted);
            println!(
                "target 13 | instructions: {what} | {reference:.0} | {ours:.0} | {ratio:.2} | {wanted} | {said}"
            );
        }
        if has_grown(limit(number), ratio, wanted) {
            grown.push(format!("{number}, {what}: {ratio:.3}"));
        }
    }
}

/// Targets 2 and 8: whole numbers, held to the letter of the target or of what was reached.
fn by_allocations(lines: bool, grown: &mut Vec<String>) {
    let each = |name: &str| allocations_of(name, SHORT);
    let (bare, theirs) = (each("request"), each("request+add_extension"));
    let ours = each("request+defer");
    let per_task = |kind: &str| {
        let of = |tasks| each(&format!("whole {kind} {tasks}/64"));
        (of(4) - of(1)) / 3.0
    };
    // On a thread that has no boxes of tasks that have ended: those would be missing in the count.
    let queued = std::thread::spawn(|| in_runtime(async { tasks::queued_bytes(4096) }));
    let queued = queued.join().expect("the measuring thread");
    let beside = |bytes: u64| bytes.saturating_sub(queued.future) as f64;
    println!();
    for (number, what, reference, ours, figure, wanted) in [
        (
            "2",
            "allocations that the layer adds to a request, against `AddExtension`",
            theirs - bare,
            ours - bare,
            ours - theirs,
            (1.0, "≤ 1 more"),
        ),
        (
            "2b",
            "allocations of each task, against `tokio::spawn`",
            per_task("spawn"),
            per_task("defer"),
            per_task("defer"),
            (1.0, "≤ 1"),
        ),
        (
            "8",
            "bytes of ours per queued task, its future aside, against `tokio::spawn`",
            beside(queued.spawned),
            beside(queued.once),
            beside(queued.once),
            (64.0, "≤ 64 bytes"),
        ),
    ] {
        let (reference, ours, figure) =
            (hundredths(reference), hundredths(ours), hundredths(figure));
        let (wanted, words) = wanted;
        // A worker's start may fall into the count; a hundredth is no allocation per task.
        let ratio = figure / wanted - 0.01;
        let said = verdict(ratio, Some(1.0));
        println!("{number:>3}  {what:<72} {reference:>7.2} {ours:>6.2} {words:<10} {said}");
        if lines {
            let ratio = if number == "8" {
                format!("{:.2}", ours / reference)
            } else {
                String::new()
            };
            let digits = if number == "8" { 0 } else { 2 };
            let number = number.trim_end_matches(char::is_alphabetic);
            println!(
                "target {number} | {what} | {reference:.digits$} | {ours:.digits$} | {ratio} | {words} | {said}"
            );
        }
        if ratio > limit(number).unwrap_or(1.0) {
            grown.push(format!("{number}, {what}: {figure:.2}"));
        }
    }
}

/// The numbers that have a line beside those of [`TARGETS`].
const APART: [&str; 7] = ["2", "2b", "8", "13", "13b", "13c", "13d"];

/// A figure without a line, or a line that nobody reads, would hold nothing.
fn check_limits() -> Result<(), String> {
    let mut wanted: Vec<&str> = TARGETS.iter().map(|target| target.number).collect();
    wanted.extend(APART);
    let mut lines: Vec<&str> = LIMITS
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once(' ').map_or(line, |(number, _)| number))
        .collect();
    wanted.sort_unstable();
    lines.sort_unstable();
    if wanted == lines {
        return Ok(());
    }
    Err(format!("gate.limits has {lines:?} instead of {wanted:?}"))
}

fn limit(number: &str) -> Option<f64> {
    LIMITS.lines().find_map(|line| {
        let (name, ratio) = line.split_once(' ')?;
        (name == number).then(|| ratio.trim().parse().expect("gate.limits holds numbers"))
    })
}

/// Instructions of each variant, on as many cores as there are.
fn measure() -> Result<HashMap<&'static str, f64>, String> {
    let next = AtomicUsize::new(0);
    let counts = Mutex::new(Ok(HashMap::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(name) = VARIANTS.get(next.fetch_add(1, Relaxed)) {
                    let count = instructions(name, LONG)
                        .and_then(|long| Ok(long - instructions(name, SHORT)?));
                    let mut counts = counts.lock().expect("no thread panics here");
                    match (&mut *counts, count) {
                        (Ok(counts), Ok(count)) => {
                            counts.insert(*name, count / (LONG - SHORT) as f64);
                        }
                        (_, Err(error)) => *counts = Err(error),
                        (Err(_), Ok(_)) => {}
                    }
                }
            });
        }
    });
    counts.into_inner().expect("no thread panics here")
}

fn instructions(name: &str, n: usize) -> Result<f64, String> {
    let gate = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(gate)
        .args(["run", name, &n.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .filter(|_| output.status.success())
        .ok_or_else(|| format!("{name}: valgrind has no count\n{said}"))
}
