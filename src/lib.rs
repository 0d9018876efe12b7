//! Side effects that run after the response is really sent.
//!
//! A handler registers work with [`Defer`] and answers. When the server has let go of the response's
//! last byte, the work runs on an [`Executor`]: bounded, retried, and accounted for. The layer,
//! [`DeferLayer`], fits axum, tonic, plain hyper, and any tower service over `http` whose response body
//! yields [`bytes::Bytes`].
//!
//! # Quick start
//!
//! With the features `axum` and `signal`:
//!
#![cfg_attr(all(feature = "axum", feature = "signal"), doc = "```no_run")]
#![cfg_attr(not(all(feature = "axum", feature = "signal")), doc = "```text")]
//! use axum::{Router, routing::post};
//! use tower_defer::{Defer, DeferLayer, Shutdown, TaskError};
//!
//! async fn sign_up(defer: Defer) -> &'static str {
//!     let user = 17;                      // create the user: before we answer
//!     defer.run(move || welcome(user));   // send the mail: after it, and again if it fails
//!     "welcome\n"
//! }
//!
//! async fn welcome(user: i64) -> Result<(), TaskError> {
//!     println!("mail to user {user}");
//!     Ok(())
//! }
//!
//! #[tokio::main]
//! async fn main() -> std::io::Result<()> {
//!     let defer = DeferLayer::new();
//!     let app = Router::new().route("/users", post(sign_up)).layer(defer.clone());
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
//!     let report = Shutdown::new(&defer)
//!         .serve(tower_defer::signal(), |stop| async move {
//!             axum::serve(listener, app).with_graceful_shutdown(stop).await
//!         })
//!         .await?;
//!     println!("{report}");
//!     Ok(())
//! }
//! ```
//!
//! # The promise
//!
//! | | a task ([`defer.run`](Defer::run)) |
//! | --- | --- |
//! | is | a closure, lives in this process |
//! | starts | when the server has let go of the response's last byte, or a stalled client has held it for [`max_hold`](DeferLayer::max_hold), or a [`Shutdown`] cannot wait for it any longer |
//! | knows | what became of the response: [`TaskContext::response`] |
//! | runs | at most `max_attempts` times: [`Retry`] |
//! | where the handler failed or the client left | as its condition says: [`When`] |
//! | on overload | the handler is told while it can still act: [`TaskHandle::is_accepted`], [`Defer::try_run`], [`Defer::reserve`] |
//! | failing for good | is kept, to be looked at and replayed: [`DeadLetters`] |
//! | on shutdown | drained until a deadline; what is left is named: [`DrainReport`] |
//! | on a crash | lost |
//!
//! What must survive the process is an **event** with a store (features `events`, `sqlite`): the handler
//! says what has happened, it is recorded before the client sees the answer, and every function that
//! subscribes to it gets it at least once, through crashes and restarts. The module `event` says how.
//!
//! Nothing that was accepted ends in silence: a task is completed, skipped, discarded, cancelled or kept by
//! its store, once, and each of these is counted ([`Snapshot`]) and logged (`tracing`, target `tower_defer`: a retry at
//! level `info`, a dead letter at `warn`, a completed or skipped task at `debug`; without a subscriber
//! nothing is seen).
//!
//! # The words
//!
//! - A **task** ([`Task`]) is a unit of deferred work; an **attempt** is one run of it.
//! - [`Defer`] is the handle in the request's extensions. Behind it the **collector** holds what the
//!   request registered.
//! - The **release** is the moment when the response is out and the collected tasks go to the executor.
//!   [`ResponseInfo`] is what is known by then, [`End`] how the response ended.
//! - A task is **collected**, then **queued**, then **running**, then **completed**; or **retrying**; or
//!   **discarded**, which makes it a **dead letter**. It is **skipped** where its condition does not
//!   hold, **rejected** where there is no room, **cancelled** where its handle takes it back or a drain
//!   gives it up.
//! - An **event** is a fact, a **subscriber** a named function that listens to it, a **delivery** one
//!   event for one subscriber. What nobody here can run is **parked**.
//! - A response is **stalled** when its client takes nothing for [`max_hold`](DeferLayer::max_hold).
//!
//! Import names, not `*`: the modules `axum`, `tonic` and `hyper` of this crate would make
//! `use axum::…` ambiguous.
//!
//! # From the handle to the report
//!
//! | step | types |
//! | --- | --- |
//! | put the handle into each request | [`DeferLayer`], [`DeferService`], [`DeferFuture`], [`DeferBody`] |
//! | register work | [`Defer`], [`RequestExt`], [`Task`], [`IntoTask`], [`TaskContext`], [`TaskHandle`] |
//! | have it run or not | [`When`], [`ResponseInfo`], [`End`] |
//! | run it within bounds | [`Executor`], [`ExecutorBuilder`], [`Overflow`], [`Snapshot`] |
//! | try again, or give up | [`TaskError`], [`Retry`], [`RetryBudget`], [`DeadLetters`] |
//! | say what has happened | `event::Event`, `event::Events`, `event::Subscriber`, `Defer::emit`, `event::store` |
//! | end | [`Shutdown`], [`Executor::drain`], [`DrainReport`] |
//!
//! # What it is not
//!
//! Not `tokio::spawn`: that starts at once, bounds nothing, retries nothing, and forgets its tasks when
//! the runtime ends. Not `TaskTracker`, which waits for its tasks at shutdown and does no more. Not
//! `tower::retry`, which repeats a request while the client waits. Not a job queue: a task dies with
//! its process, and what a store keeps is facts and their deliveries.
//!
//! # Where the layer stands
//!
//! Outermost: in axum the last `.layer(…)`, in tonic's `Server` and tower's `ServiceBuilder` the first.
//! What stands outside it and compresses or collects bodies makes the release come early.
//!
//! # Limits
//!
//! - "Let go" means taken by the kernel, or thrown away with a connection that died; it is never the
//!   client's acknowledgement. A body that the server has buffered whole counts as [`End::Complete`]
//!   though the client left before it got it.
//! - A connection without vectored writes, and some TLS, copies a chunk before it is sent: tasks start
//!   early by what that buffer holds.
//! - What a body yielded before the first registration of its request is not guarded.
//! - HEAD through axum's `Router::layer` is released when axum discards the body, before the head is
//!   written; a layer around the finished router is not.
//! - A task that keeps a CPU busy holds a thread of the runtime that runs it, by default the server's.
//!   [`Task::blocking`] and [`ExecutorBuilder::dedicated`] give it another.
//! - Timeouts and drains act at await points; what never reaches one is reported as stuck.
//! - The tokio runtime needs its timer enabled.
//! - With `panic = "abort"` a task that panics ends the process.
//! - Tasks and their dead letters are in memory: [`ExecutorBuilder::on_dead_letter`] is the hook to keep
//!   the latter elsewhere. Events with a store are kept.
//! - Another executor than the layer's ([`Defer::on`], an inner layer) is drained at shutdown only if
//!   [`Shutdown::and`] names it.
//! - A drain's report names at most 10,000 tasks and counts the rest.
//!
//! # Features
//!
//! None is on by default. Each adds API and changes no behaviour.
//!
//! - `axum`: [`Defer`] as an extractor, also `Option<Defer>`, and its rejections as responses.
//! - `tonic`: `request.defer()` on `tonic::Request`, `NamedService` for [`DeferService`], errors as
//!   `Status`.
//! - `hyper`: `hyper::serve`, an accept loop that can stop, for a service without a framework.
//! - `signal`: `signal()`, SIGTERM and ctrl-c as a future.
//! - `metrics`: counters, gauges and histograms through the `metrics` facade, listed in
//!   `docs/observability.md`.
//! - `opentelemetry`: attempts link to the request's trace, also when its span is closed
//!   (`tracing-opentelemetry` 0.34).
//! - `events`: `event`, facts that any number of functions subscribe to, and the contract of a store
//!   that keeps them through crashes.
//! - `sqlite`: the embedded store, on SQLite, which is compiled in and needs a C compiler.
//! - `test-util`: `test_util`, the kit for the tests of an application: capture, inline,
//!   `send_and_drain`, injected ends; with `events` also the conformance suite for those who write a
//!   store.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

