//! Deliveries: cases 35 and 36, and what a subscriber can rely on.
#![cfg(all(feature = "sqlite", feature = "hyper"))]

mod support;

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tower_defer::event::store::{Filter, Memory, State};
use tower_defer::event::{DeliveryContext, Event, Events, Subscriber};
use tower_defer::{DeferLayer, Executor, Retry, Task, TaskError};

use support::events::{
    Act, Book, EVENTS, File, Keep, Paid, Scratch, Tap, answer, both, count, defer_of, events,
    id_of, listener, look_into, once,
};
use support::{Gate, app, eventually, soon};

#[test]
fn case_35_a_subscriber_that_fails_for_ever_is_invisible_to_the_others() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("case-35");
            let book = Book::new();
            book.act("second", Act::Fail("down"));
            let events = keep
                .give(events(&book, &["first", "second", "third"]), &scratch)
                .await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                assert!(defer_of(&request).emit(Paid { id: 7 }).is_accepted());
                answer(201)
            }));
            assert_eq!(
                setting.connect(&server).await.get("/").await.head.status,
                201
            );
            book.awaits("second", 3).await;
            let executor = layer.get_executor();
            soon("idle", executor.idle()).await;
            eventually("the end of all three", || book.runs().len() == 5).await;

            let attempts =
                |name: &str| -> Vec<u32> { book.of(name).iter().map(|run| run.attempt).collect() };
            assert_eq!(attempts("first"), [1], "{keep:?}");
            assert_eq!(attempts("second"), [1, 2, 3], "{keep:?}");
            assert_eq!(attempts("third"), [1], "{keep:?}");
            assert_eq!(book.of("second")[2].last_error.as_deref(), Some("down"));

            book.act("second", Act::Well);
            let everything = Filter::default();
            if keep == Keep::Nowhere {
                let letters = executor.dead_letters();
                let names: Vec<_> = letters.list().iter().map(|l| l.name.clone()).collect();
                assert_eq!(names, ["second"]);
                assert_eq!(letters.replay_where(|_| true).await, 1);
            } else {
                let letters = events.dead_letters();
                let dead = letters.list(&everything, None, 10).await.expect("a list");
                let names: Vec<_> = dead.iter().map(|letter| &*letter.subscriber).collect();
                assert_eq!(names, ["second"]);
                assert_eq!(dead[0].attempt, 3);
                assert_eq!(dead[0].reason.as_deref(), Some("attempts"));
                assert_eq!(dead[0].error.as_deref(), Some("down"));
                let replay = letters.replay("repaired", everything);
                assert_eq!(replay.run().await.expect("replayed"), 1);
            }
            book.awaits("second", 4).await;
            soon("idle", executor.idle()).await;
            // Begins anew, as the same delivery, and nobody else hears of it.
            assert_eq!(attempts("second"), [1, 2, 3, 1], "{keep:?}");
            let deliveries: Vec<_> = book.of("second").into_iter().map(|r| r.delivery).collect();
            assert!(
                deliveries.iter().all(|it| *it == deliveries[0]),
                "{deliveries:?}"
            );
            assert_eq!((book.count("first"), book.count("third")), (1, 1));
            if keep != Keep::Nowhere {
                let counts = events.counts().await.expect("counts");
                assert_eq!((counts.finished, counts.discarded), (3, 0), "{counts:?}");
                assert_eq!(counts.queued + counts.running + counts.retrying, 0);
            }
        });
    }
}

#[test]
fn case_35_they_run_in_parallel() {
    for keep in Keep::ALL {
        once(|setting| async move {
            let scratch = Scratch::new("case-35-parallel");
            let book = Book::new();
            let gate = Gate::new();
            book.act("first", Act::Wait(gate.clone()));
            let events = keep
                .give(events(&book, &["first", "second"]), &scratch)
                .await;
            let layer = DeferLayer::new().events(events);
            let server = setting.serve(app(&layer, |request| async move {
                defer_of(&request).emit(Paid { id: 1 });
                answer(200)
            }));
            setting.connect(&server).await.get("/").await;
            book.awaits("first", 1).await;
            book.awaits("second", 1).await;
            gate.open();
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(layer.get_executor().snapshot().completed, 2);
        });
    }
}

