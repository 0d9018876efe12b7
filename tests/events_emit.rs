//! What becomes of an emission: conditions, ends without an answer, keys, limits, refusals.
#![cfg(all(feature = "sqlite", feature = "hyper"))]

mod support;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize, Serializer};
use tower::Layer;
use tower_defer::event::store::Memory;
use tower_defer::event::{Emit, EmitError, Event, Events, Unheard};
use tower_defer::{Defer, DeferLayer, End, Executor, Overflow, RejectReason, Task, When};

use support::body::Script;
use support::events::{
    Book, Keep, Paid, Scratch, Sent, Tap, answer, both, defer_of, events, id_of, listener, once,
};
use support::{Gate, app, eventually, soon};

/// What the handler says when it emits an event under each condition.
fn emit_six(defer: &Defer) {
    defer.emit(Paid { id: 0 });
    let conditions = [
        When::success(),
        When::always(),
        When::failure(),
        When::new(|info| info.status.is_some_and(|status| status == 404)),
        When::new(|_| panic!("the condition's own panic")),
    ];
    for (id, when) in (1..).zip(conditions) {
        defer.emit(Emit::new(Paid { id }).when(when));
    }
}

#[test]
fn conditions_are_asked_about_the_head() {
    for keep in Keep::ALL {
        both(|setting| async move {
            for (status, expected) in [
                (200, &[0, 1, 2][..]),
                (302, &[0, 1, 2]),
                (404, &[2, 3, 4]),
                (500, &[2, 3]),
            ] {
                let scratch = Scratch::new("conditions");
                let book = Book::new();
                let events = keep.give(events(&book, &["books"]), &scratch).await;
                let layer = DeferLayer::new().events(events.clone());
                let server = setting.serve(app(&layer, move |request| async move {
                    emit_six(&defer_of(&request));
                    answer(status)
                }));
                assert_eq!(
                    setting.connect(&server).await.get("/").await.head.status,
                    status
                );
                book.awaits("books", expected.len()).await;
                soon("idle", layer.get_executor().idle()).await;
                assert_eq!(book.ids("books"), expected, "{keep:?}, {status}");
                if keep != Keep::Nowhere {
                    let counts = events.counts().await.expect("counts");
                    assert_eq!(
                        counts.events,
                        expected.len() as u64,
                        "only these are recorded"
                    );
                }
            }
        });
    }
}

#[test]
fn a_handler_that_fails_has_said_nothing() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("fails");
            let book = Book::new();
            let events = keep.give(events(&book, &["books"]), &scratch).await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                let id = id_of(&request);
                assert!(defer_of(&request).emit(Paid { id }).is_accepted());
                answer(if id == 1 { 500 } else { 200 })
            }));
            let mut client = setting.connect(&server).await;
            assert_eq!(client.get("/1").await.head.status, 500);
            assert_eq!(client.get("/2").await.head.status, 200);
            book.awaits("books", 1).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(book.ids("books"), [2]);
            if keep != Keep::Nowhere {
                assert_eq!(events.counts().await.expect("counts").events, 1);
            }
        });
    }
}

#[test]
fn a_handler_that_panics_has_said_nothing_but_what_was_to_be_said_always() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("panics");
            let book = Book::new();
            let events = keep.give(events(&book, &["books"]), &scratch).await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                emit_six(&defer_of(&request));
                panic!("the handler's own panic");
            }));
            let mut client = setting.connect(&server).await;
            let request = client.request(Method::GET, "/");
            assert!(
                client.send(request).await.is_err(),
                "the panic reaches the server"
            );
            // `always` and `failure`.
            book.awaits("books", 2).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(book.ids("books"), [2, 3], "{keep:?}");
            eventually("the request is over", || {
                layer.get_executor().snapshot().open_requests == 0
            })
            .await;
        });
    }
}

#[test]
fn a_service_that_returns_an_error_has_said_nothing() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("errs");
            let book = Book::new();
            let events = keep.give(events(&book, &["books"]), &scratch).await;
            let layer = DeferLayer::new().events(events);
            let failing = tower::service_fn(|request: Request<Incoming>| async move {
                emit_six(&defer_of(&request));
                Err::<Response<Script>, _>(std::io::Error::other("the service's own error"))
            });
            let server = setting.serve(layer.layer(failing));
            let mut client = setting.connect(&server).await;
            let request = client.request(Method::GET, "/");
            assert!(client.send(request).await.is_err());
            book.awaits("books", 2).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(book.ids("books"), [2, 3], "{keep:?}");
        });
    }
}

