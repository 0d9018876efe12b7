//! Attempts to break what events promise: runtimes that end at the worst moment, futures that nobody
//! polls, keys that come twice, executors that are small, user code that panics.
#![cfg(all(feature = "sqlite", feature = "hyper"))]
#![expect(
    clippy::disallowed_methods,
    reason = "servers, clients and deadlines of tests are no deferred work"
)]

mod support;

use std::time::Duration;

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use serde::{Deserialize, Serialize};
use tower::{Layer as _, ServiceExt as _};
use tower_defer::event::store::Memory;
use tower_defer::event::{Emit, Event, Events, Subscriber};
use tower_defer::{Defer, DeferLayer, Executor, Retry, Snapshot, Task, TaskError};

use support::events::{Act, Book, File, Paid, Tap, events, listener};
use support::{Flavor, Gate, eventually, soon};

fn law(snapshot: &Snapshot) {
    let ends = snapshot.completed
        + snapshot.discarded
        + snapshot.skipped
        + snapshot.cancelled
        + snapshot.kept;
    assert_eq!(snapshot.accepted, ends, "{snapshot:?}");
    let left = (snapshot.outstanding, snapshot.reserved);
    assert_eq!(left, (0, 0), "{snapshot:?}");
}

/// One that has begun, on a runtime that ends then.
fn left_running_by_a_runtime(book: &Book, tap: &Tap, executor: &Executor) -> Events<Book> {
    book.act("books", Act::Never);
    let events = events(book, &["books"])
        .store(tap.clone())
        .executor(executor);
    let first = Flavor::MultiThread(1).build();
    first.block_on(async {
        let recorded = events.emit(Paid { id: 1 }).recorded();
        soon("recorded", recorded).await.expect("recorded");
        book.awaits("books", 1).await;
    });
    drop(first);
    events
}

#[test]
fn a_drain_in_another_runtime_writes_down_what_the_first_one_left() {
    let (book, tap) = (Book::new(), Tap::new(Memory::new()));
    let executor = Executor::new();
    let events = left_running_by_a_runtime(&book, &tap, &executor);
    Flavor::CurrentThread.build().block_on(async {
        let report = executor.drain(Duration::from_secs(5)).await;
        assert!(!report.timed_out, "{report:?}");
        let counts = events.counts().await.expect("counts");
        assert_eq!((counts.queued, counts.running), (1, 0), "{counts:?}");
        law(&executor.snapshot());
    });
}

#[test]
fn idle_in_another_runtime_comes_to_an_end() {
    let (book, tap) = (Book::new(), Tap::new(Memory::new()));
    let executor = Executor::new();
    let events = left_running_by_a_runtime(&book, &tap, &executor);
    book.act("books", Act::Well);
    Flavor::CurrentThread.build().block_on(async {
        events.start();
        book.awaits("books", 2).await;
        soon("idle", executor.idle()).await;
        assert_eq!(events.counts().await.expect("counts").finished, 1);
        law(&executor.snapshot());
    });
}

#[test]
fn what_is_being_settled_when_a_runtime_ends_is_settled_in_the_next() {
    let (book, tap) = (Book::new(), Tap::new(Memory::new()));
    let gate = Gate::new();
    tap.hold_settles(&gate);
    let executor = Executor::new();
    let events = events(&book, &["books"])
        .store(tap.clone())
        .executor(&executor);
    let first = Flavor::MultiThread(1).build();
    first.block_on(async {
        let recorded = events.emit(Paid { id: 1 }).recorded();
        soon("recorded", recorded).await.expect("recorded");
        eventually("it is being settled", || tap.settles() == 1).await;
    });
    drop(first);
    gate.open();
    Flavor::CurrentThread.build().block_on(async {
        events.start();
        soon("finished", async {
            while events.counts().await.expect("counts").finished == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        soon("idle", executor.idle()).await;
        law(&executor.snapshot());
    });
}

/// A request to a service of ours, without a socket.
fn request(id: i64) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = format!("/{id}").parse().expect("a path");
    request
}

fn service(
    layer: &DeferLayer,
    emit: impl Fn(Defer, i64) + Clone + Send + 'static,
) -> impl tower::Service<
    Request<Full<Bytes>>,
    Response = Response<tower_defer::DeferBody<Full<Bytes>>>,
    Error = std::convert::Infallible,
    Future: Send,
> + Clone
+ Send
+ 'static {
    layer.layer(tower::service_fn(move |request: Request<Full<Bytes>>| {
        let emit = emit.clone();
        async move {
            let defer = Defer::from_extensions(request.extensions()).expect("the layer is there");
            let path = request.uri().path();
            emit(defer, path[1..].parse().expect("a number"));
            Ok(Response::new(Full::from("done")))
        }
    }))
}

