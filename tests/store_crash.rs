//! A process that is killed with SIGKILL at random moments, against a ledger kept outside of the
//! database: what it wrote to its standard output before it died.
//!
//! `DEFER_KILLS` sets how many times (60 by default), `DEFER_SEED` repeats a run.

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use event::event;
use scratch::Scratch;
use tower_defer::event::store::{CRASHED, Filter, Replay, Settle, Sqlite, Start, State, Store};

/// How many deliveries the child has in flight at once.
const BATCH: usize = 20;

const POISON: &str = "poison";

/// Starts the calling test again as a child (see [`child_store`]) and kills it after `lines` lines of its ledger, or lets it end by itself.
/// Returns the whole ledger: a pipe keeps what was written before the kill.
fn run(test: &str, directory: &Path, number: usize, lines: Option<usize>) -> Vec<String> {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("DEFER_DIR", directory)
        .env("DEFER_RUN", number.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut ledger = Vec::new();
    if let Some(lines) = lines {
        while ledger.len() < lines {
            let Some(line) = output.next() else { break };
            ledger.push(line.unwrap());
        }
        process.kill().unwrap();
    }
    // A line that the kill has torn is no entry.
    ledger.extend(output.map_while(Result::ok));
    let status = process.wait().unwrap();
    assert!(
        lines.is_some() || status.success(),
        "the child failed: {ledger:?}"
    );
    ledger
}

fn entries<'a>(ledger: &'a [String], kind: &str) -> impl Iterator<Item = &'a str> {
    // The test harness writes its own lines, one of them in front of the first entry.
    let mark = format!("@{kind} ");
    ledger
        .iter()
        .filter_map(move |line| line.split_once(&mark)?.1.strip_suffix(" ;"))
}

/// Writes an entry with one call, so that it is whole or not there.
fn note(kind: &str, entry: &str) {
    let line = format!("@{kind} {entry} ;\n");
    std::io::stdout()
        .write_all(line.as_bytes())
        .expect("the parent reads");
}

