//! A store that cannot write, and one that is damaged: cases 38 and 39.
#![cfg(all(feature = "sqlite", feature = "hyper", feature = "tonic"))]

mod support;

#[path = "store_support/mount.rs"]
mod mount;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Code;
use tonic::transport::Server as Tonic;
use tower::util::MapRequestLayer;
use tower_defer::event::store::{Filter, Sqlite, SqliteOptions, StoreError};
use tower_defer::event::{Event, Events};
use tower_defer::{Defer, DeferLayer, Executor, When};

use mount::Mount;
use support::body::Script;
use support::client::{Client, read};
use support::events::{
    Book, EVENTS, File, Paid, Scratch, answer, both, count, defer_of, events, id_of, listener,
    look_into, once, open, open_with,
};
use support::grpc::{Echo, EchoClient, STREAM, UNARY};
use support::ran::Ran;
use support::{Flavor, Http, Server, Setting, app, eventually, on, soon};

/// Fills a disk quickly.
#[derive(Clone, Serialize, Deserialize)]
struct Scan {
    id: i64,
    page: String,
}

impl Event for Scan {
    const NAME: &'static str = "scan";
}

/// The handler's answer when all is well.
fn made() -> Response<Script> {
    let mut response = answer(201);
    let headers = response.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("text/plain"));
    headers.insert("x-made", HeaderValue::from_static("yes"));
    response
}

fn is_refused(answer: &support::client::Answer, http: Http) {
    assert_eq!(answer.head.status, 503);
    assert!(answer.body.is_empty(), "{:?}", answer.body);
    assert!(answer.trailers.is_none());
    let headers = &answer.head.headers;
    assert!(!headers.contains_key("x-made"), "{headers:?}");
    assert!(!headers.contains_key("content-type"), "{headers:?}");
    if http == Http::One {
        assert_eq!(headers["content-length"], "0");
    }
}

/// What a server does while its store cannot write, and after.
async fn refuses_and_recovers(
    setting: Setting,
    store: Sqlite,
    is_expected: fn(&StoreError) -> bool,
    fail: impl FnOnce(),
    heal: impl FnOnce(),
) {
    let book = Book::new();
    let ran = Ran::new();
    let events = events(&book, &["books"])
        .on("archive", |book: Book, scan: Scan| async move {
            book.heard("archive", scan.id);
        })
        .store(store);
    let layer = DeferLayer::new().events(events.clone());
    let witness = ran.clone();
    let server = setting.serve(app(&layer, move |request| {
        let ran = witness.clone();
        async move {
            let defer = defer_of(&request);
            let id = id_of(&request);
            defer.run(ran.task(&format!("always {id}")).when(When::always()));
            defer.run(ran.task(&format!("success {id}")));
            defer.run(ran.task(&format!("failure {id}")).when(When::failure()));
            if !request.uri().path().starts_with("/silent") {
                defer.emit(Paid { id });
                let page = "x".repeat(100_000);
                defer.emit(Scan { id, page });
            }
            made()
        }
    }));
    let mut client = setting.connect(&server).await;
    assert_eq!(client.get("/1").await.head.status, 201);
    let mut recorded = vec![1];
    assert!(events.health().expect("a store").trouble.is_none());

    fail();
    let mut refused = None;
    for id in 2..1_000 {
        let answer = client.get(&format!("/{id}")).await;
        if answer.head.status == 201 {
            recorded.push(id);
            continue;
        }
        is_refused(&answer, setting.http);
        refused = Some(id);
        break;
    }
    let refused = refused.expect("the fault never came");
    // The request's tasks see what the client saw.
    let always = format!("always {refused}");
    ran.awaits(&always).await;
    ran.awaits(&format!("failure {refused}")).await;
    assert_eq!(ran.info(&always).status.map(|s| s.as_u16()), Some(503));
    assert!(!ran.has(&format!("success {refused}")));
    // And the health says so. It tells how the last write went: on a disk that is nearly full a small
    // one may succeed, and what the store tidies up makes room for another large one.
    book.awaits("archive", recorded.len()).await;
    let mut id = 1_000;
    let trouble = soon("the health says so", async {
        loop {
            id += 1;
            let again = client.get(&format!("/{id}")).await;
            if again.head.status == 201 {
                recorded.push(id);
                continue;
            }
            is_refused(&again, setting.http);
            if let Some(trouble) = events.health().expect("a store").trouble {
                return trouble;
            }
        }
    })
    .await;
    assert!(is_expected(&trouble.error), "{}", trouble.error);

    // Also outside of a request.
    let mut archived = recorded.clone();
    let page = "x".repeat(100_000);
    match events.emit(Scan { id: 9_001, page }).recorded().await {
        Ok(()) => archived.push(9_001),
        Err(error) => assert!(error.store_error().is_some_and(is_expected), "{error}"),
    }
    // What is not recorded goes on.
    assert_eq!(client.get("/silent/9003").await.head.status, 201);
    ran.awaits("success 9003").await;

    heal();
    assert_eq!(
        client.get("/9004").await.head.status,
        201,
        "it did not recover by itself"
    );
    recorded.push(9_004);
    archived.push(9_004);
    assert!(events.health().expect("a store").trouble.is_none());
    book.awaits("books", recorded.len()).await;
    book.awaits("archive", archived.len()).await;
    soon("idle", layer.get_executor().idle()).await;
    assert_eq!(
        book.ids("books"),
        recorded,
        "delivered is not what was recorded"
    );
    assert_eq!(book.ids("archive"), archived);
    let snapshot = layer.get_executor().snapshot();
    assert_eq!(
        (snapshot.outstanding, snapshot.reserved),
        (0, 0),
        "{snapshot:?}"
    );
    assert_eq!(
        snapshot.discarded + snapshot.kept + snapshot.cancelled,
        0,
        "{snapshot:?}"
    );
}