/// There is room for one delivery, which never ends, until this is opened.
async fn no_room(book: &Book, events: &Events<Book>) -> Gate {
    let gate = Gate::new();
    book.act("books", Act::Wait(gate.clone()));
    let first = events.emit(Paid { id: 0 }).recorded();
    soon("recorded", first).await.expect("recorded");
    book.awaits("books", 1).await;
    book.act("books", Act::Well);
    gate
}

#[tokio::test]
async fn a_key_that_comes_again_does_not_start_the_first_ones_deliveries() {
    let book = Book::new();
    let recorded = events(&book, &["books"])
        .max_in_flight(1)
        .store(Memory::new());
    let layer = DeferLayer::new().events(recorded.clone());
    let service = service(&layer, |defer, id| {
        defer.emit(Emit::new(Paid { id }).key("the same"));
    });
    let gate = no_room(&book, &recorded).await;
    let first = service.clone().oneshot(request(1)).await.expect("answers");
    let again = service.clone().oneshot(request(2)).await.expect("answers");
    again.into_body().collect().await.expect("a body");
    gate.open();
    // Claimed: it waits for its response, and holds its place.
    eventually("it is claimed", || {
        layer.get_executor().snapshot().accepted == 2
    })
    .await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(book.count("books"), 1, "the first response is not out");
    first.into_body().collect().await.expect("a body");
    book.awaits("books", 2).await;
}

#[tokio::test]
async fn a_response_that_nobody_polls_any_longer_holds_up_no_other() {
    let book = Book::new();
    let tap = Tap::new(Memory::new());
    let recorded = events(&book, &["books"])
        .max_in_flight(1)
        .store(tap.clone());
    let layer = DeferLayer::new().events(recorded.clone());
    let service = service(&layer, |defer, id| {
        defer.emit(Paid { id });
    });
    let gate = no_room(&book, &recorded).await;
    let held = Gate::new();
    tap.hold(&held);
    let mut forgotten = Box::pin(service.clone().oneshot(request(1)));
    let before = tap.appends();
    let waits = async {
        while tap.appends() == before {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        _ = &mut forgotten => panic!("it is not recorded"),
        () = waits => {}
    }
    let open = Gate::new();
    open.open();
    tap.hold(&open);
    let second = service.clone().oneshot(request(2)).await.expect("answers");
    second.into_body().collect().await.expect("a body");
    held.open();
    gate.open();
    soon("the second's delivery", async {
        while !book.ids("books").contains(&2) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(forgotten);
    book.awaits("books", 3).await;
}

#[tokio::test]
async fn a_claim_under_way_leaves_room_for_tasks() {
    let book = Book::new();
    let tap = Tap::new(Memory::new());
    let executor = Executor::builder().capacity(8).build();
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(executor.reserve().await.expect("room"));
    }
    let events = events(&book, &["books"])
        .store(tap.clone())
        .executor(&executor);
    for id in 1..=20 {
        let recorded = events.emit(Paid { id }).recorded();
        soon("recorded", recorded).await.expect("recorded");
    }
    let gate = Gate::new();
    tap.hold_claims(&gate);
    let before = tap.claims();
    drop(held);
    eventually("a claim", || {
        tap.claims() > before + 1 || executor.snapshot().reserved >= 2
    })
    .await;
    let task = executor.submit(Task::once(async {}));
    assert!(task.is_accepted(), "{:?}", executor.snapshot());
    gate.open();
    book.awaits("books", 20).await;
    soon("idle", executor.idle()).await;
    law(&executor.snapshot());
}

#[test]
fn the_file_is_free_when_an_executor_with_threads_of_its_own_is_dropped() {
    let file = File::new("dedicated");
    let book = Book::new();
    Flavor::CurrentThread.build().block_on(async {
        for id in 1..=2 {
            let executor = Executor::builder().dedicated(1).build();
            let events = events(&book, &["books"])
                .store(file.open().await)
                .executor(&executor);
            let recorded = events.emit(Paid { id }).recorded();
            soon("recorded", recorded).await.expect("recorded");
            book.awaits("books", usize::try_from(id).expect("small"))
                .await;
        }
        drop(file.open().await);
    });
}

#[test]
fn odd_names_and_keys_come_back_as_they_went_in() {
    let names = [
        "\0",
        "a\0b",
        "a\0c",
        " ",
        "%",
        "'; DROP TABLE defer_events; --",
        "a/b",
        "\u{1f4a5}",
        "\n",
        "A",
        "\u{e9}",
        "e\u{301}",
    ];
    let long = "x".repeat(100_000);
    let file = File::new("names");
    let book = Book::new();
    Flavor::MultiThread(1).build().block_on(async {
        let executor = Executor::builder().capacity(2).concurrency(1).build();
        let mut events = events(&book, &names)
            .on(&long, listener())
            .max_in_flight(1)
            .executor(&executor)
            .store(file.open().await);
        events = events.keep(tower_defer::event::store::Keep::everything());
        for key in ["", "\0", "\0\0", "a\0b", "a\0c", &long] {
            let emit = Emit::new(Paid { id: 1 }).key(key);
            soon("recorded", events.emit(emit).recorded())
                .await
                .expect("recorded");
        }
        for name in names.iter().copied().chain([&*long]) {
            book.awaits(name, 6).await;
        }
        soon("idle", executor.idle()).await;
        let counts = events.counts().await.expect("counts");
        assert_eq!(counts.finished, 6 * 13, "{counts:?}");
        law(&executor.snapshot());
    });
}

/// What the user's code can do wrong, one by one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Wrong {
    Decode,
    CloneState,
    Call,
    Poll,
    DropFuture,
    DropEvent,
    ShowError,
    DropError,
    Nothing,
}

const WRONGS: [Wrong; 9] = [
    Wrong::Decode,
    Wrong::CloneState,
    Wrong::Call,
    Wrong::Poll,
    Wrong::DropFuture,
    Wrong::DropEvent,
    Wrong::ShowError,
    Wrong::DropError,
    Wrong::Nothing,
];

#[derive(Clone, Debug, Serialize)]
struct Trap {
    wrong: Wrong,
    number: u32,
    #[serde(skip)]
    armed: bool,
}

impl<'de> Deserialize<'de> for Trap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Plain {
            wrong: Wrong,
            number: u32,
        }
        let Plain { wrong, number } = Plain::deserialize(deserializer)?;
        assert_ne!(wrong, Wrong::Decode, "while it is decoded");
        NEXT_CLONE_PANICS.set(wrong == Wrong::CloneState);
        Ok(Self {
            wrong,
            number,
            armed: wrong == Wrong::DropEvent,
        })
    }
}

