//! [`Emit`]: an event, and what is to be said about this one emission.

use std::fmt;

use super::Event;
use crate::task::When;

/// An event with settings of this emission. An event alone is one by itself.
///
/// # Examples
///
/// ```
/// use tower_defer::When;
/// use tower_defer::event::Emit;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Serialize, Deserialize)] struct SignUpFailed { email: String }
/// # impl tower_defer::event::Event for SignUpFailed { const NAME: &'static str = "sign_up.failed"; }
/// # fn handler(defer: tower_defer::Defer, email: String) {
/// defer.emit(Emit::new(SignUpFailed { email }).when(When::always()));
/// # }
/// ```
#[must_use = "nothing is emitted until it is given to `emit`"]
pub struct Emit<E> {
    pub(super) event: E,
    pub(super) when: When,
    pub(super) key: Option<String>,
}

impl<E: Event> Emit<E> {
    /// With the defaults.
    pub fn new(event: E) -> Self {
        Self {
            event,
            when: When::default(),
            key: None,
        }
    }

    /// Whether it is emitted, given what the handler has answered. Default:
    /// [`When::unless_failed`].
    ///
    /// With a store the condition is asked once, when there is a head, and the end of the response is
    /// taken to be [`End::Complete`](crate::End::Complete): conditions on the end belong to tasks.
    pub fn when(mut self, when: When) -> Self {
        self.when = when;
        self
    }

    /// An idempotency key: while the store has an event of this name with this key, another one is not
    /// recorded, whatever else it says, and [`recorded`](super::Emitted::recorded) is ready as if it were.
    /// It means nothing without a store.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }
}

impl<E: Event> fmt::Debug for Emit<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emit")
            .field("event", &E::NAME)
            .field("when", &self.when)
            .field("key", &self.key)
            .finish()
    }
}

/// What `emit` takes: an [`Event`], or an [`Emit`] with settings.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "expected an event",
    note = "an event is a type that implements `Event`, which names it"
)]
pub trait IntoEmit: sealed::Sealed {
    /// Its type.
    type Event: Event;

    /// The emission, with the defaults where it says nothing itself.
    fn into_emit(self) -> Emit<Self::Event>;
}

mod sealed {
    pub trait Sealed {}
    impl<E: super::Event> Sealed for E {}
    impl<E: super::Event> Sealed for super::Emit<E> {}
}

impl<E: Event> IntoEmit for E {
    type Event = E;

    fn into_emit(self) -> Emit<E> {
        Emit::new(self)
    }
}

impl<E: Event> IntoEmit for Emit<E> {
    type Event = E;

    fn into_emit(self) -> Emit<E> {
        self
    }
}
