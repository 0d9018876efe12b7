//! The one bounded queue, and which worker is told of it.
//!
//! Workers are started on demand and stay parked for a while. This file decides under one lock and
//! does nothing else: whom to wake or that a worker is to be started is *returned*, so it can be model
//! checked without a runtime.
//!
//! Invariants:
//! 1. While the queue is not empty, some worker is awake or being woken (`searching`), or the last
//!    attempt to start one failed for want of a runtime.
//! 2. At most one worker is being woken at a time; it wakes the next one when it takes a task and
//!    leaves others behind. A burst of one costs one wake-up, a burst of many a chain.
//! 3. A worker in `idle` is parked and has not been told. It can be polled all the same, by a waker
//!    that an old task left somewhere, and then stays parked.
//! 4. A retry whose time has come goes before new work.
//! 5. A parked worker that is in `idle` no more, and has not been told, has been retired: it no longer
//!    counts, and ends when it is polled.
//! 6. No task that was pushed with `others_first` starts before its worker has let others go first since
//!    then (see [`Worker::seen`]): the last bytes of its response may be written by another task of the
//!    same runtime, and a worker that was faster would delay them by its task.

use std::task::Waker;

use crate::sync::Mutex;
use crate::task::{Fifo, Link};

/// After so many tasks in one go a worker lets others of its thread go first: a task pays a sixteenth of
/// a turn of the runtime.
const FAIR: u32 = 16;

#[derive(Debug)]
pub(crate) struct Queue<T: Link> {
    max_workers: usize,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T: Link> {
    due: Fifo<T>,
    ready: Fifo<T>,
    /// How many have ever been pushed to `ready`, and taken from it.
    pushed: u64,
    taken: u64,
    /// What was pushed before this number may have to let others go first.
    others_first: u64,
    idle: Vec<Parked>,
    live: usize,
    next_worker: u64,
    searching: Option<u64>,
}

#[derive(Debug)]
struct Parked {
    worker: u64,
    waker: Waker,
}

/// What a worker knows of itself.
#[derive(Debug)]
pub(crate) struct Worker {
    id: u64,
    parked: bool,
    /// What was pushed before this number has had its yield.
    seen: u64,
    /// Tasks taken since its last yield.
    in_a_row: u32,
}

/// What the caller has to do, without holding the lock.
#[must_use]
#[derive(Debug)]
pub(crate) enum Wake {
    Nobody,
    Unpark(Waker),
    Start(Worker),
}

/// What a worker does next.
#[derive(Debug)]
pub(crate) enum Next<T> {
    /// And whether it leaves others behind for a worker that is to be [told](Queue::poke) before.
    Run(T, bool),
    YieldFirst,
    /// After many in a row. Nobody's bytes are waited for: one turn is enough.
    YieldOnce,
    /// It is parked.
    Park,
    /// It was parked, and has been retired.
    End,
}

impl<T: Link> Queue<T> {
    pub(crate) fn new(max_workers: usize) -> Self {
        Self {
            max_workers: max_workers.max(1),
            state: Mutex::new(State {
                due: Fifo::new(),
                ready: Fifo::new(),
                pushed: 0,
                taken: 0,
                others_first: 0,
                idle: Vec::new(),
                live: 0,
                next_worker: 0,
                searching: None,
            }),
        }
    }

    pub(crate) fn push(&self, items: Fifo<T>, others_first: bool) -> Wake {
        let mut state = self.state.lock();
        state.pushed += items.len() as u64;
        if others_first {
            state.others_first = state.pushed;
        }
        if state.ready.is_empty() {
            state.ready = items;
        } else {
            state.ready.append(items);
        }
        self.pick(&mut state)
    }

    /// As [`push`](Self::push), without a list around one item, which its two turns made 245 of a
    /// task's 1,971 instructions. To let others go first is a turn of the runtime: 800 of 3,430
    /// instructions of a task that comes alone.
    #[inline]
    pub(crate) fn push_one(&self, item: T, others_first: bool) -> Wake {
        let mut state = self.state.lock();
        state.pushed += 1;
        if others_first {
            state.others_first = state.pushed;
        }
        state.ready.push(item);
        self.pick(&mut state)
    }

