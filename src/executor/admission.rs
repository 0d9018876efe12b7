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

/// Tickets grow along the line, so a waiter is found without walking it, however long it is.
#[derive(Debug, Default)]
struct Waiters {
    next_ticket: u64,
    line: VecDeque<Waiter>,
    /// So many at the front have been given their place and have not come for it yet.
    served: usize,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    waker: Waker,
}

impl Waiters {
    fn position(&self, ticket: u64) -> Option<usize> {
        self.line.binary_search_by_key(&ticket, |w| w.ticket).ok()
    }
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

    #[cfg(feature = "events")]
    pub(crate) fn free(&self) -> usize {
        self.capacity.saturating_sub(self.taken())
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
                });
                *ticket = Some(mine);
                self.waiting.fetch_add(1, Ordering::SeqCst);
                drop(queue);
                // By invariant 4: a place may have become free before we were counted.
                self.serve();
            }
            Some(mine) => {
                let mut queue = self.queue.lock();
                if let Some(at) = queue.position(mine) {
                    let waker = &mut queue.line[at].waker;
                    if !waker.will_wake(cx.waker()) {
                        let old = std::mem::replace(waker, cx.waker().clone());
                        drop(queue);
                        // Not under the lock: a waker's drop is not our code.
                        drop(old);
                    }
                }
            }
        }
        let mine = ticket.unwrap_or_default();
        let mut queue = self.queue.lock();
        let Some(at) = queue.position(mine) else {
            *ticket = None;
            return Poll::Ready(Err(NoPlace::Closed));
        };
        let taken = if at < queue.served {
            Ok(())
        } else if self.is_closed() {
            Err(NoPlace::Closed)
        } else {
            return Poll::Pending;
        };
        *ticket = None;
        let gone = self.step_out(&mut queue, at);
        drop(queue);
        drop(gone);
        Poll::Ready(taken)
    }

    /// Leaves the line; a place that was already given is passed on. Returns whether none is taken any
    /// more by that.
    pub(crate) fn cancel(&self, ticket: u64) -> bool {
        let mut queue = self.queue.lock();
        let Some(at) = queue.position(ticket) else {
            return false;
        };
        let served = at < queue.served;
        let gone = self.step_out(&mut queue, at);
        drop(queue);
        drop(gone);
        served && self.give_back()
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

    fn step_out(&self, queue: &mut Waiters, at: usize) -> Option<Waiter> {
        if at < queue.served {
            queue.served -= 1;
        } else {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        queue.line.remove(at)
    }

    /// Gives free places to those who wait, in order. A served waiter no longer counts as waiting.
    fn serve(&self) {
        let mut woken = Vec::new();
        let mut queue = self.queue.lock();
        while queue.served < queue.line.len() && self.take().is_ok() {
            woken.push(queue.line[queue.served].waker.clone());
            queue.served += 1;
            self.waiting.fetch_sub(1, Ordering::SeqCst);
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

#[cfg(all(test, not(defer_loom)))]
mod tests {
    use super::*;

    fn poll(admission: &Admission, ticket: &mut Option<u64>) -> Poll<Result<(), NoPlace>> {
        admission.poll_take(ticket, &mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn served_in_order_though_some_leave_the_line() {
        let admission = Admission::new(2);
        assert_eq!([admission.try_take(), admission.try_take()], [Ok(()); 2]);
        let mut tickets = [None; 6];
        for ticket in &mut tickets {
            assert!(poll(&admission, ticket).is_pending());
        }
        assert!(!admission.cancel(tickets[1].take().expect("in line")));
        assert!(!admission.give_back());
        assert!(!admission.give_back());
        // 0 and 2 are served; nobody overtakes while 3, 4 and 5 wait.
        assert_eq!(admission.try_take(), Err(NoPlace::Full));
        assert_eq!(poll(&admission, &mut tickets[2]), Poll::Ready(Ok(())));
        assert!(poll(&admission, &mut tickets[3]).is_pending());
        // 0 leaves with its place, which goes to 3.
        admission.cancel(tickets[0].take().expect("served"));
        assert!(poll(&admission, &mut tickets[4]).is_pending());
        assert_eq!(poll(&admission, &mut tickets[3]), Poll::Ready(Ok(())));
        admission.close();
        for at in [4, 5] {
            assert_eq!(
                poll(&admission, &mut tickets[at]),
                Poll::Ready(Err(NoPlace::Closed))
            );
            assert_eq!(tickets[at], None);
        }
        assert!(!admission.give_back());
        assert!(admission.give_back());
        assert_eq!(admission.taken(), 0);
        assert_eq!(admission.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn who_leaves_with_the_last_place_says_so() {
        let admission = Admission::new(1);
        assert_eq!(admission.try_take(), Ok(()));
        let mut ticket = None;
        assert!(poll(&admission, &mut ticket).is_pending());
        admission.give_back();
        assert!(admission.cancel(ticket.expect("served")));
        assert!(admission.close_if_empty());
    }
}