#[test]
fn case_35_a_panicking_subscriber_is_a_dead_letter_and_nobody_elses_affair() {
    for keep in Keep::STORES {
        once(|setting| async move {
            let scratch = Scratch::new("case-35-panic");
            let book = Book::new();
            book.act("second", Act::Panic);
            let events = keep
                .give(events(&book, &["first", "second", "third"]), &scratch)
                .await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                defer_of(&request).emit(Paid { id: 1 });
                answer(200)
            }));
            setting.connect(&server).await.get("/").await;
            book.awaits("third", 1).await;
            book.awaits("first", 1).await;
            soon("idle", layer.get_executor().idle()).await;
            let letters = events.dead_letters();
            let dead = letters
                .list(&Filter::default(), None, 9)
                .await
                .expect("a list");
            assert_eq!(dead.len(), 1);
            assert_eq!(dead[0].reason.as_deref(), Some("panicked"));
            assert_eq!(dead[0].attempt, 1, "a panic is not tried again");
        });
    }
}

/// One process, without requests: what the file has is delivered by these events.
async fn reopened(file: &File, events: Events<Book>) -> (Events<Book>, Executor) {
    let executor = Executor::new();
    let events = events.store(file.open().await).executor(&executor);
    events.start();
    (events, executor)
}

async fn shut(events: Events<Book>, executor: Executor) {
    let report = executor.drain(Duration::from_secs(10)).await;
    assert!(!report.timed_out, "{report:?}");
    drop(events);
}

#[test]
fn case_36_a_subscriber_is_removed_while_deliveries_wait_and_comes_back() {
    once(|setting| async move {
        let file = File::new("case-36");
        let book = Book::new();
        book.act("leaves", Act::Later(Duration::from_millis(1)));
        {
            // It is asked in vain until the process ends.
            let events = Events::new(book.clone())
                .on("stays", listener())
                .on(
                    "leaves",
                    listener().retry(Retry::fixed(1_000_000, Duration::from_millis(1))),
                )
                .store(file.open().await);
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                defer_of(&request).emit(Paid {
                    id: id_of(&request),
                });
                answer(200)
            }));
            let mut client = setting.connect(&server).await;
            for id in 1..=3 {
                client.get(&format!("/{id}")).await;
            }
            book.awaits("stays", 3).await;
            book.awaits("leaves", 3).await;
            layer.drain(Duration::from_secs(10)).await;
        }
        let attempts = attempts_in(&file, "leaves");

        let (events, executor) = reopened(&file, self::events(&book, &["stays"])).await;
        let all = Filter::default();
        let parked = soon("three parked", async {
            loop {
                let parked = events.dead_letters().parked(&all, None, 10).await;
                let parked = parked.expect("a list");
                if parked.len() == 3 {
                    return parked;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
        for parked in &parked {
            assert_eq!(&*parked.subscriber, "leaves");
            assert_eq!(parked.reason.as_deref(), Some("unknown_subscriber"));
            assert_eq!(parked.state, State::Parked);
        }
        let counts = events.counts().await.expect("counts");
        assert_eq!((counts.parked, counts.discarded), (3, 0));
        shut(events, executor).await;
        assert_eq!(
            attempts_in(&file, "leaves"),
            attempts,
            "parking consumes nothing"
        );
        let before = book.count("leaves");

        book.act("leaves", Act::Well);
        let (events, executor) = reopened(&file, self::events(&book, &["stays", "leaves"])).await;
        book.awaits("leaves", before + 3).await;
        soon("idle", executor.idle()).await;
        let counts = events.counts().await.expect("counts");
        assert_eq!((counts.parked, counts.finished), (0, 6), "{counts:?}");
        assert_eq!(book.ids("stays"), [1, 2, 3]);
        shut(events, executor).await;
    });
}

fn attempts_in(file: &File, subscriber: &str) -> Vec<i64> {
    let conn = look_into(&file.path());
    let mut rows = conn
        .prepare("SELECT attempt FROM defer_deliveries WHERE subscriber = ?1 ORDER BY event")
        .expect("a query");
    let found = rows
        .query_map([subscriber], |row| row.get(0))
        .expect("rows");
    found.collect::<Result<_, _>>().expect("numbers")
}

#[test]
fn case_36_a_renamed_subscriber_keeps_its_deliveries_by_an_alias() {
    once(|_| async move {
        let file = File::new("case-36-alias");
        let book = Book::new();
        let (first, executor) = reopened(&file, self::events(&book, &["mailing-list"])).await;
        // Recorded and never started.
        executor.drain(Duration::from_secs(10)).await;
        first
            .emit(Paid { id: 4 })
            .recorded()
            .await
            .expect("recorded");
        drop((first, executor));

        let renamed = Events::new(book.clone()).on("newsletter", listener().alias("mailing-list"));
        let (events, executor) = reopened(&file, renamed).await;
        book.awaits("newsletter", 1).await;
        soon("idle", executor.idle()).await;
        let run = &book.of("newsletter")[0];
        assert_eq!((run.id, run.attempt), (4, 1));
        assert!(run.delivery.ends_with("/mailing-list"), "{run:?}");
        assert_eq!(events.counts().await.expect("counts").finished, 1);
        shut(events, executor).await;
    });
}

/// What [`Paid`] was called when it was younger.
#[derive(Clone, Serialize, Deserialize)]
struct Payed {
    id: i64,
}

impl Event for Payed {
    const NAME: &'static str = "order.payed";
}

#[derive(Clone, Serialize, Deserialize)]
struct Corrected {
    id: i64,
}

impl Event for Corrected {
    const NAME: &'static str = "order.corrected";
    const ALIASES: &'static [&'static str] = &["order.payed"];
}

