//! The operator's tool for an event store in a SQLite file: what waits, what has failed and why, replay,
//! discard. It works beside the server that has the file open, and where none runs.
//!
//! ```text
//! cargo run --example deliveries --features sqlite
//! cargo run --example deliveries --features sqlite -- signup.db group
//! ```
//!
//! The first line prints the commands. The second one shows what has failed for good in the file that
//! the example `signup` leaves; then:
//!
//! ```text
//! … -- signup.db list --subscriber newsletter
//! … -- signup.db replay --name list-0-is-back --subscriber newsletter
//! … -- signup.db discard --subscriber newsletter --error-group 'the newsletter has no list #'
//! … -- signup.db discard --state parked --subscriber one-that-is-gone
//! ```
//!
//! A replay that was cut short goes on under its name; a running server finds it within 5 s. The tool
//! ends with 0, with 1 when the store could not do it, with 2 when it was not understood.

#![expect(
    clippy::disallowed_methods,
    reason = "a tool may sleep, and read its clock"
)]

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tower_defer::event::store::{Counts, Filter, Replay, SqliteOperator, State, StoreError};

const USAGE: &str = "\
usage: deliveries FILE COMMAND

  counts                        how many deliveries are in which state
  list [--state STATE]          one line each; STATE is discarded (the default),
                                parked, queued, retrying or running
  group                         what failed for good, by subscriber and error
  replay --name NAME            starts dead letters again: under one name each
                                at most once, however often it is called
  discard [--all] [--state parked]
                                dead letters, or what is parked, become history;
                                without a filter it wants --all

which ones: --subscriber NAME  --event NAME  --error-group GROUP (see group)
how many:   --limit N (list and group: 100, replay and discard: no limit)";

/// So many are replayed or discarded with one commit: the server's requests wait for it.
const PAGE: usize = 200;

#[derive(Clone, Copy, PartialEq)]
enum Verb {
    Counts,
    List,
    Group,
    Replay,
    Discard,
}

struct Order {
    file: String,
    verb: Verb,
    filter: Filter,
    state: State,
    name: String,
    limit: Option<usize>,
    all: bool,
}

enum Failure {
    Usage(String),
    Store(StoreError),
    Output(io::Error),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn usage(what: impl Into<String>) -> Failure {
    Failure::Usage(what.into())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match understand(&words).and_then(|order| carry_out(&order, &mut io::stdout().lock())) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read this may have seen enough.
        Err(Failure::Output(error)) => complain(&error, 1),
        Err(Failure::Store(error)) => match std::error::Error::source(&error) {
            Some(why) => complain(&format!("{error}: {why}"), 1),
            None => complain(&error, 1),
        },
        Err(Failure::Usage(what)) => complain(&format!("{what}\n\n{USAGE}"), 2),
    }
}

fn complain(what: &dyn Display, code: u8) -> ExitCode {
    eprintln!("deliveries: {what}");
    ExitCode::from(code)
}

fn understand(words: &[String]) -> Result<Order, Failure> {
    let [file, verb, options @ ..] = words else {
        return Err(usage("it takes a file and a command"));
    };
    let verb = match verb.as_str() {
        "counts" => Verb::Counts,
        "list" => Verb::List,
        "group" => Verb::Group,
        "replay" => Verb::Replay,
        "discard" => Verb::Discard,
        other => return Err(usage(format!("there is no command {other:?}"))),
    };
    let mut order = Order {
        file: file.clone(),
        verb,
        filter: Filter::default(),
        state: State::Discarded,
        name: String::new(),
        limit: None,
        all: false,
    };
    if verb == Verb::Counts && !options.is_empty() {
        return Err(usage("it counts them all"));
    }
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let no_value = || usage(format!("{option} takes a value"));
        let mut value = || options.next().ok_or_else(no_value);
        match option.as_str() {
            "--subscriber" => order.filter.subscriber = Some(value()?.as_str().into()),
            "--event" => order.filter.event_name = Some(value()?.as_str().into()),
            "--error-group" => order.filter.error_group = Some(value()?.clone()),
            "--limit" => {
                let limit = value()?.parse();
                order.limit = Some(limit.map_err(|_| usage("--limit takes a number"))?);
            }
            "--state" if matches!(verb, Verb::List | Verb::Discard) => {
                let state = State::from_name(value()?).ok_or_else(|| usage("no such state"));
                order.state = state?;
            }
            "--name" if verb == Verb::Replay => order.name = value()?.clone(),
            "--all" if verb == Verb::Discard => order.all = true,
            other => return Err(usage(format!("{other:?} does not belong here"))),
        }
    }
    if verb == Verb::Replay && order.name.is_empty() {
        return Err(usage("a replay needs a --name, to be called again by"));
    }
    if verb == Verb::Discard && !matches!(order.state, State::Discarded | State::Parked) {
        return Err(usage(
            "only dead letters and what is parked can be discarded",
        ));
    }
    if verb == Verb::Discard && !order.all && order.filter == Filter::default() {
        return Err(usage("say which ones, or --all"));
    }
    Ok(order)
}

