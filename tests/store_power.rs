//! A power cut without one: SQLite's log loses what was not synced, at every place where it can break off,
//! and the redo log gives the events back. After a kill nothing is lost, and nothing comes twice.

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::path::Path;

use event::event;
use rusqlite::Connection;
use scratch::Scratch;
use tower_defer::event::store::{NewEvent, Settle, Sqlite, Start, Store};

/// A frame of SQLite's log, and its header.
const FRAME: u64 = 24 + 4096;
const HEADER: u64 = 32;

/// Every row of these tables, as text.
fn rows(path: &Path, tables: &[&str]) -> Vec<String> {
    let conn = Connection::open(path).unwrap();
    let mut all = Vec::new();
    for table in tables {
        let mut statement = conn.prepare(&format!("SELECT * FROM {table}")).unwrap();
        let columns = statement.column_count();
        let row = |row: &rusqlite::Row<'_>| {
            let cells = (0..columns).map(|at| format!("{:?}", row.get_ref(at).unwrap()));
            Ok(format!("{table}: {}", cells.collect::<Vec<_>>().join(", ")))
        };
        let found: Result<Vec<_>, _> = statement.query_map([], row).unwrap().collect();
        all.extend(found.unwrap());
    }
    all
}

const TABLES: [&str; 4] = [
    "defer_events",
    "defer_deliveries",
    "defer_history",
    "defer_counts",
];

fn length(path: &Path) -> u64 {
    std::fs::metadata(with(path, "-wal")).unwrap().len()
}

fn with(path: &Path, suffix: &str) -> std::path::PathBuf {
    format!("{}{suffix}", path.display()).into()
}

fn cut(path: &Path, length: u64) {
    let log = std::fs::OpenOptions::new()
        .write(true)
        .open(with(path, "-wal"))
        .unwrap();
    log.set_len(length).unwrap();
}

/// Opens an image and closes it, twice: what was made good must not be made good again.
async fn opened(path: &Path) -> Vec<String> {
    let store = Sqlite::open(path).unwrap();
    let once = rows(path, &TABLES);
    // As if it were killed again.
    let image = with(path, ".again");
    image::copy_store(path, &image);
    let again = Sqlite::open(&image).unwrap();
    assert_eq!(
        rows(&image, &["defer_events", "defer_deliveries"]),
        rows(path, &["defer_events", "defer_deliveries"])
    );
    again.close().await.unwrap();
    store.close().await.unwrap();
    once
}

/// A store with some events, and how long its log was when it was last synced for sure.
async fn written(path: &Path) -> (Sqlite, u64) {
    let store = Sqlite::open(path).unwrap();
    let claimed = |name: &str| NewEvent::new(name, "{}").deliver("mail", Start::Claimed);
    let receipts = store.append(vec![claimed("settled")], 1).await.unwrap();
    store
        .append(vec![event("before", "mail", 2)], 2)
        .await
        .unwrap();
    let settles = vec![(receipts[0].claimed[0].clone(), Settle::Complete)];
    // This is what is synced.
    store.settle(settles, 3).await.unwrap();
    let synced = length(path);
    store.append(vec![claimed("started")], 4).await.unwrap();
    let batch = vec![
        event("with everything", "mail", 50)
            .key("key")
            .context("trace")
            .deliver("audit", Start::Claimed),
        NewEvent::new("for nobody", "ü"),
    ];
    store.append(batch, 5).await.unwrap();
    // A duplicate, alone and beside a new one: a claim, which a power cut may take.
    let again = || event("with everything", "mail", 6).key("key");
    store.append(vec![again()], 6).await.unwrap();
    store
        .append(vec![again(), event("last", "mail", 70)], 7)
        .await
        .unwrap();
    (store, synced)
}

