//! [`Subscriber`]: a function that listens to an event, and how its deliveries are treated.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use super::{DeliveryContext, Event};
use crate::error::TaskError;
use crate::retry::Retry;
use crate::sync::Arc;
use crate::task::TaskOutput;

/// An attempt of a delivery, under way.
pub(super) type Attempt = Pin<Box<dyn Future<Output = Result<(), TaskError>> + Send>>;

pub(super) type Call<S, E> = Arc<dyn Fn(S, E, DeliveryContext) -> Attempt + Send + Sync>;

/// A function that listens to an event, with settings of its own. A plain `async fn(State, Event)` is
/// one by itself; this is for what needs another policy.
///
/// Every setting that is not made is the executor's default.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tower_defer::Retry;
/// use tower_defer::event::{DeliveryContext, Events, Subscriber};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Serialize, Deserialize)] struct UserCreated { id: i64 }
/// # impl tower_defer::event::Event for UserCreated { const NAME: &'static str = "user.created"; }
/// # #[derive(Clone)] struct App;
/// # async fn add(_: i64) -> Result<(), std::io::Error> { Ok(()) }
///
/// async fn newsletter(_: App, event: UserCreated) -> Result<(), std::io::Error> {
///     add(event.id).await
/// }
/// async fn charge(_: App, event: UserCreated, delivery: DeliveryContext) {
///     println!("charge {} once, by the key {}", event.id, delivery.id());
/// }
///
/// let events = Events::new(App)
///     .on("newsletter", Subscriber::new(newsletter)
///         .retry(Retry::exponential(12).give_up_after(Duration::from_secs(3600)))
///         .timeout(Duration::from_secs(5))
///         .alias("mailing-list"))
///     .on("charge", Subscriber::with_context(charge));
/// # let _ = events;
/// ```
#[must_use = "a subscriber hears nothing until it is given to `Events::on`"]
pub struct Subscriber<S, E> {
    pub(super) call: Call<S, E>,
    pub(super) policy: Policy,
}

/// What a subscriber says about its deliveries.
#[derive(Debug, Default)]
pub(super) struct Policy {
    pub(super) retry: Option<Retry>,
    pub(super) timeout: Option<Duration>,
    pub(super) aliases: Vec<Arc<str>>,
}

impl<S: Send + 'static, E: Event> Subscriber<S, E> {
    /// `attempt` is called for each attempt, with a clone of the state and the event.
    pub fn new<F, Fut>(attempt: F) -> Self
    where
        F: Fn(S, E) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        let attempt = Arc::new(attempt);
        Self::with(move |state, event, _| {
            let attempt = attempt.clone();
            // Called within the attempt, where a panic is its own.
            Box::pin(async move { attempt(state, event).await.into_result() })
        })
    }

    /// As [`new`](Self::new), told about its attempt: an identity to make repetitions harmless, the
    /// attempt's number, how the last one ended.
    pub fn with_context<F, Fut>(attempt: F) -> Self
    where
        F: Fn(S, E, DeliveryContext) -> Fut + Send + Sync + 'static,
        Fut: Future<Output: TaskOutput> + Send + 'static,
    {
        let attempt = Arc::new(attempt);
        Self::with(move |state, event, context| {
            let attempt = attempt.clone();
            Box::pin(async move { attempt(state, event, context).await.into_result() })
        })
    }

    fn with(call: impl Fn(S, E, DeliveryContext) -> Attempt + Send + Sync + 'static) -> Self {
        Self {
            call: Arc::new(call),
            policy: Policy::default(),
        }
    }

    /// When a failed delivery is tried again. Default: the executor's.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.policy.retry = Some(retry);
        self
    }

    /// How long an attempt may take. Default: the executor's (60 s).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.policy.timeout = Some(timeout);
        self
    }

    /// A name that it had before: what a store still has for that one is delivered to this.
    pub fn alias(mut self, name: &str) -> Self {
        self.policy.aliases.push(name.into());
        self
    }
}

impl<S, E> fmt::Debug for Subscriber<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.policy.fmt(f)
    }
}

/// What [`Events::on`](super::Events::on) takes: an `async fn(State, Event)`, or a [`Subscriber`] with
/// settings. `M` is found by the compiler.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a subscriber",
    label = "expected an `async fn(State, Event)`, or a `Subscriber`",
    note = "it takes the state that was given to `Events::new` and one event, in this order",
    note = "it returns `()` or `Result<(), E>`, where `E` is an error, a text or a `TaskError`"
)]
pub trait IntoSubscriber<S, M>: sealed::Sealed<S, M> {
    /// What it listens to.
    type Event: Event;

    /// The subscriber, with the executor's defaults where it says nothing itself.
    fn into_subscriber(self) -> Subscriber<S, Self::Event>;
}

mod sealed {
    pub trait Sealed<S, M> {}
}

impl<S, E> sealed::Sealed<S, ()> for Subscriber<S, E> {}

impl<S: Send + 'static, E: Event> IntoSubscriber<S, ()> for Subscriber<S, E> {
    type Event = E;

    fn into_subscriber(self) -> Subscriber<S, E> {
        self
    }
}

impl<S, E, F, Fut> sealed::Sealed<S, (E,)> for F
where
    F: Fn(S, E) -> Fut + Send + Sync + 'static,
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
}

impl<S, E, F, Fut> IntoSubscriber<S, (E,)> for F
where
    S: Send + 'static,
    E: Event,
    F: Fn(S, E) -> Fut + Send + Sync + 'static,
    Fut: Future<Output: TaskOutput> + Send + 'static,
{
    type Event = E;

    fn into_subscriber(self) -> Subscriber<S, E> {
        Subscriber::new(self)
    }
}
