//! Room that a handler waits for.

use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::Defer;
use crate::executor::{Closed, Permit, Rejected, Reserve, TaskHandle, located};
use crate::task::{IntoTask, Task};

/// The future of [`Defer::reserve`].
#[must_use = "futures do nothing unless awaited"]
pub struct DeferReserve {
    defer: Defer,
    reserve: Reserve,
}

/// Room for one task of this request. Dropping it gives the room back.
#[must_use = "dropping a permit gives its room back"]
pub struct DeferPermit {
    defer: Defer,
    permit: Permit,
}

impl DeferReserve {
    pub(super) fn new(defer: Defer, reserve: Reserve) -> Self {
        Self { defer, reserve }
    }
}

impl Future for DeferReserve {
    type Output = Result<DeferPermit, Closed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let permit = ready!(Pin::new(&mut self.reserve).poll(cx));
        Poll::Ready(permit.map(|permit| DeferPermit {
            defer: self.defer.clone(),
            permit,
        }))
    }
}

impl DeferPermit {
    /// Registers a task with the reserved room.
    ///
    /// # Errors
    ///
    /// [`Rejected`] where the request has registered as many tasks as it may: room in the executor does
    /// not lift that limit.
    #[track_caller]
    pub fn run(self, task: impl IntoTask) -> Result<TaskHandle, Rejected> {
        let node = located(task.into_task(), Location::caller());
        let (executor, place) = self.permit.into_parts();
        self.defer.register(node, place).map_err(|(node, reason)| {
            executor.shared().reject(&node, reason);
            Rejected::new(Task::from_node(node), reason)
        })
    }
}

impl fmt::Debug for DeferReserve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeferReserve").field(&self.defer).finish()
    }
}

impl fmt::Debug for DeferPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeferPermit").field(&self.defer).finish()
    }
}
