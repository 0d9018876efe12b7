//! Models of [`admission`](crate::executor::admission): the bound, who waits for a place, and the end.
//!
//! At most five threads, three waiters, two or three preemptions. Its accesses are sequentially
//! consistent, which loom is given by fences (see `sync/ordered.rs`).

use std::task::{Context, Poll, Waker};

use super::super::admission::{Admission, NoPlace};
use crate::sync::model::{Bell, JoinHandle, check, spawn};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};

const TAKEN: Result<(), NoPlace> = Ok(());

/// A waiter that is in line already: `poll_take` has been pending once.
struct InLine {
    bell: Arc<Bell>,
    ticket: Option<u64>,
}

impl InLine {
    fn join(admission: &Admission) -> Self {
        let bell = Bell::new();
        let mut ticket = None;
        let waker = bell.waker();
        let polled = admission.poll_take(&mut ticket, &mut Context::from_waker(&waker));
        assert_eq!(polled, Poll::Pending);
        Self { bell, ticket }
    }

    fn wait(mut self, admission: &Admission) -> Result<(), NoPlace> {
        let ticket = &mut self.ticket;
        self.bell.block_on(|cx| admission.poll_take(ticket, cx))
    }
}

fn wait(admission: &Admission) -> Result<(), NoPlace> {
    let mut ticket = None;
    Bell::new().block_on(|cx| admission.poll_take(&mut ticket, cx))
}

fn full(capacity: usize) -> Arc<Admission> {
    let admission = Arc::new(Admission::new(capacity));
    for _ in 0..capacity {
        assert_eq!(admission.try_take(), TAKEN);
    }
    admission
}

fn with<T: 'static>(
    admission: &Arc<Admission>,
    act: impl FnOnce(&Admission) -> T + 'static,
) -> JoinHandle<T> {
    let admission = admission.clone();
    spawn(move || act(&admission))
}

/// Invariant 1. Capacity 1 and 2, three threads, each takes a place and gives it back; one of them
/// waits in line for it. Three preemptions.
#[test]
fn loom_never_more_than_capacity_is_taken() {
    for capacity in [1, 2] {
        check(3, move || {
            let admission = Arc::new(Admission::new(capacity));
            let held = Arc::new(AtomicUsize::new(0));
            let hold = move |admission: &Admission, held: &AtomicUsize| {
                let others = held.fetch_add(1, Ordering::Relaxed);
                assert!(others < capacity, "{others} others hold a place");
                assert!(admission.taken() <= capacity);
                held.fetch_sub(1, Ordering::Relaxed);
                admission.give_back();
            };
            let taker = {
                let held = held.clone();
                with(&admission, move |admission| {
                    if admission.try_take().is_ok() {
                        hold(admission, &held);
                    }
                })
            };
            let waiter = {
                let held = held.clone();
                with(&admission, move |admission| {
                    assert_eq!(wait(admission), TAKEN);
                    hold(admission, &held);
                })
            };
            if admission.try_take().is_ok() {
                hold(&admission, &held);
            }
            taker.join().unwrap();
            waiter.join().unwrap();
            assert_eq!(admission.taken(), 0);
        });
    }
}

/// Invariant 4. Two threads: the only place is given back while another thread gets in line for it.
/// Three preemptions.
#[test]
fn loom_a_place_given_back_reaches_who_waits() {
    check(3, || {
        let admission = full(1);
        let waiter = with(&admission, wait);
        admission.give_back();
        assert_eq!(waiter.join().unwrap(), TAKEN);
        assert!(admission.give_back());
        assert_eq!(admission.try_take(), TAKEN, "someone is still counted");
    });
}

/// Invariant 4. Three threads: two get in line for the two places that a third gives back, one by one.
/// Three preemptions.
#[test]
fn loom_two_places_given_back_reach_two_who_wait() {
    check(3, || {
        let admission = full(2);
        let waiters = [(); 2].map(|()| with(&admission, wait));
        admission.give_back();
        admission.give_back();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), TAKEN);
        }
        assert_eq!(admission.taken(), 2);
    });
}

/// Invariant 3. Four threads: two stand in line, one gives the place back, one tries to overtake, by
/// `try_take` or by getting in line behind. The place goes down the line in order; the overtaker gets it
/// after both, or (`try_take`) not at all. Two preemptions.
#[test]
fn loom_who_waits_is_served_in_order_and_not_overtaken() {
    for behind in [false, true] {
        check(2, move || {
            let admission = full(1);
            let order = Arc::new(Mutex::new(Vec::new()));
            let waiters = [1, 2].map(|number| {
                let in_line = InLine::join(&admission);
                let order = order.clone();
                move |admission: &Admission| {
                    assert_eq!(in_line.wait(admission), TAKEN);
                    order.lock().push(number);
                    admission.give_back();
                }
            });
            let waiters = waiters.map(|waiter| with(&admission, waiter));
            let overtaker = {
                let order = order.clone();
                with(&admission, move |admission| {
                    let taken = if behind {
                        wait(admission)
                    } else {
                        admission.try_take()
                    };
                    if taken.is_ok() {
                        order.lock().push(3);
                        admission.give_back();
                    }
                })
            };
            admission.give_back();
            for thread in waiters.into_iter().chain([overtaker]) {
                thread.join().unwrap();
            }
            let order = order.lock();
            let fair = *order == [1, 2, 3] || (*order == [1, 2] && !behind);
            assert!(fair, "{order:?}");
        });
    }
}

