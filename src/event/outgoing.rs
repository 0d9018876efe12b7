//! An event on its way into a store, and the outbox of a request that it waits in.

use tokio::sync::oneshot;

use super::hub::Hub;
use super::store::NewEvent;
use super::table::Subscription;
use super::{EmitError, Recorded};
use crate::executor::Executor;
use crate::observe;
use crate::sync::Arc;
use crate::task::{Node, When};

/// An event that was written as JSON and is not recorded yet.
pub(crate) struct Outgoing {
    pub(super) hub: Arc<Hub>,
    /// Without its deliveries.
    pub(super) event: NewEvent,
    pub(super) listeners: Vec<Arc<Subscription>>,
    pub(crate) when: When,
    /// None once it has been given: each is counted once.
    answer: Option<oneshot::Sender<Result<(), EmitError>>>,
}

impl Outgoing {
    pub(super) fn new(
        hub: Arc<Hub>,
        event: NewEvent,
        listeners: Vec<Arc<Subscription>>,
        when: When,
    ) -> (Self, Recorded) {
        let (answer, answered) = oneshot::channel();
        let outgoing = Self {
            hub,
            event,
            listeners,
            when,
            answer: Some(answer),
        };
        (outgoing, Recorded::answered(answered))
    }

    pub(crate) fn name(&self) -> &str {
        &self.event.name
    }

    pub(super) fn answer(mut self, result: Result<(), EmitError>) {
        let Some(answer) = self.answer.take() else {
            return;
        };
        match &result {
            Ok(()) => self.hub.emissions.recorded(1),
            Err(error) if error.is_skipped() => self.hub.emissions.skipped(),
            Err(_) => self.hub.emissions.not_recorded(1),
        }
        // Nobody may be waiting for it.
        let _ = answer.send(result);
    }
}

impl Drop for Outgoing {
    /// Its runtime ended, or there was none: not even then in silence.
    fn drop(&mut self) {
        if self.answer.is_some() {
            self.hub.emissions.not_recorded(1);
            observe::not_recorded(1);
        }
    }
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Outgoing").field(&self.event.name).finish()
    }
}

/// A request, as far as events care: it holds deliveries until its response is out.
pub(crate) trait Holder: Send + Sync {
    /// Holds a delivery until the release, or starts it at once where that has been.
    fn hold(self: Arc<Self>, executor: &Executor, delivery: Node);

    /// Records what waits in the outbox under this number, without waiting for the answer.
    fn hurry(self: Arc<Self>, number: u64);
}