#[test]
fn a_client_that_leaves_before_the_head_does_not_undo_what_has_happened() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("leaves");
            let book = Book::new();
            let events = keep.give(events(&book, &["books"]), &scratch).await;
            let layer = DeferLayer::new().events(events);
            let entered = Gate::new();
            let enters = entered.clone();
            let server = setting.serve(app(&layer, move |request| {
                let entered = enters.clone();
                async move {
                    emit_six(&defer_of(&request));
                    entered.open();
                    std::future::pending::<Response<Script>>().await
                }
            }));
            let mut client = setting.connect(&server).await;
            let request = client.request(Method::GET, "/");
            tokio::select! {
                answer = client.send(request) => panic!("{answer:?}"),
                () = entered.passed() => {}
            }
            assert_eq!(book.runs().len(), 0);
            client.leave().await;
            book.awaits("books", 2).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(
                book.ids("books"),
                [0, 2],
                "{keep:?}: the default and `always`"
            );
            assert_eq!(book.of("books")[0].status, None);
        });
    }
}

/// Emits when it is asked for its length: after the handler has answered, before its head is known.
struct Asked {
    defer: Defer,
    said: Mutex<bool>,
}

impl Body for Asked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }

    fn size_hint(&self) -> SizeHint {
        if !std::mem::replace(&mut *self.said.lock().expect("no panic"), true) {
            drop(self.defer.emit(Paid { id: 1 }));
            drop(
                self.defer
                    .emit(Emit::new(Paid { id: 2 }).when(When::failure())),
            );
        }
        SizeHint::with_exact(0)
    }
}

#[test]
fn nothing_falls_between_the_answer_and_its_head() {
    // With and without an event that is recorded before.
    for keep in Keep::ALL {
        for before in [false, true] {
            for (status, expected) in [(200, 1), (500, 2)] {
                once(|setting| async move {
                    let scratch = Scratch::new("between");
                    let book = Book::new();
                    let events = keep.give(events(&book, &["books"]), &scratch).await;
                    let layer = DeferLayer::new().events(events);
                    let inner = tower::service_fn(move |request: Request<Incoming>| async move {
                        let defer = defer_of(&request);
                        if before {
                            defer.emit(Emit::new(Paid { id: 0 }).when(When::always()));
                        }
                        let said = Mutex::new(false);
                        let mut response = Response::new(Asked { defer, said });
                        *response.status_mut() = http::StatusCode::from_u16(status).expect("one");
                        Ok::<_, Infallible>(response)
                    });
                    let server = setting.serve(layer.layer(inner));
                    setting.connect(&server).await.get("/").await;
                    let wanted: Vec<i64> =
                        before.then_some(0).into_iter().chain([expected]).collect();
                    book.awaits("books", wanted.len()).await;
                    soon("idle", layer.get_executor().idle()).await;
                    assert_eq!(book.ids("books"), wanted, "{keep:?} {status}");
                });
            }
        }
    }
}

#[test]
fn what_is_emitted_while_the_answer_waits_for_the_store_is_asked_about_that_answer() {
    both(|setting| async move {
        let book = Book::new();
        let tap = Tap::new(Memory::new());
        let events = events(&book, &["books"]).store(tap.clone());
        let layer = DeferLayer::new().events(events);
        let kept: Arc<Mutex<Option<Defer>>> = Arc::default();
        let keeps = kept.clone();
        let server = setting.serve(app(&layer, move |request| {
            let keeps = keeps.clone();
            async move {
                let defer = defer_of(&request);
                defer.emit(Emit::new(Paid { id: 0 }).when(When::always()));
                *keeps.lock().expect("no panic") = Some(defer);
                answer(500)
            }
        }));
        let gate = Gate::new();
        tap.hold(&gate);
        let mut client = setting.connect(&server).await;
        let meanwhile = async {
            eventually("it waits", || tap.appends() == 1).await;
            let defer = kept.lock().expect("no panic").clone().expect("kept");
            let default = defer.emit(Paid { id: 1 }).recorded();
            let failure = defer.emit(Emit::new(Paid { id: 2 }).when(When::failure()));
            let skipped = soon("an answer", default)
                .await
                .expect_err("the handler failed");
            assert!(skipped.is_skipped(), "{skipped}");
            eventually("the other waits too", || tap.appends() == 2).await;
            gate.open();
            soon("an answer", failure.recorded())
                .await
                .expect("recorded");
        };
        let (answer, ()) = tokio::join!(client.get("/"), meanwhile);
        assert_eq!(answer.head.status, 500);
        book.awaits("books", 2).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.ids("books"), [0, 2]);
    });
}

