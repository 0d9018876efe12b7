//! Drains, restarts, faults of the store and runtimes that end: nothing is lost, and nothing is counted
//! twice.
#![cfg(all(feature = "sqlite", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "servers, clients and deadlines of tests are no deferred work"
)]

mod support;

use std::time::{Duration, SystemTime};

use tower_defer::event::store::{
    AttemptToken, EventId, Memory, NewEvent, Settle, Settled, Start, Store,
};
use tower_defer::event::{Emit, Events, Unheard};
use tower_defer::{DeferLayer, Executor, Retry, Snapshot, When};

use support::events::{
    Act, Book, EVENTS, File, Keep, Paid, Scratch, Sent, Tap, answer, both, count, defer_of, events,
    id_of, listener, look_into, once, open, sent_listener,
};
use support::{Flavor, Gate, app, eventually, soon};

fn law(snapshot: &Snapshot) {
    let ends = snapshot.completed
        + snapshot.discarded
        + snapshot.skipped
        + snapshot.cancelled
        + snapshot.kept;
    assert_eq!(snapshot.accepted, ends, "{snapshot:?}");
    assert_eq!(
        (snapshot.outstanding, snapshot.reserved),
        (0, 0),
        "{snapshot:?}"
    );
}

/// State, attempts and crash marks of what is unfinished.
fn unfinished(file: &File) -> Vec<(String, i64, i64)> {
    let conn = look_into(&file.path());
    let mut rows = conn
        .prepare("SELECT state, attempt, crashes FROM defer_deliveries ORDER BY event, subscriber")
        .expect("a query");
    let found = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    found
        .expect("rows")
        .collect::<Result<_, _>>()
        .expect("texts and numbers")
}

fn untouched(count: usize) -> Vec<(String, i64, i64)> {
    vec![("queued".to_owned(), 0, 0); count]
}

#[test]
fn a_drain_lets_running_attempts_end_and_keeps_the_rest_unconsumed() {
    both(|setting| async move {
        let file = File::new("drain");
        let book = Book::new();
        let gate = Gate::new();
        book.act("books", Act::Wait(gate.clone()));
        let executor = Executor::builder().concurrency(1).build();
        let recorded = events(&book, &["books"])
            .max_in_flight(4)
            .executor(&executor)
            .store(file.open().await);
        let layer = DeferLayer::new()
            .executor(executor.clone())
            .events(recorded.clone());
        let server = setting.serve(app(&layer, |request| async move {
            defer_of(&request).emit(Paid {
                id: id_of(&request),
            });
            answer(200)
        }));
        let mut client = setting.connect(&server).await;
        for id in 1..=10 {
            client.get(&format!("/{id}")).await;
        }
        book.awaits("books", 1).await;
        eventually("all responses are out", || {
            executor.snapshot().open_requests == 0
        })
        .await;
        let drained = executor.drain(Duration::from_secs(10));
        let (report, ()) = tokio::join!(drained, async {
            tokio::task::yield_now().await;
            gate.open();
        });
        assert!(!report.timed_out, "{report:?}");
        assert_eq!(
            (report.completed, report.kept, report.cancelled),
            (1, 3, 0),
            "{report:?}"
        );
        assert!(report.unfinished.is_empty(), "{report:?}");
        law(&executor.snapshot());
        assert_eq!(book.count("books"), 1, "no new attempt");
        assert_eq!(unfinished(&file), untouched(9));

        // Still recorded, and left to the next process.
        client.get("/11").await;
        assert_eq!(unfinished(&file), untouched(10));
        assert_eq!(executor.snapshot().rejected_closed, 0);
        drop((client, server, layer, recorded));

        book.act("books", Act::Well);
        let next = Executor::new();
        let events = events(&book, &["books"])
            .executor(&next)
            .store(file.open().await);
        events.start();
        book.awaits("books", 11).await;
        soon("idle", next.idle()).await;
        assert_eq!(book.ids("books"), (1..=11).collect::<Vec<_>>());
        assert!(book.of("books").iter().all(|run| run.attempt == 1));
        law(&next.snapshot());
    });
}

