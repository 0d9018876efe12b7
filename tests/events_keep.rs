//! What a store hands out alone, for how long it keeps what is over, and from when a delivery's time
//! counts.
#![cfg(all(feature = "sqlite", feature = "hyper"))]

mod support;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tower_defer::event::store::{
    Filter, Keep, Memory, NewEvent, Sqlite, SqliteOptions, Start, State, Store,
};
use tower_defer::event::{Event, Events, Subscriber};
use tower_defer::{DeferLayer, Executor, Retry};

use support::events::{Scratch, open, open_with};
use support::{Gate, eventually, soon};

#[derive(Clone, Serialize, Deserialize)]
struct Counted(u32);

impl Event for Counted {
    const NAME: &'static str = "counted";
}

#[derive(Clone, Serialize, Deserialize)]
struct Poison;

impl Event for Poison {
    const NAME: &'static str = "poison";
}

type Said = Arc<Mutex<Vec<String>>>;

fn say(said: &Said, text: impl Into<String>) {
    said.lock().expect("no panic").push(text.into());
}

fn said(said: &Said) -> Vec<String> {
    said.lock().expect("no panic").clone()
}

/// The files that a process leaves which is killed now.
fn image(of: &Path, number: u32) -> PathBuf {
    let image = of.with_extension(format!("{number}.db"));
    for suffix in ["", "-wal"] {
        let name = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        std::fs::copy(name(of), name(&image)).expect("an image");
    }
    image
}

#[tokio::test]
async fn a_suspect_has_the_process_for_itself() {
    let scratch = Scratch::new("suspect");
    let mut file = scratch.path("events.db");
    // Recorded, and lent to a process that dies with it; and so does the next one.
    let store = open(&file).await;
    store
        .append(
            vec![NewEvent::new("poison", "null").deliver("poison", Start::At(0))],
            0,
        )
        .await
        .expect("appended");
    let mut stores = vec![store];
    for number in 0..2 {
        let claimed = stores[0].claim(10, 1).await.expect("claimed");
        assert_eq!(claimed.len(), 1);
        assert_eq!(claimed[0].crashes, number);
        file = image(&file, number);
        stores.insert(0, Sqlite::open(&file).expect("opens"));
    }
    let third = stores.remove(0);

    let order = Said::default();
    let gate = Gate::new();
    let executor = Executor::new();
    let events = Events::new((order.clone(), gate.clone()))
        .on(
            "poison",
            |(order, gate): (Said, Gate), _: Poison| async move {
                say(&order, "suspect begins");
                gate.passed().await;
                say(&order, "suspect ends");
            },
        )
        .on(
            "counts",
            |(order, _): (Said, Gate), event: Counted| async move {
                say(&order, format!("other {}", event.0));
            },
        )
        .executor(&executor)
        .store(third);
    events.start();
    eventually("the suspect", || said(&order) == ["suspect begins"]).await;
    // Recorded meanwhile, and lent to nobody.
    for number in 0..3 {
        let recorded = events.emit(Counted(number)).recorded();
        soon("recorded", recorded).await.expect("recorded");
    }
    let counts = events.counts().await.expect("counts");
    assert_eq!((counts.running, counts.queued), (1, 3), "{counts:?}");
    gate.open();
    eventually("the others", || said(&order).len() == 5).await;
    assert_eq!(said(&order)[1], "suspect ends", "{:?}", said(&order));
    soon("idle", executor.idle()).await;
    assert_eq!(events.counts().await.expect("counts").finished, 4);
    drop(stores);
}

