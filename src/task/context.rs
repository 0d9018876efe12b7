//! What an attempt can ask for.

use std::fmt;
use std::mem::ManuallyDrop;

use tokio_util::sync::CancellationToken;

use super::{Name, TaskId};
use crate::pool::{Attendant, Pool};
use crate::response::{End, ResponseInfo};
use crate::sync::Arc;

/// The request that a task came from, as it was when its response was out. Made at the release: until
/// then a task is in the collector, and its tasks are the last that need to know of the request.
///
/// Behind one thin pointer, which a dead letter keeps, too: it leads to no executor.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) response: ResponseInfo,
    /// Another task may have to write the response's last bytes: it is to go before these tasks.
    pub(crate) others_first: bool,
    /// The span in which the request's first task was registered.
    pub(crate) follows: Option<Follows>,
}

thread_local! {
    /// In a burst they are more than the allocator keeps at hand: making and dropping one was 242 of the 4,174
    /// instructions of a request that defers one task, and is 96.
    static POOL: ManuallyDrop<Pool<Origin>> = const { Pool::new() };

    static ATTENDANT: Attendant = const { Attendant(|| POOL.with(|pool| pool.close())) };
}

impl Origin {
    /// `fill` gets one of which nothing is known yet. It is written where it lies: put together elsewhere it
    /// would be moved twice.
    #[inline]
    pub(crate) fn new(fill: impl FnOnce(&mut Self)) -> Arc<Self> {
        let mut origin = match POOL.with(|pool| pool.take()) {
            Some(pooled) => pooled,
            None => Self::blank(),
        };
        match Arc::get_mut(&mut origin) {
            Some(origin) => fill(origin),
            None => unreachable!("nobody else has it"),
        }
        origin
    }

    #[cold]
    fn blank() -> Arc<Self> {
        Arc::new(Self {
            response: ResponseInfo::new(None, End::Stalled),
            others_first: true,
            follows: None,
        })
    }

    /// A task of it is over. Not inlined: tasks without a request are emptied by the same code, and it cost
    /// them 30 of 742 instructions.
    #[inline(never)]
    pub(super) fn let_go(mut this: Arc<Self>) {
        if let Some(origin) = Arc::get_mut(&mut this) {
            origin.response.body_error = None;
            origin.follows = None;
            let attend = || ATTENDANT.try_with(|_| {}).is_ok();
            POOL.with(|pool| pool.put(this, attend));
        }
    }
}

/// The span in which a task was registered. Only what outlives it: a clone of the span would keep it
/// open, and the request's time would grow by the task's.
#[derive(Clone, Debug)]
pub(crate) struct Follows {
    pub(crate) id: tracing::span::Id,
    #[cfg(feature = "opentelemetry")]
    pub(crate) context: Option<Box<opentelemetry::trace::SpanContext>>,
}

/// One attempt, as the executor describes it to a body that asks for it.
pub(crate) struct Attempt {
    pub(crate) id: TaskId,
    pub(crate) name: Name,
    pub(crate) number: u32,
    pub(crate) last_error: Option<Arc<str>>,
    pub(crate) origin: Option<Arc<Origin>>,
    pub(crate) token: CancellationToken,
}

/// What an attempt can ask for; see [`Task::with_context`](crate::Task::with_context).
///
/// Cheap to clone. A replay sees what was captured at registration: capture ids, not rows.
#[derive(Clone)]
pub struct TaskContext(Arc<Attempt>);

impl TaskContext {
    pub(crate) fn new(attempt: Attempt) -> Self {
        Self(Arc::new(attempt))
    }

    /// The task's identity, the same over all attempts and replays: an idempotency key.
    pub fn id(&self) -> TaskId {
        self.0.id
    }

    /// The task's name.
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// The number of this attempt, counted from 1. A replay starts again at 1.
    pub fn attempt(&self) -> u32 {
        self.0.number
    }

    /// How the attempt before this one ended, at most 1 KiB of its text.
    pub fn last_error(&self) -> Option<&str> {
        self.0.last_error.as_deref()
    }

    /// What became of the response; `None` for a task that was submitted without a request.
    pub fn response(&self) -> Option<&ResponseInfo> {
        self.0.origin.as_ref().map(|origin| &origin.response)
    }

    /// Cancelled when the attempt outlives its timeout and when a drain reaches its deadline.
    ///
    /// An async task is dropped at its next await point then anyway; the token is for what it started
    /// elsewhere, and for blocking tasks, which nothing else can stop.
    pub fn cancellation(&self) -> CancellationToken {
        self.0.token.clone()
    }

    /// Shorthand for `cancellation().is_cancelled()`.
    pub fn is_cancelled(&self) -> bool {
        self.0.token.is_cancelled()
    }
}

impl fmt::Debug for TaskContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskContext")
            .field("id", &self.id())
            .field("name", &self.name())
            .field("attempt", &self.attempt())
            .field("last_error", &self.last_error())
            .field("response", &self.response())
            .finish()
    }
}
