//! Threads for tasks that block, with a bound of their own.
//!
//! Not `tokio::task::spawn_blocking`: a runtime waits at its end for every blocking task that has
//! begun, so one that ignores its token would keep the process from ending. These threads end with it.

use std::task::{Context, Waker};
use std::time::Duration;

use super::report::UnfinishedState;
use super::running::Slot;
use super::{Shared, attempt};
use crate::clock::Tick;
use crate::observe;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard};
use crate::task::{Fifo, Node};

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct BlockingLane {
    max_threads: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Debug)]
struct State {
    /// A retry whose time has come goes before new work.
    due: Fifo<Node>,
    ready: Fifo<Node>,
    live: usize,
    idle: usize,
}

impl State {
    fn len(&self) -> usize {
        self.due.len() + self.ready.len()
    }

    fn pop(&mut self) -> Option<Node> {
        self.due.pop().or_else(|| self.ready.pop())
    }
}

impl BlockingLane {
    pub(crate) fn new(max_threads: usize) -> Self {
        let state = State {
            due: Fifo::new(),
            ready: Fifo::new(),
            live: 0,
            idle: 0,
        };
        Self {
            max_threads,
            state: Mutex::new(state),
            work: Condvar::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.state.lock().len()
    }

    pub(crate) fn push(&self, shared: &Arc<Shared>, node: Node) {
        let mut state = self.state.lock();
        state.ready.push(node);
        self.call(state, shared);
    }

    pub(crate) fn push_due(&self, shared: &Arc<Shared>, node: Node) {
        let mut state = self.state.lock();
        state.due.push(node);
        self.call(state, shared);
    }

    /// Sees to it that someone comes for what is queued.
    pub(crate) fn poke(&self, shared: &Arc<Shared>) {
        self.call(self.state.lock(), shared);
    }

    fn call(&self, mut state: MutexGuard<'_, State>, shared: &Arc<Shared>) {
        let queued = state.len();
        if queued > 0 && state.idle > 0 {
            self.work.notify_one();
        }
        if queued > state.idle && state.live < self.max_threads {
            state.live += 1;
            drop(state);
            self.start(shared);
        }
    }

    /// Takes the oldest of the new tasks, if it was handed over before `than`.
    pub(crate) fn pop_older(&self, than: Option<Tick>) -> Option<Node> {
        let mut state = self.state.lock();
        let oldest = state.ready.peek()?.header().queued_at;
        if than.is_some_and(|than| than <= oldest) {
            return None;
        }
        state.ready.pop()
    }

    /// When the oldest of the new tasks was handed over.
    pub(crate) fn oldest(&self) -> Option<Tick> {
        let mut state = self.state.lock();
        state.ready.peek().map(|node| node.header().queued_at)
    }

    pub(crate) fn remove(&self, is_it: impl FnMut(&Node) -> bool) -> Option<Node> {
        self.state.lock().ready.remove(is_it)
    }

    /// What has not started, and what waits for another attempt.
    pub(crate) fn take_all(&self) -> (Fifo<Node>, Fifo<Node>) {
        let mut state = self.state.lock();
        let ready = std::mem::replace(&mut state.ready, Fifo::new());
        let due = std::mem::replace(&mut state.due, Fifo::new());
        (ready, due)
    }

    pub(crate) fn for_each(&self, mut see: impl FnMut(&Node)) {
        let mut state = self.state.lock();
        state.ready.for_each(&mut see);
        state.due.for_each(&mut see);
    }

    fn start(&self, shared: &Arc<Shared>) {
        let thread = BlockingThread {
            shared: shared.clone(),
            slot: shared.slots.add(shared.limit),
            ended: false,
        };
        let started = std::thread::Builder::new()
            .name("tower-defer-blocking".to_owned())
            .spawn(move || thread.run());
        // On an error the closure is dropped, and with it the thread's entry is taken back; the task
        // stays queued for the next thread or the next push.
        if let Err(error) = started {
            observe::no_thread(&error);
        }
    }

    /// The next task; none after a while without one, and then the thread no longer counts: whoever
    /// pushes from now on starts another.
    fn next(&self) -> Option<Node> {
        let mut state = self.state.lock();
        loop {
            if let Some(node) = state.pop() {
                return Some(node);
            }
            state.idle += 1;
            let wait = self.work.wait_for(&mut state, IDLE);
            state.idle -= 1;
            if wait.timed_out() && state.len() == 0 {
                state.live -= 1;
                return None;
            }
        }
    }
}

struct BlockingThread {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    ended: bool,
}

impl BlockingThread {
    fn run(mut self) {
        while let Some(mut node) = self.shared.blocking.next() {
            if self.shared.drain.is_abandoned() {
                let state = UnfinishedState::unstarted(&node);
                self.shared.cancel(node, state);
                continue;
            }
            if self.shared.is_too_late(&node) {
                self.shared.give_up(node);
                continue;
            }
            if let Some(outcome) = attempt::admit(&self.shared, &mut node, &self.slot) {
                self.shared.settle(node, outcome, None, &self.slot);
                continue;
            }
            let mut begun = attempt::begin(&self.shared, &node, &self.slot);
            let mut cx = Context::from_waker(Waker::noop());
            // A blocking body is ready after one poll.
            if let std::task::Poll::Ready(outcome) =
                attempt::poll_once(&mut node, &mut begun, &mut cx)
            {
                self.shared
                    .settle(node, outcome, Some(&mut begun), &self.slot);
            }
        }
        self.ended = true;
    }
}

impl Drop for BlockingThread {
    fn drop(&mut self) {
        self.shared.slots.remove(&self.slot);
        if self.ended {
            return;
        }
        // The system refused the thread, or something that is not a task's code panicked on it. In the
        // latter case another one goes on; in the former it would be refused again.
        self.shared.blocking.state.lock().live -= 1;
        if std::thread::panicking() {
            self.shared.blocking.poke(&self.shared);
        }
    }
}