#[tokio::test]
async fn finished_events_go_only_where_the_application_said_so() {
    let scratch = Scratch::new("keep");
    let file = scratch.path("events.db");
    for (keep, left) in [(Keep::everything(), 3), (Keep::everything().at_most(1), 1)] {
        let executor = Executor::new();
        let events = Events::new(())
            .on("counts", |(), _: Counted| async {})
            .executor(&executor)
            .keep(keep)
            .store(open(&file).await);
        if left == 3 {
            for number in 0..3 {
                let recorded = events.emit(Counted(number)).recorded();
                soon("recorded", recorded).await.expect("recorded");
            }
        }
        events.start();
        soon("idle", executor.idle()).await;
        let gone = async {
            loop {
                let counts = events.counts().await.expect("counts");
                if (counts.events, counts.pruned) == (left, 3 - left) {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        soon("what may go has gone", gone).await;
        executor.drain(support::DEADLINE).await;
    }
}

#[tokio::test]
async fn the_time_to_give_up_counts_from_the_first_attempt_over_restarts() {
    let scratch = Scratch::new("since");
    let file = scratch.path("events.db");
    let old = |executor: &Executor, store| {
        let patience = Duration::from_secs(3600);
        let fails = Subscriber::new(|(), _: Counted| async { Err::<(), _>("down") });
        Events::new(())
            .on(
                "counts",
                fails.retry(Retry::fixed(100, Duration::from_secs(60)).give_up_after(patience)),
            )
            .executor(executor)
            .store(store)
    };
    let executor = Executor::new();
    let events = old(&executor, Sqlite::open(&file).expect("opens"));
    let recorded = events.emit(Counted(1)).recorded();
    soon("recorded", recorded).await.expect("recorded");
    soon("idle", executor.idle()).await;
    assert_eq!(events.counts().await.expect("counts").retrying, 1);
    executor.drain(support::DEADLINE).await;
    drop(events);

    // An hour passes: in the file, which is where the time is kept.
    {
        let _free = open(&file).await;
        let shell = rusqlite::Connection::open(&file).expect("a shell");
        let aged = "UPDATE defer_deliveries SET due_ms = 0, since_ms = since_ms - 3600000";
        assert_eq!(shell.execute(aged, []).expect("aged"), 1);
    }
    let executor = Executor::new();
    let events = old(&executor, open(&file).await);
    events.start();
    let letters = events.dead_letters();
    let dies = async {
        loop {
            let dead = letters.list(&Filter::default(), None, 10).await;
            let dead = dead.expect("a list");
            if !dead.is_empty() {
                break dead;
            }
            tokio::task::yield_now().await;
        }
    };
    let dead = soon("its end", dies).await;
    assert_eq!(dead[0].reason.as_deref(), Some("gave_up"));
    assert_eq!((dead[0].attempt, dead[0].state), (2, State::Discarded));
}

#[tokio::test]
async fn health_recovers_though_nobody_records_anything() {
    let scratch = Scratch::new("probe");
    let file = scratch.path("events.db");
    let options = SqliteOptions::new(&file).lock_patience(Duration::ZERO);
    let events = Events::new(())
        .on("counts", |(), _: Counted| async {})
        .store(open_with(options).await);
    events.start();
    let shell = rusqlite::Connection::open(&file).expect("a shell");
    shell.execute_batch("BEGIN IMMEDIATE").expect("a lock");
    let recorded = events.emit(Counted(1)).recorded();
    let refused = soon("refused", recorded).await.expect_err("locked");
    assert!(
        refused.store_error().is_some_and(|e| e.is_locked()),
        "{refused}"
    );
    let trouble = || events.health().expect("a store").trouble;
    assert!(trouble().is_some());
    let emissions = events.emissions();
    assert_eq!((emissions.recorded, emissions.not_recorded), (0, 1));
    shell.execute_batch("ROLLBACK").expect("free");
    // A load balancer sends nothing to it now, so nothing is recorded.
    eventually("health", || trouble().is_none()).await;
}

#[tokio::test]
async fn events_that_were_started_before_their_layer_are_drained_with_it() {
    let (began, gate) = (Said::default(), Gate::new());
    let events = Events::new((began.clone(), gate.clone()))
        .on(
            "counts",
            |(began, gate): (Said, Gate), _: Counted| async move {
                say(&began, "begun");
                gate.passed().await;
            },
        )
        .store(Memory::new());
    // On an executor of their own: nobody has said which.
    events.start();
    let layer = DeferLayer::new().events(events.clone());
    let recorded = events.emit(Counted(1)).recorded();
    soon("recorded", recorded).await.expect("recorded");
    eventually("it runs", || !said(&began).is_empty()).await;
    let (report, ()) = tokio::join!(layer.drain(support::DEADLINE), async { gate.open() });
    assert_eq!((report.completed, report.timed_out), (1, false), "{report}");
    let counts = events.counts().await.expect("counts");
    assert_eq!((counts.finished, counts.running), (1, 0), "{counts:?}");
}

#[test]
fn an_event_that_no_runtime_records_is_counted_and_its_emitter_told() {
    let events = Events::new(())
        .on("counts", |(), _: Counted| async {})
        .store(Memory::new());
    let emitted = events.emit(Counted(1));
    assert!(emitted.is_accepted());
    let emissions = events.emissions();
    assert_eq!((emissions.recorded, emissions.not_recorded), (0, 1));
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let told = runtime.expect("a runtime").block_on(emitted.recorded());
    assert!(told.is_err(), "{told:?}");
}
