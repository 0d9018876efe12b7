//! Tasks that wait for their next attempt: a heap by due time, and behind it the budget.
//!
//! One timer for all of them, in one task of the runtime that lives while there is something to wait
//! for. A hundred thousand waiting retries are a hundred thousand entries of 32 bytes.

use std::cmp::Ordering as Order;
use std::collections::BinaryHeap;

use tokio::sync::Notify;

use super::Shared;
use crate::clock::Tick;
use crate::observe;
use crate::retry::{RetryBudget, TokenBucket};
use crate::sync::{Arc, Mutex};
use crate::task::{Fifo, Node};

#[derive(Debug)]
pub(crate) struct Waiting {
    state: Mutex<State>,
    /// Something is due earlier than the timer knows.
    earlier: Notify,
}

#[derive(Debug)]
struct State {
    heap: BinaryHeap<Entry>,
    /// Due, and waiting for a token of the budget.
    throttled: Fifo<Node>,
    bucket: TokenBucket,
    order: u64,
    timer_runs: bool,
}

#[derive(Debug)]
struct Entry {
    due: Tick,
    order: u64,
    node: Node,
}

impl Ord for Entry {
    /// The heap gives its greatest: the earliest due, and among these the one that came first.
    fn cmp(&self, other: &Self) -> Order {
        (other.due, other.order).cmp(&(self.due, self.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Order::Equal
    }
}

impl Eq for Entry {}

impl Waiting {
    pub(crate) fn new(budget: RetryBudget) -> Self {
        let state = State {
            heap: BinaryHeap::new(),
            throttled: Fifo::new(),
            bucket: TokenBucket::new(budget),
            order: 0,
            timer_runs: false,
        };
        Self {
            state: Mutex::new(state),
            earlier: Notify::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        let state = self.state.lock();
        state.heap.len() + state.throttled.len()
    }

    pub(crate) fn for_each(&self, mut see: impl FnMut(&Node)) {
        let mut state = self.state.lock();
        state.throttled.for_each(&mut see);
        state.heap.iter().for_each(|entry| see(&entry.node));
    }

    pub(crate) fn take_all(&self) -> Fifo<Node> {
        let mut state = self.state.lock();
        let mut all = std::mem::replace(&mut state.throttled, Fifo::new());
        while let Some(entry) = state.heap.pop() {
            all.push(entry.node);
        }
        all
    }

    /// Whether the timer has to be started, or told.
    fn add(&self, node: Node, due: Tick) -> Timer {
        let mut state = self.state.lock();
        let order = state.order;
        state.order += 1;
        let first = state.heap.peek().is_none_or(|entry| due < entry.due);
        state.heap.push(Entry { due, order, node });
        if !state.timer_runs {
            state.timer_runs = true;
            return Timer::Start;
        }
        if first { Timer::Tell } else { Timer::Leave }
    }

    /// What may start now, and when to look again.
    fn due(&self, now: Tick) -> (Fifo<Node>, Option<Tick>) {
        let mut state = self.state.lock();
        while state.heap.peek().is_some_and(|entry| entry.due <= now) {
            if let Some(entry) = state.heap.pop() {
                state.throttled.push(entry.node);
            }
        }
        let mut may_start = Fifo::new();
        let mut next = state.heap.peek().map(|entry| entry.due);
        while !state.throttled.is_empty() {
            match state.bucket.take(now) {
                Ok(()) => match state.throttled.pop() {
                    Some(node) => may_start.push(node),
                    None => break,
                },
                Err(token_at) => {
                    next = Some(next.map_or(token_at, |at| at.min(token_at)));
                    break;
                }
            }
        }
        if next.is_none() {
            state.timer_runs = false;
        }
        (may_start, next)
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

    fn start_timer(self: &Arc<Self>) {
        let timer = RunningTimer {
            shared: self.clone(),
            ended: false,
        };
        if self.spawn(async move { timer.run().await }).is_none() {
            observe::no_runtime();
        }
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
            let (due, next) = shared.waiting.due(now);
            self.start(due, now);
            let Some(next) = next else {
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

    fn start(&self, mut due: Fifo<Node>, now: Tick) {
        let mut in_time = Fifo::new();
        while let Some(node) = due.pop() {
            let retry = node
                .settings()
                .and_then(|s| s.retry.as_ref())
                .unwrap_or(&self.shared.config.retry);
            if now.since(node.header().queued_at) > retry.age_limit() {
                self.shared.give_up(node);
            } else {
                in_time.push(node);
            }
        }
        if !in_time.is_empty() {
            self.shared.enqueue_due(in_time);
        }
    }
}

impl Drop for RunningTimer {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.waiting.state.lock().timer_runs = false;
        }
    }
}