#[tokio::test]
async fn a_power_cut_takes_nothing_that_was_acknowledged() {
    let scratch = Scratch::new("power");
    let path = scratch.path("events.db");
    let (_store, synced) = written(&path).await;
    let whole = scratch.path("whole.db");
    image::copy_store(&path, &whole);
    let expected = opened(&whole).await;
    assert_eq!(
        expected
            .iter()
            .filter(|row| row.starts_with("defer_events"))
            .count(),
        6,
        "{expected:#?}"
    );

    let end = length(&path);
    let frames = (end - HEADER) / FRAME;
    let first = (synced - HEADER) / FRAME;
    assert!(frames > first + 8, "nothing was left unsynced");
    for frame in first..=frames {
        for torn in [0, 1_000] {
            let at = (HEADER + frame * FRAME + torn).min(end);
            let image = scratch.path(&format!("cut-{at}.db"));
            image::copy_store(&path, &image);
            cut(&image, at);
            assert_eq!(opened(&image).await, expected, "cut at {at} of {end}");
        }
    }
}

#[tokio::test]
async fn a_number_that_was_given_away_meanwhile_stays_given() {
    let scratch = Scratch::new("power-number");
    let path = scratch.path("events.db");
    let (_store, synced) = written(&path).await;
    let image = scratch.path("image.db");
    image::copy_store(&path, &image);
    cut(&image, synced);
    // The user writes before the server is there again.
    let mut conn = Connection::open(&image).unwrap();
    let transaction = conn.transaction().unwrap();
    let receipts = Sqlite::append_in(&transaction, &[event("mine", "mail", 1)], 1).unwrap();
    transaction.commit().unwrap();
    drop(conn);

    let store = Sqlite::open(&image).unwrap();
    let conn = Connection::open(&image).unwrap();
    let names: Vec<(i64, String)> = conn
        .prepare("SELECT id, name FROM defer_events ORDER BY id")
        .unwrap()
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let mine = receipts[0].event.get();
    assert!(names.contains(&(mine, "mine".to_owned())), "{names:?}");
    for name in ["started", "with everything", "for nobody", "last"] {
        let found = names.iter().filter(|(_, it)| it == name).count();
        assert_eq!(found, 1, "{name} in {names:?}");
    }
    store.close().await.unwrap();
}

/// Beside a file that was put in its place, an old log means nothing.
#[tokio::test]
async fn the_log_of_another_file_changes_nothing() {
    let scratch = Scratch::new("power-other");
    let (path, other) = (scratch.path("events.db"), scratch.path("other.db"));
    let (_store, synced) = written(&path).await;
    let (_other, _) = written(&other).await;
    let image = scratch.path("image.db");
    image::copy_store(&path, &image);
    cut(&image, synced);
    std::fs::copy(with(&other, "-log"), with(&image, "-log")).unwrap();
    let found = opened(&image).await;
    let events = found.iter().filter(|row| row.starts_with("defer_events"));
    assert_eq!(events.count(), 2, "{found:#?}");
}

/// More events than the redo log holds: when it begins anew, SQLite has synced its own.
#[tokio::test]
async fn the_redo_log_begins_anew_only_when_nothing_needs_it() {
    let scratch = Scratch::new("power-full");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let start = || {
        use std::io::Read;
        let mut header = [0; 32];
        let mut log = std::fs::File::open(with(&path, "-log")).unwrap();
        log.read_exact(&mut header).unwrap();
        header
    };
    let (mut synced, mut lengths, mut began) = (0, Vec::new(), 0);
    let mut header = start();
    for number in 0..60 {
        let mut event = event(&format!("event {number}"), "mail", number);
        event.payload = "x".repeat(50_000);
        store.append(vec![event], number).await.unwrap();
        if start() != header {
            (header, began) = (start(), began + 1);
            // The append before this one did not fit any more, so SQLite has synced it.
            synced = lengths.last().copied().unwrap_or(0);
            let image = scratch.path(&format!("image-{number}.db"));
            image::copy_store(&path, &image);
            if synced > 0 {
                cut(&image, synced);
            }
            let store = Sqlite::open(&image).unwrap();
            let events = store.counts().await.unwrap().events;
            assert_eq!(events, u64::try_from(number).unwrap() + 1);
        }
        lengths.push(length(&path));
    }
    assert!(began >= 3 && synced > 0, "it began {began} times");
    assert_eq!(
        std::fs::metadata(with(&path, "-log")).unwrap().len(),
        1 << 20
    );
    store.close().await.unwrap();
    assert!(
        !with(&path, "-log").exists(),
        "an orderly end leaves one file"
    );
}
