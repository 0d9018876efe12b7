//! The redo log under what a power cut, an operator and a file system can do to it. `store_power` holds
//! the plain cut; here blocks are lost and torn where nothing was synced, also in the middle, and files are
//! put beside each other that do not belong together.

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use event::event;
use rusqlite::Connection;
use scratch::Scratch;
use tower_defer::event::store::{Receipt, Settle, Sqlite, Start, Store, StoreError};

const BLOCK: usize = 4096;

fn with(path: &Path, suffix: &str) -> PathBuf {
    format!("{}{suffix}", path.display()).into()
}

/// What is on the disk, or may be.
#[derive(Clone)]
struct Files {
    database: Vec<u8>,
    wal: Vec<u8>,
    log: Vec<u8>,
}

impl Files {
    fn of(path: &Path) -> Self {
        let read = |suffix| std::fs::read(with(path, suffix)).unwrap_or_default();
        Self {
            database: read(""),
            wal: read("-wal"),
            log: read("-log"),
        }
    }

    fn write(&self, path: &Path) {
        for (suffix, bytes) in [
            ("", &self.database),
            ("-wal", &self.wal),
            ("-log", &self.log),
        ] {
            std::fs::write(with(path, suffix), bytes).unwrap();
        }
    }
}

/// The same pictures in every run.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    /// What was not synced is there, or zeros are, or the end is missing, block by block.
    fn lose(&mut self, wal: &mut Vec<u8>, synced: usize) {
        if self.throw(3) == 0 && wal.len() > synced {
            let kept = usize::try_from(self.throw((wal.len() - synced) as u64)).unwrap();
            wal.truncate(synced + kept);
        }
        let lossy = self.throw(8);
        let mut at = synced;
        while at < wal.len() {
            let end = wal.len().min((at / BLOCK + 1) * BLOCK);
            if self.throw(8) < lossy {
                wal[at..end].fill(0);
            }
            at = end;
        }
    }

    /// Some blocks as they were before, some as they are, and one of them torn.
    fn mix(&mut self, before: &[u8], after: &[u8]) -> Vec<u8> {
        let mut mixed = before.to_vec();
        for (at, block) in after.chunks(BLOCK).enumerate() {
            let sectors = match self.throw(4) {
                0 => 0,
                1 => usize::try_from(self.throw(9)).unwrap(),
                _ => 8,
            };
            let end = block.len().min(sectors * 512);
            mixed[at * BLOCK..][..end].copy_from_slice(&block[..end]);
        }
        mixed
    }
}

/// The numbers of the events, by name. Each must be there once.
fn events(path: &Path) -> BTreeMap<String, i64> {
    let conn = Connection::open(path).unwrap();
    let mut statement = conn.prepare("SELECT name, id FROM defer_events").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
    let mut found = BTreeMap::new();
    for row in rows.unwrap() {
        let (name, id): (String, i64) = row.unwrap();
        assert!(found.insert(name.clone(), id).is_none(), "{name} is twice");
    }
    found
}

/// What the store makes of the files; also of the counters and deliveries, and of a second open.
async fn made_good(files: &Files, path: &Path) -> BTreeMap<String, i64> {
    files.write(path);
    let store = Sqlite::open(path).unwrap();
    let found = events(path);
    let counts = store.counts().await.unwrap();
    assert_eq!(counts.events, found.len() as u64);
    assert_eq!(counts.queued, found.len() as u64, "one delivery each");
    let again = with(path, ".again");
    image::copy_store(path, &again);
    let store_again = Sqlite::open(&again).unwrap();
    assert_eq!(events(&again), found, "made good twice");
    for (store, path) in [(store, path), (store_again, &*again)] {
        store.close().await.unwrap();
        std::fs::remove_file(path).unwrap();
    }
    found
}

