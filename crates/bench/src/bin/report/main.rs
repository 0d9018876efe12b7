//! The report of all fifteen targets. It runs the programs that measure them, one after the other, and
//! collects the lines that begin with `target`.
//!
//! ```text
//! cargo run --release -p tower-defer-bench --bin report            # about half an hour, without building
//! cargo run --release -p tower-defer-bench --bin report -- quick   # about eight minutes; noisier, no plots
//! cargo run --release -p tower-defer-bench --bin report -- write   # also draws it into docs/ and README.md
//! ```
//!
//! The table goes to stdout, what the programs say meanwhile to stderr. It needs `valgrind` for the
//! targets 1 to 8 and `oha` for 9 and 10; what is missing is said in the table.

mod documents;
mod programs;
mod table;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (quick, write) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => (false, false),
        ["quick"] => (true, false),
        ["write"] => (false, true),
        ["quick", "write"] | ["write", "quick"] => (true, true),
        _ => {
            eprintln!("usage: report [quick] [write]");
            return ExitCode::from(2);
        }
    };
    let machine = table::machine(quick);
    let results: Vec<_> = programs::ALL.iter().map(|p| p.run(quick)).collect();
    let table = table::of_all(&results);
    println!("{machine}\n\n{table}");
    if write {
        documents::write(&machine, &table, &results);
    }
    ExitCode::SUCCESS
}
