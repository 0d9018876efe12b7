//! An event on its way into a store, and the outbox of a request that it waits in.

use tokio::sync::oneshot;

use super::hub::Hub;
use super::store::NewEvent;
use super::table::Subscription;
use super::{EmitError, Recorded};
use crate::executor::Executor;
use crate::sync::Arc;
use crate::task::{Node, When};

/// An event that was written as JSON and is not recorded yet.
pub(crate) struct Outgoing {
    pub(super) hub: Arc<Hub>,
    /// Without its deliveries.
    pub(super) event: NewEvent,
    pub(super) listeners: Vec<Arc<Subscription>>,
    pub(crate) when: When,
    pub(super) answer: oneshot::Sender<Result<(), EmitError>>,
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
            answer,
        };
        (outgoing, Recorded::answered(answered))
    }

    pub(crate) fn name(&self) -> &str {
        &self.event.name
    }

    pub(super) fn answer(self, result: Result<(), EmitError>) {
        // Nobody may be waiting for it.
        let _ = self.answer.send(result);
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