impl Event for Trap {
    const NAME: &'static str = "trap";
}

impl Drop for Trap {
    fn drop(&mut self) {
        assert!(
            !self.armed || std::thread::panicking(),
            "in the event's drop"
        );
    }
}

thread_local! {
    static NEXT_CLONE_PANICS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[derive(Debug)]
struct Touchy(Wrong);

impl std::fmt::Display for Touchy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        assert_ne!(self.0, Wrong::ShowError, "in its display");
        f.write_str("touchy")
    }
}

impl std::error::Error for Touchy {}

impl Drop for Touchy {
    fn drop(&mut self) {
        assert!(
            self.0 != Wrong::DropError || std::thread::panicking(),
            "in its drop"
        );
    }
}

#[derive(Default, Debug)]
struct State(Arc<AtomicUsize>);

/// Its clone panics where the event that was decoded last on this thread says so.
impl Clone for State {
    fn clone(&self) -> Self {
        assert!(!NEXT_CLONE_PANICS.replace(false), "in the state's clone");
        Self(self.0.clone())
    }
}

struct DropsBadly;

impl Drop for DropsBadly {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "in the future's drop");
    }
}

async fn trapped(state: State, event: Trap) -> Result<(), TaskError> {
    let wrong = event.wrong;
    match wrong {
        Wrong::Poll | Wrong::Call => panic!("in its poll"),
        Wrong::DropFuture => {
            let _held = DropsBadly;
            std::future::pending::<()>().await;
        }
        Wrong::ShowError | Wrong::DropError => return Err(TaskError::new(Touchy(wrong))),
        Wrong::Decode | Wrong::CloneState | Wrong::DropEvent | Wrong::Nothing => {}
    }
    drop(event);
    state.0.fetch_add(1, SeqCst);
    Ok(())
}

