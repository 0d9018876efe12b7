//! Recorded before the head, delivered after the last byte: case 37, as far as one process can show it.
#![cfg(all(feature = "sqlite", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "servers, clients and deadlines of tests are no deferred work"
)]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};

use http::Method;
use tower_defer::event::store::Memory;
use tower_defer::event::{Emit, Events, Unheard};
use tower_defer::{Defer, DeferLayer, End, When};

use support::body::Script;
use support::client::read;
use support::events::{
    Act, Book, EVENTS, File, Paid, Sent, Tap, answer, both, count, defer_of, events, id_of,
    listener, look_into, once, respond, sent_listener,
};
use support::ran::Ran;
use support::{Gate, Log, app, eventually, soon};

#[test]
fn case_37_when_the_client_has_the_head_the_event_is_in_the_file() {
    both(|setting| async move {
        let file = File::new("case-37");
        let book = Book::new();
        let events = events(&book, &["books", "stock"]).store(file.open().await);
        let layer = DeferLayer::new().events(events);
        let gate = Gate::new();
        let held = gate.clone();
        let server = setting.serve(app(&layer, move |request| {
            let gate = held.clone();
            async move {
                defer_of(&request).emit(Paid {
                    id: id_of(&request),
                });
                respond(201, Script::new().data("a").wait(&gate).data("b"))
            }
        }));
        let mut client = setting.connect(&server).await;
        let response = client.head_of("/7").await;
        // At this very moment, the body still open.
        let conn = look_into(&file.path());
        assert_eq!(count(&conn, EVENTS), 1);
        assert_eq!(count(&conn, "SELECT count(*) FROM defer_deliveries"), 2);
        let payload: String = conn
            .query_row("SELECT payload FROM defer_events", [], |row| row.get(0))
            .expect("a row");
        assert_eq!(payload, r#"{"id":7}"#);
        assert_eq!(layer.get_executor().snapshot().collected, 2);
        assert_eq!(book.runs().len(), 0, "the response is not out");

        gate.open();
        let answer = read(response).await.expect("a body");
        assert_eq!(
            (answer.head.status.as_u16(), &answer.body[..]),
            (201, &b"ab"[..])
        );
        book.awaits("books", 1).await;
        book.awaits("stock", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(
            book.of("books")[0].status,
            Some(201),
            "it can see its response"
        );
        assert_eq!(count(&conn, "SELECT count(*) FROM defer_deliveries"), 0);
    });
}

#[test]
fn case_37_what_found_no_room_waits_for_the_release_too() {
    both(|setting| async move {
        let file = File::new("case-37-room");
        let book = Book::new();
        let (occupied, gate) = (Gate::new(), Gate::new());
        book.act("books", Act::Wait(occupied.clone()));
        let events = events(&book, &["books"])
            .on("post", sent_listener())
            .max_in_flight(1)
            .store(file.open().await);
        let layer = DeferLayer::new().events(events.clone());
        let held = gate.clone();
        let server = setting.serve(app(&layer, move |request| {
            let gate = held.clone();
            async move {
                defer_of(&request).emit(Sent { id: 5 });
                respond(200, Script::new().data("a").wait(&gate).data("b"))
            }
        }));
        // The only room is taken by somebody else's delivery.
        events
            .emit(Paid { id: 1 })
            .recorded()
            .await
            .expect("recorded");
        book.awaits("books", 1).await;
        let mut client = setting.connect(&server).await;
        let response = client.head_of("/").await;
        let conn = look_into(&file.path());
        let queued = "SELECT count(*) FROM defer_deliveries WHERE state = 'queued'";
        assert_eq!(count(&conn, queued), 1, "left to the store");

        // Now there is room: the store hands it out, and it waits with its request.
        occupied.open();
        eventually("it is held", || {
            layer.get_executor().snapshot().collected == 1 && count(&conn, queued) == 0
        })
        .await;
        assert_eq!(book.count("post"), 0);
        gate.open();
        read(response).await.expect("a body");
        book.awaits("post", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.of("post")[0].attempt, 1);
        assert_eq!(events.counts().await.expect("counts").finished, 2);
    });
}

#[test]
fn case_37_the_events_of_a_request_are_one_batch() {
    both(|setting| async move {
        let book = Book::new();
        let tap = Tap::new(Memory::new());
        let events = events(&book, &["books"])
            .on("post", sent_listener())
            .store(tap.clone());
        let layer = DeferLayer::new().events(events.clone());
        let server = setting.serve(app(&layer, |request| async move {
            let defer = defer_of(&request);
            defer.emit(Paid { id: 1 });
            defer.emit(Sent { id: 2 });
            defer.emit(Paid { id: 3 });
            answer(200)
        }));
        setting.connect(&server).await.get("/").await;
        book.awaits("books", 2).await;
        book.awaits("post", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(tap.appends(), 1);
        assert_eq!((book.ids("books"), book.ids("post")), (vec![1, 3], vec![2]));
        assert_eq!(events.counts().await.expect("counts").events, 3);
    });
}

/// How many commits the log holds. Its frames say which of them end one.
fn commits(path: &Path) -> usize {
    let log = std::fs::read(format!("{}-wal", path.display())).expect("a log");
    let number = |at: usize| u32::from_be_bytes(log[at..at + 4].try_into().expect("four bytes"));
    let (page, salt) = (number(8) as usize, number(16));
    let mut frames = Vec::new();
    let mut at = 32;
    while at + 24 + page <= log.len() && number(at + 8) == salt {
        frames.push(number(at + 4));
        at += 24 + page;
    }
    frames.into_iter().filter(|pages| *pages > 0).count()
}

#[test]
fn case_37_requests_that_wait_share_a_commit() {
    const REQUESTS: usize = 16;
    both(|setting| async move {
        let file = File::new("case-37-group");
        let tap = Tap::new(file.open().await);
        // Nobody listens, so that nothing else writes.
        let events = Events::new(()).unheard(Unheard::Allow).store(tap.clone());
        let layer = DeferLayer::new().events(events);
        let server = setting.serve(app(&layer, |request| async move {
            defer_of(&request).emit(Paid {
                id: id_of(&request),
            });
            answer(200)
        }));
        let before = commits(&file.path());
        let mut foreign = look_into(&file.path());
        let lock = foreign
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .expect("the lock");
        let mut clients = Vec::new();
        for id in 0..REQUESTS {
            let mut client = setting.connect(&server).await;
            clients.push(tokio::spawn(async move {
                client.get(&format!("/{id}")).await.head.status
            }));
        }
        eventually("all of them wait", || tap.appends() == REQUESTS).await;
        assert!(clients.iter().all(|client| !client.is_finished()));
        lock.rollback().expect("let go");
        for client in clients {
            assert_eq!(soon("an answer", client).await.expect("no panic"), 200);
        }
        assert_eq!(count(&foreign, EVENTS), REQUESTS as i64);
        // The first has the writer's turn, with whom came by then; the others are the next commit.
        let shared = commits(&file.path()) - before;
        assert!(
            (1..=3).contains(&shared),
            "{shared} commits for {REQUESTS} requests"
        );
    });
}

#[test]
fn case_37_the_client_that_leaves_while_the_append_waits_does_not_undo_it() {
    both(|setting| async move {
        let file = File::new("case-37-leaves");
        let book = Book::new();
        let ran = Ran::new();
        let tap = Tap::new(file.open().await);
        let events = events(&book, &["books"]).store(tap.clone());
        let layer = DeferLayer::new().events(events.clone());
        let witness = ran.clone();
        let server = setting.serve(app(&layer, move |request| {
            let ran = witness.clone();
            async move {
                let defer = defer_of(&request);
                defer.emit(Paid { id: 3 });
                defer.run(ran.task("task"));
                answer(200)
            }
        }));
        let mut foreign = look_into(&file.path());
        let lock = foreign
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .expect("the lock");
        let mut client = setting.connect(&server).await;
        let request = client.request(Method::GET, "/");
        {
            // Asked, and given up when the writer has the batch.
            let mut asked = std::pin::pin!(client.send(request));
            tokio::select! {
                answer = &mut asked => panic!("answered before it was recorded: {answer:?}"),
                () = eventually("the batch is handed over", || tap.appends() == 1) => {}
            }
        }
        client.leave().await;
        ran.awaits("task").await;
        assert_eq!(ran.info("task").end, End::Cancelled);
        assert_eq!(book.runs().len(), 0, "not recorded yet");
        lock.rollback().expect("let go");
        book.awaits("books", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(count(&foreign, EVENTS), 1);
        assert_eq!((tap.appends(), book.count("books")), (1, 1));
        assert_eq!(events.counts().await.expect("counts").finished, 1);
    });
}

#[test]
fn case_37_recorded_within_the_handler_is_recorded_there() {
    both(|setting| async move {
        let file = File::new("case-37-within");
        let book = Book::new();
        let events = events(&book, &["books"]).store(file.open().await);
        let layer = DeferLayer::new().events(events);
        let path = file.path();
        let gate = Gate::new();
        let held = gate.clone();
        let log = Log::new();
        let noted = log.clone();
        let server = setting.serve(app(&layer, move |request| {
            let (path, gate, log) = (path.clone(), held.clone(), noted.clone());
            async move {
                let defer = defer_of(&request);
                let other = defer.emit(Paid { id: 1 });
                let recorded = defer.emit(Paid { id: 2 }).recorded().await;
                recorded.expect("recorded");
                log.note(format!("{} in the file", count(&look_into(&path), EVENTS)));
                gate.passed().await;
                assert!(other.is_accepted());
                // What was recorded has happened, whatever the answer is; the other has not.
                answer(500)
            }
        }));
        let mut client = setting.connect(&server).await;
        let got = async {
            log.awaits("1 in the file").await;
            assert_eq!(book.runs().len(), 0);
            assert_eq!(layer.get_executor().snapshot().collected, 1);
            gate.open();
        };
        let (answer, ()) = tokio::join!(client.get("/"), got);
        assert_eq!(answer.head.status, 500);
        book.awaits("books", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.ids("books"), [2]);
        assert_eq!(book.of("books")[0].status, Some(500));
        assert_eq!(count(&look_into(&file.path()), EVENTS), 1);
    });
}

#[test]
fn case_37_after_the_head_an_event_is_recorded_at_once() {
    both(|setting| async move {
        let file = File::new("case-37-late");
        let book = Book::new();
        let events = events(&book, &["books"]).store(file.open().await);
        let layer = DeferLayer::new().events(events);
        let gate = Gate::new();
        let held = gate.clone();
        let kept: Arc<Mutex<Option<Defer>>> = Arc::default();
        let keeps = kept.clone();
        let server = setting.serve(app(&layer, move |request| {
            let (gate, keeps) = (held.clone(), keeps.clone());
            async move {
                let defer = defer_of(&request);
                *keeps.lock().expect("no panic") = Some(defer.clone());
                let body = Script::new().data("a").then(move || {
                    // Dropped at once: nobody waits for it.
                    drop(defer.emit(Paid { id: 1 }));
                    drop(defer.emit(Emit::new(Paid { id: 2 }).when(When::failure())));
                });
                respond(200, body.wait(&gate).data("b"))
            }
        }));
        let mut client = setting.connect(&server).await;
        let response = client.head_of("/").await;
        let conn = look_into(&file.path());
        eventually("it is recorded while the body is open", || {
            count(&conn, EVENTS) == 1
        })
        .await;
        let collected = || layer.get_executor().snapshot().collected == 1;
        eventually("its delivery waits", collected).await;
        assert_eq!(book.runs().len(), 0);
        gate.open();
        read(response).await.expect("a body");
        book.awaits("books", 1).await;

        // A clone that outlives the response.
        let clone = kept.lock().expect("no panic").clone().expect("kept");
        eventually("the response is out", || clone.response().is_some()).await;
        clone
            .emit(Paid { id: 3 })
            .recorded()
            .await
            .expect("recorded");
        assert_eq!(count(&conn, EVENTS), 2);
        book.awaits("books", 2).await;
        let skipped = clone.emit(Emit::new(Paid { id: 4 }).when(When::failure()));
        assert!(skipped.is_accepted());
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.ids("books"), [1, 3]);
        assert_eq!(book.of("books")[1].status, Some(200));
        let refused = clone.emit(Emit::new(Paid { id: 5 }).when(When::failure()));
        // Waiting for it asks for it, unless its condition has been asked before.
        let refused = soon("an answer", refused.recorded()).await;
        assert!(refused.expect_err("not recorded").is_skipped());
        assert_eq!(count(&conn, EVENTS), 2);
    });
}

#[test]
fn case_37_outside_of_a_request_an_event_is_recorded_at_once() {
    once(|_| async move {
        let file = File::new("case-37-outside");
        let book = Book::new();
        let events = Events::new(book.clone())
            .on("books", listener())
            .store(file.open().await);
        events
            .emit(Paid { id: 1 })
            .recorded()
            .await
            .expect("recorded");
        let conn = look_into(&file.path());
        assert_eq!(count(&conn, EVENTS), 1);
        book.awaits("books", 1).await;
        drop(events.emit(Paid { id: 2 }));
        book.awaits("books", 2).await;
        assert_eq!(count(&conn, EVENTS), 2);
    });
}
