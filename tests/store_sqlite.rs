//! What only the embedded store promises: one process, the user's transaction, the shell, and what
//! becomes of damage and of a foreign lock.

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::process::Command;
use std::task::Poll;
use std::time::Duration;

use event::event;
use rusqlite::Connection;
use scratch::Scratch;
use tower_defer::event::store::{
    Claimed, DAMAGED, Filter, NewEvent, Settle, Settled, Sqlite, SqliteOptions, Start, State,
    Store, StoreError,
};

#[tokio::test]
async fn a_second_opener_is_told_who_has_it() {
    let scratch = Scratch::new("lock");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let error = Sqlite::open(&path).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    let (pid, since_ms) = error.holder().unwrap();
    assert_eq!(pid, Some(std::process::id()));
    // Later than 2020: a real time, whatever the machine's clock says exactly.
    assert!(since_ms.unwrap() > 1_577_836_800_000);
    let said = error.to_string();
    assert!(said.starts_with(path.to_str().unwrap()), "{said}");
    assert!(said.contains("in use by this very process"), "{said}");
    store.close().await.unwrap();
    Sqlite::open(&path).unwrap().close().await.unwrap();
}

#[test]
fn an_error_of_the_opening_names_the_file_and_what_is_wrong() {
    let scratch = Scratch::new("open-errors");
    let text = scratch.path("notes.txt");
    std::fs::write(&text, "no database, ".repeat(100)).unwrap();
    let nowhere = scratch.path("nowhere").join("events.db");
    for (path, is) in [
        (text, StoreError::is_no_store as fn(&StoreError) -> bool),
        (nowhere, StoreError::is_missing),
    ] {
        let error = Sqlite::open(&path).unwrap_err();
        assert!(is(&error), "{error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
        // What `main` prints.
        assert!(format!("{error:?}").starts_with(&error.to_string()));
    }
}

#[tokio::test]
async fn the_users_transaction_carries_the_event() {
    let scratch = Scratch::new("append-in");
    let path = scratch.path("app.db");
    let store = Sqlite::open(&path).unwrap();
    let mut app = Connection::open(&path).unwrap();
    app.execute_batch("CREATE TABLE events (name TEXT)")
        .unwrap();
    for commits in [false, true] {
        let transaction = app.transaction().unwrap();
        transaction
            .execute("INSERT INTO events VALUES ('jo')", [])
            .unwrap();
        Sqlite::append_in(&transaction, &[event("user.created", "mail", 1)], 1).unwrap();
        if commits {
            transaction.commit().unwrap();
        } else {
            transaction.rollback().unwrap();
        }
        let wakeups = store.wakeups();
        store.appended();
        tokio::time::timeout(Duration::from_secs(60), wakeups.notified())
            .await
            .unwrap();
        assert_eq!(
            store.claim(10, 1).await.unwrap().len(),
            usize::from(commits)
        );
        // The counters are the transaction's too.
        let counts = store.counts().await.unwrap();
        assert_eq!(
            (counts.events, counts.running),
            match commits {
                true => (1, 1),
                false => (0, 0),
            }
        );
    }
}

/// Nothing stops under load for the log to be moved, and still it does not grow for ever.
#[tokio::test]
async fn the_log_is_moved_while_it_is_written() {
    let scratch = Scratch::new("log");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let mut longest = 0;
    for i in 0..480 {
        let mut event = event("big", "mail", i);
        event.payload = "x".repeat(250_000);
        store.append(vec![event], i).await.unwrap();
        longest = longest.max(scratch.path("events.db-wal").metadata().unwrap().len());
    }
    // 120 MB went through it. At 64 MB beyond the first 16 the writer moves it itself.
    assert!(longest < 90_000_000, "{longest} bytes of log");
    assert!(path.metadata().unwrap().len() > 20_000_000);
    store.close().await.unwrap();
    assert_eq!(
        scratch
            .path("events.db-wal")
            .metadata()
            .map_or(0, |m| m.len()),
        0
    );
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() {
    let scratch = Scratch::new("schema");
    let path = scratch.path("events.db");
    Sqlite::open(&path).unwrap().close().await.unwrap();
    let shell = Connection::open(&path).unwrap();
    shell
        .execute("UPDATE defer_meta SET value = 99 WHERE key = 'schema'", [])
        .unwrap();
    let error = Sqlite::open(&path).unwrap_err();
    assert!(error.is_schema(), "{error}");
    let version: i64 = shell
        .query_row(
            "SELECT value FROM defer_meta WHERE key = 'schema'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(version, 99);
}

#[tokio::test]
async fn a_claim_reads_its_index_and_no_row_that_is_not_due() {
    let scratch = Scratch::new("plan");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let shell = Connection::open(&path).unwrap();
    let plan = |sql: &str| -> String {
        let mut statement = shell.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let rows = statement
            .query_map([], |row| row.get::<_, String>(3))
            .unwrap();
        rows.map(Result::unwrap).collect::<Vec<_>>().join("; ")
    };
    let claim = plan(
        "SELECT due_ms, event, subscriber FROM defer_deliveries INDEXED BY defer_deliveries_due
         WHERE due_ms <= 1 ORDER BY due_ms, event, subscriber LIMIT 10",
    );
    assert!(
        claim.contains("COVERING INDEX defer_deliveries_due (due_ms<?)"),
        "{claim}"
    );
    assert!(!claim.contains("TEMP B-TREE"), "{claim}");
    store.close().await.unwrap();
}

#[tokio::test]
async fn finished_deliveries_leave_the_hot_table() {
    let scratch = Scratch::new("hot");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    store
        .append((0..100).map(|_| event("one", "mail", 1)).collect(), 1)
        .await
        .unwrap();
    let claimed = store.claim(100, 1).await.unwrap();
    let settles = claimed
        .into_iter()
        .map(|c| (c.token, Settle::Complete))
        .collect();
    store.settle(settles, 2).await.unwrap();
    let shell = Connection::open(&path).unwrap();
    let count = |table: &str| -> i64 {
        let sql = format!("SELECT count(*) FROM {table}");
        shell.query_row(&sql, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(
        (count("defer_deliveries"), count("defer_history")),
        (0, 100)
    );
}

/// Nobody waits any more for a claim, or for an append that claims: while it is being made, or when its
/// answer is there. What was claimed is due again, in a process that lives on and asks for nothing.
#[tokio::test]
async fn what_was_claimed_for_nobody_is_handed_back() {
    let scratch = Scratch::new("nobody");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    let due = |name: &str| event(name, "mail", 1);
    let mine = |name: &str| NewEvent::new(name, "{}").deliver("mail", Start::Claimed);
    for (round, is_answered) in [false, true].into_iter().enumerate() {
        store.append(vec![due("due")], 1).await.unwrap();
        let shell = Connection::open(&path).unwrap();
        shell.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut claim = store.claim(10, 2);
        let mut append = store.append(vec![mine("mine")], 2);
        // Both are in the writer's hands.
        std::future::poll_fn(|context| {
            assert!(claim.as_mut().poll(context).is_pending());
            assert!(append.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        eventually(&mut std::future::pending::<()>(), || store.health().trouble).await;
        let counted = async |wanted: [u64; 2]| {
            for _ in 0..60_000 {
                let counts = store.counts().await.unwrap();
                if [counts.queued, counts.running] == wanted {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await; // the probe's pause
            }
            panic!("{:?} in place of {wanted:?}", store.counts().await);
        };
        if is_answered {
            shell.execute_batch("COMMIT").unwrap();
            counted([0, 2]).await;
            drop((claim, append));
        } else {
            drop((claim, append));
            shell.execute_batch("COMMIT").unwrap();
        }
        counted([2, 0]).await;
        tokio::time::timeout(Duration::from_secs(60), store.wakeups().notified())
            .await
            .expect("whoever claims is told");
        let claimed = store.claim(10, 3).await.unwrap();
        assert_eq!(claimed.len(), 2, "in round {round}");
        assert!(claimed.iter().all(|it| (it.attempt, it.crashes) == (1, 0)));
        let complete = |it: Claimed| (it.token, Settle::Complete);
        let settles = claimed.into_iter().map(complete).collect();
        store.settle(settles, 4).await.unwrap();
    }
    store.close().await.unwrap();
}

/// A foreign transaction, held until we have seen that it is reported: appends wait, nothing
/// fails, and they go on by themselves.
#[tokio::test]
async fn a_foreign_lock_delays_and_is_reported() {
    let scratch = Scratch::new("foreign");
    let path = scratch.path("events.db");
    let store = std::sync::Arc::new(Sqlite::open(&path).unwrap());
    let shell = Connection::open(&path).unwrap();
    shell.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut append = store.append(vec![event("one", "mail", 1)], 7);
    let trouble = eventually(&mut append, || store.health().trouble).await;
    assert!(trouble.error.is_locked(), "{}", trouble.error);
    assert_eq!(trouble.since_ms, 7);
    // Reading goes on meanwhile.
    assert_eq!(store.counts().await.unwrap().events, 0);
    shell.execute_batch("COMMIT").unwrap();
    append.await.unwrap();
    assert!(
        store.health().trouble.is_none(),
        "the trouble outlived its cause"
    );
    assert_eq!(store.claim(1, 8).await.unwrap().len(), 1);
}

/// Longer than we have patience: a typed error, nothing recorded, and the writer lives.
#[tokio::test]
async fn a_foreign_lock_that_stays_fails_typed() {
    let scratch = Scratch::new("patience");
    let path = scratch.path("events.db");
    let options = SqliteOptions::new(&path).lock_patience(Duration::from_millis(300));
    let store = options.open().unwrap();
    let shell = Connection::open(&path).unwrap();
    shell.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = store
        .append(vec![event("one", "mail", 1)], 1)
        .await
        .unwrap_err();
    assert!(error.is_locked(), "{error}");
    shell.execute_batch("COMMIT").unwrap();
    store
        .append(vec![event("two", "mail", 1)], 1)
        .await
        .unwrap();
    let claimed = store.claim(10, 1).await.unwrap();
    assert_eq!(claimed.len(), 1);
    assert_eq!(&*claimed[0].event.name, "two");
}

/// The last frame of the log is torn: everything acknowledged before it is there.
#[tokio::test]
async fn a_torn_last_page_of_the_log_costs_only_what_it_held() {
    let scratch = Scratch::new("torn");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    for i in 0..50 {
        store
            .append(vec![event(&format!("event {i}"), "mail", i)], i)
            .await
            .unwrap();
    }
    let before = scratch.path("events.db-wal").metadata().unwrap().len();
    store
        .append(vec![event("torn", "mail", 99)], 99)
        .await
        .unwrap();
    let image = scratch.path("image.db");
    image::copy_store(&path, &image);
    let log = std::fs::OpenOptions::new()
        .write(true)
        .open(scratch.path("image.db-wal"))
        .unwrap();
    let torn = log.metadata().unwrap().len();
    assert!(
        torn > before,
        "the log was reset, so its end is not the last append"
    );
    log.set_len(torn - 100).unwrap();
    // What was torn is in the redo log, which gives it back (`store_power`): here that is gone, too.
    std::fs::remove_file(scratch.path("image.db-log")).unwrap();
    let store = Sqlite::open(&image).unwrap();
    let claimed = store.claim(100, 100).await.unwrap();
    let names: Vec<_> = claimed.iter().map(|c| c.event.name.to_string()).collect();
    assert_eq!(
        names,
        (0..50).map(|i| format!("event {i}")).collect::<Vec<_>>()
    );
}

/// Flips one byte of the file wherever `find` stands in it; the pages around stay as they are.
fn flip(path: &std::path::Path, find: &str, byte: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let places: Vec<usize> = bytes
        .windows(find.len())
        .enumerate()
        .filter(|(_, window)| *window == find.as_bytes())
        .map(|(place, _)| place)
        .collect();
    assert_eq!(places.len(), 1, "{find} must stand in the file once");
    bytes[places[0] + byte] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}

async fn three_events(path: &std::path::Path) {
    let store = Sqlite::open(path).unwrap();
    for (name, subscriber) in [
        ("before", "first"),
        ("victim", "second"),
        ("after", "third"),
    ] {
        let mut event = event(name, subscriber, 1);
        event.payload = format!("{{\"payload\":\"of {name}\"}}");
        store.append(vec![event], 1).await.unwrap();
    }
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_flipped_byte_in_a_payload_sets_only_its_delivery_aside() {
    let scratch = Scratch::new("payload");
    let path = scratch.path("events.db");
    three_events(&path).await;
    flip(&path, "of victim", 4);

    let store = Sqlite::open(&path).unwrap();
    let claimed = store.claim(10, 1).await.unwrap();
    let names: Vec<_> = claimed.iter().map(|c| &*c.event.name).collect();
    assert_eq!(names, ["before", "after"]);
    assert_eq!(store.health().damaged, 1);
    assert!(store.health().last_damage.unwrap().contains("checksum"));
    let parked = store
        .list(State::Parked, Filter::default(), None, 10)
        .await
        .unwrap();
    assert_eq!(parked.len(), 1);
    assert_eq!(parked[0].reason.as_deref(), Some(DAMAGED));

    // Repaired from the shell, it runs.
    let shell = Connection::open(&path).unwrap();
    shell
        .execute(
            "UPDATE defer_events SET payload = '{}', sum = NULL WHERE name = 'victim'",
            [],
        )
        .unwrap();
    assert_eq!(
        store.unpark(Filter::default(), None, 10, 2).await.unwrap(),
        1
    );
    assert_eq!(store.claim(10, 2).await.unwrap()[0].event.payload, "{}");
}

#[tokio::test]
async fn a_flipped_byte_in_a_state_sets_only_its_delivery_aside() {
    let scratch = Scratch::new("state");
    let path = scratch.path("events.db");
    three_events(&path).await;
    // A row is its key and then its state.
    flip(&path, "secondqueued", 8);

    for damaged in [1, 0] {
        let store = Sqlite::open(&path).unwrap();
        let claimed = store.claim(10, 1).await.unwrap();
        let names: Vec<_> = claimed.iter().map(|c| &*c.event.name).collect();
        assert_eq!(names, ["before", "after"]);
        assert_eq!(store.health().damaged, damaged, "it is set aside once");
        // Not claimed again, not in the way of others, not deleted.
        assert!(store.claim(10, 1).await.unwrap().is_empty());
        let settles = claimed
            .into_iter()
            .map(|c| (c.token, Settle::Release))
            .collect();
        store.settle(settles, 1).await.unwrap();
        let counts = store.counts().await.unwrap();
        assert_eq!((counts.queued, counts.parked, counts.unknown), (2, 1, 0));
        store.close().await.unwrap();
    }
}

/// A whole page of the hot table is noise: what is on other pages goes on.
#[tokio::test]
async fn a_damaged_page_does_not_stop_the_others() {
    let scratch = Scratch::new("page");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    for i in 0..2_000 {
        // One batch would do; single names make the payload's page findable.
        let mut event = event("one", "mail", i);
        event.payload = format!("\"payload {i:05} {}\"", "x".repeat(300));
        store.append(vec![event], i).await.unwrap();
    }
    store.close().await.unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let place = bytes
        .windows(13)
        .position(|window| window == b"payload 01000")
        .unwrap();
    let page = place / 4_096 * 4_096;
    bytes[page..page + 64].fill(0xff);
    std::fs::write(&path, bytes).unwrap();

    let store = Sqlite::open(&path).unwrap();
    let mut found = 0;
    for _ in 0..100 {
        let claimed = store.claim(100, 5_000).await.unwrap();
        found += claimed.len();
        let settles = claimed
            .into_iter()
            .map(|c| (c.token, Settle::Complete))
            .collect();
        let settled = store.settle(settles, 5_000).await.unwrap();
        assert!(settled.iter().all(|settled| *settled == Settled::Applied));
    }
    // A page of events holds about ten.
    assert!(found > 1_980, "only {found} of 2,000 were found");
    assert_eq!(store.health().damaged, 2_000 - found as u64);
    assert!(store.health().damaged > 0, "the damage went unnoticed");
}

/// What the documentation of the schema promises to people with a shell.
#[tokio::test]
async fn the_shell_can_read_it_beside_a_running_store() {
    let scratch = Scratch::new("shell");
    let path = scratch.path("events.db");
    let store = Sqlite::open(&path).unwrap();
    store
        .append(vec![event("user.created", "mail", 1_700_000_000_000)], 1)
        .await
        .unwrap();
    let sql = "SELECT e.name, e.payload, d.subscriber, d.state, d.due_ms FROM defer_deliveries d
               JOIN defer_events e ON e.id = d.event";
    let Ok(output) = Command::new("sqlite3").arg(&path).arg(sql).output() else {
        eprintln!("SKIPPED: there is no sqlite3 on this machine");
        return;
    };
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "user.created|{}|mail|queued|1700000000000"
    );
    store.close().await.unwrap();
}

/// Polls `future` until `probe` finds something; the future must not be ready before.
async fn eventually<F: Future + Unpin, T>(
    future: &mut F,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    for _ in 0..60_000 {
        if let Some(found) = probe() {
            return found;
        }
        let tick = tokio::time::sleep(Duration::from_millis(1)); // the probe's pause
        tokio::select! {
            _ = &mut *future => panic!("ready before the probe found anything"),
            () = tick => {}
        }
    }
    panic!("nothing found in a minute");
}
