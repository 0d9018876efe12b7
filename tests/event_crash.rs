//! A server that is killed with SIGKILL at random moments under load, and started again on the same
//! file: what it has acknowledged over HTTP is handled, nothing is invented, and no more is repeated
//! than was in flight. The witness is a ledger outside of the store.
//!
//! `DEFER_KILLS` sets how many times (60 by default), `DEFER_SEED` repeats a run's choices (not the
//! machine's). The long form: `DEFER_KILLS=1000 cargo test --release --all-features --test event_crash
//! nothing_acknowledged -- --nocapture`.
#![cfg(all(unix, feature = "sqlite", feature = "axum", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "processes, clients and deadlines of tests are no deferred work"
)]

#[path = "event_crash/ledger.rs"]
mod ledger;
#[path = "event_crash/load.rs"]
mod load;
#[path = "event_crash/server.rs"]
mod server;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ledger::{Entry, Kind};
use load::{CONNECTIONS, Connection, Load};
use server::{App, BROKEN, Made, POISON, Process, SUBSCRIBERS, WINDOW, is_child};
use support::Flavor;
use support::events::Scratch;
use tower_defer::event::Events;
use tower_defer::event::store::{CRASHED, Counts, Filter, Listed, Replay, SqliteOperator};

/// What a restart must not take, from the open store to the first start of what was in flight: far
/// above what it takes (some milliseconds), and below every interval and timeout that there is (the
/// shortest is the courier's look into the store, every 5 s).
const AT_ONCE: Duration = Duration::from_millis(2_500);

/// After it, deliveries that have nothing to wait for count as stuck.
const DELIVERED: Duration = Duration::from_secs(60);

/// When a process is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So many microseconds after it began to open the store: while this is recovered.
    Opening(u64),
    /// So many microseconds after that: while it claims what was recovered.
    Opened(u64),
    /// So many microseconds after so many heads have come.
    Heads(usize, u64),
}

fn kills() -> usize {
    let kills = std::env::var("DEFER_KILLS").ok();
    kills.and_then(|kills| kills.parse().ok()).unwrap_or(60)
}

