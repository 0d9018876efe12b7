//! The report of all fifteen targets. It runs the programs that measure them, one after the other, and
//! collects the lines that begin with `target`.
//!
//! ```text
//! cargo run --release -p tower-defer-bench --bin report            # prints the table, draws the plots
//! cargo run --release -p tower-defer-bench --bin report -- quick   # noisier, no plots
//! cargo run --release -p tower-defer-bench --bin report -- check   # sees that each program works; no figures
//! cargo run --release -p tower-defer-bench --bin report -- write   # also draws it into docs/ and README.md
//! ```
//!
//! The table goes to stdout, what the programs say meanwhile to stderr. How long each took, and all
//! together, stands in what is written; the tables of the documents are the only place that says it. It needs `valgrind` for the
//! targets 1 to 8 and `oha` for 9, 10 and 12; what is missing is said in the table.

#![expect(clippy::disallowed_methods, reason = "a program that measures time")]

mod documents;
mod programs;
mod table;

use std::process::ExitCode;

use tower_defer_measure::{Arguments, Length};

fn main() -> ExitCode {
    let arguments = Arguments::read_unhurried();
    let length = arguments.length;
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    let write = match (length, &words[..]) {
        (_, []) => false,
        (Length::Quick | Length::Full, ["write"]) => true,
        _ => {
            eprintln!(
                "usage: report [quick | check] [write]; what `check` sees is not written down"
            );
            return ExitCode::from(2);
        }
    };
    // A check is as short as a program allows. The gate allows nothing, and CI runs it as it is.
    let wanted = |program: &&programs::Program| program.lengths || length != Length::Check;
    let programs: Vec<_> = programs::ALL.iter().filter(wanted).collect();
    programs.iter().for_each(|program| program.build(length));
    let machine = table::machine(length);
    let results: Vec<_> = programs.iter().map(|p| p.run(length)).collect();
    let took = results.iter().map(|said| said.took).sum();
    let machine = format!(
        "{machine} It took {}, without building.",
        documents::spoken(took)
    );
    if length == Length::Check {
        return checked(&results);
    }
    let table = table::of_all(&results);
    println!("{machine}\n\n{table}");
    if write {
        documents::write(&machine, &table, &results);
    }
    ExitCode::SUCCESS
}

/// Without a tool nothing is known of a program; that is said, and no failure of it.
fn checked(results: &[programs::Said]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    println!();
    for said in results {
        let shown = said.program.shown();
        match &said.failed {
            None => println!("works: {shown}"),
            Some(why) if said.lacks_a_tool => println!("NOTHING CHECKED: {shown}: {why}"),
            Some(why) => {
                println!("FAILED: {shown}: {why}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
