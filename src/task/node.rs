//! One box per task: the link, what the executor needs to know, and the body.

use std::any::Any;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::Pin;

use pin_project::pin_project;

use super::id::{Marks, Sequence};
use super::spent::{self, Shelf};
use super::{AttemptRecord, Body, Kind, Lent, Link, Name, Origin, Reuse, Settings, TaskId, When};
use crate::clock::Tick;
use crate::error::panic_text;
use crate::response::ResponseInfo;
use crate::sync::Arc;

/// 56 bytes. With the body's own marks a queued task costs 64 beside its captures (a test holds it).
pub(crate) struct Header {
    next: Option<Node>,
    /// Known from the release on.
    pub(crate) origin: Option<Arc<Origin>>,
    marks: Marks,
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
            marks: Marks::new(body.about().kind == Kind::Blocking),
            location,
            queued_at: Tick::ZERO,
            settings: None,
        };
        Self(Box::pin(Cell { header, body }))
    }

    /// In the box of an emptied task, where there is one.
    #[inline]
    pub(super) fn reused<B: Reuse>(
        content: B::Content,
        location: &'static Location<'static>,
    ) -> Self {
        if !spent::is_kept::<B>() {
            return Self::new(B::filled(content), location);
        }
        let mut content = Some(content);
        match Shelf::of::<B>().take(&mut content) {
            Some(mut node) => {
                node.header_mut().location = location;
                node
            }
            None => match content {
                Some(content) => Self::new(B::filled(content), location),
                None => unreachable!("it is taken with a task"),
            },
        }
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
        self.sequence().id()
    }

    #[inline]
    pub(crate) fn sequence(&self) -> Sequence {
        match self.header().marks.sequence() {
            Some(sequence) => sequence,
            None => unreachable!("an accepted task has an id"),
        }
    }

    /// Gives the task its identity, once: a replayed one keeps it.
    pub(crate) fn identify(&mut self) -> Sequence {
        let marks = &mut self.header_mut().marks;
        match marks.sequence() {
            Some(sequence) => sequence,
            None => {
                let sequence = Sequence::next();
                marks.number(sequence);
                sequence
            }
        }
    }

    pub(crate) fn marks(&self) -> Marks {
        self.header().marks
    }

    /// It goes to the blocking lane.
    #[inline]
    pub(crate) fn is_blocking(&self) -> bool {
        self.header().marks.is_blocking()
    }

    pub(crate) fn name(&self) -> Name {
        match self.settings().and_then(|settings| settings.name.clone()) {
            Some(name) => name,
            None => Name::Function(self.body().about().name),
        }
    }

    pub(crate) fn when(&self) -> Option<&When> {
        self.settings().and_then(|settings| settings.when.as_ref())
    }

    /// What became of the response, for a task of a request that has been released.
    #[inline]
    pub(crate) fn response(&self) -> Option<&ResponseInfo> {
        self.header().origin.as_ref().map(|origin| &origin.response)
    }

    /// Failed attempts so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.settings().map_or(0, |settings| settings.attempts)
    }

    /// Writes a failed attempt down.
    pub(crate) fn remember(&mut self, failure: AttemptRecord) {
        let settings = self.settings_mut();
        settings.attempts = failure.attempt;
        settings.history.push(failure);
    }

    /// Whether it is kept elsewhere.
    pub(crate) fn is_lent(&self) -> bool {
        self.settings()
            .is_some_and(|settings| settings.lent.is_some())
    }

    /// Its keeper is gone.
    #[cfg(feature = "events")]
    pub(crate) fn is_orphan(&self) -> bool {
        self.settings()
            .and_then(|settings| settings.lent.as_ref())
            .is_some_and(|lent| lent.keeper.is_gone())
    }

    /// It goes to the executor's queue.
    #[cfg(feature = "events")]
    pub(crate) fn tell_released(&self) {
        if let Some(lent) = self.settings().and_then(|settings| settings.lent.as_ref()) {
            lent.keeper.released();
        }
    }

    /// Its keeper, where it has one.
    pub(crate) fn take_lent(&mut self) -> Option<Lent> {
        self.header_mut()
            .settings
            .as_mut()
            .and_then(|settings| settings.lent.take())
    }

    /// Drops the task; what it captured is the user's, and its drop may panic. Returns what it said.
    #[inline(always)]
    pub(crate) fn drop_quietly(mut self) -> Option<String> {
        let emptied = catch_unwind(AssertUnwindSafe(|| self.empty()));
        match emptied {
            Ok(Some(shelf)) => {
                shelf.put(self);
                None
            }
            Ok(None) => self.drop_box(),
            Err(payload) => self.drop_rest(payload),
        }
    }

    #[inline(never)]
    fn drop_box(self) -> Option<String> {
        catch_unwind(AssertUnwindSafe(|| drop(self)))
            .err()
            .map(panic_text)
    }

    /// What is left in it; were that to panic within the first unwinding, the process would end.
    #[cold]
    fn drop_rest(self, payload: Box<dyn Any + Send>) -> Option<String> {
        let _ = self.drop_box();
        Some(panic_text(payload))
    }

    /// Drops what the user gave and what the task has become. Where the box may be used again, returns
    /// the place for it.
    #[inline]
    fn empty(&mut self) -> Option<Shelf> {
        let shelf = self.body_mut().empty()?;
        let header = self.header_mut();
        if header.settings.is_some() {
            header.settings = None;
        }
        header.origin = None;
        header.marks.forget_number();
        Some(shelf)
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
    fn a_queued_task_costs_56_bytes_of_ours() {
        assert_eq!(std::mem::size_of::<Header>(), 56);
    }
}