#[test]
fn case_36_a_renamed_event_is_delivered_under_its_old_name() {
    once(|_| async move {
        let file = File::new("case-36-event");
        let book = Book::new();
        let old = Events::new(book.clone()).on("audit", |book: Book, event: Payed| async move {
            let _ = (book, event);
        });
        let (old, executor) = reopened(&file, old).await;
        executor.drain(Duration::from_secs(10)).await;
        old.emit(Payed { id: 9 })
            .recorded()
            .await
            .expect("recorded");
        drop((old, executor));

        // Without the alias it is not forgotten.
        let unaware = self::events(&book, &["audit"]);
        let (unaware, executor) = reopened(&file, unaware).await;
        let parked = until_parked(&unaware, 1).await;
        assert_eq!(parked[0].reason.as_deref(), Some("unknown_event"));
        shut(unaware, executor).await;

        let corrected = Events::new(book.clone()).on(
            "audit",
            Subscriber::with_context(
                |book: Book, event: Corrected, delivery: DeliveryContext| async move {
                    assert_eq!(delivery.subscriber(), "audit");
                    book.act(&format!("heard {}", event.id), Act::Well);
                    book.note(event.id, &delivery);
                },
            ),
        );
        let (events, executor) = reopened(&file, corrected).await;
        book.awaits("audit", 1).await;
        assert_eq!(book.ids("audit"), [9]);
        soon("idle", executor.idle()).await;
        assert_eq!(events.counts().await.expect("counts").parked, 0);
        shut(events, executor).await;
    });
}

/// What is parked for code that nobody will bring back goes, when somebody says so.
#[test]
fn what_is_parked_can_be_discarded_and_is_not_begun_again() {
    once(|_| async move {
        let file = File::new("parked-discarded");
        let book = Book::new();
        let (old, executor) = reopened(&file, self::events(&book, &["books", "audit"])).await;
        executor.drain(Duration::from_secs(10)).await;
        for id in 1..=3 {
            old.emit(Paid { id }).recorded().await.expect("recorded");
        }
        drop((old, executor));

        let (without, executor) = reopened(&file, self::events(&book, &["books"])).await;
        assert_eq!(until_parked(&without, 3).await.len(), 3);
        book.awaits("books", 3).await;
        soon("idle", executor.idle()).await;
        let letters = without.dead_letters();
        let of = |name: &str| Filter {
            subscriber: Some(name.into()),
            ..Filter::default()
        };
        assert_eq!(letters.discard_parked(&of("books")).await.expect("none"), 0);
        assert_eq!(letters.discard(&of("audit")).await.expect("none"), 0);
        assert_eq!(letters.discard_parked(&of("audit")).await.expect("all"), 3);
        let counts = without.counts().await.expect("counts");
        assert_eq!((counts.parked, counts.finished), (0, 6), "{counts:?}");
        drop(letters);
        shut(without, executor).await;

        // The code came back all the same, too late.
        let (back, executor) = reopened(&file, self::events(&book, &["books", "audit"])).await;
        back.emit(Paid { id: 4 })
            .recorded()
            .await
            .expect("recorded");
        book.awaits("audit", 1).await;
        soon("idle", executor.idle()).await;
        assert_eq!(book.ids("audit"), [4]);
        shut(back, executor).await;
    });
}