fn seed() -> u64 {
    let seed = std::env::var("DEFER_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("DEFER_SEED={seed}");
    seed
}

/// Waits on a thread, since the clock of the runtime counts milliseconds.
async fn micros(micros: u64) {
    let until = Instant::now() + Duration::from_micros(micros);
    while Instant::now() < until {
        tokio::task::yield_now().await;
    }
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_is_invented() {
    if is_child() {
        return;
    }
    let test = "nothing_acknowledged_is_lost_and_nothing_is_invented";
    let scratch = Scratch::new("event-crash");
    let directory = scratch.path("");
    let mut random = fastrand::Rng::with_seed(seed());
    let load = Load::new();
    let kills = kills();
    let mut in_recovery = 0;
    let began = Instant::now();
    Flavor::CurrentThread.build().block_on(async {
        for run in 0..kills {
            let moment = match random.usize(0..4) {
                // As often in the first as in the tenth millisecond.
                0 if run > 0 && random.bool() => {
                    Moment::Opening(random.u64(0..256) << random.u32(0..8))
                }
                0 if run > 0 => Moment::Opened(random.u64(0..256) << random.u32(0..8)),
                _ => Moment::Heads(random.usize(1..150), random.u64(0..2_000)),
            };
            in_recovery += usize::from(!matches!(moment, Moment::Heads(..)));
            let process = Process::start(test, &directory, run).await;
            live(process, moment, &load, run, &mut random).await;
        }
    });
    let took = began.elapsed();
    let crashed = finish(&directory, kills);
    let seen = load.seen.into_inner();
    let entries = ledger::read(&directory);

    let mut handled: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.kind == Kind::Handled) {
        let delivery = (&*entry.id, &*entry.subscriber);
        handled.entry(delivery).or_default().push(entry.run);
    }
    let lost: Vec<_> = seen
        .acknowledged
        .iter()
        .flat_map(|id| SUBSCRIBERS.map(|subscriber| (&**id, subscriber)))
        .filter(|delivery| !handled.contains_key(delivery))
        .collect();
    assert!(lost.is_empty(), "acknowledged and never handled: {lost:?}");
    let invented: BTreeSet<_> = entries
        .iter()
        .filter(|e| e.kind != Kind::Opened)
        .map(|e| &*e.id)
        .filter(|id| !seen.tried.contains(*id) || seen.refused.contains(*id))
        .collect();
    assert!(invented.is_empty(), "nobody said so: {invented:?}");

    let repeated = repetitions(&handled, kills);
    let most = repeated.iter().max().copied().unwrap_or(0);
    // Those of the requests that are being answered come on top: of each at most two events.
    let bound = WINDOW + CONNECTIONS * 2 * SUBSCRIBERS.len();
    assert!(most <= bound, "a kill repeated {most}, in flight {bound}");
    let mut once = BTreeSet::new();
    for entry in entries.iter().filter(|e| e.kind == Kind::Failed) {
        let delivery = (entry.id.clone(), entry.subscriber.clone());
        // What crashed is replayed, and begins anew.
        let fresh = crashed.contains(&delivery) || once.insert(delivery);
        assert!(fresh, "a first attempt was made twice: {entry:?}");
    }

    let mut latencies = recoveries(&entries);
    latencies.sort_unstable();
    assert!(latencies.len() >= kills / 4, "{latencies:?}");
    let slowest = latencies[latencies.len() - 1];
    assert!(slowest < AT_ONCE, "recovered after {slowest:?}");
    let stuck = entries.iter().filter(|e| e.kind == Kind::Stuck).count();
    assert!(
        (1..=3).contains(&stuck),
        "the poison was started {stuck} times"
    );
    assert!(crashed.contains(&(POISON.to_owned(), "trial".to_owned())));

    let opened = entries.iter().filter(|e| e.kind == Kind::Opened).count();
    println!(
        "{kills} kills in {took:?} ({in_recovery} at the start, {} of them before the store was open): \
         {} tried, {} acknowledged, {} refused, \
         {} events handled, {} repeated (at most {most} by one kill), {} dead as crashed and replayed; \
         in flight starts again after {:?} (median of {}), {slowest:?} at most",
        kills + 1 - opened,
        seen.tried.len(),
        seen.acknowledged.len(),
        seen.refused.len(),
        handled.len() / SUBSCRIBERS.len(),
        repeated.iter().sum::<usize>(),
        crashed.len(),
        latencies[latencies.len() / 2],
        latencies.len(),
    );
}

/// One process, from its start to its kill.
async fn live(
    mut process: Process,
    moment: Moment,
    load: &Load,
    run: usize,
    random: &mut fastrand::Rng,
) {
    let (heads, later) = match moment {
        Moment::Opening(later) => {
            micros(later).await;
            return process.kill().await;
        }
        Moment::Opened(later) => {
            process.opened().await;
            micros(later).await;
            return process.kill().await;
        }
        Moment::Heads(heads, later) => (heads, later),
    };
    let address = process.address().await;
    if run == 0 {
        load.seen.borrow_mut().tried.insert(POISON.to_owned());
        let mut connection = Connection::open(address, false).await.expect("it listens");
        let answer = connection.send(&format!("/plain/{POISON}")).await;
        assert_eq!(answer.expect("a head").status(), 201);
    }
    let kill = async {
        load.heads(heads).await;
        micros(later).await;
        process.kill().await;
    };
    // The clients end after it: what has come before the kill is read, and counts.
    tokio::join!(kill, load.run(address, run, random));
}

/// Opens the file a last time, without a kill, and lets everything come to its end. Returns the
/// deliveries that had become dead letters because the process died during them.
fn finish(directory: &Path, run: usize) -> BTreeSet<(String, String)> {
    Flavor::MultiThread(2).build().block_on(async {
        let events = server::events(directory, run, true);
        events.start();
        settled(&events).await;
        let dead = letters(&events).await;
        assert!(
            dead.iter()
                .all(|letter| letter.reason.as_deref() == Some(CRASHED)),
            "{dead:?}"
        );
        let replay = events.dead_letters().replay("mended", Filter::default());
        assert_eq!(replay.run().await.expect("replayed"), dead.len() as u64);
        let counts = settled(&events).await;
        assert_eq!(
            (counts.discarded, counts.parked, counts.unknown),
            (0, 0, 0),
            "{counts:?}"
        );
        assert_eq!(counts.finished, counts.events * SUBSCRIBERS.len() as u64);
        dead.iter()
            .map(|letter| {
                let made: Made = serde_json::from_str(&letter.payload).expect("as it was");
                (made.id, letter.subscriber.to_string())
            })
            .collect()
    })
}

/// Waits until this process has let go of the file.
async fn freed(directory: &Path) {
    let lock = directory.join("events.db-lock");
    // Who lets go takes the name off.
    let is_free = || std::fs::read(&lock).is_ok_and(|name| name.is_empty());
    support::eventually("the file is free", is_free).await;
}

async fn letters(events: &Events<App>) -> Vec<Listed> {
    let all = Filter::default();
    let listed = events.dead_letters().list(&all, None, 100_000).await;
    listed.expect("the store reads")
}

/// Waits until nothing is unfinished.
async fn settled(events: &Events<App>) -> Counts {
    let began = Instant::now();
    loop {
        let counts = events.counts().await.expect("the store reads");
        if counts.queued + counts.retrying + counts.running == 0 {
            return counts;
        }
        assert!(began.elapsed() < DELIVERED, "never settled: {counts:?}");
        tokio::time::sleep(Duration::from_millis(5)).await; // the probe's pause
    }
}

/// How many deliveries were handled before each kill and once more after it.
fn repetitions(handled: &BTreeMap<(&str, &str), Vec<usize>>, kills: usize) -> Vec<usize> {
    let mut repeated = vec![0; kills + 1];
    for (delivery, runs) in handled {
        for pair in runs.windows(2) {
            assert!(
                pair[0] < pair[1],
                "{delivery:?} was handled twice by one process, though nothing had crashed"
            );
            repeated[pair[0]] += 1;
        }
    }
    repeated
}

/// How long it took each process to start the first of what it had found in the store.
fn recoveries(entries: &[Entry]) -> Vec<Duration> {
    let mut first: BTreeMap<usize, u128> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.kind != Kind::Opened) {
        let made_by: Option<usize> = entry.id.split('-').next().and_then(|run| run.parse().ok());
        if made_by.unwrap_or(0) < entry.run {
            let least = first.entry(entry.run).or_insert(entry.micros);
            *least = entry.micros.min(*least);
        }
    }
    let micros = first.into_values();
    micros
        .map(|micros| Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)))
        .collect()
}

