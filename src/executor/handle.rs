//! [`Executor`]: the handle that users hold.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::panic::Location;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::{
    Closed, DeadLetters, DrainReport, ExecutorBuilder, Place, Rejected, Shared, Snapshot,
    TaskHandle,
};
use crate::observe;
use crate::sync::Arc;
use crate::task::{IntoTask, Node, Task};

/// Runs tasks: bounded, with retries, and with an account of each.
///
/// A [`DeferLayer`](crate::DeferLayer) has one of its own. Share one between layers to share its
/// bounds, or make one per resource, so that a slow mail server does not hold up the cache. Cheap to
/// clone; all clones are the same executor.
///
/// # Examples
///
/// Without a request:
///
/// ```
/// use std::time::Duration;
/// use tower_defer::Executor;
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let executor = Executor::builder().concurrency(4).build();
/// executor.submit(|| async { println!("hello") });
///
/// executor.idle().await; // no task is left
/// assert_eq!(executor.snapshot().completed, 1);
///
/// let report = executor.drain(Duration::from_secs(10)).await;
/// assert!(!report.timed_out);
/// # });
/// ```
#[derive(Clone)]
pub struct Executor {
    shared: Arc<Shared>,
}

impl Executor {
    /// An executor with the defaults of [`ExecutorBuilder`].
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Bounds and policies of one's own.
    pub fn builder() -> ExecutorBuilder {
        ExecutorBuilder::default()
    }

    /// Gives a task to the executor, without a request. It starts as soon as a worker is free; its
    /// condition is not asked. Where there is no room, the overflow policy decides, and the handle
    /// says whether the task was accepted.
    ///
    /// The executor runs on the runtime of the caller, unless it has one of its own. Called where
    /// there is none (or one without a timer, which attempts need), the task stays queued until the
    /// executor is used from within a runtime; that is logged as an error.
    #[track_caller]
    pub fn submit(&self, task: impl IntoTask) -> TaskHandle {
        let node = located(task.into_task(), Location::caller());
        match self.shared.admit() {
            Ok(place) => self.accept(node, place),
            Err(reason) => {
                self.shared.reject_for_good(node, reason);
                TaskHandle::rejected(reason)
            }
        }
    }

    /// As [`submit`](Self::submit), and gives the task back where there is no room, whatever the
    /// overflow policy.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with the task and the reason.
    #[track_caller]
    pub fn try_submit(&self, task: impl IntoTask) -> Result<TaskHandle, Rejected> {
        let node = located(task.into_task(), Location::caller());
        match self.shared.try_admit() {
            Ok(place) => Ok(self.accept(node, place)),
            Err(reason) => {
                self.shared.reject(&node, reason);
                Err(Rejected::new(Task::from_node(node), reason))
            }
        }
    }

    /// Waits for room and reserves it. Served in order.
    ///
    /// # Examples
    ///
    /// A producer that goes no faster than its tasks:
    ///
    /// ```
    /// # use tower_defer::{Closed, Executor};
    /// # async fn import(_: u32) {}
    /// # async fn produce(executor: Executor) -> Result<(), Closed> {
    /// for row in 0..1_000_000 {
    ///     executor.reserve().await?.submit(move || import(row));
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Closed`] once the executor has been drained.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the line; a place that it had been given already goes to the next.
    pub fn reserve(&self) -> Reserve {
        Reserve {
            shared: self.shared.clone(),
            ticket: None,
        }
    }

    /// Finishes what was accepted, also what running tasks and requests in flight still register, and
    /// then closes: what is registered afterwards is rejected. What waits for a retry gets its next
    /// attempt at once, as its last. When `within` has passed, the rest is cancelled and named in the
    /// report.
    ///
    /// The report counts what ends after the drain began; what ended before is in the
    /// [`snapshot`](Self::snapshot) only. A test that wants to know whether a task completed waits with
    /// [`idle`](Self::idle) and asks that.
    ///
    /// Several may drain at once; the earliest deadline holds, and each gets a report of all that
    /// happened since the first began. After the deadline it waits for at most another 100 ms, for the
    /// runtime to drop what was cancelled; an attempt that has not yielded by then is reported as
    /// [`StillRunning`](crate::UnfinishedState::StillRunning).
    ///
    /// [`Shutdown`](crate::Shutdown) does this and stops the server before it.
    ///
    /// A task may drain its own executor: it is outstanding itself, so that ends with the deadline, and
    /// with the task.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with a timer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the executor draining (retries at once) but open, and closed where
    /// the deadline has passed.
    pub async fn drain(&self, within: Duration) -> DrainReport {
        let deadline = self.shared.clock.now().saturating_add(within);
        self.shared.drain(deadline, true).await
    }

    /// Waits until no task is outstanding: for tests and batch programs. Nothing is closed, and retries
    /// keep their delays. A task whose response is still held is outstanding: read the response to its
    /// end, or drop it, before.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn idle(&self) {
        self.shared.idle().await;
    }

    /// Counts and states, now. It takes each of the executor's locks for a moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot()
    }

    /// The tasks that failed for good: list, group, replay, discard.
    #[must_use]
    pub fn dead_letters(&self) -> DeadLetters {
        DeadLetters::new(self.shared.clone())
    }

    pub(crate) fn from_shared(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn accept<H: Deref<Target = Shared>>(
        &self,
        mut node: Node,
        place: Place<H>,
    ) -> TaskHandle {
        let id = node.identify();
        self.shared.accept(&node, place);
        observe::submitted(&mut node);
        let handle = TaskHandle::accepted(id, self.shared.clone());
        self.shared.enqueue_one(node, None);
        handle
    }
}

/// An unnamed task is named after its closure, and placed where it was registered.
pub(crate) fn located(task: Task, location: &'static Location<'static>) -> Node {
    let mut node = task.into_node();
    node.header_mut().location = location;
    node
}

impl Default for Executor {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.fmt(f)
    }
}

/// The future of [`Executor::reserve`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct Reserve {
    shared: Arc<Shared>,
    ticket: Option<u64>,
}

impl Future for Reserve {
    type Output = Result<Permit, Closed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let taken = ready!(this.shared.admission.poll_take(&mut this.ticket, cx));
        Poll::Ready(match taken {
            Ok(()) => Ok(Permit {
                place: Place::new(this.shared.clone()),
                executor: this.executor(),
            }),
            Err(_) => Err(Closed(())),
        })
    }
}

impl Reserve {
    fn executor(&self) -> Executor {
        Executor {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.shared.leave_line(ticket);
        }
    }
}

/// Room for one task. Dropping it gives the room back.
#[derive(Debug)]
#[must_use = "dropping a permit gives its room back"]
pub struct Permit {
    place: Place,
    executor: Executor,
}

impl Permit {
    /// Uses the room.
    #[track_caller]
    pub fn submit(self, task: impl IntoTask) -> TaskHandle {
        let node = located(task.into_task(), Location::caller());
        self.executor.accept(node, self.place)
    }

    pub(crate) fn into_parts(self) -> (Executor, Place) {
        (self.executor, self.place)
    }
}