#[test]
fn an_inner_layer_has_its_own_subscribers() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let (scratch, within) = (Scratch::new("outer"), Scratch::new("inner"));
            let book = Book::new();
            let outer_events = keep.give(events(&book, &["outer"]), &scratch).await;
            let inner_events = keep.give(events(&book, &["inner"]), &within).await;
            let outer = DeferLayer::new().events(outer_events);
            let inner = DeferLayer::new().events(inner_events);
            let handler = inner.layer(tower::service_fn(|request: Request<Incoming>| async move {
                defer_of(&request).emit(Paid { id: 2 });
                Ok::<_, Infallible>(answer(200))
            }));
            let between = tower::service_fn(move |request: Request<Incoming>| {
                let mut handler = handler.clone();
                async move {
                    defer_of(&request).emit(Paid { id: 1 });
                    tower::Service::call(&mut handler, request).await
                }
            });
            let server = setting.serve(outer.layer(between));
            assert_eq!(
                setting.connect(&server).await.get("/").await.head.status,
                200
            );
            book.awaits("outer", 1).await;
            book.awaits("inner", 1).await;
            soon("idle", outer.get_executor().idle()).await;
            soon("idle", inner.get_executor().idle()).await;
            assert_eq!((book.ids("outer"), book.ids("inner")), (vec![1], vec![2]));
            for layer in [&outer, &inner] {
                let snapshot = layer.get_executor().snapshot();
                assert_eq!((snapshot.accepted, snapshot.completed), (1, 1), "{keep:?}");
            }
        });
    }
}

#[test]
fn a_key_is_recorded_once() {
    for keep in Keep::STORES {
        both(|setting| async move {
            let scratch = Scratch::new("key");
            let book = Book::new();
            let events = keep.give(events(&book, &["books"]), &scratch).await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                let defer = defer_of(&request);
                let id = id_of(&request);
                defer.emit(Emit::new(Paid { id }).key("the payment"));
                // The other events of a batch are recorded all the same.
                defer.emit(Paid { id: 10 + id });
                answer(200)
            }));
            let mut client = setting.connect(&server).await;
            for id in 1..=3 {
                assert_eq!(client.get(&format!("/{id}")).await.head.status, 200);
            }
            let again = Emit::new(Paid { id: 4 }).key("the payment");
            events
                .emit(again)
                .recorded()
                .await
                .expect("it is there already");
            book.awaits("books", 4).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(book.ids("books"), [1, 11, 12, 13]);
            let counts = events.counts().await.expect("counts");
            assert_eq!((counts.events, counts.finished), (4, 4));
            let snapshot = layer.get_executor().snapshot();
            assert_eq!(snapshot.reserved, 0, "the room of a duplicate is free");
        });
    }
}

#[test]
fn what_nobody_listens_to_is_refused_or_kept_as_was_chosen() {
    for keep in Keep::ALL {
        for policy in [Unheard::Warn, Unheard::Error, Unheard::Allow] {
            once(|setting| async move {
                let scratch = Scratch::new("unheard");
                let book = Book::new();
                let events = events(&book, &["books"]).unheard(policy);
                let events = keep.give(events, &scratch).await;
                let layer = DeferLayer::new().events(events.clone());
                let server = setting.serve(app(&layer, move |request| async move {
                    let emitted = defer_of(&request).emit(Sent { id: 1 });
                    assert_eq!(emitted.is_accepted(), policy != Unheard::Error);
                    match emitted.error() {
                        None => answer(200),
                        Some(error) => {
                            assert!(error.is_unheard());
                            assert!(error.to_string().contains("order.sent"), "{error}");
                            answer(409)
                        }
                    }
                }));
                let status = setting.connect(&server).await.get("/").await.head.status;
                assert_eq!(status, if policy == Unheard::Error { 409 } else { 200 });
                if keep != Keep::Nowhere {
                    let kept = u64::from(policy != Unheard::Error);
                    assert_eq!(events.counts().await.expect("counts").events, kept);
                }
                assert_eq!(book.runs().len(), 0);
            });
        }
    }
}

