//! Tasks that wait for their next attempt: by the millisecond in which they are due, and behind that the
//! budget.
//!
//! By milliseconds, because the runtime's timer is no finer.
//!
//! What a failed attempt leaves waits beside its task, and is written into the task's settings when it comes out:
//! most tasks that fail have no settings until then. With a box for each, and a tree instead of the wheel, arming a
//! retry was 523 of 2,874 instructions more, and a waiting one took up 412 bytes instead of 186.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use tokio::sync::Notify;

use super::wheel::Wheel;
use crate::clock::Tick;
use crate::retry::{RetryBudget, TokenBucket};
use crate::sync::Mutex;
use crate::task::{AttemptRecord, Fifo, Node};

/// The timer hands over what is due in portions of about so many: its lock is held no longer, and a
/// portion is still in the cache when the queue takes it.
const BATCH: usize = 64;

/// So many entries of tasks that have left are not worth a clean-up.
const SPARE: usize = 64;

#[derive(Debug)]
pub(crate) struct Waiting {
    state: Mutex<State>,
    /// Something is due earlier than the timer knows.
    pub(super) earlier: Notify,
}

#[derive(Debug)]
struct State {
    /// By the first whole millisecond at which they are due.
    by_time: Wheel<Waiter>,
    /// Due, and waiting for a token of the budget, in the order in which they became due.
    throttled: BTreeMap<u64, (Tick, Waiter)>,
    /// When each of these gives up. Who has left by a token stands here until then.
    give_ups: BinaryHeap<Reverse<(Tick, u64)>>,
    throttled_so_far: u64,
    bucket: TokenBucket,
    timer_runs: bool,
    /// When the timer looks again by itself.
    looks_at: Tick,
}

#[derive(Debug)]
pub(super) struct Waiter {
    node: Node,
    /// The attempt after which it waits.
    failure: AttemptRecord,
}

impl Waiter {
    pub(super) fn into_node(self, due: Tick) -> Node {
        let mut node = self.node;
        node.remember(self.failure);
        node.settings_mut().due_at = due;
        node
    }
}

impl Waiting {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        let state = State {
            by_time: Wheel::new(),
            throttled: BTreeMap::new(),
            give_ups: BinaryHeap::new(),
            throttled_so_far: 0,
            bucket: TokenBucket::new(budget),
            timer_runs: false,
            looks_at: Tick::ZERO,
        };
        Self {
            state: Mutex::new(state),
            earlier: Notify::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        let state = self.state.lock();
        state.by_time.len() + state.throttled.len()
    }

    pub(crate) fn for_each(&self, mut see: impl FnMut(&Node)) {
        let state = self.state.lock();
        let throttled = state.throttled.values().map(|(_, waiter)| waiter);
        throttled
            .chain(state.by_time.iter())
            .for_each(|waiter| see(&waiter.node));
    }

    /// In the order in which they are due.
    pub(crate) fn take_all(&self) -> Fifo<Node> {
        let mut state = self.state.lock();
        state.give_ups.clear();
        let throttled = std::mem::take(&mut state.throttled);
        let mut by_time = Vec::with_capacity(state.by_time.len());
        state
            .by_time
            .empty(|due, waiter| by_time.push((due, waiter)));
        drop(state);
        by_time.sort_by_key(|(due, _)| *due);
        let mut all = Fifo::new();
        for (due, waiter) in throttled.into_values().chain(by_time) {
            all.push(waiter.into_node(due));
        }
        all
    }

    /// Takes all of them for good.
    pub(crate) fn clear(&self, mut end: impl FnMut(Node)) {
        let mut state = self.state.lock();
        let throttled = std::mem::take(&mut state.throttled);
        let mut by_time = std::mem::replace(&mut state.by_time, Wheel::new());
        drop(state);
        throttled
            .into_values()
            .for_each(|(_, waiter)| end(waiter.node));
        by_time.empty(|_, waiter| end(waiter.node));
    }

    /// Whether the timer has to be started, or told.
    pub(super) fn add(&self, node: Node, failure: AttemptRecord, due: Tick) -> Timer {
        let mut state = self.state.lock();
        state.by_time.insert(due, Waiter { node, failure });
        if !state.timer_runs {
            state.timer_runs = true;
            return Timer::Start;
        }
        if due < state.looks_at {
            // Once is enough.
            state.looks_at = due;
            return Timer::Tell;
        }
        Timer::Leave
    }