#[test]
fn what_a_drains_deadline_interrupts_is_kept_unconsumed() {
    for keep in Keep::STORES {
        once(|_| async move {
            let scratch = Scratch::new("deadline");
            let book = Book::new();
            book.act("books", Act::Never);
            let executor = Executor::builder().concurrency(2).build();
            let events = keep
                .give(events(&book, &["books"]).executor(&executor), &scratch)
                .await;
            for id in 1..=5 {
                events.emit(Paid { id }).recorded().await.expect("recorded");
            }
            book.awaits("books", 2).await;
            let report = executor.drain(Duration::ZERO).await;
            assert!(report.timed_out);
            assert_eq!(
                (report.kept, report.cancelled, report.discarded),
                (5, 0, 0),
                "{report:?}"
            );
            eventually("it is written down", || executor.snapshot().reserved == 0).await;
            law(&executor.snapshot());
            let counts = events.counts().await.expect("counts");
            assert_eq!((counts.queued, counts.running), (5, 0), "{counts:?}");
        });
    }
}

#[test]
fn a_store_that_cannot_settle_delays_and_loses_nothing() {
    for keep in Keep::STORES {
        both(|setting| async move {
            let scratch = Scratch::new("settle");
            let tap = match keep {
                Keep::Sqlite => Tap::new(open(&scratch.path("events.db")).await),
                _ => Tap::new(Memory::new()),
            };
            let book = Book::new();
            book.act("bad", Act::Fatal("no"));
            let events = events(&book, &["good", "bad"])
                .max_in_flight(2)
                .store(tap.clone());
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                defer_of(&request).emit(Paid {
                    id: id_of(&request),
                });
                answer(200)
            }));
            tap.fail_settles(3);
            tap.fail_claims(2);
            let mut client = setting.connect(&server).await;
            for id in 1..=3 {
                assert_eq!(client.get(&format!("/{id}")).await.head.status, 200);
            }
            book.awaits("good", 3).await;
            book.awaits("bad", 3).await;
            soon("idle", layer.get_executor().idle()).await;
            assert!(tap.settles() > 3 && tap.claims() > 2);
            assert_eq!(
                (book.ids("good"), book.ids("bad")),
                (vec![1, 2, 3], vec![1, 2, 3])
            );
            let counts = events.counts().await.expect("counts");
            assert_eq!((counts.finished, counts.discarded), (3, 3), "{counts:?}");
            assert_eq!(tap.settled().len(), 6, "each settled once");
            law(&layer.get_executor().snapshot());
        });
    }
}

#[test]
fn backoff_survives_a_restart_as_a_due_time() {
    once(|_| async move {
        let file = File::new("backoff");
        let book = Book::new();
        let hour = Duration::from_secs(3_600);
        book.act("books", Act::Later(hour));
        let patient = || {
            let retry = Retry::fixed(3, hour).give_up_after(hour * 24);
            Events::new(book.clone()).on("books", listener().retry(retry))
        };
        let due = |conn: &rusqlite::Connection| {
            count(
                conn,
                "SELECT coalesce(max(due_ms), 0) FROM defer_deliveries",
            )
        };
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now_ms = since.expect("after 1970").as_millis() as i64;
        let first = Executor::new();
        let recorded = patient().executor(&first).store(file.open().await);
        recorded
            .emit(Paid { id: 1 })
            .recorded()
            .await
            .expect("recorded");
        book.awaits("books", 1).await;
        soon("idle", first.idle()).await;
        let report = first.drain(Duration::from_secs(10)).await;
        assert!(
            !report.timed_out,
            "a drain does not wait for it, and gives it no last chance"
        );
        assert_eq!(book.count("books"), 1);
        drop(recorded);

        book.act("books", Act::Well);
        let second = Executor::new();
        let events = patient().executor(&second).store(file.open().await);
        events.start();
        let conn = look_into(&file.path());
        let stored = due(&conn);
        let late = stored - now_ms - 3_600_000;
        assert!((0..600_000).contains(&late), "{late} ms after the hour");
        assert_eq!(unfinished(&file), [("retrying".to_owned(), 1, 0)]);
        // Another delivery passes it by.
        events
            .emit(Paid { id: 2 })
            .recorded()
            .await
            .expect("recorded");
        book.awaits("books", 2).await;
        soon("idle", second.idle()).await;
        assert_eq!((due(&conn), book.ids("books")), (stored, vec![1, 2]));

        // The hour is over.
        conn.execute("UPDATE defer_deliveries SET due_ms = ?1", [now_ms])
            .expect("updated");
        events.appended();
        book.awaits("books", 3).await;
        soon("idle", second.idle()).await;
        let run = &book.of("books")[2];
        assert_eq!(
            (run.id, run.attempt, run.last_error.as_deref()),
            (1, 2, Some("later"))
        );
        assert_eq!(events.counts().await.expect("counts").finished, 2);
    });
}

