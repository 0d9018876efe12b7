//! Recovery from a bug: case 40, and what else is done with dead letters of a store.
#![cfg(all(feature = "sqlite", feature = "hyper"))]

mod support;

use std::time::Duration;

use tower_defer::event::Events;
use tower_defer::event::store::{Filter, Memory};
use tower_defer::{Executor, Retry};

use support::events::{
    Act, Book, File, Keep, Paid, Scratch, count, events, listener, look_into, once,
};
use support::{eventually, soon};

const LETTERS: usize = 1_000;
const DEAD: &str = "SELECT count(*) FROM defer_dead_letters";

/// Events on the file, that run on an executor of their own.
async fn on_file(file: &File, book: &Book) -> (Events<Book>, Executor) {
    let executor = Executor::new();
    let events = events(book, &["mail"])
        .store(file.open().await)
        .executor(&executor);
    events.start();
    (events, executor)
}

async fn dead_letters(file: &File, book: &Book) -> (Events<Book>, Executor) {
    let (events, executor) = on_file(file, book).await;
    book.act("mail", Act::Fatal("no such template"));
    for id in 1..=LETTERS {
        drop(events.emit(Paid { id: id as i64 }));
    }
    book.awaits("mail", LETTERS).await;
    soon("idle", executor.idle()).await;
    assert_eq!(
        events.counts().await.expect("counts").discarded,
        LETTERS as u64
    );
    (events, executor)
}

