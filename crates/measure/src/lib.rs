//! What the programs that measure share: the word that says how long they run, medians with their
//! spread, and the line by which the report of all targets learns of a figure.
//!
//! No dependencies, and nothing of what is measured.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// How long a program measures: the last word of its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// `check`: as short as it can be, to see that the program works. Its figures mean nothing.
    Check,
    /// `quick`: noisier.
    Quick,
    /// Nothing said: what the documents show.
    Full,
}

impl Length {
    /// One of the three.
    pub fn choose<T>(self, check: T, quick: T, full: T) -> T {
        match self {
            Self::Check => check,
            Self::Quick => quick,
            Self::Full => full,
        }
    }

    /// The word itself; none for the full length.
    pub fn word(self) -> &'static str {
        self.choose("check", "quick", "")
    }
}

/// No program takes longer at its full length: one that does hangs.
const LONGEST: Duration = Duration::from_secs(20 * 60);

#[expect(
    clippy::disallowed_methods,
    reason = "not a wait for something to become true: a program's time"
)]
fn give_up() {
    std::thread::sleep(LONGEST);
    let _ = unmeasured("it did not end within 20 minutes");
    std::process::exit(1);
}

/// Tells the report, and whoever reads along, why there are no figures, or no more of them.
pub fn unmeasured(why: &str) -> ExitCode {
    println!("unmeasured | {why}");
    ExitCode::FAILURE
}

/// How the reason begins where a program is missing that this one needs.
pub const LACKING: &str = "there is no ";

/// Whether this machine can start a program.
pub fn has(program: &str, version: &str) -> bool {
    let mut command = Command::new(program);
    command.arg(version).stdin(Stdio::null());
    command.output().is_ok_and(|output| output.status.success())
}

/// What stood behind the command.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// How long to measure.
    pub length: Length,
    /// The other words, in order: which parts are wanted, or a server's role.
    pub words: Vec<String>,
    bench: bool,
    directory: Option<PathBuf>,
}

impl Arguments {
    /// Of this process, which from now on has [`LONGEST`] to end. `--dir PATH` names the disk to write
    /// to; other options are cargo's.
    pub fn read() -> Self {
        std::thread::spawn(give_up);
        Self::read_unhurried()
    }

    /// The same for a program that starts others, which have their own time to end.
    pub fn read_unhurried() -> Self {
        let mut read = Self {
            length: Length::Full,
            words: Vec::new(),
            bench: false,
            directory: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "check" => read.length = Length::Check,
                "quick" => read.length = Length::Quick,
                "--bench" => read.bench = true,
                "--dir" => read.directory = arguments.next().map(PathBuf::from),
                option if option.starts_with("--") => {}
                _ => read.words.push(argument),
            }
        }
        read
    }

    /// Of a program under `benches/`: none where `cargo test` has started it, which then has nothing
    /// to do.
    pub fn of_bench() -> Option<Self> {
        let read = Self::read();
        if !read.bench {
            println!("nothing is measured by a test run; say `cargo bench`");
        }
        read.bench.then_some(read)
    }

    /// Whether this part is to be measured: it is named, or no part is.
    pub fn wanted(&self, part: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| word == part)
    }

    /// A new directory to write to, on the disk that was named.
    pub fn scratch(&self) -> Scratch {
        let parent = self.directory.clone().unwrap_or_else(std::env::temp_dir);
        let path = parent.join(format!("defer-measure-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory to write to");
        Scratch(path)
    }
}

/// A directory that goes with this value.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The least, the median and the most of some rounds.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The upper one of two.
    pub median: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of one round at least.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }

    /// Of a figure that is the same in every round, as instructions are.
    pub fn exact(value: f64) -> Self {
        Self {
            least: value,
            median: value,
            most: value,
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2}", self.median)?;
        if self.least < self.most {
            write!(f, " ({:.2} to {:.2})", self.least, self.most)?;
        }
        Ok(())
    }
}

/// Of some rounds at least.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).median
}

/// What a ratio is to be.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Not more than this.
    AtMost(f64),
    /// Not less than this.
    AtLeast(f64),
}

/// Nearer to the target than this, a figure moves across it with the code around it.
const NARROW: f64 = 0.03;