#[test]
fn a_layer_without_events_says_so() {
    once(|setting| async move {
        let layer = DeferLayer::new();
        let server = setting.serve(app(&layer, |request| async move {
            let emitted = defer_of(&request).emit(Paid { id: 1 });
            let error = emitted.error().expect("there is nobody");
            assert!(
                error.is_no_events() && error.to_string().contains(".events("),
                "{error}"
            );
            let recorded = defer_of(&request).emit(Paid { id: 1 }).recorded().await;
            assert!(recorded.is_err_and(|error| error.is_no_events()));
            answer(200)
        }));
        assert_eq!(
            setting.connect(&server).await.get("/").await.head.status,
            200
        );
    });
}

#[test]
#[should_panic(expected = "two subscribers with the name \"mail\": give one of them another name")]
fn two_subscribers_with_one_name_are_found_at_the_start() {
    let _ = Events::new(Book::new())
        .on("mail", listener())
        .on("mail", listener());
}

#[test]
#[should_panic(expected = "two subscribers with the name \"mail\"")]
fn an_alias_that_is_taken_is_found_at_the_start() {
    let _ = Events::new(Book::new())
        .on("mail", listener())
        .on("post", listener().alias("mail"));
}

/// [`Paid`]'s name, another type.
#[derive(Clone, Serialize, Deserialize)]
struct Impostor;

impl Event for Impostor {
    const NAME: &'static str = "order.paid";
}

#[test]
#[should_panic(expected = "two types of event have the name \"order.paid\"")]
fn two_types_with_one_name_are_found_at_the_start() {
    let _ = Events::new(Book::new())
        .on("mail", listener())
        .on("impostor", |_: Book, _: Impostor| async {});
}

#[test]
#[should_panic(expected = "comes too late: call it before these events are cloned")]
fn a_subscriber_that_comes_too_late_is_found_at_the_start() {
    let events = events(&Book::new(), &["mail"]);
    let _layer = DeferLayer::new().events(events.clone());
    let _ = events.on("post", listener());
}

#[test]
fn an_event_of_another_type_with_a_known_name_is_refused() {
    for keep in Keep::ALL {
        once(|_| async move {
            let scratch = Scratch::new("impostor");
            let events = keep.give(events(&Book::new(), &["mail"]), &scratch).await;
            let emitted = events.emit(Impostor);
            let error = emitted.error().expect("refused").to_string();
            assert!(
                error.contains("another type of event has the name \"order.paid\""),
                "{error}"
            );
        });
    }
}

/// As large as it says, or none that can be written.
#[derive(Clone, Deserialize)]
struct Bulky(String);

impl Serialize for Bulky {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_empty() {
            return Err(serde::ser::Error::custom("it cannot be put into words"));
        }
        self.0.serialize(serializer)
    }
}

impl Event for Bulky {
    const NAME: &'static str = "bulky";
}

#[test]
fn a_payload_that_is_too_large_or_cannot_be_written_is_refused_and_nothing_else_is() {
    for keep in Keep::STORES {
        once(|setting| async move {
            let scratch = Scratch::new("bulky");
            let book = Book::new();
            let events = events(&book, &["books"])
                .on("bulk", |_: Book, _: Bulky| async {})
                .max_payload(100);
            let events = keep.give(events, &scratch).await;
            let layer = DeferLayer::new().events(events.clone());
            let server = setting.serve(app(&layer, |request| async move {
                let defer = defer_of(&request);
                let refused = |text: String| -> EmitError {
                    defer.emit(Bulky(text)).error().expect("refused").clone()
                };
                // The quotes count.
                let large = refused("x".repeat(99));
                assert!(
                    large.is_payload() && large.to_string().contains("101 bytes"),
                    "{large}"
                );
                let unwritable = refused(String::new());
                assert!(unwritable.is_payload() && unwritable.to_string().contains("bulky"));
                assert!(defer.emit(Bulky("x".repeat(98))).is_accepted());
                defer.emit(Paid { id: 1 });
                answer(200)
            }));
            assert_eq!(
                setting.connect(&server).await.get("/").await.head.status,
                200
            );
            book.awaits("books", 1).await;
            soon("idle", layer.get_executor().idle()).await;
            assert_eq!(events.counts().await.expect("counts").events, 2);
        });
    }
}