#[test]
fn a_replay_that_is_killed_and_called_again_runs_each_once_more() {
    const LETTERS: usize = 1_000;
    if is_child() {
        return;
    }
    let test = "a_replay_that_is_killed_and_called_again_runs_each_once_more";
    let scratch = Scratch::new("event-replay");
    let directory = scratch.path("");
    let mut replayed = 0;
    Flavor::CurrentThread.build().block_on(async {
        write_letters(&directory, LETTERS).await;
        // The mailboxes are still missing: what is replayed ends as a dead letter again, and a replay
        // without memory would find it there.
        for (run, until) in [(1, LETTERS * 4 / 10), (2, LETTERS * 7 / 10)] {
            let mut process = Process::start(test, &directory, run).await;
            let address = process.address().await;
            let mut connection = Connection::open(address, false).await.expect("it listens");
            let replay = connection.send("/replay/mailboxes");
            let kill = async {
                let enough = || mails(&directory, 1).len() >= until;
                support::eventually("enough is replayed", enough).await;
                process.kill().await;
            };
            let (answer, ()) = tokio::join!(replay, kill);
            assert!(answer.is_none(), "the replay was over before the kill");
        }
        let events = server::events(&directory, 3, true);
        events.start();
        let replay = events.dead_letters().replay("mailboxes", Filter::default());
        replayed = replay.run().await.expect("replayed");
        let counts = settled(&events).await;
        assert_eq!(counts.discarded, LETTERS as u64, "{counts:?}");
        let again = events.dead_letters().replay("mailboxes", Filter::default());
        assert_eq!(again.run().await.expect("replayed"), 0);
    });
    let twice = once_more(&directory, LETTERS);
    println!("{LETTERS} replayed, {twice:?} once more by kills, by the last call: {replayed}");
    // Nobody else heard of it.
    let entries = ledger::read(&directory);
    let others = entries
        .iter()
        .filter(|e| e.run > 0 && e.kind != Kind::Opened && e.subscriber != "mail");
    assert_eq!(others.count(), 0);
}

/// Leaves so many dead letters, as process 0.
async fn write_letters(directory: &Path, count: usize) {
    let events = server::events(directory, 0, true);
    for number in 0..count {
        let id = format!("{BROKEN}-{number}");
        let recorded = events.emit(Made { id }).recorded().await;
        recorded.expect("recorded");
    }
    assert_eq!(settled(&events).await.discarded, count as u64);
    drop(events);
    freed(directory).await;
}

