//! The events of a request: they wait in its outbox until the handler has answered, are recorded as one
//! batch, and their deliveries are held until the release.
//!
//! Invariants:
//! 1. An event is in the outbox, or was handed to a recording: the outbox is closed under the same lock
//!    under which it is emptied.
//! 2. It is emptied when the handler has answered, and for good under the lock under which its head (or
//!    that there will be none) becomes known: what a clone put in between is recorded then.
//! 3. The conditions are asked about the handler's answer, also those of what is emitted while that
//!    answer waits for the store.
//! 4. No condition is asked in a drop: it is the user's code.

use super::ending::Known;
use super::{Collector, Defer};
use crate::event::{EmitError, Emitted, Holder, Hub, IntoEmit, Outgoing, Prepared, Recording};
use crate::executor::Executor;
use crate::observe;
use crate::response::{End, ResponseInfo};
use crate::sync::Arc;
use crate::task::{Node, Task};
use std::panic::Location;

/// Kept under the gate's lock.
#[derive(Debug, Default)]
pub(super) enum Outbox {
    #[default]
    Empty,
    /// Boxed: few requests emit.
    Open(Box<Waiting>),
    /// What was in it is being recorded, because of this answer.
    Closed(Box<ResponseInfo>),
}

#[derive(Debug, Default)]
pub(super) struct Waiting {
    next: u64,
    events: Vec<(u64, Outgoing)>,
}

impl Outbox {
    /// Takes it, unless it is closed, and says its number.
    fn push(&mut self, outgoing: &mut Option<Outgoing>) -> Option<u64> {
        if matches!(self, Outbox::Empty) {
            *self = Outbox::Open(Box::default());
        }
        let Outbox::Open(waiting) = self else {
            return None;
        };
        let number = waiting.next;
        waiting.next += 1;
        waiting.events.push((number, outgoing.take()?));
        Some(number)
    }

    fn take(&mut self, number: u64) -> Option<Outgoing> {
        let Outbox::Open(waiting) = self else {
            return None;
        };
        let events = &mut waiting.events;
        let at = events.iter().position(|(other, _)| *other == number)?;
        Some(events.remove(at).1)
    }

    /// What waits. From now on nothing else does, where anything did.
    fn close(&mut self, info: impl FnOnce() -> ResponseInfo) -> Vec<Outgoing> {
        if !matches!(self, Outbox::Open(_)) {
            return Vec::new();
        }
        match std::mem::replace(self, Outbox::Closed(Box::new(info()))) {
            Outbox::Open(waiting) => waiting.all(),
            Outbox::Empty | Outbox::Closed(_) => Vec::new(),
        }
    }

    /// What waits still, when it is known how the request was answered.
    #[inline]
    pub(super) fn take_late(&mut self) -> Vec<Outgoing> {
        match self {
            Outbox::Empty => Vec::new(),
            Outbox::Open(_) | Outbox::Closed(_) => match std::mem::take(self) {
                Outbox::Open(waiting) => waiting.all(),
                Outbox::Empty | Outbox::Closed(_) => Vec::new(),
            },
        }
    }
}

impl Waiting {
    fn all(self) -> Vec<Outgoing> {
        self.events.into_iter().map(|(_, event)| event).collect()
    }
}

impl Defer {
    /// Says what has happened: every [subscriber](crate::event::Events::on) of the event has its own
    /// delivery, after the response.
    ///
    /// With a store the events of a request are recorded in one commit when the handler has returned,
    /// before the client sees its answer; if that fails, the answer becomes a 503 (gRPC:
    /// `UNAVAILABLE`) and none of them is delivered. A handler that reports failure has said nothing:
    /// see [`Emit::when`](crate::event::Emit::when). Emitted after the head, through a clone, an event is
    /// recorded at once.
    ///
    /// Where an inner layer has events of its own, each store has its own commit: two stores cannot be
    /// atomic, and the second is not asked once the first has failed.
    ///
    /// Without a store the deliveries are tasks, and there is room for all of them or for none.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tower_defer::Defer;
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Clone, Serialize, Deserialize)] struct UserCreated { id: i64, email: String }
    /// # impl tower_defer::event::Event for UserCreated { const NAME: &'static str = "user.created"; }
    /// # fn handler(defer: Defer, id: i64, email: String) {
    /// defer.emit(UserCreated { id, email });
    /// # }
    /// ```
    #[track_caller]
    pub fn emit(&self, event: impl IntoEmit) -> Emitted {
        let location = Location::caller();
        let emitted = match self.events() {
            None => Err(EmitError::no_events()),
            Some(hub) => hub
                .prepare(event, location)
                .and_then(|prepared| match prepared {
                    Prepared::Tasks(tasks) => self.emit_tasks(hub, tasks),
                    Prepared::Outgoing(outgoing, recorded) => {
                        let holder: Arc<dyn Holder> = self.collector().clone();
                        Ok(Emitted::outgoing(
                            match self.collector().emit(*outgoing)? {
                                Some(number) => recorded.waiting(holder, number),
                                None => recorded,
                            },
                        ))
                    }
                }),
        };
        emitted.unwrap_or_else(|error| {
            observe::not_emitted(&error, location);
            Emitted::refused(error)
        })
    }

    /// All deliveries, or none: a fact that half of its subscribers hear of would be two facts.
    fn emit_tasks(&self, hub: &Hub, tasks: Vec<Task>) -> Result<Emitted, EmitError> {
        let defer = self.on(hub.executor());
        let shared = hub.executor().shared();
        let mut places = Vec::with_capacity(tasks.len());
        for task in tasks {
            match defer.within_limit().and_then(|()| shared.admit()) {
                Ok(place) => places.push((task, place)),
                Err(reason) => {
                    shared.reject_for_good(task.into_node(), reason);
                    return Err(EmitError::rejected(reason));
                }
            }
        }
        let mut handles = Vec::with_capacity(places.len());
        for (task, place) in places {
            match defer.register(task.into_node(), place) {
                Ok(handle) => handles.push(handle),
                Err((node, reason)) => {
                    // The limit came between: what was registered before is taken back.
                    shared.reject_for_good(node, reason);
                    for handle in &handles {
                        let _ = handle.cancel();
                    }
                    return Err(EmitError::rejected(reason));
                }
            }
        }
        Ok(Emitted::tasks(handles))
    }
}