#[test]
fn no_panic_of_the_users_takes_anything_with_it() {
    for keep in [true, false] {
        let file = File::new("panics");
        let state = State::default();
        Flavor::MultiThread(1).build().block_on(async {
            let executor = Executor::builder().concurrency(2).build();
            let subscriber = Subscriber::new(trapped)
                .timeout(Duration::from_millis(20))
                .retry(Retry::fixed(2, Duration::from_millis(1)));
            let mut events = Events::new(state.clone())
                .on("trapped", subscriber)
                .max_in_flight(3)
                .executor(&executor);
            if keep {
                events = events.store(file.open().await);
            }
            for number in 0..5 {
                for wrong in WRONGS {
                    let event = Trap {
                        wrong,
                        number,
                        armed: false,
                    };
                    let recorded = events.emit(event).recorded();
                    soon("recorded", recorded).await.expect("recorded");
                }
            }
            soon("idle", executor.idle()).await;
            if keep {
                soon("all ends", async {
                    loop {
                        let counts = events.counts().await.expect("counts");
                        if counts.finished + counts.discarded == 45 {
                            return;
                        }
                        tokio::task::yield_now().await;
                    }
                })
                .await;
            }
            assert!(state.0.load(SeqCst) >= 5);
            soon("idle", executor.idle()).await;
            law(&executor.snapshot());
            if keep {
                let counts = events.counts().await.expect("counts");
                assert_eq!(
                    counts.queued + counts.running + counts.retrying + counts.parked,
                    0
                );
            }
        });
    }
}

/// Emits the next from within the last.
#[derive(Clone, Default)]
struct Chain {
    events: Arc<OnceLock<Events<Chain>>>,
    seen: Arc<AtomicUsize>,
}

#[test]
fn chains_threads_and_small_numbers_lose_nothing() {
    for (flavor, window, concurrency, capacity) in [
        (Flavor::CurrentThread, 1, 1, 1),
        (Flavor::MultiThread(1), 1, 1, 2),
        (Flavor::MultiThread(2), 5, 2, 3),
        (Flavor::MultiThread(2), 256, 64, 16_384),
    ] {
        let chain = Chain::default();
        let file = File::new("chains");
        let runtime = flavor.build();
        runtime.block_on(async {
            let executor = Executor::builder()
                .concurrency(concurrency)
                .capacity(capacity)
                .build();
            let events = Events::new(chain.clone())
                .on("first", |chain: Chain, event: Paid| async move {
                    chain.seen.fetch_add(1, SeqCst);
                    if event.id > 0 {
                        let events = chain.events.get().expect("set");
                        let recorded = events.emit(Paid { id: event.id - 1 }).recorded();
                        recorded.await.expect("recorded");
                    }
                })
                .on("second", |chain: Chain, _: Paid| async move {
                    chain.seen.fetch_add(1, SeqCst);
                    tokio::task::yield_now().await;
                })
                .max_in_flight(window)
                .executor(&executor)
                .store(file.open().await);
            assert!(chain.events.set(events.clone()).is_ok());
            let layer = DeferLayer::new().executor(executor.clone());
            let layer = layer.events(events.clone());
            let service = service(&layer, |defer, id| {
                defer.emit(Paid { id });
                // Races the head and the release.
                tokio::task::spawn_blocking(move || defer.emit(Paid { id }));
            });
            let calls = (0..40).map(|_| {
                let service = service.clone();
                async move {
                    let response = service.oneshot(request(4)).await.expect("answers");
                    response.into_body().collect().await.expect("a body");
                }
            });
            soon("all are answered", futures_util::future::join_all(calls)).await;
            // Each is 5 events for two.
            let all = 40 * 2 * 5 * 2;
            let what = format!("{all} runs with {flavor:?} {window} {concurrency} {capacity}");
            eventually(&what, || chain.seen.load(SeqCst) >= all).await;
            soon("idle", executor.idle()).await;
            assert_eq!(chain.seen.load(SeqCst), all, "{what}");
            let counts = events.counts().await.expect("counts");
            assert_eq!(counts.finished, all as u64, "{counts:?}");
            law(&executor.snapshot());
        });
    }
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline_though_an_append_hangs() {
    let book = Book::new();
    let tap = Tap::new(Memory::new());
    let recorded = events(&book, &["books"]).store(tap.clone());
    let layer = DeferLayer::new().events(recorded.clone());
    let service = service(&layer, |defer, id| {
        defer.emit(Paid { id });
    });
    let gate = Gate::new();
    tap.hold(&gate);
    let call = tokio::spawn(service.oneshot(request(1)));
    eventually("it is recorded", || tap.appends() == 1).await;
    let report = soon("drained", layer.drain(Duration::from_millis(50))).await;
    assert!(report.timed_out, "{report:?}");
    gate.open();
    let answer = soon("answered", call).await.expect("no panic");
    assert_eq!(answer.expect("answers").status(), 200);
    eventually("idle", || layer.get_executor().snapshot().reserved == 0).await;
    law(&layer.get_executor().snapshot());
    let counts = recorded.counts().await.expect("counts");
    assert_eq!((counts.queued, counts.running), (1, 0), "{counts:?}");
}