#[test]
fn an_attempt_that_timed_out_is_settled_as_that_and_its_token_is_void() {
    for keep in Keep::STORES {
        once(|_| async move {
            let scratch = Scratch::new("timeout");
            let tap = match keep {
                Keep::Sqlite => Tap::new(open(&scratch.path("events.db")).await),
                _ => Tap::new(Memory::new()),
            };
            let book = Book::new();
            book.act("books", Act::Never);
            let retry = Retry::fixed(3, Duration::from_millis(1));
            let subscriber = listener().retry(retry).timeout(Duration::from_millis(200));
            let executor = Executor::new();
            let events = Events::new(book.clone())
                .on("books", subscriber)
                .executor(&executor)
                .store(tap.clone());
            events
                .emit(Paid { id: 1 })
                .recorded()
                .await
                .expect("recorded");
            book.awaits("books", 1).await;
            let gate = Gate::new();
            book.act("books", Act::Wait(gate.clone()));
            book.awaits("books", 2).await;
            // The first attempt's late finish.
            let token = AttemptToken::new(EventId::new(1), "books".into(), 1);
            let late = tap.settle(vec![(token, Settle::Complete)], 1).await;
            assert_eq!(late.expect("asked"), [Settled::Stale]);
            let counts = events.counts().await.expect("counts");
            assert_eq!(
                (counts.running, counts.finished),
                (1, 0),
                "the second goes on"
            );
            gate.open();
            soon("idle", executor.idle()).await;
            let second = &book.of("books")[1];
            assert_eq!(second.attempt, 2);
            let error = second.last_error.as_deref().unwrap_or_default();
            assert!(error.starts_with("timed out"), "{error}");
            assert_eq!(events.counts().await.expect("counts").finished, 1);
        });
    }
}

#[test]
fn every_delivery_is_in_exactly_one_state_when_it_is_quiet() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("law");
            let book = Book::new();
            book.act("fails", Act::Fail("again and again"));
            book.act("fatal", Act::Fatal("never"));
            book.act("panics", Act::Panic);
            let names = ["well", "fails", "fatal", "panics"];
            let events = events(&book, &names)
                .on("post", sent_listener())
                .max_in_flight(7);
            let events = keep.give(events, &scratch).await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                let defer = defer_of(&request);
                let id = id_of(&request);
                defer.emit(Emit::new(Paid { id }).key(format!("{}", id / 2)));
                defer.emit(Sent { id });
                defer.run(|| async {});
                defer.emit(Emit::new(Sent { id }).when(When::failure()));
                answer(if id % 5 == 0 { 500 } else { 200 })
            }));
            let mut client = setting.connect(&server).await;
            for id in 1..=20 {
                client.get(&format!("/{id}")).await;
            }
            eventually("all responses are out", || {
                layer.get_executor().snapshot().open_requests == 0
            })
            .await;
            book.awaits("post", 20).await;
            if keep == Keep::Nowhere {
                soon("idle", layer.get_executor().idle()).await;
                law(&layer.get_executor().snapshot());
                return;
            }
            let counts = soon("all of them ended", async {
                loop {
                    let counts = events.counts().await.expect("counts");
                    if counts.queued + counts.running + counts.retrying == 0 {
                        return counts;
                    }
                    tokio::task::yield_now().await;
                }
            })
            .await;
            soon("idle", layer.get_executor().idle()).await;
            let snapshot = layer.get_executor().snapshot();
            law(&snapshot);
            // 16 answers are good, and ten keys are among theirs.
            let paid = 10;
            assert_eq!(book.count("well"), paid);
            assert_eq!(book.count("fails"), 3 * paid);
            assert_eq!(book.count("post"), 20);
            assert_eq!(counts.finished, paid as u64 + 20, "{counts:?}");
            assert_eq!(counts.discarded, 3 * paid as u64, "{counts:?}");
            assert_eq!(counts.events, paid as u64 + 20);
            // The tasks beside them are completed, too, but for those of the failures.
            assert_eq!(snapshot.completed, paid as u64 + 20 + 16);
            assert_eq!((snapshot.discarded, snapshot.skipped), (3 * paid as u64, 4));
            assert_eq!(
                snapshot.kept,
                2 * paid as u64,
                "two retries of each that fails"
            );
        });
    }
}