/// Through several beginnings of the log, at each record: before it is synced any of its blocks may be
/// there, before SQLite's log is synced any of that one's. What was acknowledged is there, what was not is
/// there as a whole or not at all.
#[tokio::test]
async fn any_blocks_may_be_lost_of_what_was_not_synced() {
    let scratch = Scratch::new("redo-blocks");
    let path = scratch.path("events.db");
    let image = scratch.path("image.db");
    let store = Sqlite::open(&path).unwrap();
    let mut dice = Dice(7);
    let mut acknowledged = BTreeMap::new();
    let mut before = Files::of(&path);
    // What was written before the log began.
    let (mut synced, mut began) = (before.wal.len(), 0);
    for number in 0..36 {
        let mut batch = Vec::new();
        for part in ["a", "b"] {
            let mut event = event(&format!("{number} {part}"), "mail", number);
            let size = dice.throw(if number % 3 == 0 { 150_000 } else { 900 });
            event.payload = part.repeat(usize::try_from(size).unwrap());
            batch.push(event.key(format!("{number}")));
        }
        let names: Vec<_> = batch.iter().map(|it| it.name.to_string()).collect();
        let receipts = store.append(batch, number).await.unwrap();
        let id = |receipt: &Receipt| receipt.event.get();
        let recorded = names.iter().cloned().zip(receipts.iter().map(id));
        let after = Files::of(&path);
        let is_logged = before.log != after.log;
        for _ in 0..2 {
            // Before the answer.
            let mut torn = before.clone();
            if is_logged {
                torn.log = dice.mix(&before.log, &after.log);
            } else {
                torn.wal.clone_from(&after.wal);
            }
            dice.lose(&mut torn.wal, synced);
            let found = made_good(&torn, &image).await;
            let more = found.len() - acknowledged.len();
            let is_there = |(name, id)| found.get(name) == Some(id);
            assert!(acknowledged.iter().all(is_there), "{number}: {found:?}");
            assert!(more == 0 || more == 2, "{number}: a part of a batch");
        }
        acknowledged.extend(recorded);
        if !is_logged {
            synced = after.wal.len();
            began += 1;
        }
        for _ in 0..2 {
            let mut torn = after.clone();
            dice.lose(&mut torn.wal, synced);
            assert_eq!(made_good(&torn, &image).await, acknowledged, "{number}");
        }
        before = after;
    }
    assert!(began >= 1, "the log never began anew");
    store.close().await.unwrap();
}

/// A file that was put back, beside the log of the one that went on.
#[tokio::test]
async fn an_older_copy_is_not_given_the_end_of_a_newer_log() {
    let scratch = Scratch::new("redo-restored");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    store
        .append(vec![event("first", "mail", 1)], 1)
        .await
        .unwrap();
    let restored = scratch.path("restored.db");
    let conn = Connection::open(&path).unwrap();
    conn.execute("VACUUM INTO ?1", [restored.to_str().unwrap()])
        .unwrap();
    for number in 0..50 {
        let mut event = event(&format!("later {number}"), "mail", 1);
        event.payload = "x".repeat(40_000);
        store.append(vec![event], number).await.unwrap();
    }
    std::fs::copy(with(&path, "-log"), with(&restored, "-log")).unwrap();
    let again = Sqlite::open(&restored).unwrap();
    let found = events(&restored);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["first"], "{found:?}");
    again.close().await.unwrap();
    store.close().await.unwrap();
}

/// Whose number was given away gets a new one. Nobody else does: a subscriber knows an event by its number.
#[tokio::test]
async fn only_the_event_whose_number_is_taken_gets_another_one() {
    let scratch = Scratch::new("redo-number");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let first = event("synced", "mail", 1).deliver("audit", Start::Claimed);
    let receipts = store.append(vec![first], 1).await.unwrap();
    let settles = vec![(receipts[0].claimed[0].clone(), Settle::Complete)];
    store.settle(settles, 2).await.unwrap();
    let synced = Files::of(&path);
    for name in ["one", "two", "three"] {
        store.append(vec![event(name, "mail", 3)], 3).await.unwrap();
    }
    let before = events(&path);
    let image = scratch.path("image.db");
    let mut files = Files::of(&path);
    files.wal = synced.wal;
    files.write(&image);
    let mut conn = Connection::open(&image).unwrap();
    let transaction = conn.transaction().unwrap();
    let mine = Sqlite::append_in(&transaction, &[event("mine", "mail", 4)], 4).unwrap();
    transaction.commit().unwrap();
    drop(conn);
    assert_eq!(mine[0].event.get(), before["one"]);

    let again = Sqlite::open(&image).unwrap();
    let after = events(&image);
    assert_eq!(after["mine"], before["one"]);
    assert_eq!(after["two"], before["two"]);
    assert_eq!(after["three"], before["three"]);
    assert_eq!(after["one"], before["three"] + 1);
    again.close().await.unwrap();
    store.close().await.unwrap();
}

/// Payloads are in it: whoever may not read the database may not read it.
#[cfg(unix)]
#[tokio::test]
async fn the_log_is_readable_by_whom_the_database_is() {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new("redo-mode");
    let path = scratch.path("events.db");
    Sqlite::open(&path).unwrap().close().await.unwrap();
    for mode in [0o600, 0o640, 0o660] {
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let store = Sqlite::open(&path).unwrap();
        let log = std::fs::metadata(with(&path, "-log")).unwrap();
        assert_eq!(log.permissions().mode() & 0o777, mode);
        // As after a kill: it stays.
        let killed = scratch.path("killed.db");
        image::copy_store(&path, &killed);
        store.close().await.unwrap();
        std::fs::set_permissions(&killed, Permissions::from_mode(0o600)).unwrap();
        let store = Sqlite::open(&killed).unwrap();
        let log = std::fs::metadata(with(&killed, "-log")).unwrap();
        assert_eq!(log.permissions().mode() & 0o777, 0o600);
        store.close().await.unwrap();
    }
}

