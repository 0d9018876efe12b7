//! Tasks that wait for their next attempt: by the millisecond in which they are due, and behind that the
//! budget.
//!
//! One timer for all of them, in one task of the runtime that lives while there is something to wait
//! for. By milliseconds and not in a heap, which costs more the more there are and walks through all of
//! them: of 100,000 waiting retries it took a sixth of the CPU time. The runtime's timer is no finer.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use tokio::sync::Notify;

use super::Shared;
use crate::clock::Tick;
use crate::observe;
use crate::retry::{RetryBudget, TokenBucket};
use crate::sync::{Arc, Mutex};
use crate::task::{Fifo, Node};

/// The timer hands over what is due in portions of about so many: its lock is held no longer, and a
/// portion is still in the cache when the queue takes it.
const BATCH: usize = 64;

/// So many entries of tasks that have left are not worth a clean-up.
const SPARE: usize = 64;

#[derive(Debug)]
pub(crate) struct Waiting {
    state: Mutex<State>,
    /// Something is due earlier than the timer knows.
    earlier: Notify,
}

#[derive(Debug)]
struct State {
    /// In the order in which they came, under the first whole millisecond at which they are due.
    by_time: BTreeMap<Tick, Vec<Node>>,
    /// How many these are.
    waiting: usize,
    /// Due, and waiting for a token of the budget, in the order in which they became due.
    throttled: BTreeMap<u64, Node>,
    /// When each of these gives up. Who has left by a token stands here until then.
    give_ups: BinaryHeap<Reverse<(Tick, u64)>>,
    throttled_so_far: u64,
    bucket: TokenBucket,
    timer_runs: bool,
}

impl Waiting {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        let state = State {
            by_time: BTreeMap::new(),
            waiting: 0,
            throttled: BTreeMap::new(),
            give_ups: BinaryHeap::new(),
            throttled_so_far: 0,
            bucket: TokenBucket::new(budget),
            timer_runs: false,
        };
        Self {
            state: Mutex::new(state),
            earlier: Notify::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        let state = self.state.lock();
        state.waiting + state.throttled.len()
    }

    pub(crate) fn for_each(&self, mut see: impl FnMut(&Node)) {
        let state = self.state.lock();
        state.throttled.values().for_each(&mut see);
        state.by_time.values().flatten().for_each(see);
    }

    pub(crate) fn take_all(&self) -> Fifo<Node> {
        let mut state = self.state.lock();
        let mut all = Fifo::new();
        state.give_ups.clear();
        while let Some((_, node)) = state.throttled.pop_first() {
            all.push(node);
        }
        state.waiting = 0;
        for node in std::mem::take(&mut state.by_time).into_values().flatten() {
            all.push(node);
        }
        all
    }

    /// Whether the timer has to be started, or told.
    fn add(&self, node: Node, due: Tick) -> Timer {
        let mut state = self.state.lock();
        let due = due.ceil_to_millis();
        let first = state.by_time.keys().next().is_none_or(|next| due < *next);
        let nodes = state.by_time.entry(due);
        // Most often there is one to a millisecond.
        nodes.or_insert_with(|| Vec::with_capacity(1)).push(node);
        state.waiting += 1;
        if !state.timer_runs {
            state.timer_runs = true;
            return Timer::Start;
        }
        if first { Timer::Tell } else { Timer::Leave }
    }

    /// What may start now, and when to look again.
    fn due(&self, now: Tick, give_up_at: impl Fn(&Node) -> Tick) -> Due {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut due = Due {
            may_start: Fifo::new(),
            too_late: Fifo::new(),
            next: None,
        };
        while due.may_start.len() < BATCH {
            let Some(first) = state.by_time.first_entry().filter(|e| *e.key() <= now) else {
                break;
            };
            let nodes = first.remove();
            state.waiting -= nodes.len();
            for node in nodes {
                // What never waits for a token needs no place among those who do.
                if state.throttled.is_empty() && state.bucket.take(now).is_ok() {
                    due.may_start.push(node);
                    continue;
                }
                let key = state.throttled_so_far;
                state.throttled_so_far += 1;
                let at = give_up_at(&node);
                state.give_ups.push(Reverse((at, key)));
                state.throttled.insert(key, node);
            }
        }
        // Before the tokens are given out: what gives up needs none.
        while let Some(Reverse((at, key))) = state.give_ups.peek().copied() {
            if at > now && state.throttled.contains_key(&key) {
                due.next = Some(at);
                break;
            }
            state.give_ups.pop();
            if let Some(node) = state.throttled.remove(&key) {
                due.too_late.push(node);
            }
        }
        while !state.throttled.is_empty() {
            if let Err(token_at) = state.bucket.take(now) {
                due.look_at(token_at);
                break;
            }
            if let Some((_, node)) = state.throttled.pop_first() {
                due.may_start.push(node);
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
        if let Some(next) = state.by_time.keys().next() {
            due.look_at(*next);
        }
        if due.next.is_none() {
            state.timer_runs = false;
        }
        due
    }

    /// Whether the timer has to be started: it went with its runtime.
    fn resume(&self) -> bool {
        let mut state = self.state.lock();
        let nothing = state.by_time.is_empty() && state.throttled.is_empty();
        if nothing || state.timer_runs {
            return false;
        }
        state.timer_runs = true;
        true
    }

    pub(super) fn is_stranded(&self) -> bool {
        !self.state.lock().timer_runs
    }
}

struct Due {
    may_start: Fifo<Node>,
    too_late: Fifo<Node>,
    /// When to look again.
    next: Option<Tick>,
}

impl Due {
    fn look_at(&mut self, at: Tick) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }
}

enum Timer {
    Leave,
    Tell,
    Start,
}

impl Shared {
    /// Puts a task aside until its next attempt; a drain gives it that attempt at once, as its last.
    pub(super) fn retry_at(self: &Arc<Self>, mut node: Node, due: Tick) {
        node.settings_mut().due_at = due;
        match self.waiting.add(node, due) {
            Timer::Leave => {}
            Timer::Tell => self.waiting.earlier.notify_one(),
            Timer::Start => self.start_timer(),
        }
        // After it was added: a drain that began before then finds it here, one that begins now, there.
        if self.drain.has_begun() {
            self.hurry();
        }
        observe::changed(self);
    }