#[test]
fn a_runtime_that_ends_in_the_middle_takes_no_attempt_with_it() {
    let file = File::new("runtime");
    let book = Book::new();
    book.act("books", Act::Never);
    let executor = Executor::builder().concurrency(2).build();
    let first = Flavor::MultiThread(2).build();
    let events = first.block_on(async {
        let events = events(&book, &["books"])
            .executor(&executor)
            .store(file.open().await);
        for id in 1..=5 {
            events.emit(Paid { id }).recorded().await.expect("recorded");
        }
        book.awaits("books", 2).await;
        events
    });
    drop(first);
    let running = book.count("books");
    book.act("books", Act::Well);
    // The same events, on another runtime.
    Flavor::CurrentThread.build().block_on(async {
        events.start();
        book.awaits("books", running + 5).await;
        soon("idle", executor.idle()).await;
        law(&executor.snapshot());
        let counts = events.counts().await.expect("counts");
        assert_eq!((counts.finished, counts.running), (5, 0), "{counts:?}");
        assert!(
            book.of("books").iter().all(|run| run.attempt == 1),
            "{:?}",
            book.runs()
        );
    });
}

/// Events on the file, and a delivery of each of these that is due.
async fn with_due(file: &File, book: &Book, ids: &[i64]) -> Events<Book> {
    let store = file.open().await;
    let due = |id: &i64| NewEvent::new("order.paid", format!("{{\"id\":{id}}}"));
    let due = ids.iter().map(|id| due(id).deliver("books", Start::At(1)));
    store.append(due.collect(), 1).await.expect("recorded");
    events(book, &["books"])
        .executor(&Executor::new())
        .store(store)
}

/// And on another runtime all of them are done.
fn done_on_another_runtime(events: &Events<Book>, book: &Book, ids: &[i64]) {
    book.act("books", Act::Well);
    Flavor::CurrentThread.build().block_on(async {
        events.start();
        soon("all of them", async {
            while events.counts().await.expect("counts").finished < ids.len() as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await; // the probe's pause
            }
        })
        .await;
        assert!(book.of("books").iter().all(|run| run.attempt == 1));
    });
}

#[test]
fn a_runtime_that_ends_during_a_claim_leaves_nothing_claimed() {
    let file = File::new("runtime-claim");
    let book = Book::new();
    let first = Flavor::MultiThread(2).build();
    let shell = look_into(&file.path());
    let events = first.block_on(async {
        let events = with_due(&file, &book, &[1, 2, 3]).await;
        shell.execute_batch("BEGIN IMMEDIATE").expect("locked");
        events.start();
        // It is in the writer's hands.
        eventually("a claim that waits", || {
            events.health().expect("a store").trouble.is_some()
        })
        .await;
        events
    });
    drop(first);
    shell.execute_batch("COMMIT").expect("free");
    done_on_another_runtime(&events, &book, &[1, 2, 3]);
}

#[test]
fn a_runtime_that_ends_before_a_suspect_has_started_leaves_it_to_the_next() {
    let file = File::new("runtime-suspect");
    let book = Book::new();
    book.act("books", Act::Never);
    let first = Flavor::MultiThread(2).build();
    let events = first.block_on(async {
        let events = with_due(&file, &book, &[1, 2, 3]).await;
        look_into(&file.path())
            .execute(
                "UPDATE defer_deliveries SET crashes = 2 WHERE event = 3",
                [],
            )
            .expect("a suspect");
        events.start();
        book.awaits("books", 2).await;
        // Claimed, it waits until the others are through.
        soon("the suspect", async {
            while events.counts().await.expect("counts").running < 3 {
                tokio::time::sleep(Duration::from_millis(1)).await; // the probe's pause
            }
        })
        .await;
        assert_eq!(book.count("books"), 2);
        events
    });
    drop(first);
    done_on_another_runtime(&events, &book, &[1, 2, 3]);
}