#[test]
fn case_38_a_full_disk() {
    both(|setting| async move {
        let scratch = Scratch::new("case-38-full");
        let Some(mount) = Mount::small(scratch.path("disk")) else {
            eprintln!(
                "SKIPPED: no file system may be mounted here; the shim fills the disk instead"
            );
            return;
        };
        let store = open(&mount.0.join("events.db")).await;
        let heal = || mount.remount("size=64m");
        refuses_and_recovers(setting, store, StoreError::is_full, || {}, heal).await;
    });
}

#[test]
fn case_38_a_sync_that_fails() {
    under_the_shim("case_38_a_sync_that_fails", "f", StoreError::is_io);
}

#[test]
fn case_38_a_write_that_finds_no_room() {
    under_the_shim(
        "case_38_a_write_that_finds_no_room",
        "e",
        StoreError::is_full,
    );
}

/// Starts the calling test again as a child, over the shim. In that child, lets the shim fail.
fn under_the_shim(test: &str, fault: &str, is_expected: fn(&StoreError) -> bool) {
    if let Ok(switch) = std::env::var("DEFER_FAULT") {
        let switch = Path::new(&switch);
        both(|setting| async move {
            std::fs::write(switch, "-").expect("written");
            let file = File::new("shim");
            let fail = || std::fs::write(switch, fault).expect("written");
            let heal = || std::fs::write(switch, "-").expect("written");
            refuses_and_recovers(setting, file.open().await, is_expected, fail, heal).await;
        });
        return;
    }
    let scratch = Scratch::new("case-38-shim");
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
    let output = Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", test, "--nocapture"])
        .env("LD_PRELOAD", &shim)
        .env("DEFER_FAULT", scratch.path("fault"))
        .output()
        .expect("a child");
    let said = String::from_utf8_lossy(&output.stdout);
    // A name that no test has would succeed as well.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn case_38_a_foreign_lock_that_outlasts_the_patience() {
    both(|setting| async move {
        let file = File::new("case-38-lock");
        let options = SqliteOptions::new(file.path()).lock_patience(Duration::from_millis(500));
        let store = open_with(options).await;
        let foreign = look_into(&file.path());
        let fail = || foreign.execute_batch("BEGIN IMMEDIATE").expect("the lock");
        let heal = || foreign.execute_batch("ROLLBACK").expect("let go");
        refuses_and_recovers(setting, store, StoreError::is_locked, fail, heal).await;
    });
}

