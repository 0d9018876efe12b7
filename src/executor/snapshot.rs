//! What an executor is doing, at a glance.

use std::time::Duration;

use super::Shared;
use crate::sync::Arc;
use crate::task::TaskId;

/// The state of an executor.
///
/// `accepted = completed + discarded + skipped + cancelled + kept + outstanding`, exactly when it is quiet;
/// under load the numbers are read one after the other and differ by the transitions in flight.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    /// Tasks accepted since the executor was made.
    pub accepted: u64,
    /// Tasks that ended well.
    pub completed: u64,
    /// Tasks that failed for good. Replaying one from the dead letters counts it as accepted again.
    pub discarded: u64,
    /// Tasks whose condition did not hold.
    pub skipped: u64,
    /// Tasks that were taken back, abandoned at a drain's deadline, or lost with their runtime.
    pub cancelled: u64,
    /// Deliveries that went back to their store: for another attempt, because nobody here can run
    /// them, or unfinished at a drain.
    pub kept: u64,
    /// Tasks that were not accepted because the executor was full.
    pub rejected_full: u64,
    /// Tasks that were not accepted because their request had registered too many.
    pub rejected_request_limit: u64,
    /// Tasks that were not accepted because the executor had been drained.
    pub rejected_closed: u64,
    /// Retries that were decided on.
    pub retries: u64,
    /// Dead letters that were replayed.
    pub replayed: u64,
    /// Attempts that were reported as stuck.
    pub stuck: u64,
    /// Accepted and unfinished tasks.
    pub outstanding: u64,
    /// Of these: registered, and their response is still on its way.
    pub collected: u64,
    /// Of these: released, and waiting for a worker.
    pub queued: u64,
    /// Of these: waiting for their next attempt.
    pub waiting: u64,
    /// Of these: attempts that run.
    pub running: Vec<RunningTask>,
    /// How long the oldest of the queued tasks that have not started has waited.
    pub oldest_wait: Option<Duration>,
    /// Places that `reserve` has given out and that are not used yet, and those of deliveries whose end
    /// is being written down.
    pub reserved: u64,
    /// Requests in flight.
    pub open_requests: u64,
    /// Dead letters kept.
    pub dead_letters: u64,
    /// Dead letters that fell out because there were too many.
    pub dead_letters_lost: u64,
}

/// An attempt that runs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunningTask {
    /// The task's identity.
    pub id: TaskId,
    /// The task's name.
    pub name: String,
    /// The attempt's number, counted from 1.
    pub attempt: u32,
    /// How long it has been running; zero for one that has not waited yet, unless it is stuck.
    pub age: Duration,
    /// Whether it runs on a thread of the blocking lane.
    pub blocking: bool,
    /// Whether it has outlived its timeout and cannot be stopped.
    pub stuck: bool,
}

impl Shared {
    /// How many tasks are queued, running and waiting for their next attempt.
    #[cfg(feature = "metrics")]
    pub(crate) fn occupancy(&self) -> (usize, usize, usize) {
        let queued = self.queue.len() + self.blocking.len();
        (queued, self.slots.count(), self.waiting.len())
    }

    pub(super) fn snapshot(self: &Arc<Self>) -> Snapshot {
        let c = &self.counters;
        let now = self.clock.now();
        let running: Vec<RunningTask> = self
            .slots
            .running()
            .into_iter()
            .filter(|attempt| !attempt.abandoned)
            .map(|attempt| RunningTask {
                id: attempt.id,
                name: attempt.name.as_str().to_owned(),
                attempt: attempt.attempt,
                age: attempt
                    .since
                    .map(|since| now.since(since))
                    .into_iter()
                    .chain(attempt.stuck)
                    .max()
                    .unwrap_or_default(),
                blocking: attempt.blocking,
                stuck: attempt.stuck.is_some(),
            })
            .collect();
        let quick = self.queue.oldest(|node| node.header().queued_at);
        let queued_at = quick.into_iter().chain(self.blocking.oldest()).min();
        let queued = (self.queue.len() + self.blocking.len()) as u64;
        let waiting = self.waiting.len() as u64;
        let (handlers, responses) = self.open_requests();
        let (completed, discarded) = (c.completed.get(), c.discarded.get());
        let (skipped, cancelled) = (c.skipped.get(), c.cancelled.get());
        let kept = c.kept.get();
        // Read last: each of its tasks may have ended since, and then the difference is not negative.
        let accepted = c.accepted.get();
        let outstanding =
            accepted.saturating_sub(completed + discarded + skipped + cancelled + kept);
        Snapshot {
            accepted,
            completed,
            discarded,
            skipped,
            cancelled,
            kept,
            rejected_full: c.rejected_full.get(),
            rejected_request_limit: c.rejected_request.get(),
            rejected_closed: c.rejected_closed.get(),
            retries: c.retries.get(),
            replayed: c.replayed.get(),
            stuck: c.stuck.get(),
            outstanding,
            collected: outstanding.saturating_sub(queued + waiting + running.len() as u64),
            queued,
            waiting,
            running,
            oldest_wait: queued_at.map(|at| now.since(at)),
            reserved: (self.admission.taken() as u64).saturating_sub(outstanding),
            open_requests: (handlers + responses) as u64,
            dead_letters: self.letters.len() as u64,
            dead_letters_lost: c.dead_letters_lost.get(),
        }
    }
}