#[test]
fn without_a_store_there_is_room_for_all_deliveries_or_for_none() {
    for overflow in [Overflow::Reject, Overflow::DropOldest] {
        both(|setting| async move {
            let book = Book::new();
            let gate = Gate::new();
            let executor = Executor::builder().capacity(4).overflow(overflow).build();
            let events = events(&book, &["one", "two", "three"]);
            let layer = DeferLayer::new()
                .executor(executor.clone())
                .events(events.clone());
            let held = gate.clone();
            let server = setting.serve(app(&layer, move |request| {
                let gate = held.clone();
                async move {
                    let defer = defer_of(&request);
                    let blocked = || {
                        let gate = gate.clone();
                        Task::once(async move { gate.passed().await })
                    };
                    assert!(defer.run(blocked()).is_accepted());
                    assert!(defer.run(blocked()).is_accepted());
                    let emitted = defer.emit(Paid { id: 1 });
                    let error = emitted.error().expect("there is room for two of three");
                    assert_eq!(error.reject_reason(), Some(RejectReason::Full));
                    assert!(emitted.handles().is_empty());
                    // What it had taken is free again.
                    assert!(defer.run(blocked()).is_accepted());
                    assert!(defer.run(blocked()).is_accepted());
                    answer(200)
                }
            }));
            setting.connect(&server).await.get("/").await;
            gate.open();
            soon("idle", executor.idle()).await;
            assert_eq!(book.runs().len(), 0);
            let snapshot = executor.snapshot();
            assert_eq!(
                (snapshot.accepted, snapshot.completed),
                (4, 4),
                "{snapshot:?}"
            );
            assert_eq!(snapshot.reserved, 0);
            // And outside of a request.
            assert!(events.emit(Paid { id: 2 }).is_accepted());
            soon("idle", executor.idle()).await;
            assert_eq!(book.runs().len(), 3);
        });
    }
}

#[test]
fn the_limit_of_a_request_holds_for_events_too() {
    for keep in Keep::ALL {
        both(|setting| async move {
            let scratch = Scratch::new("limit");
            let book = Book::new();
            let events = keep
                .give(events(&book, &["one", "two", "three"]), &scratch)
                .await;
            let layer = DeferLayer::new().events(events).max_tasks_per_request(4);
            let server = setting.serve(app(&layer, move |request| async move {
                let defer = defer_of(&request);
                let accepted = (0..6).filter(|id| defer.emit(Paid { id: *id }).is_accepted());
                // In memory each delivery is a task; in a store the event is what waits here.
                assert_eq!(accepted.count(), if keep == Keep::Nowhere { 1 } else { 4 });
                answer(200)
            }));
            assert_eq!(
                setting.connect(&server).await.get("/").await.head.status,
                200
            );
            let events = if keep == Keep::Nowhere { 1 } else { 4 };
            book.awaits("three", events).await;
            soon("idle", layer.get_executor().idle()).await;
            for name in ["one", "two", "three"] {
                assert_eq!(book.count(name), events, "{keep:?}");
            }
        });
    }
}

#[test]
fn a_condition_on_the_end_is_taken_to_hold_where_the_head_decides() {
    both(|setting| async move {
        let book = Book::new();
        let events = events(&book, &["books"]).store(Memory::new());
        let layer = DeferLayer::new().events(events);
        let server = setting.serve(app(&layer, |request| async move {
            let defer = defer_of(&request);
            let asked = When::new(|info| info.end == End::Complete && info.bytes == 0);
            defer.emit(Emit::new(Paid { id: 1 }).when(asked));
            defer.emit(Emit::new(Paid { id: 2 }).when(When::complete()));
            defer.emit(Emit::new(Paid { id: 3 }).when(When::aborted()));
            answer(200)
        }));
        setting.connect(&server).await.get("/").await;
        book.awaits("books", 2).await;
        soon("idle", layer.get_executor().idle()).await;
        assert_eq!(book.ids("books"), [1, 2]);
    });
}
