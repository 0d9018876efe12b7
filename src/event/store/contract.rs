//! What a store promises.
//!
//! Not how: [`Memory`](super::Memory) shows it most plainly. `conformance` has one test function
//! for each numbered promise, under the same number.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::Notify;

use super::error::StoreError;
use super::life::{Settle, State};
use super::query::{
    AddPast, Counts, Cursor, Filter, Group, Health, Listed, Prune, Pruned, Replay, Walked,
};
use super::record::{AttemptToken, Claimed, EventId, NewEvent, Receipt, Settled};

/// The answer of a store: boxed, so that `dyn Store` works.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keeps events and their deliveries until every subscriber has them.
///
/// All times are unix milliseconds and come from the caller: a store reads no clock, so that it can
/// be tested under a simulated one.
///
/// # Promises
///
/// 1. **Atomic, durable append.** The events of a batch are recorded with all their deliveries or
///    not at all, and are durable when the future is ready. After an error nothing of the batch is
///    delivered by this process; after a crash a batch whose recording failed may be found
///    recorded all the same (at least once).
/// 2. **Idempotent append.** An event whose key is known for its name is not recorded again; its
///    receipt says so and names the first one. The other events of the batch are recorded.
/// 3. **Claims are exclusive and in due order.** A claim returns at most `limit` deliveries that
///    are due, the longest due first (then by event, then by subscriber), each under a fresh
///    token, and no delivery is running under two valid tokens.
/// 4. **Attempts count at the start.** The claim counts the attempt before it returns, so that the
///    count outlives the process, however that dies. A power cut may take it back, together with
///    all that came later and was not durable either: then the attempt was never begun.
/// 5. **Settling is by token.** A settle with a void token changes nothing and says
///    [`Settled::Stale`]. The settles of one call are independent of each other.
/// 6. **Retries keep their due time and error** across claims and crashes; a delivery is not
///    claimed before it is due.
/// 7. **A release consumes nothing**: the delivery is due at once, the attempt does not count.
/// 8. **Deliveries are independent.** What happens to one of an event's deliveries changes nothing
///    about the others.
/// 9. **Recovery is immediate.** What was running when the process died is due at once when the
///    store is opened, without waiting for any timeout.
/// 10. **Crashes count.** Each time the process dies while a delivery is running marks it; at the
///     third mark ([`CRASHED`](super::CRASHED)) it is discarded instead of started again. A release
///     or an orderly close sets no mark. The mark cannot tell the culprit from what merely ran
///     beside it, so a claim hands out a suspect (one mark less,
///     [`SUSPECT`](super::SUSPECT)) alone, in its turn: wait until nothing else runs, run it, and
///     claim on when it is settled. Then only the culprit gets the last mark.
/// 11. **Dead letters stay** until they are replayed or discarded: they can be listed page by page,
///     and grouped by subscriber and error.
/// 12. **Replay is idempotent by its name.** Under one name each delivery is replayed at most once,
///     also when the replay was cut short by a crash and called again. A replayed delivery keeps
///     its identity and begins with attempt 1.
/// 13. **Discarding dead letters** moves exactly those that match into history.
/// 14. **Parked deliveries wait**, are never claimed, can be listed, and go on when they are
///     unparked, under another subscriber's name if it was renamed, or are discarded, into history.
/// 15. **A new subscriber can be given the past**, and gets no event twice.
/// 16. **Nothing is pruned without a policy**, and what is unfinished or dead never is.
/// 17. **Counts tell the truth**: every delivery is in exactly one state.
/// 18. **Wake-ups are hints**: they may be lost or come for nothing; nothing depends on them but
///     latency.
/// 19. **A closed store refuses** with an error that says so; what was accepted before is finished
///     first, and what was running is handed back, unconsumed.
/// 20. **Texts come back as they went in**: names, payloads, contexts and errors, except that an
///     error is cut to 4 KiB.
///
/// # Cancel safety
///
/// Dropping a future before it was first polled does nothing. Later, the request may already be
/// in the store's hands, and is then carried out all the same: a batch is recorded. What was claimed
/// for an answer that nobody takes is handed back, as by a release.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Records a batch (promises 1, 2). The receipts are in the order of the events.
    ///
    /// # Errors
    ///
    /// [`is_full`](StoreError::is_full), [`is_io`](StoreError::is_io),
    /// [`is_locked`](StoreError::is_locked) and the like: nothing was recorded, it can be tried
    /// again. [`is_invalid`](StoreError::is_invalid): one event names a subscriber twice, or a name
    /// is empty.
    fn append(&self, events: Vec<NewEvent>, now_ms: i64) -> StoreFuture<'_, Vec<Receipt>>;

    /// Claims what is due (promises 3, 4, 10). Fewer than `limit` does not mean that no more is due:
    /// a suspect comes alone. [`next_due`](Self::next_due) tells.
    ///
    /// # Errors
    ///
    /// When the claim could not be written; nothing was claimed.
    fn claim(&self, limit: usize, now_ms: i64) -> StoreFuture<'_, Vec<Claimed>>;

    /// Settles attempts (promises 5 to 8). The answers are in the order of the requests.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was settled, and the tokens are still good.
    fn settle(
        &self,
        settles: Vec<(AttemptToken, Settle)>,
        now_ms: i64,
    ) -> StoreFuture<'_, Vec<Settled>>;

    /// Puts parked deliveries that match back into the queue, at most `limit`; if `rename` is
    /// given, under that subscriber's name (promise 14). Returns how many; fewer than `limit`
    /// means that no more match. What the new name has a delivery of already stays parked.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was changed.
    fn unpark(
        &self,
        filter: Filter,
        rename: Option<Arc<str>>,
        limit: usize,
        now_ms: i64,
    ) -> StoreFuture<'_, u64>;

    /// Lists deliveries in a state, by event and subscriber, after `after`, at most `limit`
    /// (promises 11, 14).
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    fn list(
        &self,
        state: State,
        filter: Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> StoreFuture<'_, Vec<Listed>>;

    /// Groups the dead letters that match by subscriber and error, the largest groups first, at
    /// most `limit` groups (promise 11).
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    fn group(&self, filter: Filter, limit: usize) -> StoreFuture<'_, Vec<Group>>;

    /// Replays dead letters (promise 12). Returns how many; fewer than the limit means that the
    /// replay is over.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was replayed.
    fn replay(&self, replay: Replay, now_ms: i64) -> StoreFuture<'_, u64>;

    /// Discards dead letters that match, at most `limit` (promise 13). Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was discarded.
    fn discard(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64>;

    /// Discards parked deliveries that match, at most `limit` (promise 14). Returns how many.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was discarded.
    fn discard_parked(&self, filter: Filter, limit: usize, now_ms: i64) -> StoreFuture<'_, u64>;

    /// Gives past events to a subscriber (promise 15), due at once.
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was added.
    fn add_past(&self, past: AddPast, now_ms: i64) -> StoreFuture<'_, Walked>;

    /// Prunes finished events by a policy (promise 16).
    ///
    /// # Errors
    ///
    /// When it could not be made durable; nothing was pruned.
    fn prune(&self, policy: Prune) -> StoreFuture<'_, Pruned>;

    /// Counts deliveries by state (promise 17). May read every row, where a store keeps no
    /// counters: for metrics every few seconds, not for decisions.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    fn counts(&self) -> StoreFuture<'_, Counts>;

    /// When the next delivery is due (unix ms; in the past if one is overdue); `None`: none waits.
    /// Cheap.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    fn next_due(&self) -> StoreFuture<'_, Option<i64>>;

    /// Told when something may have become due or claimable (promise 18). One waiter is woken, or
    /// the next one to wait: made for one delivery loop, which polls now and then all the same.
    fn wakeups(&self) -> Arc<Notify>;

    /// Writes something small and durable, so that [`health`](Self::health) tells the truth also where
    /// nothing else is written. Asked now and then while there is trouble. Default: there is nothing to
    /// find out.
    ///
    /// # Errors
    ///
    /// What is still wrong.
    fn probe(&self, now_ms: i64) -> StoreFuture<'_, ()> {
        let _ = now_ms;
        Box::pin(std::future::ready(Ok(())))
    }

    /// How the store is. Does not wait for anything.
    fn health(&self) -> Health;

    /// Closes the store (promise 19): later calls fail, the data are free for another process when
    /// the future is ready. Closing twice is no error.
    ///
    /// # Errors
    ///
    /// When the running deliveries could not be handed back; they are recovered at the next open.
    fn close(&self) -> StoreFuture<'_, ()>;
}

/// What every store checks before it takes a batch.
pub(crate) fn check(events: &[NewEvent]) -> Result<(), StoreError> {
    for event in events {
        if event.name.is_empty() {
            return Err(StoreError::invalid("an event without a name"));
        }
        let mut names = HashSet::with_capacity(event.deliveries.len());
        for delivery in &event.deliveries {
            if delivery.subscriber.is_empty() {
                return Err(StoreError::invalid("a subscriber without a name"));
            }
            if !names.insert(&delivery.subscriber) {
                return Err(StoreError::invalid("one subscriber twice for one event"));
            }
        }
    }
    Ok(())
}

/// Whether a policy lets an event go, its deliveries aside: `newest` is the last event recorded,
/// which always stays, so that its number is never given again.
pub(crate) fn may_prune(policy: &Prune, id: EventId, recorded_ms: i64, newest: EventId) -> bool {
    let is_old = policy.before_ms.is_some_and(|before| recorded_ms < before);
    let is_beyond = policy
        .keep_last
        .is_some_and(|keep| i64::try_from(keep).is_ok_and(|keep| id.get() <= newest.get() - keep));
    id != newest && (is_old || is_beyond)
}