    pub(crate) fn push_due(&self, items: Fifo<T>) -> Wake {
        let mut state = self.state.lock();
        state.due.append(items);
        self.pick(&mut state)
    }

    /// The next step of a worker.
    #[inline]
    pub(crate) fn next(&self, worker: &mut Worker, waker: &Waker) -> Next<T> {
        let mut state = self.state.lock();
        if state.searching == Some(worker.id) {
            state.searching = None;
            worker.parked = false;
        } else if worker.parked {
            return state.still_parked(worker, waker);
        }
        let fair = worker.in_a_row < FAIR;
        let due = if fair && !state.due.is_empty() {
            state.due.pop()
        } else {
            None
        };
        let next = match due {
            Some(item) => Some(item),
            None if state.ready.is_empty() && state.due.is_empty() => None,
            None if state.taken >= worker.seen && state.taken < state.others_first => {
                // Invariant 6.
                worker.seen = state.pushed;
                worker.in_a_row = 0;
                return Next::YieldFirst;
            }
            None if !fair => {
                worker.in_a_row = 0;
                return Next::YieldOnce;
            }
            None => {
                state.taken += 1;
                state.ready.pop()
            }
        };
        match next {
            Some(item) => {
                worker.in_a_row += 1;
                Next::Run(item, self.may_tell(&state))
            }
            None => {
                worker.parked = true;
                worker.in_a_row = 0;
                state.idle.push(Parked {
                    worker: worker.id,
                    waker: waker.clone(),
                });
                Next::Park
            }
        }
    }

    /// Nothing has run for a while: all parked workers may end, and are returned to be woken for it. Also
    /// whether any worker is left.
    pub(crate) fn retire(&self) -> (Vec<Waker>, bool) {
        let mut state = self.state.lock();
        let retired = std::mem::take(&mut state.idle);
        state.live -= retired.len();
        let left = state.live > 0;
        drop(state);
        (
            retired.into_iter().map(|parked| parked.waker).collect(),
            left,
        )
    }

    /// A worker that was not [retired](Self::retire) is gone: its runtime ended, or it could not be
    /// started. What it was told is told to another.
    pub(crate) fn leave(&self, worker: &Worker) -> Wake {
        let mut state = self.state.lock();
        let parked = state.idle.len();
        state.idle.retain(|p| p.worker != worker.id);
        if state.searching == Some(worker.id) {
            state.searching = None;
        } else if worker.parked && state.idle.len() == parked {
            // Retired, and dropped before it was polled.
            return Wake::Nobody;
        }
        state.live -= 1;
        self.pick(&mut state)
    }

    /// A worker that was to be started cannot be.
    pub(crate) fn abandon(&self, worker: &Worker) {
        let mut state = self.state.lock();
        state.live -= 1;
        if state.searching == Some(worker.id) {
            state.searching = None;
        }
    }

    /// Takes the oldest of the new tasks that may be taken. Nearly always that is the first one.
    pub(crate) fn pop_oldest(&self, mut may_go: impl FnMut(&T) -> bool) -> Option<T> {
        let mut state = self.state.lock();
        let item = if state.ready.peek().is_some_and(|item| may_go(item)) {
            state.ready.pop()?
        } else {
            state.ready.remove(may_go)?
        };
        state.taken += 1;
        Some(item)
    }

    /// Sees to it that a worker comes for what is queued: after it was pushed where no worker could be
    /// started, or when the workers went with their runtime.
    pub(crate) fn poke(&self) -> Wake {
        self.pick(&mut self.state.lock())
    }

    /// Whether something is queued and nobody will come for it.
    pub(crate) fn is_stranded(&self) -> bool {
        let state = self.state.lock();
        state.live == 0 && !(state.ready.is_empty() && state.due.is_empty())
    }

