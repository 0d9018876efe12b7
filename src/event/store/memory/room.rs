//! What [`Memory`](super::Memory) holds, and one method for each step that changes it.
//!
//! Not concurrent: the lock around it makes each step atomic.
//!
//! Invariants:
//!
//! 1. A delivery is in exactly one of `unfinished`, `dead` and `history`.
//! 2. Its event is in `events` as long as it is in one of these.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::event::store::contract::may_prune;
use crate::event::store::grouping::error_group;
use crate::event::store::life::{Fate, Life, Settle, State};
use crate::event::store::query::{
    AddPast, Counts, Filter, Group, Listed, Prune, Pruned, Replay, Walked,
};
use crate::event::store::record::{
    AttemptToken, Claimed, EventId, NewEvent, Receipt, Settled, Start, StoredEvent,
};

/// A delivery is one event for one subscriber, and known by nothing else.
pub(super) type Key = (EventId, Arc<str>);

#[derive(Clone, Debug, Default)]
pub(super) struct Room {
    pub(super) events: BTreeMap<EventId, Arc<StoredEvent>>,
    pub(super) keys: HashMap<(Arc<str>, String), EventId>,
    pub(super) last: i64,
    pub(super) unfinished: BTreeMap<Key, Life>,
    pub(super) dead: BTreeMap<Key, Life>,
    pub(super) history: BTreeSet<Key>,
    pub(super) replays: BTreeSet<(String, Key)>,
    pub(super) pruned: u64,
    pub(super) closed: bool,
}

impl Room {
    pub(super) fn append(&mut self, event: NewEvent, now_ms: i64) -> Receipt {
        let key = event.key.clone().map(|key| (event.name.clone(), key));
        if let Some(first) = key.as_ref().and_then(|key| self.keys.get(key)) {
            return Receipt {
                event: *first,
                duplicate: true,
                claimed: Vec::new(),
            };
        }
        self.last += 1;
        let id = EventId::new(self.last);
        if let Some(key) = key {
            self.keys.insert(key, id);
        }
        let mut claimed = Vec::new();
        for delivery in event.deliveries {
            let life = match delivery.start {
                Start::At(due_ms) => Life::queued(due_ms, now_ms),
                Start::Claimed => {
                    let mut life = Life::queued(now_ms, now_ms);
                    life.start(now_ms);
                    let subscriber = Arc::clone(&delivery.subscriber);
                    claimed.push(AttemptToken::new(id, subscriber, life.generation));
                    life
                }
            };
            self.unfinished.insert((id, delivery.subscriber), life);
        }
        let event = StoredEvent {
            id,
            key: event.key,
            name: event.name,
            payload: event.payload,
            context: event.context,
            recorded_ms: now_ms,
        };
        self.events.insert(id, Arc::new(event));
        Receipt {
            event: id,
            duplicate: false,
            claimed,
        }
    }

    pub(super) fn claim(&mut self, key: &Key, now_ms: i64) -> Option<Claimed> {
        let event = Arc::clone(self.events.get(&key.0)?);
        let life = self.unfinished.get_mut(key)?;
        let due_ms = life.due_ms?;
        life.start(now_ms);
        Some(Claimed {
            token: AttemptToken::new(key.0, Arc::clone(&key.1), life.generation),
            attempt: life.attempt,
            crashes: life.crashes,
            due_ms,
            since_ms: life.since_ms.unwrap_or(now_ms),
            last_error: life.error.clone(),
            event,
        })
    }

    pub(super) fn settle(&mut self, token: &AttemptToken, settle: &Settle, now_ms: i64) -> Settled {
        let key = (token.event(), Arc::clone(token.subscriber()));
        if !self
            .unfinished
            .get(&key)
            .is_some_and(|life| life.is_held_by(token.generation()))
        {
            return Settled::Stale;
        }
        self.change(&key, |life| life.settle(settle, now_ms));
        Settled::Applied
    }

    /// Lets an unfinished delivery decide, and puts it where it belongs then.
    pub(super) fn change(&mut self, key: &Key, decide: impl FnOnce(&mut Life) -> Fate) {
        let Some(mut life) = self.unfinished.remove(key) else {
            return;
        };
        match decide(&mut life) {
            Fate::Unfinished => drop(self.unfinished.insert(key.clone(), life)),
            Fate::Dead => drop(self.dead.insert(key.clone(), life)),
            Fate::Finished => drop(self.history.insert(key.clone())),
        }
    }

    fn has(&self, key: &Key) -> bool {
        self.unfinished.contains_key(key)
            || self.dead.contains_key(key)
            || self.history.contains(key)
    }

    fn listed(&self, key: &Key, life: &Life) -> Listed {
        let event = self.events.get(&key.0);
        Listed {
            event: key.0,
            event_name: event.map_or_else(|| Arc::from(""), |event| Arc::clone(&event.name)),
            payload: event.map_or_else(String::new, |event| event.payload.clone()),
            subscriber: Arc::clone(&key.1),
            state: life.state,
            attempt: life.attempt,
            crashes: life.crashes,
            due_ms: life.due_ms,
            reason: life.reason.clone(),
            error: life.error.clone(),
            changed_ms: life.changed_ms,
        }
    }

    pub(super) fn matching(&self, state: State, filter: &Filter) -> Vec<Listed> {
        let table = if state == State::Discarded {
            &self.dead
        } else {
            &self.unfinished
        };
        table
            .iter()
            .filter(|(_, life)| life.state == state)
            .map(|(key, life)| self.listed(key, life))
            .filter(|listed| filter.matches(listed))
            .collect()
    }

