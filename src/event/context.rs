//! What a subscriber can ask about its attempt.

use std::fmt;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use super::store::StoredEvent;
use crate::response::ResponseInfo;
use crate::sync::Arc;
use crate::task::TaskContext;

/// What a subscriber can ask about its attempt; see
/// [`Subscriber::with_context`](super::Subscriber::with_context). Cheap to clone.
#[derive(Clone)]
pub struct DeliveryContext {
    task: TaskContext,
    /// With the subscriber's name as it was recorded, which an alias does not change.
    stored: Option<(Arc<StoredEvent>, Arc<str>)>,
}

impl DeliveryContext {
    pub(super) fn in_memory(task: TaskContext) -> Self {
        Self { task, stored: None }
    }

    pub(super) fn stored(task: TaskContext, event: Arc<StoredEvent>, recorded: Arc<str>) -> Self {
        Self {
            task,
            stored: Some((event, recorded)),
        }
    }

    /// The delivery's identity, the same over all its attempts, restarts and replays: an idempotency
    /// key for whoever is called. A delivery is made *at least* once, so hand it on where a repetition
    /// would hurt. With a store it is unique within that store.
    #[must_use]
    pub fn id(&self) -> String {
        match &self.stored {
            Some((event, subscriber)) => format!("{}/{subscriber}", event.id),
            None => self.task.id().to_string(),
        }
    }

    /// The subscriber's name.
    #[must_use]
    pub fn subscriber(&self) -> &str {
        self.task.name()
    }

    /// The number of this attempt, counted from 1. A replay starts again at 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.task.attempt()
    }

    /// How the attempt before this one ended.
    #[must_use]
    pub fn last_error(&self) -> Option<&str> {
        self.task.last_error()
    }

    /// When the event was recorded; `None` without a store.
    #[must_use]
    pub fn recorded_at(&self) -> Option<SystemTime> {
        let (event, _) = self.stored.as_ref()?;
        let since = Duration::from_millis(u64::try_from(event.recorded_ms).unwrap_or(0));
        SystemTime::UNIX_EPOCH.checked_add(since)
    }

    /// What became of the response, where this attempt was started by its release; `None` after a
    /// restart, for a later attempt from a store, and for an event without a request.
    #[must_use]
    pub fn response(&self) -> Option<&ResponseInfo> {
        self.task.response()
    }

    /// Cancelled when the attempt outlives its timeout and when a drain reaches its deadline.
    #[must_use]
    pub fn cancellation(&self) -> CancellationToken {
        self.task.cancellation()
    }
}

impl fmt::Debug for DeliveryContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryContext")
            .field("id", &self.id())
            .field("subscriber", &self.subscriber())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}
