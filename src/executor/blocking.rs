//! Threads for tasks that block, with a bound of their own.
//!
//! Not `tokio::task::spawn_blocking`: a runtime waits at its end for every blocking task that has
//! begun, so one that ignores its token would keep the process from ending. These threads end with it.

use std::task::{Context, Waker};
use std::time::Duration;

use super::running::Slot;
use super::{Shared, attempt};
use crate::observe;
use crate::sync::{Arc, Condvar, Mutex};
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
    queue: Fifo<Node>,
    live: usize,
    idle: usize,
}

impl BlockingLane {
    pub(crate) fn new(max_threads: usize) -> Self {
        let state = State {
            queue: Fifo::new(),
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
        self.state.lock().queue.len()
    }

    pub(crate) fn push(&self, shared: &Arc<Shared>, node: Node) {
        let mut state = self.state.lock();
        state.queue.push(node);
        if state.idle > 0 {
            self.work.notify_one();
        }
        if state.queue.len() > state.idle && state.live < self.max_threads {
            state.live += 1;
            drop(state);
            self.start(shared);
        }
    }

    pub(crate) fn remove(&self, is_it: impl FnMut(&Node) -> bool) -> Option<Node> {
        self.state.lock().queue.remove(is_it)
    }

    pub(crate) fn take_all(&self) -> Fifo<Node> {
        std::mem::replace(&mut self.state.lock().queue, Fifo::new())
    }

    pub(crate) fn for_each(&self, see: impl FnMut(&Node)) {
        self.state.lock().queue.for_each(see);
    }

    fn start(&self, shared: &Arc<Shared>) {
        let thread = BlockingThread {
            shared: shared.clone(),
            slot: shared.slots.add(),
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

    /// The next task; none after a while without one.
    fn next(&self) -> Option<Node> {
        let mut state = self.state.lock();
        loop {
            if let Some(node) = state.queue.pop() {
                return Some(node);
            }
            state.idle += 1;
            let (guard, wait) = self
                .work
                .wait_timeout(state, IDLE)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if wait.timed_out() && state.queue.is_empty() {
                return None;
            }
        }
    }
}

struct BlockingThread {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
}

impl BlockingThread {
    fn run(self) {
        while let Some(mut node) = self.shared.blocking.next() {
            if let Some(outcome) = attempt::admit(&mut node) {
                self.shared.settle(node, outcome, None, &self.slot);
                continue;
            }
            let mut begun = attempt::begin(&self.shared, &node, &self.slot);
            let mut cx = Context::from_waker(Waker::noop());
            // A blocking body is ready after one poll.
            if let std::task::Poll::Ready(outcome) =
                attempt::poll_once(&mut node, &mut begun, &mut cx)
            {
                self.shared.settle(node, outcome, Some(&begun), &self.slot);
            }
        }
    }
}

impl Drop for BlockingThread {
    fn drop(&mut self) {
        self.shared.slots.remove(&self.slot);
        let mut state = self.shared.blocking.state.lock();
        state.live -= 1;
    }
}