#[test]
fn case_38_a_foreign_lock_within_the_patience_only_delays() {
    both(|setting| async move {
        let file = File::new("case-38-patience");
        let book = Book::new();
        let events = events(&book, &["books"]).store(file.open().await);
        let layer = DeferLayer::new().events(events.clone());
        let server = setting.serve(app(&layer, |request| async move {
            defer_of(&request).emit(Paid { id: 1 });
            answer(200)
        }));
        let foreign = look_into(&file.path());
        foreign.execute_batch("BEGIN IMMEDIATE").expect("the lock");
        let mut client = setting.connect(&server).await;
        let unlock = async {
            eventually("the health says so", || {
                let trouble = events.health().expect("a store").trouble;
                trouble.is_some_and(|trouble| trouble.error.is_locked())
            })
            .await;
            foreign.execute_batch("ROLLBACK").expect("let go");
        };
        let (answer, ()) = tokio::join!(client.get("/"), unlock);
        assert_eq!(answer.head.status, 200);
        assert!(events.health().expect("a store").trouble.is_none());
        book.awaits("books", 1).await;
        soon("idle", layer.get_executor().idle()).await;
    });
}

/// A call, as its bytes: no message matters here.
async fn call(client: &mut Client, path: &str) -> support::client::Answer {
    let request = Request::post(format!("http://test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from_static(&[0, 0, 0, 0, 0])))
        .expect("a request");
    let response = client.send(request).await.expect("a response");
    read(response).await.expect("a body")
}

#[test]
fn case_38_a_grpc_call_is_unavailable() {
    for flavor in [Flavor::CurrentThread, Flavor::MultiThread(2)] {
        let http = Http::Two;
        on(Setting { http, flavor }, |setting| async move {
            let file = File::new("case-38-grpc");
            let book = Book::new();
            let options = SqliteOptions::new(file.path()).lock_patience(Duration::ZERO);
            let events = events(&book, &["books"]).store(open_with(options).await);
            let layer = DeferLayer::new().events(events.clone());
            let echo = Echo::new();
            let (outer, service) = (layer.clone(), echo.clone());
            let server = Server::start(flavor, move |listener: TcpListener| async move {
                let emits = MapRequestLayer::new(|request: Request<tonic::body::Body>| {
                    let defer = Defer::from_extensions(request.extensions());
                    defer.expect("the layer is there").emit(Paid { id: 1 });
                    request
                });
                let served = Tonic::builder()
                    .layer(outer)
                    .layer(emits)
                    .add_service(service)
                    .serve_with_incoming(TcpListenerStream::new(listener));
                served.await.expect("the server serves");
            });
            let foreign = look_into(&file.path());
            foreign.execute_batch("BEGIN IMMEDIATE").expect("the lock");
            let mut echoes = EchoClient::connect(server.addr).await;
            let status = echoes.unary("well").await.expect_err("not recorded");
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            let status = echoes.stream("well").await.expect_err("not recorded");
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            // Trailers-only: the head says it, and it is the end.
            let mut client = setting.connect(&server).await;
            for path in [UNARY, STREAM] {
                let answer = call(&mut client, path).await;
                assert_eq!(answer.head.status, 200);
                assert_eq!(answer.head.headers["grpc-status"], "14");
                assert_eq!(answer.head.headers["content-type"], "application/grpc");
                assert!(
                    answer.body.is_empty() && answer.trailers.is_none(),
                    "{answer:?}"
                );
            }
            eventually("the tasks see it", || {
                echo.ran.names().matches("failure").count() == 4
            })
            .await;
            assert_eq!(echo.ran.info("failure").grpc_status, Some(14));
            assert!(!echo.ran.has("success") && !echo.ran.has("default"));

            foreign.execute_batch("ROLLBACK").expect("let go");
            assert_eq!(echoes.unary("well").await.expect("recorded"), "once");
            book.awaits("books", 1).await;
            // A call that fails has said nothing.
            echoes.unary("fail").await.expect_err("asked to fail");
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(book.count("books"), 1);
            assert_eq!(count(&foreign, EVENTS), 1);
        });
    }
}

/// Events that are recorded, and nothing delivered: the executor has been drained before.
async fn record(file: &File, book: &Book, ids: std::ops::RangeInclusive<i64>) {
    let executor = Executor::new();
    executor.drain(Duration::ZERO).await;
    let events = Events::new(book.clone())
        .on("books", listener())
        .executor(&executor)
        .store(file.open().await);
    for id in ids {
        events.emit(Paid { id }).recorded().await.expect("recorded");
    }
    assert_eq!(events.counts().await.expect("counts").running, 0);
}

#[test]
fn case_39_a_damaged_record_is_set_aside_and_the_rest_is_delivered() {
    for (damage, at) in [
        // A flipped byte, which leaves the JSON as valid as it was.
        (
            "UPDATE defer_events SET payload = '{\"id\":8}' WHERE id = 3",
            3,
        ),
        // A text that is none.
        (
            "UPDATE defer_events SET payload = CAST(x'ff00' AS TEXT) WHERE id = 3",
            3,
        ),
        (
            "UPDATE defer_events SET name = 'order.paie' WHERE id = 3",
            3,
        ),
        (
            "UPDATE defer_deliveries SET attempt = 'many' WHERE event = 1",
            1,
        ),
        (
            "UPDATE defer_deliveries SET generation = x'00' WHERE event = 5",
            5,
        ),
        ("DELETE FROM defer_events WHERE id = 2", 2),
    ] {
        once(|setting| async move {
            eprintln!("{damage}");
            let file = File::new("case-39");
            let book = Book::new();
            record(&file, &book, 1..=5).await;
            drop(file.open().await);
            let rows = "SELECT count(*) FROM defer_deliveries";
            let kept = {
                let conn = look_into(&file.path());
                conn.execute_batch(damage).expect("damaged");
                (count(&conn, EVENTS), count(&conn, rows))
            };
            let events = events(&book, &["books"]).store(file.open().await);
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                defer_of(&request).emit(Paid { id: 6 });
                answer(200)
            }));
            book.awaits("books", 4).await;
            assert_eq!(
                setting.connect(&server).await.get("/").await.head.status,
                200
            );
            book.awaits("books", 5).await;
            soon("idle", layer.get_executor().idle()).await;
            let expected: Vec<i64> = (1..=6).filter(|id| *id != at).collect();
            assert_eq!(book.ids("books"), expected);
            let health = events.health().expect("a store");
            assert_eq!(health.damaged, 1);
            let last = health.last_damage.expect("it is said");
            assert!(last.contains(&format!("event {at} for books")), "{last}");
            // Nothing is deleted: one event came, and four deliveries are history.
            let conn = look_into(&file.path());
            assert_eq!(
                (count(&conn, EVENTS), count(&conn, rows)),
                (kept.0 + 1, kept.1 - 4)
            );
            assert_eq!(count(&conn, "SELECT count(*) FROM defer_history"), 5);
            assert_eq!(events.counts().await.expect("counts").parked, 1);
            if damage.contains("UPDATE defer_events") {
                let letters = events.dead_letters();
                let parked = letters.parked(&Filter::default(), None, 9).await;
                let parked = parked.expect("a list");
                let reasons: Vec<_> = parked.iter().map(|p| p.reason.as_deref()).collect();
                assert_eq!(reasons, [Some("damaged")]);
            }
        });
    }
}