#[test]
fn a_runtime_that_ends_leaves_the_file_free_and_unmarked() {
    let file = File::new("runtime-file");
    let book = Book::new();
    book.act("books", Act::Never);
    let executor = Executor::builder().concurrency(2).build();
    let runtime = Flavor::MultiThread(2).build();
    let recorded = runtime.block_on(async {
        let events = events(&book, &["books"])
            .executor(&executor)
            .store(file.open().await);
        for id in 1..=5 {
            events.emit(Paid { id }).recorded().await.expect("recorded");
        }
        book.awaits("books", 2).await;
        events
    });
    drop(runtime);
    drop((recorded, executor));
    book.act("books", Act::Well);
    let before = book.count("books");
    once(|_| async move {
        let store = file.open().await;
        assert_eq!(unfinished(&file), untouched(5), "handed back in order");
        let executor = Executor::new();
        let events = events(&book, &["books"]).executor(&executor).store(store);
        events.start();
        book.awaits("books", before + 5).await;
        soon("idle", executor.idle()).await;
    });
}

#[test]
fn a_server_that_ends_leaves_its_open_responses_deliveries_to_the_next() {
    both(|setting| async move {
        let file = File::new("server");
        let book = Book::new();
        let recorded = events(&book, &["books"]).store(file.open().await);
        let layer = DeferLayer::new().events(recorded.clone());
        let server = setting.serve(app(&layer, |request| async move {
            defer_of(&request).emit(Paid { id: 1 });
            let body = support::body::Script::new().data("a").never();
            support::events::respond(200, body)
        }));
        let mut client = setting.connect(&server).await;
        let response = client.head_of("/").await;
        assert_eq!(layer.get_executor().snapshot().collected, 1);
        let report = layer.drain(Duration::ZERO).await;
        assert_eq!((report.kept, report.cancelled), (1, 0), "{report:?}");
        drop((response, client, server, layer, recorded));
        let store = file.open().await;
        assert_eq!(unfinished(&file), untouched(1));
        let executor = Executor::new();
        let events = events(&book, &["books"]).executor(&executor).store(store);
        events.start();
        book.awaits("books", 1).await;
        soon("idle", executor.idle()).await;
    });
}

#[test]
fn append_in_is_a_part_of_the_users_own_transaction() {
    once(|setting| async move {
        let file = File::new("append-in");
        let book = Book::new();
        let events = events(&book, &["books"])
            .unheard(Unheard::Error)
            .store(file.open().await);
        let layer = DeferLayer::new().events(events.clone());
        look_into(&file.path())
            .execute_batch("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
            .expect("a table of the user's");
        let (path, appends) = (file.path(), events.clone());
        let server = setting.serve(app(&layer, move |request| {
            let (path, events) = (path.clone(), appends.clone());
            async move {
                let id = id_of(&request);
                let mut conn = look_into(&path);
                let transaction = conn.transaction().expect("a transaction");
                transaction
                    .execute("INSERT INTO orders VALUES (?1)", [id])
                    .expect("inserted");
                events
                    .append_in(&transaction, Paid { id })
                    .expect("appended");
                let unheard = events.append_in(&transaction, Sent { id });
                assert!(unheard.is_err_and(|error| error.is_unheard()));
                if id % 2 == 0 {
                    return answer(500);
                }
                transaction.commit().expect("committed");
                events.appended();
                answer(201)
            }
        }));
        let mut client = setting.connect(&server).await;
        for id in 1..=4 {
            let status = client.get(&format!("/{id}")).await.head.status;
            assert_eq!(status, if id % 2 == 0 { 500 } else { 201 });
        }
        book.awaits("books", 2).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.ids("books"), [1, 3]);
        let conn = look_into(&file.path());
        assert_eq!(count(&conn, EVENTS), 2);
        assert_eq!(count(&conn, "SELECT sum(id) FROM orders"), 4);
        assert_eq!(events.counts().await.expect("counts").finished, 2);
    });
}
