//! A disk that fails, for real: a file system that is full or read-only, and a sync that returns
//! an error to SQLite (a shim below it, compiled here; nothing of ours is mocked).

#[path = "store_support/event.rs"]
mod event;
#[path = "store_support/image.rs"]
mod image;
#[path = "store_support/scratch.rs"]
mod scratch;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use event::event;
use http::{Request, Response};
use scratch::Scratch;
use serde::{Deserialize, Serialize};
use tower::{Layer, ServiceExt, service_fn};
use tower_defer::event::store::{
    Filter, NewEvent, Settle, Sqlite, SqliteOperator, State, Store, StoreError,
};
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer};

#[derive(Clone, Serialize, Deserialize)]
struct Paid;

impl Event for Paid {
    const NAME: &'static str = "order.paid";
}

/// A small file system of its own, where we may mount one.
struct Mount(PathBuf);

impl Mount {
    fn small(path: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&path).unwrap();
        let mount = Self(path);
        mount
            .run(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .then_some(mount)
    }

    fn remount(&self, options: &str) {
        assert!(
            self.run(&["-o", &format!("remount,{options}")]),
            "remount,{options}"
        );
    }

    fn run(&self, args: &[&str]) -> bool {
        let output = Command::new("mount").args(args).arg(&self.0).output();
        output.is_ok_and(|output| output.status.success())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// What a store must do while its disk fails and after: `fail` begins the fault, `heal` ends it.
async fn fails_typed_and_recovers(
    path: &Path,
    is_expected: fn(&StoreError) -> bool,
    fail: impl FnOnce(),
    heal: impl FnOnce(),
) {
    let store = Sqlite::open(path).unwrap();
    let big = |name: String| {
        let mut event = event(&name, "mail", 1);
        event.payload = "x".repeat(10_000);
        event
    };
    let mut acknowledged = BTreeSet::new();
    for i in 0..10 {
        store
            .append(vec![big(format!("before {i}"))], 1)
            .await
            .unwrap();
        acknowledged.insert(format!("before {i}"));
    }
    fail();
    // A disk fills while it is written: so many are more than the small file system holds.
    let mut error = None;
    for i in 0..1_000 {
        match store.append(vec![big(format!("during {i}"))], 5).await {
            Ok(_) => drop(acknowledged.insert(format!("during {i}"))),
            Err(refused) => {
                error = Some(refused);
                break;
            }
        }
    }
    let error = error.expect("the fault never came");
    assert!(
        is_expected(&error),
        "{error}: {:?}",
        std::error::Error::source(&error)
    );
    let trouble = store.health().trouble.expect("the health says nothing");
    assert!(is_expected(&trouble.error));
    assert_eq!(trouble.since_ms, 5);

    // Many at once: all of them fail, and each says why.
    let refused = futures_util::future::join_all(
        (0..20).map(|i| store.append(vec![big(format!("refused {i}"))], 6)),
    )
    .await;
    assert!(
        refused
            .iter()
            .all(|result| result.as_ref().is_err_and(is_expected)),
        "{refused:?}"
    );
    assert_eq!(
        store.health().trouble.map(|trouble| trouble.since_ms),
        Some(5)
    );

    heal();
    store
        .append(vec![NewEvent::new("healed", "{}")], 7)
        .await
        .expect("it did not recover");
    assert!(
        store.health().trouble.is_none(),
        "the trouble outlived its cause"
    );
    let claimed = store.claim(10_000, 7).await.unwrap();
    let names: BTreeSet<_> = claimed.iter().map(|c| c.event.name.to_string()).collect();
    assert_eq!(
        names, acknowledged,
        "delivered is not what was acknowledged"
    );
    let settles = claimed
        .into_iter()
        .map(|c| (c.token, Settle::Complete))
        .collect();
    store.settle(settles, 8).await.unwrap();

    // A killed process leaves a sound file behind.
    let image = path.with_file_name("image.db");
    image::copy_store(path, &image);
    let image = Sqlite::open(image).unwrap();
    assert_eq!(
        image.counts().await.unwrap().finished,
        acknowledged.len() as u64
    );
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_fails_typed_and_recovers() {
    let scratch = Scratch::new("full");
    let Some(mount) = Mount::small(scratch.path("disk")) else {
        eprintln!("SKIPPED: no file system may be mounted here; the shim fills the disk instead");
        return;
    };
    let path = mount.0.join("events.db");
    fails_typed_and_recovers(
        &path,
        StoreError::is_full,
        || {},
        || mount.remount("size=64m"),
    )
    .await;
}

#[tokio::test]
async fn a_read_only_file_is_refused_at_open() {
    let scratch = Scratch::new("read-only");
    let Some(mount) = Mount::small(scratch.path("disk")) else {
        eprintln!("SKIPPED: no file system may be mounted here");
        return;
    };
    let path = mount.0.join("events.db");
    Sqlite::open(&path).unwrap().close().await.unwrap();
    mount.remount("ro");
    let error = Sqlite::open(&path).unwrap_err();
    assert!(
        error.is_read_only(),
        "{error}: {:?}",
        std::error::Error::source(&error)
    );
    mount.remount("rw");
    Sqlite::open(&path).unwrap().close().await.unwrap();
}

#[tokio::test]
async fn an_error_from_sync_fails_typed_and_recovers() {
    let test = "an_error_from_sync_fails_typed_and_recovers";
    under_the_shim(test, "f", StoreError::is_io).await;
}

#[tokio::test]
async fn a_write_without_room_fails_typed_and_recovers() {
    let test = "a_write_without_room_fails_typed_and_recovers";
    under_the_shim(test, "e", StoreError::is_full).await;
}

/// Nobody is told that an event is recorded before the redo log is synced: neither the caller of the store
/// nor a client, nor is anybody given the event.
#[tokio::test]
async fn a_response_waits_for_the_sync() {
    let Some((path, switch)) = child("a_response_waits_for_the_sync") else {
        return;
    };
    let store = Sqlite::open(&path).unwrap();
    let fail = |fault: &str| std::fs::write(&switch, fault).unwrap();
    store.append(vec![event("a", "mail", 1)], 1).await.unwrap();

    fail("f");
    let error = store.append(vec![event("b", "mail", 2)], 2).await;
    assert!(error.as_ref().is_err_and(StoreError::is_io), "{error:?}");
    assert!(store.health().trouble.is_some());
    let claimed = store.claim(10, 5).await.unwrap();
    assert_eq!(claimed.len(), 1, "{claimed:?}");

    // After that SQLite syncs what is recorded; and it really does.
    fail("-");
    for name in ["c", "g"] {
        store.append(vec![event(name, "mail", 3)], 3).await.unwrap();
    }
    assert!(store.health().trouble.is_none());
    let log = || {
        let log = path.with_file_name("events.db-wal").metadata();
        log.unwrap().len()
    };
    let before = log();
    fail("f");
    for name in ["d", "e"] {
        let error = store.append(vec![event(name, "mail", 4)], 4).await;
        assert!(error.as_ref().is_err_and(StoreError::is_io), "{error:?}");
    }
    fail("-");
    store.append(vec![event("f", "mail", 5)], 5).await.unwrap();
    // What SQLite's log held may be lost, whatever this sync says: it was moved, and begun anew.
    assert!(log() < before, "{} bytes after {before}", log());

    let events = Events::new(()).on("mail", async |(): (), _: Paid| {});
    let answer = async |request: Request<()>| {
        request.extensions().get::<Defer>().unwrap().emit(Paid);
        Ok::<_, Infallible>(Response::new(String::new()))
    };
    let layer = DeferLayer::new().events(events.store(store));
    let server = layer.layer(service_fn(answer));
    let ask = async || {
        server
            .clone()
            .oneshot(Request::new(()))
            .await
            .unwrap()
            .status()
    };
    assert_eq!(ask().await, 200);
    // All syncs: an event that shares its transaction with a settled delivery is synced by SQLite.
    fail("f");
    assert_eq!(ask().await, 503);
    fail("-");
    assert_eq!(ask().await, 200);
    let mut operator = SqliteOperator::open(&path).unwrap();
    let all = operator.counts().unwrap().events;
    assert_eq!(all, 6, "what was refused is not there");
}

/// The redo log is to save time: SQLite syncs what it cannot.
#[tokio::test]
async fn where_only_the_redo_log_cannot_be_synced_nothing_is_refused() {
    let test = "where_only_the_redo_log_cannot_be_synced_nothing_is_refused";
    let Some((path, switch)) = child(test) else {
        return;
    };
    let store = Sqlite::open(&path).unwrap();
    let names = ["a", "b", "c", "d"];
    for (at, name) in (1..).zip(names) {
        store
            .append(vec![event(name, "mail", at)], at)
            .await
            .unwrap();
        assert!(store.health().trouble.is_none());
        std::fs::write(&switch, "d").unwrap();
    }
    let claimed = store.claim(10, 5).await.unwrap();
    assert_eq!(claimed.len(), names.len(), "{claimed:?}");
    store.close().await.unwrap();
    let log = path.with_file_name("events.db-log");
    assert!(!log.exists(), "an orderly close leaves one file");
    std::fs::write(&switch, "-").unwrap();
    drop(Sqlite::open(&path).unwrap());
    let mut operator = SqliteOperator::open(&path).unwrap();
    assert_eq!(operator.counts().unwrap().events, 4, "each of them once");
}

/// A sync of SQLite's log that fails while that is moved, on the reader's thread: the writer's own syncs meet
/// nothing of it, and still it trusts the log no more. Meanwhile nothing is refused, and the redo log keeps all.
#[tokio::test]
async fn the_writer_learns_of_a_sync_that_failed_in_the_readers_checkpoint() {
    a_checkpoint_fails(
        "the_writer_learns_of_a_sync_that_failed_in_the_readers_checkpoint",
        "r",
    )
    .await;
}

/// The same on the writer's own.
#[tokio::test]
async fn a_sync_that_fails_in_the_writers_checkpoint_makes_the_log_begin_anew() {
    a_checkpoint_fails(
        "a_sync_that_fails_in_the_writers_checkpoint_makes_the_log_begin_anew",
        "w",
    )
    .await;
}

async fn a_checkpoint_fails(test: &str, fault: &str) {
    let Some((path, switch)) = child(test) else {
        return;
    };
    let store = Sqlite::open(&path).unwrap();
    let log = path.with_file_name("events.db-wal");
    let length = || log.metadata().unwrap().len();
    let synced = length();
    std::fs::write(&switch, fault).unwrap();
    let hits = switch.with_file_name("fault.hits");
    // From 16 MB on it is moved; the redo log holds 2,700 of these.
    let mut recorded = 0;
    while !hits.exists() {
        assert!(recorded < 2_000, "it was never moved");
        let name = format!("event {recorded}");
        store
            .append(vec![event(&name, "mail", 1)], 1)
            .await
            .unwrap();
        recorded += 1;
    }
    if fault == "r" {
        // What was not synced may be lost.
        let image = path.with_file_name("image.db");
        image::copy_store(&path, &image);
        let log = path.with_file_name("image.db-wal");
        let log = std::fs::File::options().write(true).open(log).unwrap();
        log.set_len(synced).unwrap();
        let image = Sqlite::open(&image).unwrap();
        assert_eq!(image.counts().await.unwrap().events, recorded);
    }
    // Now every sync succeeds. The thread that failed says so after its sync.
    std::fs::write(&switch, "-").unwrap();
    store
        .list(State::Queued, Filter::default(), None, 1)
        .await
        .unwrap();
    let before = length();
    let claimed = store.claim(1, 2).await.unwrap();
    let settles = vec![(claimed[0].token.clone(), Settle::Complete)];
    store.settle(settles, 2).await.unwrap();
    assert!(length() < before / 2, "{} bytes after {before}", length());
    assert_eq!(store.counts().await.unwrap().events, recorded);
    store.close().await.unwrap();
}

/// While SQLite's log is suspect, a write that is to be synced waits for a foreign reader as it does for a
/// foreign writer, and says so.
#[tokio::test]
async fn beside_a_long_read_a_suspect_log_is_waited_for() {
    let Some((path, switch)) = child("beside_a_long_read_a_suspect_log_is_waited_for") else {
        return;
    };
    let store = Sqlite::open(&path).unwrap();
    store.append(vec![event("a", "mail", 1)], 1).await.unwrap();
    let claimed = store.claim(1, 2).await.unwrap();
    let settles = || vec![(claimed[0].token.clone(), Settle::Complete)];
    std::fs::write(&switch, "f").unwrap();
    let error = store.settle(settles(), 3).await;
    assert!(error.as_ref().is_err_and(StoreError::is_io), "{error:?}");
    std::fs::write(&switch, "-").unwrap();

    let shell = rusqlite::Connection::open(&path).unwrap();
    shell
        .execute_batch("BEGIN; SELECT * FROM defer_events")
        .unwrap();
    let mut settled = store.settle(settles(), 4);
    // At least twice what SQLite itself waits for.
    let mut reported = 0;
    for probe in 0.. {
        let pause = Duration::from_millis(250); // the probe's pause
        let early = tokio::time::timeout(pause, &mut settled).await;
        assert!(early.is_err(), "{early:?}");
        reported += u32::from(store.health().trouble.unwrap().error.is_locked());
        if reported == 3 {
            break;
        }
        assert!(probe < 240, "{:?}", store.health());
    }
    shell.execute_batch("COMMIT").unwrap();
    settled.await.unwrap();
    assert!(store.health().trouble.is_none());
    store.close().await.unwrap();
}

/// Starts the calling test again as a child, over the shim. In that child, lets the shim fail.
async fn under_the_shim(test: &str, fault: &str, is_expected: fn(&StoreError) -> bool) {
    if let Some((path, switch)) = child(test) {
        fails_typed_and_recovers(
            &path,
            is_expected,
            || std::fs::write(&switch, fault).unwrap(),
            || std::fs::write(&switch, "-").unwrap(),
        )
        .await;
    }
}

/// Starts a test again as a child, over the shim. In that child: the file of its store, and that by which
/// the shim is told to fail.
fn child(test: &str) -> Option<(PathBuf, PathBuf)> {
    if let (Ok(directory), Ok(switch)) = (std::env::var("DEFER_DIR"), std::env::var("DEFER_FAULT"))
    {
        return Some((PathBuf::from(directory).join("events.db"), switch.into()));
    }
    let scratch = Scratch::new("shim");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/store_support/shim.c");
    let shim = scratch.path("shim.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&shim, &source])
        .arg("-ldl")
        .output()
        .expect("a C compiler, as for SQLite itself");
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_PRELOAD", &shim)
        .env("DEFER_FAULT", scratch.path("fault"))
        .env("DEFER_DIR", scratch.path(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    // A name that no test has would succeed as well.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    None
}