#[test]
fn case_40_a_replay_that_was_cut_short_goes_on_and_runs_nothing_twice() {
    // The bug is mended; or it is not, and what was replayed is a dead letter again.
    for mended in [true, false] {
        for restarted in [false, true] {
            once(|_| async move {
                let file = File::new("case-40");
                let book = Book::new();
                let (mut events, mut executor) = dead_letters(&file, &book).await;
                if mended {
                    book.act("mail", Act::Well);
                }
                {
                    let replay = events.dead_letters().replay("template", Filter::default());
                    let mut replay = std::pin::pin!(replay.per_second(1_000).run());
                    let forty_percent = eventually("two of five", || {
                        book.count("mail") >= LETTERS + LETTERS * 2 / 5
                    });
                    tokio::select! {
                        all = &mut replay => panic!("not cut short: {all:?}"),
                        () = forty_percent => {}
                    }
                }
                if restarted {
                    executor.drain(Duration::from_secs(10)).await;
                    drop(events);
                    (events, executor) = on_file(&file, &book).await;
                }
                soon("idle", executor.idle()).await;
                let conn = look_into(&file.path());
                let marked = "SELECT count(*) FROM defer_replays WHERE name = 'template'";
                let before = count(&conn, marked) as u64;
                assert!((400..1_000).contains(&before), "{before} of 1,000");

                let replay = || events.dead_letters().replay("template", Filter::default());
                let rest = replay().run().await.expect("replayed");
                assert_eq!(before + rest, LETTERS as u64);
                book.awaits("mail", 2 * LETTERS).await;
                soon("idle", executor.idle()).await;
                assert_eq!(
                    replay().run().await.expect("replayed"),
                    0,
                    "all of them had their turn"
                );
                soon("idle", executor.idle()).await;
                let twice: Vec<i64> = (1..=LETTERS as i64).flat_map(|id| [id, id]).collect();
                assert_eq!(book.ids("mail"), twice, "each once more, not twice");
                let dead = if mended { 0 } else { LETTERS as i64 };
                assert_eq!(count(&conn, DEAD), dead);
                // Under another name it is another replay.
                if !mended {
                    book.act("mail", Act::Well);
                    let again = events
                        .dead_letters()
                        .replay("template, again", Filter::default());
                    assert_eq!(again.run().await.expect("replayed"), LETTERS as u64);
                    book.awaits("mail", 3 * LETTERS).await;
                    soon("idle", executor.idle()).await;
                    assert_eq!(count(&conn, DEAD), 0);
                }
            });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn case_40_a_replay_keeps_to_its_rate() {
    for (rate, expected) in [(50, Duration::from_secs(2)), (4, Duration::from_secs(25))] {
        let book = Book::new();
        book.act("mail", Act::Fatal("no such template"));
        let executor = Executor::new();
        let events = events(&book, &["mail"])
            .store(Memory::new())
            .executor(&executor);
        for id in 0..100 {
            events.emit(Paid { id }).recorded().await.expect("recorded");
        }
        executor.idle().await;
        assert_eq!(events.counts().await.expect("counts").discarded, 100);
        book.act("mail", Act::Well);
        let clock = executor_clock();
        let replay = events.dead_letters().replay("slowly", Filter::default());
        assert_eq!(replay.per_second(rate).run().await.expect("replayed"), 100);
        let took = clock();
        assert!(took.abs_diff(expected) <= expected / 10, "{rate}: {took:?}");
        executor.idle().await;
        assert_eq!(book.count("mail"), 200);
    }
}

/// How long it has been, in paused time.
fn executor_clock() -> impl Fn() -> Duration {
    let sleep = tokio::time::sleep(Duration::ZERO); // paused time
    let began = sleep.deadline();
    move || {
        let now = tokio::time::sleep(Duration::ZERO); // paused time
        now.deadline() - began
    }
}

#[test]
fn dead_letters_are_grouped_replayed_and_discarded_by_what_they_have_in_common() {
    for keep in Keep::STORES {
        once(|_| async move {
            let scratch = Scratch::new("groups");
            let book = Book::new();
            book.act("mail", Act::Fatal("no such template: 17"));
            book.act("post", Act::Fail("the office is closed"));
            let executor = Executor::new();
            let events = Events::new(book.clone()).on("mail", listener()).on(
                "post",
                listener().retry(Retry::fixed(2, Duration::from_millis(1))),
            );
            let events = keep.give(events.executor(&executor), &scratch).await;
            for id in 0..10 {
                events.emit(Paid { id }).recorded().await.expect("recorded");
            }
            book.awaits("mail", 10).await;
            book.awaits("post", 20).await;
            soon("idle", executor.idle()).await;
            let letters = events.dead_letters();
            let mut groups = letters.group(&Filter::default(), 9).await.expect("groups");
            groups.sort_by(|a, b| a.subscriber.cmp(&b.subscriber));
            let summary: Vec<_> = groups.iter().map(|g| (&*g.subscriber, g.count)).collect();
            assert_eq!(summary, [("mail", 10), ("post", 10)]);
            assert_eq!(groups[0].example, "no such template: 17");

            let of = |name: &str| Filter {
                subscriber: Some(name.into()),
                ..Filter::default()
            };
            let first = letters.list(&of("mail"), None, 4).await.expect("a page");
            let next = letters
                .list(&of("mail"), first.last().map(|l| l.cursor()), 100)
                .await;
            assert_eq!((first.len(), next.expect("a page").len()), (4, 6));

            book.act("mail", Act::Well);
            let group = Filter {
                error_group: Some(groups[0].error_group.clone()),
                ..Filter::default()
            };
            assert_eq!(
                letters.replay("mail", group).run().await.expect("replayed"),
                10
            );
            book.awaits("mail", 20).await;
            soon("idle", executor.idle()).await;
            assert_eq!(book.count("post"), 20, "the others are left alone");
            assert_eq!(letters.discard(&of("post")).await.expect("discarded"), 10);
            let counts = events.counts().await.expect("counts");
            assert_eq!((counts.discarded, counts.finished), (0, 20), "{counts:?}");
            assert_eq!(letters.discard(&of("post")).await.expect("none left"), 0);
        });
    }
}

#[test]
fn a_dead_letter_that_cannot_be_read_does_not_stop_a_replay_or_a_discard() {
    for discards in [false, true] {
        once(|_| async move {
            let file = File::new("damaged-letter");
            let book = Book::new();
            book.act("mail", Act::Fatal("no such template"));
            let (events, executor) = on_file(&file, &book).await;
            for id in 1..=30 {
                events.emit(Paid { id }).recorded().await.expect("recorded");
            }
            book.awaits("mail", 30).await;
            soon("idle", executor.idle()).await;
            book.act("mail", Act::Well);
            let conn = look_into(&file.path());
            conn.execute_batch("UPDATE defer_dead_letters SET attempt = 'many' WHERE event < 3")
                .expect("damaged");
            let letters = events.dead_letters();
            if discards {
                assert_eq!(
                    letters
                        .discard(&Filter::default())
                        .await
                        .expect("discarded"),
                    28
                );
            } else {
                // One at a time: a page of nothing but what cannot be read.
                let replay = letters.replay("mended", Filter::default()).per_second(9);
                tokio::select! {
                    replayed = replay.run() => assert_eq!(replayed.expect("replayed"), 28),
                    () = book.awaits("mail", 31) => {}
                }
            }
            assert!(count(&conn, DEAD) >= 2, "nothing is deleted");
        });
    }
}
