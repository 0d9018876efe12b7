//! For the tests of applications: what was deferred, and what became of it, without a socket.
//!
//! The application under test is not changed: where it takes a [`DeferLayer`], it is given one of the
//! kit's, or its own is left in place.
//!
//! | to test | use |
//! | --- | --- |
//! | that a handler defers the right tasks (and not the wrong ones), running none of them | [`TestDefer::capture`] |
//! | what the tasks do, with the least ceremony: they have ended when the response is there | [`TestDefer::inline`] |
//! | all of it as in production: the response to its end, then the tasks | [`send_and_drain`] |
//! | what happens when the client leaves | [`Client::leaves_at`], [`Client::leaves_when`] |
//! | another end (a stall, a failed body) | [`Client::ends_with`] |
//! | a condition by itself | [`holds`], with [`client_left_at`] and its like |
//!
//! Time: with `#[tokio::test(start_paused = true)]` timeouts and waiting cost nothing. Retries come at
//! once in any case, unless [`Client::keep_backoff`] says otherwise. A test cannot hang: after ten
//! seconds of *real* time (see [`Client::guard`]) it panics and names the tasks that have not ended; if
//! a task holds the test's thread so that not even that is possible, the process is ended with the same
//! message.
//!
//! A task's name may be given short: `sign_up` stands for `app::users::sign_up`.
//!
//! # Examples
//!
//! ```
//! use tower_defer::{Defer, DeferLayer, test_util::{TestDefer, send_and_drain}};
//! use axum::{Router, routing::post};
//! # use tower::ServiceExt;
//!
//! fn app(defer: DeferLayer) -> Router {
//!     async fn sign_up(defer: Defer) -> &'static str {
//!         defer.run(|| async { println!("welcome!") });
//!         "hello"
//!     }
//!     Router::new().route("/users", post(sign_up)).layer(defer)
//! }
//! # let request = || http::Request::post("/users").body(axum::body::Body::empty()).unwrap();
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! // Nothing runs.
//! let defer = TestDefer::capture();
//! app(defer.layer()).oneshot(request()).await.unwrap();
//! defer.assert_deferred("sign_up");
//! defer.assert_not_deferred("refund");
//!
//! // Everything runs.
//! let (response, report) = send_and_drain(app(DeferLayer::new()), request()).await;
//! assert_eq!(response.body(), "hello");
//! report.assert_completed("sign_up");
//! # });
//! ```
//!
//! [`DeferLayer`]: crate::DeferLayer

mod client;
mod ends;
mod guard;
mod log;
mod modes;
mod report;
mod split;

pub use client::{Client, send_and_drain};
pub use ends::{client_left_at, holds, response, stalled_at, without_response};
pub(crate) use log::{Ears, Log};
pub use modes::TestDefer;
pub(crate) use modes::{Probe, TestScope};
pub use report::{Report, TaskRecord, TaskState};
