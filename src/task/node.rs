//! One allocation per task: the link, what the executor needs to know, and the body.

use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;

use pin_project::pin_project;

use super::id::Sequence;
use super::{Body, Lent, Link, Name, Origin, Settings, TaskId, When};
use crate::clock::Tick;
use crate::error::panic_text;
use crate::sync::Arc;

/// 64 bytes, which is what a queued task costs beside its own captures (a test holds it).
pub(crate) struct Header {
    next: Option<Node>,
    /// Set at the release: until then the collector holds the task, and would hold itself.
    pub(crate) origin: Option<Arc<dyn Origin>>,
    pub(crate) sequence: Option<Sequence>,
    pub(crate) location: &'static Location<'static>,
    pub(crate) queued_at: Tick,
    /// What few tasks have: anything that is not the default, and the record of failed attempts.
    pub(crate) settings: Option<Box<Settings>>,
}

#[pin_project]
struct Cell<B: ?Sized> {
    header: Header,
    #[pin]
    body: B,
}

/// A task, as the rooms hand it to each other.
pub(crate) struct Node(Pin<Box<Cell<dyn Body>>>);

impl Node {
    pub(crate) fn new(body: impl Body + 'static, location: &'static Location<'static>) -> Self {
        let header = Header {
            next: None,
            origin: None,
            sequence: None,
            location,
            queued_at: Tick::ZERO,
            settings: None,
        };
        Self(Box::pin(Cell { header, body }))
    }

    pub(crate) fn header(&self) -> &Header {
        &self.0.header
    }

    pub(crate) fn header_mut(&mut self) -> &mut Header {
        self.0.as_mut().project().header
    }

    pub(crate) fn settings_mut(&mut self) -> &mut Settings {
        self.header_mut().settings.get_or_insert_with(Box::default)
    }

    pub(crate) fn settings(&self) -> Option<&Settings> {
        self.header().settings.as_deref()
    }

    pub(crate) fn body(&self) -> &dyn Body {
        &self.0.body
    }

    pub(crate) fn body_mut(&mut self) -> Pin<&mut dyn Body> {
        self.0.as_mut().project().body
    }

    /// Given when the task is accepted.
    pub(crate) fn id(&self) -> TaskId {
        match self.header().sequence {
            Some(sequence) => sequence.id(),
            None => unreachable!("an accepted task has an id"),
        }
    }

    /// Gives the task its identity, once: a replayed one keeps it.
    pub(crate) fn identify(&mut self) -> TaskId {
        self.header_mut()
            .sequence
            .get_or_insert_with(Sequence::next)
            .id()
    }

    pub(crate) fn name(&self) -> Name {
        match self.settings().and_then(|settings| settings.name.clone()) {
            Some(name) => name,
            None => Name::Function(self.body().default_name()),
        }
    }

    pub(crate) fn when(&self) -> Option<&When> {
        self.settings().and_then(|settings| settings.when.as_ref())
    }

    /// Failed attempts so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.settings().map_or(0, |settings| settings.attempts)
    }

    /// Whether it is kept elsewhere.
    pub(crate) fn is_lent(&self) -> bool {
        self.settings()
            .is_some_and(|settings| settings.lent.is_some())
    }

    /// Its keeper, where it has one.
    pub(crate) fn take_lent(&mut self) -> Option<Lent> {
        self.header_mut()
            .settings
            .as_mut()
            .and_then(|settings| settings.lent.take())
    }

    /// Drops the task; what it captured is the user's, and its drop may panic. Returns what it said.
    pub(crate) fn drop_quietly(self) -> Option<String> {
        catch_unwind(AssertUnwindSafe(|| drop(self)))
            .err()
            .map(panic_text)
    }
}

impl Link for Node {
    fn link(&mut self) -> &mut Option<Self> {
        &mut self.header_mut().next
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name().as_str())
            .field("location", &self.header().location)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queued_task_costs_64_bytes_of_ours() {
        assert_eq!(std::mem::size_of::<Header>(), 64);
    }
}
