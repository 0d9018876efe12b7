//! The bound on what is accepted: places, and who waits for one.
//!
//! Invariants:
//! 1. At most `capacity` places are taken.
//! 2. Once closed, no place is taken any more: closing and taking are one atomic word.
//! 3. Who waits is served in order, and nobody overtakes: while someone waits, [`Admission::try_take`]
//!    finds no room.
//! 4. A place that is given back while someone waits reaches them: the one who gives back writes
//!    `taken` and then reads `waiting`, the one who waits writes `waiting` and then reads `taken`, all
//!    sequentially consistent, so at least one of them sees the other.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use crate::sync::{AtomicUsize, Mutex, Ordering};

/// The highest bit of `taken`.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPlace {
    Full,
    Closed,
}

#[derive(Debug)]
pub(crate) struct Admission {
    capacity: usize,
    taken: AtomicUsize,
    waiting: AtomicUsize,
    queue: Mutex<Waiters>,
}

#[derive(Debug, Default)]
struct Waiters {
    next_ticket: u64,
    line: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    waker: Waker,
    served: bool,
}

impl Admission {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.clamp(1, CLOSED - 1),
            taken: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            queue: Mutex::new(Waiters::default()),
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst) & !CLOSED
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.taken.load(Ordering::SeqCst) & CLOSED != 0
    }

    #[inline]
    pub(crate) fn try_take(&self) -> Result<(), NoPlace> {
        if self.waiting.load(Ordering::SeqCst) > 0 && !self.is_closed() {
            return Err(NoPlace::Full);
        }
        self.take()
    }

    #[inline]
    fn take(&self) -> Result<(), NoPlace> {
        let mut taken = self.taken.load(Ordering::SeqCst);
        loop {
            if taken & CLOSED != 0 {
                return Err(NoPlace::Closed);
            }
            if taken >= self.capacity {
                return Err(NoPlace::Full);
            }
            match self.taken.compare_exchange_weak(
                taken,
                taken + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            ) {
                Ok(_) => return Ok(()),
                Err(now) => taken = now,
            }
        }
    }

    /// Gives a place back. Returns whether none is taken any more.
    pub(crate) fn give_back(&self) -> bool {
        let before = self.taken.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.serve();
        }
        before & !CLOSED == 1
    }

    /// Takes a place, in turn. `ticket` is the caller's place in line; on [`Poll::Ready`] it is gone.
    pub(crate) fn poll_take(
        &self,
        ticket: &mut Option<u64>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), NoPlace>> {
        match *ticket {
            None => {
                let mut queue = self.queue.lock();
                if queue.line.is_empty() {
                    match self.take() {
                        Err(NoPlace::Full) => {}
                        done => return Poll::Ready(done),
                    }
                }
                let mine = queue.next_ticket;
                queue.next_ticket += 1;
                queue.line.push_back(Waiter {
                    ticket: mine,
                    waker: cx.waker().clone(),
                    served: false,
                });
                *ticket = Some(mine);
                self.waiting.fetch_add(1, Ordering::SeqCst);
                drop(queue);
                // By invariant 4: a place may have become free before we were counted.
                self.serve();
            }
            Some(mine) => {
                let mut queue = self.queue.lock();
                if let Some(waiter) = queue.line.iter_mut().find(|w| w.ticket == mine) {
                    if !waiter.served {
                        waiter.waker.clone_from(cx.waker());
                    }
                }
            }
        }
        let mine = ticket.unwrap_or_default();
        let mut queue = self.queue.lock();
        let Some(at) = queue.line.iter().position(|w| w.ticket == mine) else {
            *ticket = None;
            return Poll::Ready(Err(NoPlace::Closed));
        };
        if queue.line[at].served {
            queue.line.remove(at);
            *ticket = None;
            return Poll::Ready(Ok(()));
        }
        if self.is_closed() {
            self.step_out(&mut queue, at);
            *ticket = None;
            return Poll::Ready(Err(NoPlace::Closed));
        }
        Poll::Pending
    }

    /// Leaves the line; a place that was already given is passed on.
    pub(crate) fn cancel(&self, ticket: u64) {
        let mut queue = self.queue.lock();
        let Some(at) = queue.line.iter().position(|w| w.ticket == ticket) else {
            return;
        };
        if queue.line[at].served {
            queue.line.remove(at);
            drop(queue);
            self.give_back();
        } else {
            self.step_out(&mut queue, at);
        }
    }

    /// Closes if no place is taken; whether it is closed now.
    pub(crate) fn close_if_empty(&self) -> bool {
        let closed =
            match self
                .taken
                .compare_exchange(0, CLOSED, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => true,
                Err(taken) => taken & CLOSED != 0,
            };
        if closed {
            self.turn_away();
        }
        closed
    }

    /// Closes with places taken: what holds one still gives it back.
    pub(crate) fn close(&self) {
        self.taken.fetch_or(CLOSED, Ordering::SeqCst);
        self.turn_away();
    }

    fn step_out(&self, queue: &mut Waiters, at: usize) {
        queue.line.remove(at);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Gives free places to those who wait, in order. A served waiter no longer counts as waiting.
    fn serve(&self) {
        let mut woken = Vec::new();
        let mut queue = self.queue.lock();
        for waiter in queue.line.iter_mut().filter(|w| !w.served) {
            if self.take().is_err() {
                break;
            }
            waiter.served = true;
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            woken.push(waiter.waker.clone());
        }
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
    }

    fn turn_away(&self) {
        let queue = self.queue.lock();
        let woken: Vec<Waker> = queue.line.iter().map(|w| w.waker.clone()).collect();
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
    }
}