impl Target {
    /// Met or not, and how surely: a target that lies between the least and the most of the rounds is
    /// neither met nor missed for sure.
    pub fn verdict(self, ratio: Spread) -> &'static str {
        let (met, sure, margin) = match self {
            Self::AtMost(wanted) => (
                ratio.median <= wanted,
                (ratio.most <= wanted) == (ratio.least <= wanted),
                (ratio.median / wanted - 1.0).abs(),
            ),
            Self::AtLeast(wanted) => (
                ratio.median >= wanted,
                (ratio.most >= wanted) == (ratio.least >= wanted),
                (ratio.median / wanted - 1.0).abs(),
            ),
        };
        match (met, sure) {
            (true, false) => "met, but within the spread",
            (true, true) if margin <= NARROW => "met, narrowly",
            (true, true) => "met",
            (false, false) => "NOT MET, but within the spread",
            (false, true) if margin <= NARROW => "NOT MET, narrowly",
            (false, true) => "NOT MET",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(wanted) => write!(f, "≤ {wanted}"),
            Self::AtLeast(wanted) => write!(f, "≥ {wanted}"),
        }
    }
}

/// A figure for the report of all targets: `target 9 | figure | reference | ours | ratio | target |
/// met`, as the report reads it. What has no target is there to be looked at.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Of the target.
    pub number: u32,
    /// In words, the reference included.
    pub what: String,
    /// With its unit.
    pub reference: String,
    /// With its unit.
    pub ours: String,
    /// Ours to the reference.
    pub ratio: Spread,
    /// What the ratio is to be.
    pub target: Option<Target>,
    /// Why the ratio is not judged, or judged otherwise.
    pub instead: Option<&'static str>,
}

impl Figure {
    /// Met or not; empty where there is no target.
    pub fn verdict(&self) -> &'static str {
        match (self.target, self.instead) {
            (None, _) => "",
            (Some(_), Some(instead)) => instead,
            (Some(target), None) => target.verdict(self.ratio),
        }
    }

    /// The target in words; empty where there is none.
    pub fn wanted(&self) -> String {
        self.target.map_or(String::new(), |t| t.to_string())
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            what,
            reference,
            ours,
            ratio,
            ..
        } = self;
        let (wanted, verdict) = (self.wanted(), self.verdict());
        write!(
            f,
            "target {number} | {what} | {reference} | {ours} | {ratio} | {wanted} | {verdict}"
        )
    }
}

/// Of which cores, which kernel and which compiler.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo");
    let processor = processor
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1))
        .unwrap_or("a processor");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let rustc = Command::new("rustc").arg("--version").output();
    let rustc = rustc.map(|output| output.stdout).unwrap_or_default();
    format!(
        "{cores} cores of {processor}, Linux {}, {}",
        kernel.trim(),
        String::from_utf8_lossy(&rustc).trim()
    )
}

/// User and system time of a process, in ticks of 10 ms: enough over seconds. `self` is this one. Zero
/// where there is no `/proc`.
pub fn cpu_of(process: &str) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Fields 14 and 15 of the whole; the name in brackets may hold anything.
    let after = text.rsplit(')').next().unwrap_or_default();
    let ticks = after.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_says_how_sure_it_is() {
        let of = |least, median, most| Spread {
            least,
            median,
            most,
        };
        let at_most = Target::AtMost(1.1);
        assert_eq!(at_most.verdict(of(0.8, 0.9, 1.0)), "met");
        assert_eq!(
            at_most.verdict(of(0.8, 0.9, 1.2)),
            "met, but within the spread"
        );
        assert_eq!(at_most.verdict(Spread::exact(1.09)), "met, narrowly");
        assert_eq!(at_most.verdict(Spread::exact(1.11)), "NOT MET, narrowly");
        assert_eq!(
            at_most.verdict(of(1.0, 1.2, 1.3)),
            "NOT MET, but within the spread"
        );
        assert_eq!(at_most.verdict(of(1.2, 1.3, 1.4)), "NOT MET");
        let at_least = Target::AtLeast(0.5);
        assert_eq!(at_least.verdict(of(0.6, 0.7, 0.8)), "met");
        assert_eq!(
            at_least.verdict(of(0.4, 0.6, 0.7)),
            "met, but within the spread"
        );
        assert_eq!(at_least.verdict(of(0.3, 0.4, 0.45)), "NOT MET");
        assert_eq!(
            at_least.verdict(of(0.3, 0.4, 0.6)),
            "NOT MET, but within the spread"
        );
    }

    #[test]
    fn the_spread_is_shown_where_there_is_one() {
        assert_eq!(Spread::exact(1.234).to_string(), "1.23");
        assert_eq!(
            Spread::of([3.0, 1.0, 2.0]).to_string(),
            "2.00 (1.00 to 3.00)"
        );
    }
}