    /// What may start now, and when to look again.
    pub(super) fn due(&self, now: Tick, give_up_at: impl Fn(&Node) -> Tick) -> Due {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut due = Due {
            may_start: Vec::new(),
            too_late: Vec::new(),
            next: None,
        };
        while due.may_start.len() < BATCH {
            let Some(waiters) = state.by_time.take(now) else {
                break;
            };
            for (at, waiter) in waiters {
                // What never waits for a token needs no place among those who do.
                if state.throttled.is_empty() && state.bucket.take(now).is_ok() {
                    due.may_start.push((at, waiter));
                    continue;
                }
                let key = state.throttled_so_far;
                state.throttled_so_far += 1;
                let gives_up = give_up_at(&waiter.node);
                state.give_ups.push(Reverse((gives_up, key)));
                state.throttled.insert(key, (at, waiter));
            }
        }
        // Before the tokens are given out: what gives up needs none.
        while let Some(Reverse((at, key))) = state.give_ups.peek().copied() {
            if at > now && state.throttled.contains_key(&key) {
                due.next = Some(at);
                break;
            }
            state.give_ups.pop();
            if let Some(waiter) = state.throttled.remove(&key) {
                due.too_late.push(waiter);
            }
        }
        while !state.throttled.is_empty() {
            if let Err(token_at) = state.bucket.take(now) {
                due.look_at(token_at);
                break;
            }
            if let Some((_, waiter)) = state.throttled.pop_first() {
                due.may_start.push(waiter);
            }
        }
        if state.throttled.is_empty() {
            state.give_ups.clear();
            due.next = None;
        } else if state.give_ups.len() / 2 > state.throttled.len().max(SPARE) {
            // Most have left by a token. Where tasks never give up, nothing else would end these.
            let throttled = &state.throttled;
            state
                .give_ups
                .retain(|Reverse((_, key))| throttled.contains_key(key));
        }
        if let Some(next) = state.by_time.next() {
            due.look_at(next);
        }
        match due.next {
            Some(next) => state.looks_at = next,
            None => state.timer_runs = false,
        }
        due
    }

    /// Whether the timer has to be started: it went with its runtime.
    pub(super) fn resume(&self) -> bool {
        let mut state = self.state.lock();
        let nothing = state.by_time.is_empty() && state.throttled.is_empty();
        if nothing || state.timer_runs {
            return false;
        }
        state.timer_runs = true;
        true
    }

    /// The timer is gone.
    pub(super) fn timer_ended(&self) {
        self.state.lock().timer_runs = false;
    }

    pub(super) fn is_stranded(&self) -> bool {
        !self.state.lock().timer_runs
    }
}

/// With when each was due.
pub(super) struct Due {
    pub(super) may_start: Vec<(Tick, Waiter)>,
    pub(super) too_late: Vec<(Tick, Waiter)>,
    /// When to look again.
    pub(super) next: Option<Tick>,
}

impl Due {
    fn look_at(&mut self, at: Tick) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }
}

pub(super) enum Timer {
    Leave,
    Tell,
    Start,
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;
    use crate::task::Task;

    fn names(tasks: Vec<(Tick, Waiter)>) -> Vec<String> {
        let name = |(_, waiter): (Tick, Waiter)| waiter.node.name().as_str().to_owned();
        tasks.into_iter().map(name).collect()
    }

    fn failure() -> AttemptRecord {
        AttemptRecord {
            attempt: 1,
            at: clock::wall_now(),
            error: "down".into(),
        }
    }

    #[test]
    fn the_earliest_due_first_and_in_portions() {
        let waiting = Waiting::new(RetryBudget::new(1000, 1000));
        let at = |micros| Tick::ZERO.saturating_add(Duration::from_micros(micros));
        let add = |name: String, micros| {
            let task = Task::new(|| async {}).name(name);
            let _ = waiting.add(task.into_node(), failure(), at(micros));
        };
        for (name, micros) in [("c", 2_500), ("a", 1_900), ("b", 1_100), ("d", 9_000)] {
            add(name.to_owned(), micros);
        }
        let due = |micros| waiting.due(at(micros), |_| at(u64::MAX));

        let early = due(1_999);
        assert!(early.may_start.is_empty(), "due at the whole millisecond");
        assert_eq!(early.next, Some(at(2_000)));
        let first = due(3_000);
        assert_eq!(names(first.may_start), ["a", "b", "c"]);
        assert_eq!((first.next, waiting.len()), (Some(at(9_000)), 1));

        let _ = waiting.take_all();
        assert_eq!(waiting.len(), 0);
        for number in 0..200 {
            add(number.to_string(), 1_000 * (300 - number));
        }
        let mut all = Vec::new();
        loop {
            let portion = due(1_000_000);
            all.extend(names(portion.may_start));
            let Some(next) = portion.next else { break };
            assert!(next <= at(1_000_000), "there is more, and it is due");
        }
        let expected: Vec<_> = (0..200).rev().map(|n| n.to_string()).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn who_left_by_a_token_is_not_remembered_for_ever() {
        let waiting = Waiting::new(RetryBudget::new(1000, 1));
        let mut now = Tick::ZERO.saturating_add(Duration::from_secs(1));
        for _ in 0..10 {
            let _ = waiting.add(Task::new(|| async {}).into_node(), failure(), now);
        }
        let never = Tick::ZERO.saturating_add(Duration::MAX);
        let mut started = 0;
        for _ in 0..2_000 {
            now = now.saturating_add(Duration::from_millis(1));
            let due = waiting.due(now, |_| never);
            assert!(due.too_late.is_empty());
            for (_, waiter) in due.may_start {
                started += 1;
                let _ = waiting.add(waiter.node, waiter.failure, now);
            }
        }
        assert!(started > 1_000, "{started}");
        let kept = waiting.state.lock().give_ups.len();
        assert!(kept <= 2 * SPARE + 10, "{kept} entries for 10 tasks");
    }
}