/// Invariants 3 and 4. Three threads: the first in line leaves while the place is given back; whether
/// it had been served or not, the second gets the place. Three preemptions.
#[test]
fn loom_a_served_ticket_that_is_cancelled_passes_the_place_on() {
    check(3, || {
        let admission = full(1);
        let first = InLine::join(&admission);
        let second = InLine::join(&admission);
        let cancel = with(&admission, move |admission| {
            admission.cancel(first.ticket.unwrap());
        });
        let second = with(&admission, move |admission| second.wait(admission));
        admission.give_back();
        cancel.join().unwrap();
        assert_eq!(second.join().unwrap(), TAKEN);
        assert_eq!(admission.taken(), 1);
        assert!(admission.give_back());
        assert_eq!(admission.try_take(), TAKEN, "someone is still counted");
    });
}

/// Invariant 2. Three threads: one stands in line, one gets in line, the third closes with the place
/// still taken: both are woken and turned away. Three preemptions.
#[test]
fn loom_closing_wakes_all_who_wait() {
    check(3, || {
        let admission = full(1);
        let standing = InLine::join(&admission);
        let standing = with(&admission, move |admission| standing.wait(admission));
        let coming = with(&admission, wait);
        admission.close();
        assert_eq!(standing.join().unwrap(), Err(NoPlace::Closed));
        assert_eq!(coming.join().unwrap(), Err(NoPlace::Closed));
        assert_eq!(admission.taken(), 1);
        assert_eq!(admission.try_take(), Err(NoPlace::Closed));
        assert!(admission.give_back(), "the last place is not told");
    });
}

/// Invariants 2 and 4. Three threads: a place is given back and the admission closed while one stands
/// in line. It gets the place or is turned away, and no place is lost. Three preemptions.
#[test]
fn loom_closing_races_with_a_place_that_is_given_back() {
    check(3, || {
        let admission = full(1);
        let waiter = InLine::join(&admission);
        let waiter = with(&admission, move |admission| waiter.wait(admission));
        let closer = with(&admission, Admission::close);
        admission.give_back();
        let served = waiter.join().unwrap();
        closer.join().unwrap();
        assert_eq!(admission.taken(), usize::from(served.is_ok()), "{served:?}");
    });
}

/// Drain against registration, before the deadline (invariant 2). Three threads: two register a task
/// each, which ends at once; the third closes as soon as there is none, told by whoever gives back the
/// last place. It closes in the end, with nothing outstanding, and nothing is taken afterwards. Three
/// preemptions.
#[test]
fn loom_a_drain_closes_between_registrations() {
    check(3, || {
        let admission = full(1);
        let outstanding = Arc::new(AtomicUsize::new(1));
        let bell = Bell::new();
        let end = |admission: &Admission, outstanding: &AtomicUsize, bell: &Bell| {
            outstanding.fetch_sub(1, Ordering::Relaxed);
            if admission.give_back() {
                bell.ring();
            }
        };
        let registering = {
            let (outstanding, bell) = (outstanding.clone(), bell.clone());
            with(&admission, move |admission| {
                let taken = admission.try_take();
                if taken.is_ok() {
                    outstanding.fetch_add(1, Ordering::Relaxed);
                    end(admission, &outstanding, &bell);
                }
                taken
            })
        };
        let running = {
            let (outstanding, bell) = (outstanding.clone(), bell.clone());
            with(&admission, move |admission| {
                end(admission, &outstanding, &bell)
            })
        };
        while !admission.close_if_empty() {
            bell.wait();
        }
        assert_eq!(outstanding.load(Ordering::Relaxed), 0, "closed too early");
        assert_eq!(admission.try_take(), Err(NoPlace::Closed));
        running.join().unwrap();
        let _ = registering.join().unwrap();
        assert_eq!(admission.taken(), 0);
        assert_eq!(
            outstanding.load(Ordering::Relaxed),
            0,
            "taken after closing"
        );
    });
}

/// Drain against registration, at the deadline (invariant 2). Three threads: two register, the third
/// closes. What is taken then is all that was ever taken; it is given back in the end, and exactly one
/// is told that it was the last. Three preemptions.
#[test]
fn loom_nothing_is_taken_after_closing() {
    check(3, || {
        let admission = Arc::new(Admission::new(2));
        let takers = [(); 2].map(|()| with(&admission, Admission::try_take));
        admission.close();
        let at_closing = admission.taken();
        assert!(admission.close_if_empty(), "closed stays closed");
        let accepted = takers
            .into_iter()
            .filter_map(|taker| taker.join().unwrap().ok())
            .count();
        assert_eq!(accepted, at_closing);
        let givers: Vec<_> = (0..accepted)
            .map(|_| with(&admission, Admission::give_back))
            .collect();
        let told = givers
            .into_iter()
            .map(|giver| usize::from(giver.join().unwrap()))
            .sum::<usize>();
        assert_eq!(told, usize::from(accepted > 0));
    });
}

/// Invariant 2. Three threads: one reserves and cancels at once, one closes when empty, one reserves.
/// Whoever got a place got it before the closing. Three preemptions.
#[test]
fn loom_reserving_races_with_closing_when_empty() {
    check(3, || {
        let admission = Arc::new(Admission::new(1));
        let leaving = with(&admission, |admission| {
            let mut ticket = None;
            let mut cx = Context::from_waker(Waker::noop());
            match admission.poll_take(&mut ticket, &mut cx) {
                Poll::Ready(Ok(())) => {
                    admission.give_back();
                }
                Poll::Ready(Err(why)) => assert_eq!(why, NoPlace::Closed),
                Poll::Pending => {
                    admission.cancel(ticket.unwrap());
                }
            }
        });
        let staying = with(&admission, wait);
        let closed = admission.close_if_empty();
        leaving.join().unwrap();
        let stayed = staying.join().unwrap();
        assert_eq!(admission.taken(), usize::from(stayed.is_ok()));
        if closed {
            assert_eq!(stayed, Err(NoPlace::Closed));
        } else {
            assert_eq!(stayed, TAKEN);
        }
    });
}