fn seed() -> u64 {
    let seed = std::env::var("DEFER_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("DEFER_SEED={seed}");
    seed
}

/// In a child, the store that it shares with its parent, and the number of its run.
fn child_store() -> Option<(Arc<Sqlite>, String)> {
    let directory = std::env::var("DEFER_DIR").ok()?;
    let store = Sqlite::open(PathBuf::from(directory).join("events.db")).expect("open");
    Some((
        Arc::new(store),
        std::env::var("DEFER_RUN").expect("a number"),
    ))
}

/// Appends and delivers as fast as it can until it is killed.
async fn load(store: Arc<Sqlite>, run: String) {
    if run == "0" {
        store
            .append(vec![event(POISON, "mail", 0)], 0)
            .await
            .unwrap();
        note("A", POISON);
    }
    let appends = (0..8).map(|writer| {
        let (store, run) = (Arc::clone(&store), run.clone());
        async move {
            for i in 0.. {
                let name = format!("{run}-{writer}-{i}");
                note("T", &name);
                // Half of them are started from memory, as after a response.
                let start = if i % 2 == 0 {
                    Start::At(0)
                } else {
                    Start::Claimed
                };
                let mut event = event(&name, "mail", 0);
                event.deliveries[0].start = start;
                let receipts = store.append(vec![event], 1).await.unwrap();
                note("A", &name);
                for token in &receipts[0].claimed {
                    note("H", &name);
                    let settles = vec![(token.clone(), Settle::Complete)];
                    store.settle(settles, 1).await.unwrap();
                }
            }
        }
    });
    let deliver = async {
        loop {
            let mut settles = Vec::new();
            for claimed in store.claim(BATCH, 2).await.unwrap() {
                if &*claimed.event.name == POISON {
                    // Runs until it has killed the process.
                    note("P", &format!("{} {}", claimed.attempt, claimed.crashes));
                    continue;
                }
                note("H", &claimed.event.name);
                settles.push((claimed.token, Settle::Complete));
            }
            store.settle(settles, 2).await.unwrap();
        }
    };
    futures_util::future::join(futures_util::future::join_all(appends), deliver).await;
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_and_nothing_is_invented() {
    if let Some((store, run)) = child_store() {
        return load(store, run).await;
    }
    let test = "nothing_acknowledged_is_lost_and_nothing_is_invented";
    let kills: usize = std::env::var("DEFER_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(60);
    let mut random = fastrand::Rng::with_seed(seed());
    let scratch = Scratch::new("crash");
    let directory = scratch.path("");
    let mut tried = BTreeSet::from([POISON.to_owned()]);
    let mut acknowledged = BTreeSet::new();
    let mut handled: BTreeMap<String, usize> = BTreeMap::new();
    let mut poisoned = Vec::new();
    for number in 0..kills {
        // Some die before or while they recover, the first one after the poison is in.
        let lines = if number == 0 {
            10
        } else {
            random.usize(0..400)
        };
        let ledger = run(test, &directory, number, Some(lines));
        tried.extend(entries(&ledger, "T").map(ToOwned::to_owned));
        acknowledged.extend(entries(&ledger, "A").map(ToOwned::to_owned));
        for name in entries(&ledger, "H") {
            *handled.entry(name.to_owned()).or_default() += 1;
        }
        poisoned.extend(entries(&ledger, "P").map(ToOwned::to_owned));
    }

    // Recovery is immediate: the lock went with the process, and all that was running is due.
    let store = Sqlite::open(scratch.path("events.db")).unwrap();
    loop {
        let claimed = store.claim(1_000, 3).await.unwrap();
        if claimed.is_empty() {
            break;
        }
        let mut settles = Vec::new();
        for claimed in claimed {
            *handled.entry(claimed.event.name.to_string()).or_default() += 1;
            settles.push((claimed.token, Settle::Complete));
        }
        store.settle(settles, 3).await.unwrap();
    }
    let dead = store
        .list(State::Discarded, Filter::default(), None, 10_000)
        .await
        .unwrap();
    assert!(
        dead.iter()
            .all(|letter| letter.reason.as_deref() == Some(CRASHED))
    );
    let crashed: BTreeSet<_> = dead
        .iter()
        .map(|letter| letter.event_name.to_string())
        .collect();

    let lost: Vec<_> = acknowledged
        .iter()
        .filter(|name| !handled.contains_key(*name) && !crashed.contains(*name))
        .collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let invented: Vec<_> = handled
        .keys()
        .filter(|name| !tried.contains(*name))
        .collect();
    assert!(invented.is_empty(), "never appended: {invented:?}");
    let duplicates: usize = handled.values().map(|count| count - 1).sum();
    // The deliverer's batch, and one of each writer's from memory.
    assert!(
        duplicates <= kills * (BATCH + 8),
        "{duplicates} duplicates in {kills} kills"
    );
    assert!(crashed.contains(POISON), "the poison was never discarded");
    let attempts: BTreeSet<_> = poisoned.iter().cloned().collect();
    assert_eq!(
        poisoned.len(),
        attempts.len(),
        "one attempt twice: {poisoned:?}"
    );
    assert!(
        poisoned.len() <= 3,
        "the poison ran too often: {poisoned:?}"
    );
    println!(
        "{kills} kills: {} tried, {} acknowledged, {} handled, {duplicates} twice, {} crashed",
        tried.len(),
        acknowledged.len(),
        handled.len(),
        crashed.len()
    );
}

/// Replays everything under one name, ten at a time; what was replayed fails again.
async fn replay_all(store: Arc<Sqlite>) {
    let replay = Replay {
        name: "fixed".into(),
        filter: Filter::default(),
        limit: 10,
    };
    loop {
        let replayed = store.replay(replay.clone(), 10).await.unwrap();
        let claimed = store.claim(100, 10).await.unwrap();
        let mut settles = Vec::new();
        for claimed in claimed {
            note("R", &claimed.event.name);
            let end = Settle::Discard {
                reason: "fatal".into(),
                error: "again".into(),
            };
            settles.push((claimed.token, end));
        }
        store.settle(settles, 11).await.unwrap();
        if replayed < 10 {
            break;
        }
    }
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_replay_that_is_killed_and_called_again_replays_each_once() {
    if let Some((store, _)) = child_store() {
        return replay_all(store).await;
    }
    let test = "a_replay_that_is_killed_and_called_again_replays_each_once";
    let scratch = Scratch::new("replay");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let batch = (0..1_000)
        .map(|i| event(&i.to_string(), "mail", 1))
        .collect();
    store.append(batch, 1).await.unwrap();
    let end = Settle::Discard {
        reason: "fatal".into(),
        error: "first".into(),
    };
    let claimed = store.claim(1_000, 1).await.unwrap();
    let settles = claimed
        .into_iter()
        .map(|c| (c.token, end.clone()))
        .collect();
    store.settle(settles, 2).await.unwrap();
    store.close().await.unwrap();

    // At 40 %, then at odd places, then to the end.
    let mut ledger = Vec::new();
    for lines in [Some(400), Some(155), Some(7), None] {
        ledger.extend(run(test, &scratch.path(""), 0, lines));
    }
    let mut replayed: BTreeMap<&str, usize> = BTreeMap::new();
    for name in entries(&ledger, "R") {
        *replayed.entry(name).or_default() += 1;
    }
    assert_eq!(replayed.len(), 1_000, "some were never replayed");
    // Twice was only started what a kill found running: at most ten for each of three.
    let twice: Vec<_> = replayed.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.len() <= 30, "{twice:?}");
    let store = Sqlite::open(&path).unwrap();
    let counts = store.counts().await.unwrap();
    assert_eq!(
        (counts.discarded, counts.queued, counts.running),
        (1_000, 0, 0)
    );
    let shell = rusqlite::Connection::open(&path).unwrap();
    let marks: i64 = shell
        .query_row("SELECT count(*) FROM defer_replays", [], |row| row.get(0))
        .unwrap();
    assert_eq!(marks, 1_000);
}