fn carry_out(order: &Order, out: &mut impl Write) -> Result<(), Failure> {
    let mut store = SqliteOperator::open(&order.file)?;
    let shown = order.limit.unwrap_or(100);
    match order.verb {
        Verb::Counts => show_counts(&store.counts()?, out)?,
        Verb::Group => {
            let groups = store.group(&order.filter, shown)?;
            if groups.is_empty() {
                writeln!(out, "no dead letters")?;
            }
            for group in groups {
                write!(out, "{:>8}  {}  ", group.count, group.subscriber)?;
                writeln!(out, "{}  (last {})", group.error_group, ago(group.last_ms))?;
            }
        }
        Verb::List => {
            for it in store.list(order.state, &order.filter, None, shown)? {
                let (since, tries) = (ago(it.due_ms.unwrap_or(it.changed_ms)), it.attempt);
                let (reason, error) = (it.reason.unwrap_or_default(), it.error.unwrap_or_default());
                write!(out, "{}/{}  ", it.event, it.subscriber)?;
                write!(out, "{} {}  ", it.event_name, it.payload)?;
                write!(out, "{} {since}, attempt {tries}  ", it.state)?;
                writeln!(out, "{reason}: {error}")?;
            }
        }
        Verb::Replay => {
            let mut replay = Replay {
                name: order.name.clone(),
                filter: order.filter.clone(),
                limit: PAGE,
            };
            let replayed = in_pages(order.limit, |limit| {
                replay.limit = limit;
                store.replay(&replay, now_ms())
            })?;
            let name = &order.name;
            writeln!(
                out,
                "replayed: {replayed} (each once under the name {name:?})"
            )?;
        }
        Verb::Discard => {
            let page = |limit| match order.state {
                State::Parked => store.discard_parked(&order.filter, limit, now_ms()),
                _ => store.discard(&order.filter, limit, now_ms()),
            };
            let discarded = in_pages(order.limit, page)?;
            writeln!(out, "discarded: {discarded}")?;
        }
    }
    Ok(())
}

fn show_counts(counts: &Counts, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "queued    {}", counts.queued)?;
    writeln!(out, "running   {}", counts.running)?;
    writeln!(out, "retrying  {}", counts.retrying)?;
    writeln!(out, "parked    {}", counts.parked)?;
    writeln!(out, "discarded {}", counts.discarded)?;
    writeln!(out, "finished  {}", counts.finished)?;
    writeln!(out, "unknown   {}", counts.unknown)?;
    let oldest = counts.oldest_due_ms.map_or("-".to_owned(), ago);
    writeln!(out, "events    {}\noldest    {oldest}", counts.events)
}

/// Page by page, with pauses in which the server has the file to itself.
fn in_pages(
    limit: Option<usize>,
    mut page: impl FnMut(usize) -> Result<u64, StoreError>,
) -> Result<u64, StoreError> {
    let mut all = 0;
    loop {
        let left = limit.map_or(u64::MAX, |limit| limit as u64 - all);
        let size = usize::try_from(left).unwrap_or(PAGE).min(PAGE);
        let began = Instant::now();
        let done = page(size)?;
        all += done;
        if done < size as u64 || done == left {
            return Ok(all);
        }
        std::thread::sleep(began.elapsed());
    }
}

fn ago(unix_ms: i64) -> String {
    let ms = now_ms() - unix_ms;
    let seconds = Duration::from_millis(ms.unsigned_abs()).as_secs_f64();
    format!("{seconds:.1} s {}", if ms < 0 { "ahead" } else { "ago" })
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| {
        i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
    })
}