    pub(crate) fn remove(&self, is_it: impl FnMut(&T) -> bool) -> Option<T> {
        let mut state = self.state.lock();
        let item = state.ready.remove(is_it)?;
        state.taken += 1;
        Some(item)
    }

    pub(crate) fn take_all(&self) -> (Fifo<T>, Fifo<T>) {
        let mut state = self.state.lock();
        state.taken = state.pushed;
        let ready = std::mem::replace(&mut state.ready, Fifo::new());
        let due = std::mem::replace(&mut state.due, Fifo::new());
        (ready, due)
    }

    /// How many wait for a worker.
    pub(crate) fn len(&self) -> usize {
        let state = self.state.lock();
        state.ready.len() + state.due.len()
    }

    /// Looks at the oldest of the new tasks, under the lock.
    pub(crate) fn oldest<R>(&self, see: impl FnOnce(&T) -> R) -> Option<R> {
        self.state.lock().ready.peek().map(|item| see(item))
    }

    /// Looks at all that waits, under the lock.
    pub(crate) fn for_each(&self, mut see: impl FnMut(&T)) {
        let mut state = self.state.lock();
        state.ready.for_each(&mut see);
        state.due.for_each(&mut see);
    }

    #[inline]
    fn pick(&self, state: &mut State<T>) -> Wake {
        if self.may_tell(state) {
            self.pick_one(state)
        } else {
            Wake::Nobody
        }
    }

    /// Invariant 2: something is queued, nobody is being woken for it, and somebody can be.
    #[inline]
    fn may_tell(&self, state: &State<T>) -> bool {
        state.searching.is_none()
            && !(state.ready.is_empty() && state.due.is_empty())
            && !(state.idle.is_empty() && state.live == self.max_workers)
    }

    #[cold]
    fn pick_one(&self, state: &mut State<T>) -> Wake {
        if let Some(parked) = state.idle.pop() {
            state.searching = Some(parked.worker);
            return Wake::Unpark(parked.waker);
        }
        let id = state.next_worker;
        state.next_worker += 1;
        state.live += 1;
        state.searching = Some(id);
        Wake::Start(Worker {
            id,
            parked: false,
            seen: 0,
            in_a_row: 0,
        })
    }
}

impl<T: Link> State<T> {
    /// Invariants 3 and 5.
    #[cold]
    fn still_parked(&mut self, worker: &Worker, waker: &Waker) -> Next<T> {
        match self.idle.iter_mut().find(|p| p.worker == worker.id) {
            Some(parked) => {
                parked.waker.clone_from(waker);
                Next::Park
            }
            None => Next::End,
        }
    }
}

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Item(u32, Option<Box<Item>>);

    impl Link for Box<Item> {
        fn link(&mut self) -> &mut Option<Self> {
            &mut self.1
        }
    }

    fn push(queue: &Queue<Box<Item>>, n: u32, others_first: bool) -> Wake {
        queue.push_one(Box::new(Item(n, None)), others_first)
    }

    /// The number of the item, or that others go first.
    fn next(queue: &Queue<Box<Item>>, worker: &mut Worker) -> Option<u32> {
        match queue.next(worker, Waker::noop()) {
            Next::Run(item, _) => Some(item.0),
            Next::YieldFirst => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn others_go_first_where_the_last_bytes_may_be_theirs_to_write() {
        let queue = Queue::new(1);
        let Wake::Start(mut worker) = push(&queue, 1, false) else {
            panic!("nobody is told");
        };
        assert_eq!(next(&queue, &mut worker), Some(1));
        for (n, others_first) in [(2, false), (3, true), (4, false), (5, true)] {
            let _ = push(&queue, n, others_first);
        }
        // One turn is for all that is queued by then.
        let seen = [(); 5].map(|()| next(&queue, &mut worker));
        assert_eq!(seen, [None, Some(2), Some(3), Some(4), Some(5)]);
        let _ = push(&queue, 6, false);
        assert_eq!(next(&queue, &mut worker), Some(6));
        let _ = push(&queue, 7, true);
        assert_eq!([(); 2].map(|()| next(&queue, &mut worker)), [None, Some(7)]);
    }
}