// A request goes in with a handle, and its body comes out watched.
mod middleware;

// What its handler registers is held until the response is out.
mod defer;

// What is known of the response by then.
mod response;

// What was registered, how it fails,
mod task;

mod error;

// where it runs,
mod executor;

// whether it is tried again,
mod retry;

// what of all this is seen,
mod observe;

// what is said to have happened, who listens, and what keeps it,
#[cfg(feature = "events")]
pub mod event;

// and how it ends.
mod shutdown;

#[cfg(feature = "axum")]
pub mod axum;
#[cfg(feature = "hyper")]
pub mod hyper;
#[cfg(feature = "tonic")]
pub mod tonic;

#[cfg(feature = "test-util")]
pub mod test_util;

mod clock;
mod pool;
mod sync;

pub use defer::{Defer, DeferPermit, DeferReserve, MissingLayer, RequestExt};
pub use error::{BoxError, TaskError};
pub use executor::{
    Closed, DeadLetter, DeadLetterGroup, DeadLetters, DrainReport, Executor, ExecutorBuilder,
    Overflow, Permit, RejectReason, Rejected, ReplayError, Reserve, RunningTask, Snapshot,
    TaskHandle, Unfinished, UnfinishedState,
};
pub use middleware::{DeferBody, DeferFuture, DeferLayer, DeferService};
pub use response::{End, ResponseInfo};
pub use retry::{DiscardReason, Jitter, Retry, RetryBudget};
#[cfg(feature = "signal")]
pub use shutdown::signal;
pub use shutdown::{Shutdown, StopServing};
pub use task::{AttemptRecord, IntoTask, Task, TaskContext, TaskId, TaskOutput, When};

/// Their examples are compiled as documentation tests, and so cannot rot.
#[cfg(all(doctest, feature = "axum", feature = "signal", feature = "sqlite"))]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(all(doctest, feature = "axum", feature = "signal"))]
#[doc = include_str!("../CHANGELOG.md")]
struct Changelog;
