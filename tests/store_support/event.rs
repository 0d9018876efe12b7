//! The plainest event.

use tower_defer::event::store::{NewEvent, Start};

/// An event with an empty payload for one subscriber.
pub(crate) fn event(name: &str, subscriber: &str, due_ms: i64) -> NewEvent {
    NewEvent::new(name, "{}").deliver(subscriber, Start::At(due_ms))
}
