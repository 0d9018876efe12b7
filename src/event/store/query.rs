//! What an operator asks a store, and what it answers: plain data.
//!
//! Not a query language: a filter is a handful of equalities, so that every store can answer it.

use std::sync::Arc;

use super::StoreError;
use super::grouping::error_group;
use super::life::State;
use super::record::EventId;

/// Which deliveries: all that agree with every field that is set. The default is all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this subscriber.
    pub subscriber: Option<Arc<str>>,
    /// Of events with this name.
    pub event_name: Option<Arc<str>>,
    /// Parked or discarded for this reason.
    pub reason: Option<String>,
    /// With an error of this group, as [`error_group`] makes it and [`Group`] shows it.
    pub error_group: Option<String>,
    /// Changed (died, parked) at this time or later (unix ms).
    pub from_ms: Option<i64>,
    /// Changed before this time (unix ms).
    pub until_ms: Option<i64>,
}

impl Filter {
    /// Whether a delivery agrees.
    #[must_use]
    pub fn matches(&self, listed: &Listed) -> bool {
        fn is<T: PartialEq + ?Sized>(wanted: Option<&T>, found: Option<&T>) -> bool {
            wanted.is_none() || wanted == found
        }
        is(self.subscriber.as_deref(), Some(&*listed.subscriber))
            && is(self.event_name.as_deref(), Some(&*listed.event_name))
            && is(self.reason.as_deref(), listed.reason.as_deref())
            && is(
                self.error_group.as_deref(),
                Some(error_group(listed.error.as_deref().unwrap_or_default()).as_str()),
            )
            && self.from_ms.is_none_or(|from| listed.changed_ms >= from)
            && self.until_ms.is_none_or(|until| listed.changed_ms < until)
    }
}

/// A place in a list: the last delivery of the page before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// Its event.
    pub event: EventId,
    /// Its subscriber.
    pub subscriber: Arc<str>,
}

/// An unfinished delivery or a dead letter, to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The event's number.
    pub event: EventId,
    /// The event's name. Empty if the event's row cannot be read.
    pub event_name: Arc<str>,
    /// The event's payload. Empty if the event's row cannot be read.
    pub payload: String,
    /// The subscriber.
    pub subscriber: Arc<str>,
    /// What the delivery is doing.
    pub state: State,
    /// Attempts counted so far.
    pub attempt: u32,
    /// How many times the process died during it.
    pub crashes: u32,
    /// When it is due (unix ms), if it waits.
    pub due_ms: Option<i64>,
    /// Why it was parked or discarded.
    pub reason: Option<String>,
    /// The last error.
    pub error: Option<String>,
    /// When it came into this state (unix ms).
    pub changed_ms: i64,
}

impl Listed {
    /// The place after this delivery.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor {
            event: self.event,
            subscriber: Arc::clone(&self.subscriber),
        }
    }
}

/// Dead letters of one subscriber with the same error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The subscriber.
    pub subscriber: Arc<str>,
    /// The error, with what varies blanked.
    pub error_group: String,
    /// How many.
    pub count: u64,
    /// One of the errors, whole.
    pub example: String,
    /// When the first of them died (unix ms).
    pub first_ms: i64,
    /// When the last of them died (unix ms).
    pub last_ms: i64,
}

/// A replay of dead letters, in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The replay's name: under one name, a delivery is replayed at most once, however often the
    /// replay is called, also after a crash in the middle.
    pub name: String,
    /// Which dead letters.
    pub filter: Filter,
    /// At most this many in this call, the oldest events first.
    pub limit: usize,
}

/// Past events for one subscriber, in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddPast {
    /// Events with this name.
    pub event_name: Arc<str>,
    /// Recorded at this time or later (unix ms).
    pub since_ms: i64,
    /// The subscriber that gets a delivery of each …
    pub subscriber: Arc<str>,
    /// … unless it has had one under one of these names, which were its own before.
    pub aliases: Vec<Arc<str>>,
    /// Go on after this event ([`Walked::next`] of the call before); `None` at the beginning.
    pub after: Option<EventId>,
    /// Look at no more than this many events in this call. A store may look at fewer, so that nobody
    /// waits long for its writer; [`Walked::next`] tells.
    pub limit: usize,
}

/// How far a walk over the events came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// How many deliveries were added.
    pub added: u64,
    /// Where to go on; `None`: the walk is over.
    pub next: Option<EventId>,
}

/// Which finished events may go. Nothing is ever pruned without one of these, and an event with an
/// unfinished delivery or a dead letter is never pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prune {
    /// Those recorded before this time (unix ms) …
    pub before_ms: Option<i64>,
    /// … and those that are not among the last so many recorded. If both are set, either is
    /// enough; if none is, nothing goes.
    pub keep_last: Option<u64>,
    /// Go on after this event ([`Pruned::next`] of the call before); `None` at the beginning.
    pub after: Option<EventId>,
    /// Look at no more than this many events in this call. A store may look at fewer, so that nobody
    /// waits long for its writer; [`Pruned::next`] tells.
    pub limit: usize,
}

/// What was pruned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many events went.
    pub events: u64,
    /// How many finished deliveries went with them.
    pub deliveries: u64,
    /// Where to go on; `None`: the walk is over.
    pub next: Option<EventId>,
}

/// How many deliveries are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Wait for their first attempt.
    pub queued: u64,
    /// Claimed and not settled.
    pub running: u64,
    /// Wait for another attempt.
    pub retrying: u64,
    /// Parked.
    pub parked: u64,
    /// Dead letters.
    pub discarded: u64,
    /// Finished and not pruned.
    pub finished: u64,
    /// In a state that does not exist: the row was damaged or edited.
    pub unknown: u64,
    /// Events, finished or not.
    pub events: u64,
    /// Events that were ever pruned.
    pub pruned: u64,
    /// When the delivery that waits longest was due (unix ms); `None`: none waits. Compare it with
    /// the present to know how far behind the deliveries are.
    pub oldest_due_ms: Option<i64>,
}

/// How a store is.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// What is wrong now; `None`: the last write went well.
    pub trouble: Option<Trouble>,
    /// Deliveries set aside since the store was opened because their rows could not be trusted.
    pub damaged: u64,
    /// What was last found damaged.
    pub last_damage: Option<String>,
}

/// What is wrong with a store.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// The last error.
    pub error: StoreError,
    /// Since when writes fail or wait: the time that the first affected request brought with it
    /// (unix ms).
    pub since_ms: i64,
}
