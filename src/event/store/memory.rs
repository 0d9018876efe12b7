//! The reference: every promise of [`Store`] in the plainest form, for reading, for tests, and for
//! programs that want events without a file.
//!
//! Not durable, and not made for a million unfinished deliveries: a claim looks at all of them.

mod room;

use std::sync::Arc;

use tokio::sync::Notify;

use self::room::{Key, Room};
use super::StoreError;
use super::contract::{Store, StoreFuture, check};
use super::life::{CRASH_LIMIT, Settle, State};
use super::query::{
    AddPast, Counts, Cursor, Filter, Group, Health, Listed, Prune, Pruned, Replay, Walked,
};
use super::record::{AttemptToken, Claimed, NewEvent, Receipt, Settled};
use crate::sync::Mutex;

/// A store in memory.
#[derive(Debug, Default)]
pub struct Memory {
    room: Mutex<Room>,
    wakeups: Arc<Notify>,
}

impl Memory {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What another process would find after this one was killed now: for tests of what happens
    /// then. This store goes on as it is.
    #[must_use]
    pub fn after_crash(&self) -> Self {
        let mut room = self.room.lock().clone();
        room.closed = false;
        let running: Vec<Key> = room
            .unfinished
            .iter()
            .filter(|(_, life)| life.state == State::Running)
            .map(|(key, _)| key.clone())
            .collect();
        for key in running {
            room.change(&key, |life| life.recover(CRASH_LIMIT));
        }
        Self {
            room: Mutex::new(room),
            wakeups: Arc::default(),
        }
    }

    /// Every method is one step under one lock, so each is atomic.
    fn step<'a, T: Send + 'a>(
        &'a self,
        wakes: bool,
        step: impl FnOnce(&mut Room) -> Result<T, StoreError> + Send + 'a,
    ) -> StoreFuture<'a, T> {
        Box::pin(async move {
            let result = {
                let mut room = self.room.lock();
                if room.closed {
                    return Err(StoreError::closed());
                }
                step(&mut room)
            };
            if wakes {
                self.wakeups.notify_one();
            }
            result
        })
    }
}

impl Store for Memory {
    fn append(&self, events: Vec<NewEvent>, now_ms: i64) -> StoreFuture<'_, Vec<Receipt>> {
        self.step(true, move |room| {
            check(&events)?;
            Ok(events
                .into_iter()
                .map(|event| room.append(event, now_ms))
                .collect())
        })
    }

    fn claim(&self, limit: usize, now_ms: i64) -> StoreFuture<'_, Vec<Claimed>> {
        self.step(false, move |room| {
            let mut due: Vec<(i64, Key)> = room
                .unfinished
                .iter()
                .filter_map(|(key, life)| Some((life.due_ms?, key.clone())))
                .filter(|(due_ms, _)| *due_ms <= now_ms)
                .collect();
            due.sort();
            due.truncate(limit);
            // A suspect goes alone: the first, or else it ends the claim.
            let is_suspect = |(_, key): &(i64, Key)| room.unfinished[key].is_suspect();
            if let Some(suspect) = due.iter().position(is_suspect) {
                due.truncate(suspect.max(1));
            }
            Ok(due
                .iter()
                .filter_map(|(_, key)| room.claim(key, now_ms))
                .collect())
        })
    }

    fn settle(
        &self,
        settles: Vec<(AttemptToken, Settle)>,
        now_ms: i64,
    ) -> StoreFuture<'_, Vec<Settled>> {
        self.step(true, move |room| {
            Ok(settles
                .iter()
                .map(|(token, settle)| room.settle(token, settle, now_ms))
                .collect())
        })
    }

    fn unpark(
        &self,
        filter: Filter,
        rename: Option<Arc<str>>,
        limit: usize,
        now_ms: i64,
    ) -> StoreFuture<'_, u64> {
        self.step(true, move |room| {
            Ok(room.unpark(&filter, rename.as_ref(), limit, now_ms))
        })
    }

    fn list(
        &self,
        state: State,
        filter: Filter,
        after: Option<Cursor>,
        limit: usize,
    ) -> StoreFuture<'_, Vec<Listed>> {
        self.step(false, move |room| {
            let mut listed = room.matching(state, &filter);
            listed.retain(|listed| Some(listed.cursor()) > after);
            listed.truncate(limit);
            Ok(listed)
        })
    }

    fn group(&self, filter: Filter, limit: usize) -> StoreFuture<'_, Vec<Group>> {
        self.step(false, move |room| {
            let mut groups = room.group(&filter);
            groups.truncate(limit);
            Ok(groups)
        })
    }

    fn replay(&self, replay: Replay, now_ms: i64) -> StoreFuture<'_, u64> {
        self.step(true, move |room| Ok(room.replay(&replay, now_ms)))
    }

    fn discard(&self, filter: Filter, limit: usize, _now_ms: i64) -> StoreFuture<'_, u64> {
        self.step(false, move |room| {
            Ok(room.discard(State::Discarded, &filter, limit))
        })
    }

    fn discard_parked(&self, filter: Filter, limit: usize, _now_ms: i64) -> StoreFuture<'_, u64> {
        self.step(false, move |room| {
            Ok(room.discard(State::Parked, &filter, limit))
        })
    }

    fn add_past(&self, past: AddPast, now_ms: i64) -> StoreFuture<'_, Walked> {
        self.step(true, move |room| Ok(room.add_past(&past, now_ms)))
    }

    fn prune(&self, policy: Prune) -> StoreFuture<'_, Pruned> {
        self.step(false, move |room| Ok(room.prune(&policy)))
    }

    fn counts(&self) -> StoreFuture<'_, Counts> {
        self.step(false, |room| Ok(room.counts()))
    }

    fn next_due(&self) -> StoreFuture<'_, Option<i64>> {
        self.step(false, |room| Ok(room.next_due()))
    }

    fn wakeups(&self) -> Arc<Notify> {
        Arc::clone(&self.wakeups)
    }

    fn health(&self) -> Health {
        Health::default()
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let mut room = self.room.lock();
            room.closed = true;
            for life in room
                .unfinished
                .values_mut()
                .filter(|life| life.state == State::Running)
            {
                life.hand_back(life.changed_ms);
            }
            Ok(())
        })
    }
}