/// Asserts that each of them has run since, and again only where a kill found it in flight: how many,
/// by the process that was killed.
fn once_more(directory: &Path, letters: usize) -> BTreeMap<usize, usize> {
    let mails = mails(directory, 1);
    let mut runs: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for mail in mails.iter().filter(|mail| mail.id.starts_with(BROKEN)) {
        runs.entry(&mail.id).or_default().push(mail.run);
    }
    assert_eq!(runs.len(), letters, "some were never replayed");
    let mut twice = BTreeMap::new();
    for runs in runs.values() {
        for pair in runs.windows(2) {
            assert!(pair[0] < pair[1], "replayed twice by one process");
            *twice.entry(pair[0]).or_insert(0) += 1;
        }
    }
    assert!(twice.values().all(|count| *count <= WINDOW), "{twice:?}");
    twice
}

#[test]
fn an_operator_of_another_process_goes_on_while_the_server_is_killed() {
    const LETTERS: usize = 300;
    const STEP: usize = 10;
    if is_child() {
        return;
    }
    let test = "an_operator_of_another_process_goes_on_while_the_server_is_killed";
    let scratch = Scratch::new("event-operator");
    let directory = scratch.path("");
    let mut random = fastrand::Rng::with_seed(seed());
    let load = Load::new();
    let replayed = Arc::new(AtomicUsize::new(0));
    let (restarted, is_back) = std::sync::mpsc::sync_channel::<()>(1);
    Flavor::CurrentThread.build().block_on(async {
        write_letters(&directory, LETTERS).await;
        let path = directory.join("events.db");
        let count = replayed.clone();
        let hand = move || {
            let mut operator = SqliteOperator::open(path).expect("it opens");
            let replay = Replay {
                name: "mailboxes".into(),
                filter: Filter {
                    subscriber: Some("mail".into()),
                    ..Filter::default()
                },
                limit: STEP,
            };
            loop {
                // The rest beside the second server.
                if count.load(Ordering::SeqCst) == LETTERS / 2 {
                    is_back.recv().expect("a second server");
                }
                let some = operator.replay(&replay, 1).expect("replayed");
                let counts = operator.counts().expect("counted");
                assert!(counts.discarded <= LETTERS as u64, "{counts:?}");
                count.fetch_add(usize::try_from(some).expect("few"), Ordering::SeqCst);
                if some == 0 {
                    break;
                }
            }
        };
        let mut process = Process::start(test, &directory, 1).await;
        let address = process.address().await;
        let hand = tokio::task::spawn_blocking(hand);
        let kill = async {
            let some = || replayed.load(Ordering::SeqCst) >= LETTERS / 4;
            support::eventually("some are replayed", some).await;
            process.kill().await;
        };
        tokio::join!(kill, load.run(address, 1, &mut random));

        let mut process = Process::start(test, &directory, 2).await;
        let address = process.address().await;
        let kill = async {
            load.heads(20).await;
            restarted.send(()).expect("the operator waits");
            hand.await.expect("the operator");
            load.heads(20).await;
            process.kill().await;
        };
        tokio::join!(kill, load.run(address, 2, &mut random));
        let events = server::events(&directory, 3, true);
        events.start();
        let counts = settled(&events).await;
        assert_eq!(counts.discarded, LETTERS as u64, "{counts:?}");
    });
    assert_eq!(replayed.load(Ordering::SeqCst), LETTERS);
    let twice = once_more(&directory, LETTERS);
    let entries = ledger::read(&directory);
    let seen = load.seen.into_inner();
    for (id, subscriber) in seen
        .acknowledged
        .iter()
        .flat_map(|id| SUBSCRIBERS.map(|subscriber| (id, subscriber)))
    {
        let has_it = |e: &Entry| e.id == *id && e.subscriber == subscriber;
        assert!(entries.iter().any(has_it), "lost: {id} for {subscriber}");
    }
    println!(
        "{LETTERS} replayed beside {} requests and two kills, {twice:?} once more by kills",
        seen.tried.len()
    );
}

/// The mails that were handled by this process and the later ones.
fn mails(directory: &Path, run: usize) -> Vec<Entry> {
    let entries = ledger::read(directory);
    let mails = entries
        .into_iter()
        .filter(|e| e.run >= run && e.kind == Kind::Handled && e.subscriber == "mail");
    mails.collect()
}