async fn until_parked(
    events: &Events<Book>,
    count: usize,
) -> Vec<tower_defer::event::store::Listed> {
    soon("what is parked", async {
        let (letters, all) = (events.dead_letters(), Filter::default());
        loop {
            let parked = letters.parked(&all, None, 10_000).await.expect("a list");
            if parked.len() == count {
                return parked;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

/// [`Paid`] in a version that says more.
#[derive(Clone, Serialize, Deserialize)]
struct PaidInFull {
    id: i64,
    currency: String,
}

impl Event for PaidInFull {
    const NAME: &'static str = "order.paid";
}

#[test]
fn case_36_what_does_not_decode_is_parked_and_runs_when_the_code_is_back() {
    once(|setting| async move {
        let file = File::new("case-36-unreadable");
        let book = Book::new();
        let (old, executor) = reopened(&file, self::events(&book, &["books"])).await;
        executor.drain(Duration::from_secs(10)).await;
        for id in 1..=2 {
            old.emit(Paid { id }).recorded().await.expect("recorded");
        }
        drop((old, executor));

        let newer = Events::new(book.clone()).on(
            "books",
            Subscriber::with_context(
                |book: Book, event: PaidInFull, delivery: DeliveryContext| async move {
                    book.note(event.id, &delivery);
                    drop(event.currency);
                    Ok::<_, TaskError>(())
                },
            ),
        );
        let (newer, executor) = reopened(&file, newer).await;
        let parked = until_parked(&newer, 2).await;
        for parked in &parked {
            assert_eq!(parked.reason.as_deref(), Some("unreadable"));
            assert_eq!(parked.attempt, 0, "nothing was attempted");
            let error = parked.error.as_deref().unwrap_or_default();
            assert!(error.contains("currency"), "{error}");
        }
        soon("idle", executor.idle()).await;
        let snapshot = executor.snapshot();
        assert_eq!(snapshot.accepted, snapshot.kept, "{snapshot:?}");
        assert_eq!(newer.counts().await.expect("counts").discarded, 0);
        shut(newer, executor).await;
        assert_eq!(book.count("books"), 0);

        // Also with a layer, and nobody's request: it begins when it is applied.
        let back = self::events(&book, &["books"]).store(file.open().await);
        let layer = DeferLayer::new().events(back);
        let _server = setting.serve(app(&layer, |_| async move { answer(200) }));
        book.awaits("books", 2).await;
        assert_eq!(book.ids("books"), [1, 2]);
        assert!(book.of("books").iter().all(|run| run.attempt == 1));
        soon("idle", layer.get_executor().idle()).await;
    });
}

#[test]
fn case_36_a_new_subscriber_is_given_the_past() {
    for keep in Keep::STORES {
        once(|_| async move {
            let scratch = Scratch::new("case-36-past");
            let book = Book::new();
            let tap = match keep {
                Keep::Memory => Tap::new(Memory::new()),
                _ => Tap::new(support::events::open(&scratch.path("events.db")).await),
            };
            let executor = Executor::new();
            let old = events(&book, &["books"])
                .store(tap.clone())
                .executor(&executor);
            for id in 1..=3 {
                old.emit(Paid { id }).recorded().await.expect("recorded");
            }
            book.awaits("books", 3).await;
            soon("idle", executor.idle()).await;

            drop(old);

            // The line that emits is the same; a line is added where the application is put together.
            let new = events(&book, &["books", "stock"])
                .store(tap.clone())
                .executor(&executor);
            new.emit(Paid { id: 4 }).recorded().await.expect("recorded");
            book.awaits("stock", 1).await;
            assert_eq!(book.ids("stock"), [4], "the past is given on request only");
            let added = new.add_past("stock", SystemTime::UNIX_EPOCH).await;
            assert_eq!(added.expect("added"), 3);
            book.awaits("stock", 4).await;
            let again = new.add_past("stock", SystemTime::UNIX_EPOCH).await;
            assert_eq!(again.expect("walked"), 0);
            let none = new.add_past(
                "stock",
                SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40),
            );
            assert_eq!(none.await.expect("walked"), 0);
            assert!(
                new.add_past("nobody", SystemTime::UNIX_EPOCH)
                    .await
                    .is_err()
            );
            soon("idle", executor.idle()).await;
            assert_eq!(book.ids("stock"), [1, 2, 3, 4]);
            assert_eq!(book.count("books"), 4);
        });
    }
}

#[test]
fn case_36_the_handler_does_not_change_when_a_subscriber_does() {
    once(|setting| async move {
        let book = Book::new();
        let handler = |request: http::Request<hyper::body::Incoming>| async move {
            defer_of(&request).emit(Paid { id: 1 });
            answer(200)
        };
        for names in [&["one"][..], &["one", "two"], &["two"]] {
            let layer = DeferLayer::new().events(events(&book, names).store(Memory::new()));
            let server = setting.serve(app(&layer, handler));
            setting.connect(&server).await.get("/").await;
            soon("idle", layer.get_executor().idle()).await;
            eventually("the end", || {
                layer.get_executor().snapshot().outstanding == 0
            })
            .await;
        }
        assert_eq!((book.count("one"), book.count("two")), (2, 2));
    });
}

#[test]
fn a_delivery_is_the_same_over_attempts_and_restarts() {
    once(|_| async move {
        let file = File::new("identity");
        let book = Book::new();
        book.act("mail", Act::Fail("down"));
        let patient = || {
            let retry = Retry::fixed(1_000_000, Duration::from_millis(1));
            Events::new(book.clone()).on("mail", listener().retry(retry))
        };
        let (first, executor) = reopened(&file, patient()).await;
        first
            .emit(Paid { id: 1 })
            .recorded()
            .await
            .expect("recorded");
        book.awaits("mail", 3).await;
        shut(first, executor).await;
        let before = book.count("mail");
        book.act("mail", Act::Well);
        let (second, executor) = reopened(&file, patient()).await;
        book.awaits("mail", before + 1).await;
        soon("idle", executor.idle()).await;
        shut(second, executor).await;
        let runs = book.of("mail");
        assert!(
            runs.iter().all(|run| run.delivery == runs[0].delivery),
            "{runs:?}"
        );
        let attempts: Vec<_> = runs.iter().map(|run| run.attempt as usize).collect();
        assert_eq!(
            attempts,
            (1..=runs.len()).collect::<Vec<_>>(),
            "attempts go on"
        );
        assert_eq!(runs[before].last_error.as_deref(), Some("down"));
    });
}

#[test]
fn a_full_executor_delays_deliveries_and_the_courier_waits_for_room() {
    // On one thread: whoever waits by turning round in circles would keep everybody else out.
    support::on(
        support::Setting {
            http: support::Http::One,
            flavor: support::Flavor::CurrentThread,
        },
        |_| async move {
            let book = Book::new();
            let executor = Executor::builder().capacity(1).build();
            let gate = Gate::new();
            let held = gate.clone();
            executor.submit(Task::once(async move { held.passed().await }));
            let tap = Tap::new(Memory::new());
            let events = events(&book, &["mail"])
                .store(tap.clone())
                .executor(&executor);
            for id in 1..=3 {
                events.emit(Paid { id }).recorded().await.expect("recorded");
            }
            let counts = events.counts().await.expect("counts");
            assert_eq!(
                counts.queued, 3,
                "recorded, whatever the executor has room for"
            );
            gate.open();
            book.awaits("mail", 3).await;
            soon("idle", executor.idle()).await;
            assert_eq!(book.ids("mail"), [1, 2, 3]);
        },
    );
}

#[test]
fn the_courier_takes_no_room_while_nothing_is_due() {
    once(|_| async move {
        let book = Book::new();
        let executor = Executor::builder().capacity(1).build();
        let (tap, gate) = (Tap::new(Memory::new()), Gate::new());
        // A claim would keep the only place for as long as it likes.
        tap.hold_claims(&gate);
        let events = events(&book, &["mail"])
            .store(tap.clone())
            .executor(&executor);
        events.start();
        for _ in 0..100 {
            events.appended();
            tokio::task::yield_now().await;
            let task = executor.try_submit(Task::once(async {}));
            task.expect("there is room for a task");
            soon("idle", executor.idle()).await;
        }
        assert_eq!(tap.claims(), 0);
        gate.open();
    });
}

#[test]
fn the_file_says_what_happened_in_words() {
    once(|setting| async move {
        let file = File::new("words");
        let book = Book::new();
        let events = events(&book, &["mail"]).store(file.open().await);
        let layer = DeferLayer::new().events(events);
        let server = setting.serve(app(&layer, |request| async move {
            defer_of(&request).emit(Paid { id: 12 });
            answer(200)
        }));
        setting.connect(&server).await.get("/").await;
        book.awaits("mail", 1).await;
        soon("idle", layer.get_executor().idle()).await;
        let conn = look_into(&file.path());
        assert_eq!(count(&conn, EVENTS), 1);
        let row: (String, String, String, String) = conn
            .query_row(
                "SELECT e.name, e.payload, h.subscriber, h.outcome FROM defer_events e
                 JOIN defer_history h ON h.event = e.id",
                [],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
            )
            .expect("a row");
        let row = (
            row.0.as_str(),
            row.1.as_str(),
            row.2.as_str(),
            row.3.as_str(),
        );
        assert_eq!(row, ("order.paid", r#"{"id":12}"#, "mail", "completed"));
    });
}
