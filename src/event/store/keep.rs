//! For how long finished events are kept: the policy that a program states once, and whoever runs
//! deliveries applies now and then.
//!
//! Not a store's own: it prunes when it is asked to and never by itself (promise 16).

use std::time::Duration;

use super::StoreError;
use super::contract::Store;
use super::query::{Prune, Pruned};
use super::record::EventId;

/// Events that one step looks at: some milliseconds of the writer, and then those go first who wait.
const STEP: usize = 500;

/// Which finished events are kept. What is unfinished, parked or dead stays in any case, and so does
/// the newest event.
///
/// With an event goes its idempotency key (the same key is then a new event), the memory of who has
/// had it (a new subscriber cannot be given it any more), and the marks of replays.
///
/// There is no default: nothing goes that nobody said may go. A week is a good beginning: long enough to
/// find out on Monday what Friday's deployment has done, and a file stops growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Keep {
    age_ms: Option<i64>,
    last: Option<u64>,
}

impl Keep {
    /// All of them, for ever: the file grows.
    pub const fn everything() -> Self {
        Self {
            age_ms: None,
            last: None,
        }
    }

    /// Those recorded no longer ago than this.
    pub fn newer_than(age: Duration) -> Self {
        Self {
            age_ms: Some(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)),
            last: None,
        }
    }

    /// The last so many recorded, also those that are younger than the age, if there is one.
    pub const fn at_most(mut self, events: u64) -> Self {
        self.last = Some(events);
        self
    }

    /// One step of applying it, as a request to [`Store::prune`]; `None`: nothing is to be pruned.
    #[must_use]
    pub fn step(&self, after: Option<EventId>, now_ms: i64) -> Option<Prune> {
        let is_all = self.age_ms.is_none() && self.last.is_none();
        (!is_all).then(|| Prune {
            before_ms: self.age_ms.map(|age| now_ms.saturating_sub(age)),
            keep_last: self.last,
            after,
            limit: STEP,
        })
    }

    /// Applies it, in steps between which others write, and logs what went. How much ever went is in
    /// [`Counts::pruned`](super::Counts::pruned).
    ///
    /// # Errors
    ///
    /// As [`Store::prune`]; what was pruned until then stays pruned.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it stops after the step that it is at.
    pub async fn apply(&self, store: &dyn Store, now_ms: i64) -> Result<Pruned, StoreError> {
        let mut total = Pruned::default();
        let mut after = None;
        while let Some(step) = self.step(after, now_ms) {
            let pruned = store.prune(step).await?;
            total.events += pruned.events;
            total.deliveries += pruned.deliveries;
            after = pruned.next;
            if after.is_none() {
                break;
            }
        }
        if total.events > 0 {
            tracing::info!(
                events = total.events,
                deliveries = total.deliveries,
                "finished events pruned, as their policy says"
            );
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_a_request() {
        assert_eq!(Keep::everything().step(None, 10), None);
        let step = Keep::newer_than(Duration::from_millis(3))
            .at_most(7)
            .step(Some(EventId::new(5)), 10)
            .expect("a step");
        assert_eq!((step.before_ms, step.keep_last), (Some(7), Some(7)));
        assert_eq!(step.after, Some(EventId::new(5)));
    }
}