    pub(super) fn group(&self, filter: &Filter) -> Vec<Group> {
        let mut groups: BTreeMap<(Arc<str>, String), Group> = BTreeMap::new();
        for letter in self.matching(State::Discarded, filter) {
            let error = letter.error.unwrap_or_default();
            let error_group = error_group(&error);
            let group = groups
                .entry((Arc::clone(&letter.subscriber), error_group.clone()))
                .or_insert_with(|| Group {
                    subscriber: letter.subscriber,
                    error_group,
                    count: 0,
                    example: error,
                    first_ms: letter.changed_ms,
                    last_ms: letter.changed_ms,
                });
            group.count += 1;
            group.first_ms = group.first_ms.min(letter.changed_ms);
            group.last_ms = group.last_ms.max(letter.changed_ms);
        }
        let mut groups: Vec<Group> = groups.into_values().collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.count));
        groups
    }

    pub(super) fn replay(&mut self, replay: &Replay, now_ms: i64) -> u64 {
        let mut count = 0;
        for letter in self.matching(State::Discarded, &replay.filter) {
            let key = (letter.event, letter.subscriber);
            let mark = (replay.name.clone(), key.clone());
            if count >= replay.limit as u64 || self.replays.contains(&mark) {
                continue;
            }
            if let Some(mut life) = self.dead.remove(&key) {
                life.replay(now_ms);
                self.unfinished.insert(key, life);
                self.replays.insert(mark);
                count += 1;
            }
        }
        count
    }

    /// Of dead letters or parked deliveries.
    pub(super) fn discard(&mut self, state: State, filter: &Filter, limit: usize) -> u64 {
        let mut count = 0;
        for it in self.matching(state, filter).into_iter().take(limit) {
            let key = (it.event, it.subscriber);
            self.dead.remove(&key);
            self.unfinished.remove(&key);
            self.history.insert(key);
            count += 1;
        }
        count
    }

    pub(super) fn unpark(
        &mut self,
        filter: &Filter,
        rename: Option<&Arc<str>>,
        limit: usize,
        now_ms: i64,
    ) -> u64 {
        let mut count = 0;
        for parked in self.matching(State::Parked, filter) {
            let old = (parked.event, parked.subscriber);
            let new = (parked.event, Arc::clone(rename.unwrap_or(&old.1)));
            if count >= limit as u64 || (new != old && self.has(&new)) {
                continue;
            }
            if let Some(mut life) = self.unfinished.remove(&old) {
                life.unpark(now_ms);
                self.unfinished.insert(new, life);
                count += 1;
            }
        }
        count
    }

    /// At most `limit` events after `after`, and where to go on.
    fn walk(
        &self,
        after: Option<EventId>,
        limit: usize,
    ) -> (Vec<Arc<StoredEvent>>, Option<EventId>) {
        let start = EventId::new(after.map_or(0, EventId::get) + 1);
        let page: Vec<_> = self
            .events
            .range(start..)
            .take(limit)
            .map(|(_, e)| e.clone())
            .collect();
        let next = page
            .last()
            .filter(|_| page.len() == limit)
            .map(|event| event.id);
        (page, next)
    }

    pub(super) fn add_past(&mut self, past: &AddPast, now_ms: i64) -> Walked {
        let (page, next) = self.walk(past.after, past.limit);
        let mut added = 0;
        for event in page {
            let key = (event.id, Arc::clone(&past.subscriber));
            let wanted = event.name == past.event_name && event.recorded_ms >= past.since_ms;
            let names = past.aliases.iter().chain([&past.subscriber]);
            let mut known = names.map(|name| (event.id, Arc::clone(name)));
            if wanted && !known.any(|key| self.has(&key)) {
                self.unfinished.insert(key, Life::queued(now_ms, now_ms));
                added += 1;
            }
        }
        Walked { added, next }
    }

    pub(super) fn prune(&mut self, policy: &Prune) -> Pruned {
        let (page, next) = self.walk(policy.after, policy.limit);
        let mut pruned = Pruned {
            events: 0,
            deliveries: 0,
            next,
        };
        for event in page {
            let id = event.id;
            let needed = self
                .unfinished
                .keys()
                .chain(self.dead.keys())
                .any(|key| key.0 == id);
            if needed || !may_prune(policy, id, event.recorded_ms, EventId::new(self.last)) {
                continue;
            }
            let before = self.history.len();
            self.history.retain(|key| key.0 != id);
            self.replays.retain(|(_, key)| key.0 != id);
            self.keys.retain(|_, kept| *kept != id);
            self.events.remove(&id);
            pruned.events += 1;
            self.pruned += 1;
            pruned.deliveries += (before - self.history.len()) as u64;
        }
        pruned
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts {
            discarded: self.dead.len() as u64,
            finished: self.history.len() as u64,
            events: self.events.len() as u64,
            pruned: self.pruned,
            oldest_due_ms: self.next_due(),
            ..Counts::default()
        };
        for life in self.unfinished.values() {
            match life.state {
                State::Queued => counts.queued += 1,
                State::Running => counts.running += 1,
                State::Retrying => counts.retrying += 1,
                State::Parked => counts.parked += 1,
                State::Discarded => counts.unknown += 1,
            }
        }
        counts
    }

    pub(super) fn next_due(&self) -> Option<i64> {
        self.unfinished
            .values()
            .filter_map(|life| life.due_ms)
            .min()
    }
}