/// Two processes must not share a redo log, under whatever name they found the file.
#[cfg(unix)]
#[tokio::test]
async fn a_link_leads_to_the_same_lock() {
    let scratch = Scratch::new("redo-link");
    let (path, link) = (scratch.path("events.db"), scratch.path("link.db"));
    Sqlite::open(&path).unwrap().close().await.unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let store = Sqlite::open(&link).unwrap();
    let second = Sqlite::open(&path);
    assert!(
        second.as_ref().is_err_and(StoreError::is_in_use),
        "{second:?}"
    );
    store.close().await.unwrap();
}

/// A link that leads nowhere yet is as good: the file is made where it leads.
#[cfg(unix)]
#[tokio::test]
async fn a_link_to_what_is_not_there_yet_leads_to_the_same_lock() {
    let scratch = Scratch::new("redo-dangling");
    let (path, link) = (scratch.path("deep/events.db"), scratch.path("link.db"));
    std::fs::create_dir(scratch.path("deep")).unwrap();
    std::os::unix::fs::symlink("hop.db", &link).unwrap();
    std::os::unix::fs::symlink("deep/events.db", scratch.path("hop.db")).unwrap();
    let store = Sqlite::open(&link).unwrap();
    assert!(path.exists() && with(&path, "-lock").exists() && with(&path, "-log").exists());
    for name in [&path, &link] {
        let second = Sqlite::open(name);
        let is_in_use = second.as_ref().is_err_and(StoreError::is_in_use);
        assert!(is_in_use, "{second:?}");
    }
    store.close().await.unwrap();
    assert!(!with(&link, "-lock").exists());
}

/// Also not the second one to try, who finds the file that the first one made.
#[tokio::test]
async fn where_the_lock_file_was_deleted_nobody_gets_in() {
    let scratch = Scratch::new("redo-unlocked");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    for number in 0..3 {
        std::fs::remove_file(with(&path, "-lock")).unwrap();
        for _ in 0..2 {
            let second = Sqlite::open(&path);
            let is_in_use = second.as_ref().is_err_and(StoreError::is_in_use);
            assert!(is_in_use, "{second:?}");
        }
        let name = format!("event {number}");
        store
            .append(vec![event(&name, "mail", 1)], 1)
            .await
            .unwrap();
    }
    store.close().await.unwrap();
    let store = Sqlite::open(&path).unwrap();
    assert_eq!(store.counts().await.unwrap().queued, 3);
    store.close().await.unwrap();
}

/// Without the lock file and without the redo log nothing is left that could keep the second one out. Then
/// the first one is: what it is asked fails, typed, before it has written anything, and it takes nothing away.
#[tokio::test]
async fn whoever_has_lost_the_file_writes_no_more() {
    let scratch = Scratch::new("redo-lost");
    let path = scratch.path("events.db");
    let first = Sqlite::open(&path).unwrap();
    first.append(vec![event("a", "mail", 1)], 1).await.unwrap();
    let claimed = first.claim(1, 1).await.unwrap();
    for suffix in ["-lock", "-log"] {
        std::fs::remove_file(with(&path, suffix)).unwrap();
    }
    let second = Sqlite::open(&path).unwrap();
    let running = second.claim(1, 2).await.unwrap();
    assert_eq!(running.len(), 1, "what the first one ran is due again");

    let refused = [
        first.append(vec![event("b", "mail", 2)], 2).await.map(drop),
        first
            .settle(vec![(claimed[0].token.clone(), Settle::Complete)], 2)
            .await
            .map(drop),
        first.claim(1, 2).await.map(drop),
    ];
    for refused in refused {
        let is_in_use = refused.as_ref().is_err_and(StoreError::is_in_use);
        assert!(is_in_use, "{refused:?}");
    }
    assert!(first.health().trouble.unwrap().error.is_in_use());
    let closed = first.close().await;
    assert!(
        closed.as_ref().is_err_and(StoreError::is_in_use),
        "{closed:?}"
    );
    // It has not handed back what it does not have, nor removed the other one's log.
    assert_eq!(second.counts().await.unwrap().running, 1);
    let synced = Files::of(&path);
    second.append(vec![event("c", "mail", 3)], 3).await.unwrap();
    let mut files = Files::of(&path);
    files.wal = synced.wal;
    let image = scratch.path("image.db");
    files.write(&image);
    let again = Sqlite::open(&image).unwrap();
    assert_eq!(events(&image).keys().collect::<Vec<_>>(), ["a", "c"]);
    again.close().await.unwrap();
    second.close().await.unwrap();
}