    /// Gives everything that waits its next attempt now, as its last.
    pub(super) fn hurry(self: &Arc<Self>) {
        let now = self.clock.now();
        let mut waiting = self.waiting.take_all();
        let mut hurried = Fifo::new();
        while let Some(mut node) = waiting.pop() {
            let settings = node.settings_mut();
            settings.last_chance = true;
            settings.due_at = now;
            hurried.push(node);
        }
        self.enqueue_due(hurried);
    }

    /// A retry that outlived the timer's runtime goes on with another.
    pub(super) fn resume_timer(self: &Arc<Self>) {
        if self.waiting.resume() {
            self.start_timer();
        }
    }

    fn start_timer(self: &Arc<Self>) {
        let Some(runtime) = self.usable_runtime() else {
            self.waiting.state.lock().timer_runs = false;
            return;
        };
        let timer = RunningTimer {
            shared: self.clone(),
            ended: false,
        };
        runtime.spawn(timer.run());
    }
}

/// Clears the mark when the runtime drops the timer, so that the next retry starts another.
struct RunningTimer {
    shared: Arc<Shared>,
    ended: bool,
}

impl RunningTimer {
    async fn run(mut self) {
        let shared = self.shared.clone();
        loop {
            let now = shared.clock.now();
            let due = shared.waiting.due(now, |node| shared.give_up_at(node));
            let mut too_late = due.too_late;
            while let Some(node) = too_late.pop() {
                shared.give_up(node);
            }
            if !due.may_start.is_empty() {
                shared.enqueue_due(due.may_start);
            }
            let Some(next) = due.next else {
                // `due` has cleared the mark, under its lock; a retry added since has its own timer.
                self.ended = true;
                return;
            };
            tokio::select! {
                () = tokio::time::sleep_until(shared.clock.instant(next)) => {}
                () = shared.waiting.earlier.notified() => {}
            }
        }
    }
}

impl Drop for RunningTimer {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.waiting.state.lock().timer_runs = false;
            self.shared.tell_if_stranded();
        }
    }
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::task::Task;

    fn names(mut tasks: Fifo<Node>) -> Vec<String> {
        std::iter::from_fn(|| tasks.pop())
            .map(|node| node.name().as_str().to_owned())
            .collect()
    }

    #[test]
    fn the_earliest_due_first_and_in_portions() {
        let waiting = Waiting::new(RetryBudget::new(1000, 1000));
        let at = |micros| Tick::ZERO.saturating_add(Duration::from_micros(micros));
        let add = |name: String, micros| {
            let task = Task::new(|| async {}).name(name);
            let _ = waiting.add(task.into_node(), at(micros));
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
            add(number.to_string(), 1_000 * (200 - number));
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
            let _ = waiting.add(Task::new(|| async {}).into_node(), now);
        }
        let never = Tick::ZERO.saturating_add(Duration::MAX);
        let mut started = 0;
        for _ in 0..2_000 {
            now = now.saturating_add(Duration::from_millis(1));
            let mut due = waiting.due(now, |_| never);
            assert!(due.too_late.is_empty());
            while let Some(node) = due.may_start.pop() {
                started += 1;
                let _ = waiting.add(node, now);
            }
        }
        assert!(started > 1_000, "{started}");
        let kept = waiting.state.lock().give_ups.len();
        assert!(kept <= 2 * SPARE + 10, "{kept} entries for 10 tasks");
    }
}