impl Collector {
    /// Takes an event in, and says its number; `None`: the head is out, and it is being recorded.
    fn emit(self: &Arc<Self>, outgoing: Outgoing) -> Result<Option<u64>, EmitError> {
        if self.is_at_limit() {
            return Err(EmitError::rejected(
                crate::executor::RejectReason::RequestLimit,
            ));
        }
        let mut outgoing = Some(outgoing);
        let mut number = None;
        self.gate.push_beside(|beside| {
            if beside.known.is_answered() {
                return false;
            }
            number = beside.outbox.push(&mut outgoing);
            number.is_some()
        });
        let Some(outgoing) = outgoing else {
            return Ok(number);
        };
        self.record_at_once(vec![outgoing]);
        Ok(None)
    }

    /// The handler has answered, or will not: what is to be recorded before that becomes known.
    pub(crate) fn record(
        self: &Arc<Self>,
        info: impl FnOnce() -> ResponseInfo,
    ) -> Option<Recording> {
        if !self.is_used() {
            return None;
        }
        let info = info();
        let asked = || info.clone();
        let outbox = self.gate.with(|_, beside| beside.outbox.close(asked));
        if outbox.is_empty() {
            return None;
        }
        let holder: Arc<dyn Holder> = self.clone();
        Some(Recording::new(outbox, info, holder))
    }

    /// Records what came when the answer was known already, or is about to be.
    pub(super) fn record_at_once(self: &Arc<Self>, late: Vec<Outgoing>) {
        if late.is_empty() {
            return;
        }
        let info = match self.response() {
            Some(info) => info.clone(),
            None => self.gate.with(|_, beside| match &beside.outbox {
                Outbox::Closed(info) => (**info).clone(),
                Outbox::Empty | Outbox::Open(_) => beside.known.so_far(),
            }),
        };
        let holder: Arc<dyn Holder> = self.clone();
        Recording::new(late, info, holder).go_on();
    }
}

impl Holder for Collector {
    fn hold(self: Arc<Self>, executor: &Executor, delivery: Node) {
        let shared = executor.shared();
        let here = Arc::ptr_eq(shared, self.scope().executor.shared());
        if !here {
            self.scope().attach_to(shared);
        }
        let Ok(mut entered) = self.gate.enter(usize::MAX) else {
            return shared.enqueue_one(delivery, self.origin());
        };
        let beside = entered.beside();
        let mut start_sweep = false;
        if beside.place_in_sweep.is_none() {
            start_sweep = self.first_registration(beside, observe::current_span());
        }
        if here {
            entered.push(delivery);
        } else {
            beside.elsewhere.push(executor, delivery);
            drop(entered);
        }
        if start_sweep {
            self.start_sweep();
        }
    }

    fn hurry(self: Arc<Self>, number: u64) {
        let outgoing = self.gate.with(|_, beside| beside.outbox.take(number));
        if let Some(outgoing) = outgoing {
            // Asked for in so many words: its condition is not.
            let holder: Arc<dyn Holder> = self;
            Recording::unconditional(vec![outgoing], Some(holder)).go_on();
        }
    }
}

impl Known {
    /// The head is out, or there will be none.
    fn is_answered(&self) -> bool {
        self.head.is_some() || self.ending.is_some()
    }

    fn so_far(&self) -> ResponseInfo {
        let head = self.head.map(|(head, _)| head);
        let end = self.ending.as_ref().map_or(End::Complete, |e| e.end);
        head_only(head, end)
    }
}

/// What an event's condition is asked with: its response has only a head, and its end is taken for a
/// good one.
pub(crate) fn head_only(head: Option<super::Head>, end: End) -> ResponseInfo {
    let mut info = ResponseInfo::new(head.map(|head| head.status), end);
    info.grpc_status = head.and_then(|head| head.grpc_status);
    info
}
