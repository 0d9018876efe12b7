//! The plain data that goes into a store and comes out of it to be run.
//!
//! Not the user's event types: a record has a name and a text, nothing that must be known to
//! store it.

use std::fmt;
use std::sync::Arc;

/// The number of an event in its store: given by the store, rising in the order in which events
/// were recorded, never given twice. Together with the subscriber's name it identifies a delivery
/// for good, over all attempts and replays: an idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(i64);

impl EventId {
    /// Wraps the number that a store gave.
    #[must_use]
    pub const fn new(number: i64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An event to be recorded, with the subscribers that it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent {
    /// The idempotency key, if the caller wants one: a second event of the same name and key is not
    /// recorded while the first is kept. A store indexes it, so keys that rise with time (UUIDv7)
    /// cost less than random ones.
    pub key: Option<String>,
    /// The event's name, `user.created`.
    pub name: Arc<str>,
    /// The event itself; JSON by convention. The store does not look into it.
    pub payload: String,
    /// What travels with the event and is none of its business (a trace context).
    pub context: Option<String>,
    /// One delivery for each subscriber. Naming one subscriber twice is an error.
    pub deliveries: Vec<NewDelivery>,
}

impl NewEvent {
    /// An event without key, context and deliveries.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, payload: impl Into<String>) -> Self {
        Self {
            key: None,
            name: name.into(),
            payload: payload.into(),
            context: None,
            deliveries: Vec::new(),
        }
    }

    /// Sets the idempotency key.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets the context.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.context = Some(context.into());
        self
    }

    /// Adds a delivery.
    #[must_use]
    pub fn deliver(mut self, subscriber: impl Into<Arc<str>>, start: Start) -> Self {
        self.deliveries.push(NewDelivery {
            subscriber: subscriber.into(),
            start,
        });
        self
    }
}

/// One subscriber of a new event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDelivery {
    /// The subscriber's name.
    pub subscriber: Arc<str>,
    /// When the delivery may start.
    pub start: Start,
}

/// When a new delivery may start, and who starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Whoever claims first, from this time on (unix ms).
    At(i64),
    /// The caller, from memory: the delivery is recorded as claimed, its first attempt counted,
    /// and the receipt holds its token. That spares the commit of a claim. If the process dies
    /// before the caller starts it, the attempt and the crash mark count all the same.
    Claimed,
}

/// What became of one event of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The number of the event, or of the one that has the same key.
    pub event: EventId,
    /// An event with this key was there already: nothing of this one was recorded.
    pub duplicate: bool,
    /// The tokens of the deliveries with [`Start::Claimed`], in their order. Empty for a
    /// duplicate.
    pub claimed: Vec<AttemptToken>,
}

/// The right to settle one attempt of one delivery. The next claim of the same delivery makes it
/// void.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptToken {
    event: EventId,
    subscriber: Arc<str>,
    generation: i64,
}

impl AttemptToken {
    /// Made by stores only: `generation` counts the claims of this delivery and never goes back.
    #[must_use]
    pub fn new(event: EventId, subscriber: Arc<str>, generation: i64) -> Self {
        Self {
            event,
            subscriber,
            generation,
        }
    }

    /// The event that is delivered.
    #[must_use]
    pub fn event(&self) -> EventId {
        self.event
    }

    /// The subscriber that it is delivered to.
    #[must_use]
    pub fn subscriber(&self) -> &Arc<str> {
        &self.subscriber
    }

    /// How often this delivery has been claimed, this claim included.
    #[must_use]
    pub fn generation(&self) -> i64 {
        self.generation
    }
}

/// A delivery that the caller has claimed and must settle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// The right to settle this attempt.
    pub token: AttemptToken,
    /// The number of this attempt; the first is 1.
    pub attempt: u32,
    /// How many times the process died while this delivery was running. At
    /// [`SUSPECT`](super::SUSPECT) and more nothing else should run beside it.
    pub crashes: u32,
    /// When it was due (unix ms).
    pub due_ms: i64,
    /// When its first attempt began (unix ms), since it was recorded or replayed: this one, or one
    /// before it.
    pub since_ms: i64,
    /// How the last attempt ended, if that was with an error.
    pub last_error: Option<String>,
    /// The event; deliveries of one event that were claimed together share it.
    pub event: Arc<StoredEvent>,
}

/// An event as it was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    /// Its number.
    pub id: EventId,
    /// Its idempotency key.
    pub key: Option<String>,
    /// Its name.
    pub name: Arc<str>,
    /// The payload, as it came.
    pub payload: String,
    /// The context, as it came.
    pub context: Option<String>,
    /// When it was recorded (unix ms).
    pub recorded_ms: i64,
}

/// What became of a request to settle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It was done.
    Applied,
    /// The token is void (settled before, or the delivery was claimed again): nothing changed.
    Stale,
}
